"""`shoal doctor`: what this machine can and cannot do."""

from __future__ import annotations

import click

from shoal.cli._group import _colour
from shoal.cli._options import print_json
from shoal.local import doctor

_MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(as_json: bool) -> None:
    """Say what this machine can and cannot do, with advice. Exits with 1 if a node cannot run here."""
    checks = doctor.examine()
    if as_json:
        print_json(checks)
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            word, colour = _MARKS[check.verdict]
            mark = click.style(word, fg=colour)
            click.echo(f"{mark}  {check.name.ljust(width)}  {check.found}", color=_colour())
            if check.hint:
                click.echo(f"      {' ' * width}  hint: {check.hint}")
    raise SystemExit(1 if any(check.verdict == "fail" for check in checks) else 0)
