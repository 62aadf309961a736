"""`shoal inspect`: all about one sandbox."""

from __future__ import annotations

import click

from shoal.cli._ids import whole_id
from shoal.cli._options import drive, print_json
from shoal.sdk._async import sandbox_info
from shoal.types import SandboxInfo


@click.command()
@click.argument("sandbox", metavar="ID")
def command(sandbox: str) -> None:
    """Show all about a sandbox as JSON, also for a day after its end: why it ended is in `reason`.

    \b
    shoal inspect $id
    shoal inspect $id | jq -r .reason
    """

    async def main() -> SandboxInfo:
        return await sandbox_info(await whole_id(sandbox, ended=True))

    print_json(drive(main()))
