"""`shoal exec`: a command in a sandbox that is there."""

from __future__ import annotations

import sys

import click

from shoal.cli import _streams, _terminal
from shoal.cli._ids import whole_id
from shoal.cli._options import drive, exec_options, print_json, timeout_option
from shoal.cli.run import (
    COMMAND_LINE,
    NO_TERMINAL,
    conclude,
    conclude_json,
    refuse_json_with_a_terminal,
)
from shoal.sdk import AsyncSandbox


@click.command(context_settings=COMMAND_LINE)
@exec_options
@timeout_option("Seconds after which the command is killed (exit code 124).", default=None)
@click.option("-i", "--interactive", is_flag=True, help="Forward stdin.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option(
    "-d", "--detach", is_flag=True, help="Print its id and leave it running; see `shoal attach`."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object instead: outcome and output, or with -d the ids.",
)
@click.argument("sandbox", metavar="ID")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    sandbox: str,
    command: tuple[str, ...],
    interactive: bool,
    tty: bool,
    detach: bool,
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
    shoal exec -it $id -- python3      ^P ^Q leaves it running
    shoal exec -d $id -- ./server      so does this, from the start
    """

    # The parser stops at ID, so a `--` behind it is still here.
    argv = list(command[1:] if command[0] == "--" else command)
    if not argv:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    refuse_json_with_a_terminal(as_json, tty)
    if tty and interactive and not detach:
        _terminal.need(NO_TERMINAL)
    on_our_terminal = tty and not detach and sys.stdin.isatty()

    async def main() -> int:
        target = await AsyncSandbox.connect(await whole_id(sandbox))
        if on_our_terminal:
            process = await _terminal.start(
                target, argv, env=dict(env), user=user, cwd=workdir, timeout=timeout
            )
            if (joined := await _terminal.join(process)) is None:
                _terminal.say_detached(target.id, process)
                return 0
            return conclude(joined, argv[0])
        process = await target.exec(
            argv,
            stdin=interactive,
            pty=_terminal.size() if tty else False,
            env=_terminal.variables(tty) | dict(env),
            user=user,
            cwd=workdir,
            timeout=timeout,
            detached=detach,
        )
        if detach and process.exit is None:
            if as_json:
                print_json({"sandbox": target.id, "exec_id": process.exec_id, "pid": process.pid})
            else:
                click.echo(process.exec_id)
            return 0
        if as_json:
            result = await _streams.collect(process, stdin=interactive)
            return conclude_json(result, argv[0], target.id)
        end = await _streams.join(process, stdin=interactive or tty)
        return conclude(end, argv[0])

    raise SystemExit(drive(main()))
