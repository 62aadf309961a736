"""`shoal create`: a sandbox that stays."""

from __future__ import annotations

from typing import Any

import click

from shoal.cli._options import drive, exec_options, print_json, sandbox_options, timeout_option
from shoal.cli.run import create
from shoal.sdk import AsyncSandbox


@click.command()
@sandbox_options
@exec_options
@timeout_option("Seconds until it is ended, whatever it does.  [default: 300]", default=None)
@click.option("--json", "as_json", is_flag=True, help="Print all about it as JSON.")
def command(as_json: bool, timeout: float | None, **options: Any) -> None:
    """Make a sandbox and print its id. It lives until `shoal rm`, or until its time is up.

    \b
    id=$(shoal create --timeout 3600 --label job=7)
    shoal exec $id -- python3 -V
    shoal rm $id
    """

    async def main() -> AsyncSandbox:
        return await create(timeout=timeout, **options)

    sandbox = drive(main())
    if as_json:
        print_json(sandbox._info)
    else:
        click.echo(sandbox.id)
