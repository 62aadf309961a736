"""`shoal exec`: a command in a sandbox that is there."""

from __future__ import annotations

import os

import click

from shoal.cli import _streams
from shoal.cli._options import drive, exec_options, timeout_option
from shoal.cli.run import COMMAND_LINE, conclude
from shoal.sdk import AsyncSandbox
from shoal.types import PtySize


@click.command(context_settings=COMMAND_LINE)
@exec_options
@timeout_option("Seconds after which the command is killed (exit code 124).", default=None)
@click.option("-i", "--interactive", is_flag=True, help="Forward stdin.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.argument("sandbox", metavar="ID")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    sandbox: str,
    command: tuple[str, ...],
    interactive: bool,
    tty: bool,
    timeout: float | None,
    env: tuple[tuple[str, str], ...],
    user: str | None,
    workdir: str | None,
) -> None:
    """Run a command in a sandbox; exit codes are those of `shoal run`.

    \b
    shoal exec $id -- ls -l /
    shoal exec -i $id -- tar x -C /app < app.tar
    shoal exec -it $id -- python3
    """

    # The parser stops at ID, so a `--` behind it is still here.
    argv = list(command[1:] if command[0] == "--" else command)
    if not argv:
        raise click.UsageError("Missing argument 'COMMAND...'.")

    async def main() -> int:
        pty: bool | PtySize = _streams.terminal_size() if tty else False
        variables = ({"TERM": os.environ.get("TERM", "xterm")} if tty else {}) | dict(env)
        process = await (await AsyncSandbox.connect(sandbox)).exec(
            argv,
            stdin=interactive,
            pty=pty,
            env=variables,
            user=user,
            cwd=workdir,
            timeout=timeout,
        )
        return conclude(
            await (
                _streams.join_terminal(process)
                if tty
                else _streams.join(process, stdin=interactive)
            ),
            argv[0],
        )

    raise SystemExit(drive(main()))
