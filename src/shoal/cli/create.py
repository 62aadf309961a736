"""`shoal create`: a sandbox that stays."""

from __future__ import annotations

import re
from typing import Any

import click

from shoal._compat import override
from shoal.cli._options import drive, exec_options, print_json, sandbox_options, timeout_option
from shoal.cli.run import create
from shoal.sdk import AsyncSandbox
from shoal.types import Ready


class _ReadyWhen(click.ParamType[Ready]):
    """`8000`, `http://:8000/health`, or a shell command line."""

    name = "WHEN"

    @override
    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Ready:
        """What to wait for."""
        text = str(value).strip()
        address = re.fullmatch(
            r"(?:(http://)(?:localhost|127\.0\.0\.1)?:)?(\d+)(?(1)(/\S*)?)", text
        )
        if address is None:
            if not text or "://" in text.partition(" ")[0]:
                self.fail(f"{value!r} is neither PORT, http://:PORT/PATH nor a command", param, ctx)
            return Ready.on_command(["/bin/sh", "-c", text])
        port = int(address[2])
        if not 0 < port < 1 << 16:
            self.fail(f"{port} is no port; they go from 1 to 65535", param, ctx)
        return Ready.on_http(port, address[3] or "/") if address[1] else Ready.on_port(port)


@click.command()
@sandbox_options
@exec_options
@timeout_option("Seconds until it is ended, whatever it does.  [default: 300]", default=None)
@click.option(
    "--command",
    metavar="COMMAND",
    help="Shell command line to start in it; `shoal attach ID main` shows what it prints.",
)
@click.option(
    "--ready",
    type=_ReadyWhen(),
    metavar="PORT|URL|COMMAND",
    help="Wait up to 60 s until PORT listens, http://:PORT/PATH answers, or COMMAND exits with 0.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all about it as JSON.")
def command(as_json: bool, timeout: float | None, **options: Any) -> None:
    """Make a sandbox and print its id. It lives until `shoal rm`, or until its time is up.

    \b
    id=$(shoal create --timeout 3600 --label job=7)
    shoal exec $id -- python3 -V
    shoal rm $id
    id=$(shoal create --command 'python3 -m http.server 8000' --ready http://:8000/)
    """

    async def main() -> AsyncSandbox:
        return await create(timeout=timeout, **options)

    sandbox = drive(main())
    if as_json:
        print_json(sandbox._info)
    else:
        click.echo(sandbox.id)
