"""`shoal shell`: a shell in a sandbox, with a terminal."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import click

from shoal.cli import _terminal
from shoal.cli._ids import whole_id
from shoal.cli._options import drive, exec_options, sandbox_options, timeout_option
from shoal.cli.run import conclude, create, say_kept
from shoal.sdk import AsyncSandbox

_SHELL = "if command -v bash >/dev/null 2>&1; then exec bash -i; else exec sh -i; fi"


@click.command()
@sandbox_options
@exec_options
@timeout_option("Seconds a new sandbox lives at most.", default=3600.0)
@click.argument("sandbox", metavar="[ID]", required=False)
def command(
    sandbox: str | None,
    timeout: float,
    env: tuple[tuple[str, str], ...],
    user: str | None,
    workdir: str | None,
    **options: Any,
) -> None:
    """Open a shell in a sandbox. Without an ID in a new one, which ends with the shell.

    ^P ^Q detaches: the shell goes on, and so does a new sandbox; `shoal attach` comes back to it.

    \b
    shoal shell                    look around in a fresh sandbox
    shoal shell --image python:3   … of another image
    shoal shell $id                in one that is there
    """
    _terminal.need("use `shoal exec -i ID -- sh` in a script")

    async def open_shell(target: AsyncSandbox) -> int | None:
        """Its exit code; None: it was detached from."""
        process = await _terminal.start(
            target, ["/bin/sh", "-c", _SHELL], env=dict(env), user=user, cwd=workdir
        )
        if (end := await _terminal.join(process)) is None:
            _terminal.say_detached(target.id, process)
            return None
        return conclude(end, "the shell")

    async def main() -> int:
        if sandbox is not None:
            return await open_shell(await AsyncSandbox.connect(await whole_id(sandbox))) or 0
        async with AsyncExitStack() as undo:
            target = await undo.enter_async_context(
                await create(timeout=timeout, env=env, user=user, workdir=workdir, **options)
            )
            if (code := await open_shell(target)) is None:
                undo.pop_all()
                say_kept(target)
        return code or 0

    raise SystemExit(drive(main()))
