"""Sandboxes and their commands by the beginning of their id, as people type them."""

from __future__ import annotations

import re

from shoal.errors import ExecNotFoundError, InvalidArgumentError
from shoal.sdk import AsyncSandbox
from shoal.types import ExecStatus

_WHOLE = re.compile(r"sb-[a-z2-7]{26}")
_SHOWN = 5


async def whole_id(given: str, *, ended: bool = False) -> str:
    """The id that begins so. A whole one is not asked about, nor is what no id begins with: the node judges these.

    Args:
        given: An id, or the beginning of one: `sb-` and at least a character.
        ended: Look at those that have ended too; otherwise only where none that runs begins so.

    Raises:
        InvalidArgumentError: More than one begins so.
    """
    if _WHOLE.fullmatch(given) or not given.startswith("sb-") or given == "sb-":
        return given
    for everything in (True,) if ended else (False, True):
        matching = [
            info.id for info in await AsyncSandbox.list(all=everything) if info.id.startswith(given)
        ]
        if len(matching) > 1:
            raise _ambiguous(given, matching)
        if matching:
            return matching[0]
    return given


async def find_exec(sandbox: AsyncSandbox, given: str) -> ExecStatus:
    """The command that has this id, or whose id alone begins so.

    Raises:
        ExecNotFoundError: None does.
        InvalidArgumentError: More than one does.
    """
    known = {status.exec_id: status for status in await sandbox.execs()}
    if given in known:
        return known[given]
    matching = [name for name in known if given and name.startswith(given)]
    if len(matching) > 1:
        raise _ambiguous(given, matching)
    if not matching:
        raise ExecNotFoundError(
            f"no exec {given!r} in {sandbox.id}", hint=f"see `shoal execs {sandbox.id}`"
        )
    return known[matching[0]]


def _ambiguous(given: str, ids: list[str]) -> InvalidArgumentError:
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return InvalidArgumentError(
        f"{given} is the beginning of {len(ids)} ids: {', '.join(ids[:_SHOWN])}{more}",
        hint="give more of the one that is meant",
    )
