"""`shoal port`: ways to a port of a sandbox."""

from __future__ import annotations

import asyncio
import contextlib

import click

from shoal.cli._ids import whole_id
from shoal.cli._options import drive, say
from shoal.errors import NodeUnavailableError
from shoal.sdk import AsyncForward, AsyncSandbox

_LOOK = 1.0
"""Seconds between two looks at whether the sandbox, and the way to its port, is still there."""


@click.command()
@click.option(
    "--local",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port of this machine to forward from.  [default: one that is free]",
)
@click.option("--url", "way", flag_value="url", help="Print its URL; no forwarding.")
@click.option(
    "--browser", "way", flag_value="browser", help="Print a URL that lets a browser in for an hour."
)
@click.option("--public", "way", flag_value="public", help="Let anybody in, and print its URL.")
@click.option("--private", "way", flag_value="private", help="Ask for a token again.")
@click.argument("sandbox", metavar="ID")
@click.argument("port", type=click.IntRange(1, 65535))
def command(sandbox: str, port: int, local: int | None, way: str | None) -> None:
    """Make a port of a sandbox one of this machine, until ^C: raw bytes, whatever they mean.

    Or say where the node serves it over HTTP, and to whom: to those with a token, as at first, or to anybody who
    reaches the node. ID may be the beginning of an id.

    \b
    shoal port $id 5432 --local 15432      psql -h 127.0.0.1 -p 15432
    shoal port $id 8000 --browser          a URL to open
    shoal port $id 8000 --public           http://8000-sb-….localhost:41234
    """
    if way is not None and local is not None:
        raise click.UsageError(f"--local and --{way} cannot go together")

    async def main() -> None:
        target = await AsyncSandbox.connect(await whole_id(sandbox))
        match way:
            case "url":
                click.echo(target.url(port))
            case "browser":
                click.echo(target.browser_url(port))
            case "public":
                url = target.url(port)
                await target.publish(port)
                click.echo(url)
            case "private":
                await target.unpublish(port)
            case _:
                async with target.forward(port, local_port=local or 0) as forward:
                    click.echo(forward.address)
                    say(f"leads to port {port} of {target.id}; ^C ends it")
                    await _look_after(target, forward)

    drive(main())


async def _look_after(target: AsyncSandbox, forward: AsyncForward) -> None:
    """Say what keeps connections from the port, until the sandbox is gone.

    Raises:
        SandboxGoneError: It is.
    """
    told = None
    while True:
        await asyncio.sleep(_LOOK)
        if forward.error is not told and forward.error is not None:
            told = forward.error
            say(f"a connection was not made: {told.message}")
        with contextlib.suppress(NodeUnavailableError):  # it may come back
            await AsyncSandbox.connect(target.id)
