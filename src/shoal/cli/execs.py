"""`shoal execs`: the commands of a sandbox."""

from __future__ import annotations

import shlex

import click

from shoal.cli._ids import whole_id
from shoal.cli._options import drive, print_json
from shoal.sdk import AsyncSandbox
from shoal.types import ExecStatus, Outcome

_WIDEST = 72
"""Characters of a command that are shown; --json has all."""


@click.command()
@click.option("--quiet", "-q", is_flag=True, help="Ids only.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.argument("sandbox", metavar="ID")
def command(sandbox: str, quiet: bool, as_json: bool) -> None:
    """List the commands of a sandbox, oldest first: those that run, and the latest that ended.

    \b
    shoal execs $id
    shoal execs --json $id | jq -r '.[] | select(.outcome == "running").exec_id'
    """

    async def main() -> list[ExecStatus]:
        return await (await AsyncSandbox.connect(await whole_id(sandbox))).execs()

    found = drive(main())
    if as_json:
        print_json(found)
    elif quiet:
        for known in found:
            click.echo(known.exec_id)
    else:
        _table(found)


def _table(found: list[ExecStatus]) -> None:
    from shoal.cli._table import table

    def line(known: ExecStatus) -> tuple[str, ...]:
        ended = known.outcome is Outcome.EXITED
        words = shlex.join(known.argv)
        return (
            known.exec_id,
            str(known.pid or ""),
            f"{known.outcome} ({known.exit_code})" if ended else known.outcome,
            "yes" if known.pty else "no",
            words if len(words) <= _WIDEST else f"{words[: _WIDEST - 1]}…",
        )

    table(("EXEC", "PID", "STATUS", "TTY", "COMMAND"), [line(known) for known in found])
