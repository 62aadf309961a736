"""`shoal exec`: a command in a sandbox that is there."""

from __future__ import annotations

import os

import click

from shoal.cli import _streams
from shoal.cli._ids import whole_id
from shoal.cli._options import drive, exec_options, timeout_option
from shoal.cli.run import (
    COMMAND_LINE,
    conclude,
    conclude_json,
    refuse_json_with_a_terminal,
)
from shoal.sdk import AsyncSandbox
from shoal.types import PtySize


@click.command(context_settings=COMMAND_LINE)
@exec_options
@timeout_option("Seconds after which the command is killed (exit code 124).", default=None)
@click.option("-i", "--interactive", is_flag=True, help="Forward stdin.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object with outcome and output instead."
)
@click.argument("sandbox", metavar="ID")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    sandbox: str,
    command: tuple[str, ...],
    interactive: bool,
    tty: bool,
    as_json: bool,
    timeout: float | None,
    env: tuple[tuple[str, str], ...],
    user: str | None,
    workdir: str | None,
) -> None:
    """Run a command in a sandbox; exit codes are those of `shoal run`. ID may be the beginning of an id.

    \b
    shoal exec $id -- ls -l /
    shoal exec -i $id -- tar x -C /app < app.tar
    shoal exec -it $id -- python3
    """

    # The parser stops at ID, so a `--` behind it is still here.
    argv = list(command[1:] if command[0] == "--" else command)
    if not argv:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    refuse_json_with_a_terminal(as_json, tty)

    async def main() -> int:
        pty: bool | PtySize = _streams.terminal_size() if tty else False
        variables = ({"TERM": os.environ.get("TERM", "xterm")} if tty else {}) | dict(env)
        target = await AsyncSandbox.connect(await whole_id(sandbox))
        process = await target.exec(
            argv,
            stdin=interactive,
            pty=pty,
            env=variables,
            user=user,
            cwd=workdir,
            timeout=timeout,
        )
        if as_json:
            result = await _streams.collect(process, stdin=interactive)
            return conclude_json(result, argv[0], target.id)
        return conclude(
            await (
                _streams.join_terminal(process)
                if tty
                else _streams.join(process, stdin=interactive)
            ),
            argv[0],
        )

    raise SystemExit(drive(main()))
