"""`shoal attach`: back to a command that runs in a sandbox."""

from __future__ import annotations

import asyncio

import click

from shoal.cli import _streams, _terminal
from shoal.cli._ids import find_exec, whole_id
from shoal.cli._options import drive, say
from shoal.cli.run import conclude
from shoal.sdk import AsyncSandbox
from shoal.types import Outcome


@click.command()
@click.option(
    "-i", "--interactive", is_flag=True, help="Forward stdin; to a terminal it always goes."
)
@click.argument("sandbox", metavar="ID")
@click.argument("exec_id", metavar="EXEC")
def command(sandbox: str, exec_id: str, interactive: bool) -> None:
    """Show a command's output from where it was last read, and exit as `shoal exec` does when it ends.

    A command with a terminal gets this one, and ^P ^Q leaves it again. Any other is only watched, and ^C leaves it.
    Either way it goes on. ID and EXEC may be the beginnings of ids.

    \b
    shoal attach $id ex-q3r          back to what ^P ^Q has left
    shoal attach $id main            what the command of `shoal create` prints
    """

    async def main() -> int:
        target = await AsyncSandbox.connect(await whole_id(sandbox))
        known = await find_exec(target, exec_id)
        with_terminal = known.pty and known.outcome is Outcome.RUNNING
        if with_terminal:
            _terminal.need("a command with a terminal is shown on one")
        process = await target.attach(known.exec_id)
        program = known.argv[0] if known.argv else known.exec_id
        if with_terminal:
            end = await _terminal.join(process, redraw=True)
            if end is None:
                _terminal.say_detached(target.id, process)
                return 0
            return conclude(end, program)
        try:
            return conclude(await _streams.watch(process, stdin=interactive), program)
        except asyncio.CancelledError:
            say(f"left; it goes on unless this ends it: shoal kill {target.id} {known.exec_id}")
            raise

    raise SystemExit(drive(main()))
