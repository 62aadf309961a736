"""`shoal shell`: a shell in a sandbox, with a terminal."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from shoal.cli import _streams
from shoal.cli._ids import whole_id
from shoal.cli._options import drive, exec_options, sandbox_options, timeout_option
from shoal.cli.run import conclude, create
from shoal.errors import InvalidArgumentError
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

    \b
    shoal shell                    look around in a fresh sandbox
    shoal shell --image python:3   … of another image
    shoal shell $id                in one that is there
    """
    if not sys.stdin.isatty():
        raise InvalidArgumentError(
            "stdin is no terminal", hint="use `shoal exec -i ID -- sh` in a script"
        )

    async def open_shell(target: AsyncSandbox) -> int:
        process = await target.exec(
            ["/bin/sh", "-c", _SHELL],
            pty=_streams.terminal_size(),
            env={"TERM": os.environ.get("TERM", "xterm")} | dict(env),
            user=user,
            cwd=workdir,
        )
        return conclude(await _streams.join_terminal(process), "the shell")

    async def main() -> int:
        if sandbox is not None:
            return await open_shell(await AsyncSandbox.connect(await whole_id(sandbox)))
        async with await create(
            timeout=timeout, env=env, user=user, workdir=workdir, **options
        ) as target:
            return await open_shell(target)

    raise SystemExit(drive(main()))
