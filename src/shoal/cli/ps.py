"""`shoal ps`: the sandboxes."""

from __future__ import annotations

import time

import click

from shoal.cli._options import Pair, drive, print_json
from shoal.sdk import AsyncSandbox
from shoal.types import SandboxInfo


@click.command()
@click.option(
    "--all", "-a", "everything", is_flag=True, help="Also those that ended within the last day."
)
@click.option(
    "--label", multiple=True, type=Pair(), metavar="KEY=VALUE", help="Only those with this label."
)
@click.option("--quiet", "-q", is_flag=True, help="Ids only.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    everything: bool, label: tuple[tuple[str, str], ...], quiet: bool, as_json: bool
) -> None:
    """List sandboxes, newest first.

    \b
    shoal ps
    shoal ps --all --label job=7
    shoal rm $(shoal ps -q --label job=7)
    """

    async def main() -> list[SandboxInfo]:
        return await AsyncSandbox.list(labels=dict(label), all=everything)

    found = drive(main())
    if as_json:
        print_json(found)
    elif quiet:
        for sandbox in found:
            click.echo(sandbox.id)
    else:
        _table(found)


def _table(found: list[SandboxInfo]) -> None:
    from shoal.cli._table import table

    now = time.time()
    table(
        ("ID", "IMAGE", "STATUS", "AGE", "LEFT", "CPU", "MEMORY", "LABELS"),
        [
            (
                sandbox.id,
                sandbox.image,
                f"{sandbox.status}" + (f" ({sandbox.reason})" if sandbox.reason else ""),
                span(now - sandbox.created_at),
                "" if sandbox.ended_at else span(sandbox.expires_at - now),
                f"{sandbox.cpu:g}",
                f"{sandbox.memory_mib} MiB",
                " ".join(f"{key}={value}" for key, value in sorted(sandbox.labels.items())),
            )
            for sandbox in found
        ],
    )


def span(seconds: float) -> str:
    """A stretch of time in its two largest units."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    units = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    while len(units) > 1 and not units[0][0]:
        units.pop(0)
    return "".join(f"{count}{unit}" for count, unit in units[:2] if count or len(units) == 1)
