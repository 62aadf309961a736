"""`shoal rm`: the end of sandboxes."""

from __future__ import annotations

import asyncio

import click

from shoal.cli._group import Failure
from shoal.cli._ids import whole_id
from shoal.cli._options import Pair, drive
from shoal.errors import InvalidArgumentError, ShoalError
from shoal.sdk import AsyncSandbox
from shoal.sdk._async import end_sandbox

_AT_ONCE = 32


@click.command()
@click.option("--all", "-a", "everything", is_flag=True, help="All that run.")
@click.option(
    "--label", multiple=True, type=Pair(), metavar="KEY=VALUE", help="All that have this label."
)
@click.argument("sandboxes", metavar="ID...", nargs=-1)
def command(
    sandboxes: tuple[str, ...], everything: bool, label: tuple[tuple[str, str], ...]
) -> None:
    """End sandboxes and print their ids. One that has ended already is no error. ID may be the beginning of an id.

    \b
    shoal rm $id
    shoal rm --all
    shoal rm --label job=7
    """
    if not sandboxes and not everything and not label:
        raise click.UsageError("name at least one ID, or use --all or --label")
    failed = drive(_remove(list(sandboxes), everything, dict(label)))
    for sandbox, error in failed:
        Failure(f"{sandbox}: {error.message}" if sandbox else error.message, error.hint).show()
    raise SystemExit(1 if failed else 0)


async def _remove(
    names: list[str], everything: bool, labels: dict[str, str]
) -> list[tuple[str, ShoalError]]:
    if everything or labels:
        names += [info.id for info in await AsyncSandbox.list(labels=labels)]
    turns = asyncio.Semaphore(_AT_ONCE)
    failed: list[tuple[str, ShoalError]] = []
    meant: dict[str, None] = {}
    for name in names:
        try:
            meant[await whole_id(name)] = None
        except InvalidArgumentError as error:  # its message has the name
            failed.append(("", error))

    async def one(name: str) -> None:
        async with turns:
            try:
                await end_sandbox(name)
            except ShoalError as error:
                failed.append((name, error))
            else:
                click.echo(name)

    await asyncio.gather(*(one(name) for name in meant))
    return failed
