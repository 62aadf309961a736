"""Sandboxes by the beginning of their id, as people type them."""

from __future__ import annotations

import re

from shoal.errors import InvalidArgumentError
from shoal.sdk import AsyncSandbox

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
            more = f" and {len(matching) - _SHOWN} more" if len(matching) > _SHOWN else ""
            raise InvalidArgumentError(
                f"{given} is the beginning of {len(matching)} ids: {', '.join(matching[:_SHOWN])}{more}",
                hint="give more of the one that is meant",
            )
        if matching:
            return matching[0]
    return given
