"""`shoal kill`: a signal to a command of a sandbox."""

from __future__ import annotations

import signal

import click

from shoal._compat import override
from shoal.cli._ids import find_exec, whole_id
from shoal.cli._options import drive
from shoal.sdk import AsyncSandbox
from shoal.sdk._async.process import send_signal


class _Signal(click.ParamType[int]):
    """A signal: `TERM`, `SIGTERM` or `15`."""

    name = "SIG"

    @override
    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Its number."""
        word = str(value).upper()
        if word.isdecimal() and 0 < int(word) < 65:
            return int(word)
        try:
            return signal.Signals[word if word.startswith("SIG") else f"SIG{word}"]
        except KeyError:
            self.fail(f"{value!r} is no signal; use TERM, SIGTERM or 15", param, ctx)


@click.command()
@click.option(
    "--signal",
    "-s",
    "number",
    type=_Signal(),
    metavar="SIG",
    help="By name or number, and to the command alone.",
)
@click.argument("sandbox", metavar="ID")
@click.argument("exec_id", metavar="EXEC")
def command(sandbox: str, exec_id: str, number: int | None) -> None:
    """Kill a command of a sandbox and all that it started, or send it a signal. See `shoal execs` for EXEC.

    \b
    shoal kill $id ex-q3r
    shoal kill -s HUP $id main
    """

    async def main() -> None:
        target = await AsyncSandbox.connect(await whole_id(sandbox))
        known = await find_exec(target, exec_id)
        await send_signal(
            target._access, known.exec_id, number or signal.SIGKILL, tree=number is None
        )

    drive(main())
