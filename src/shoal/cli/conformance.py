"""`shoal conformance`: does a runtime do all that a runtime must?"""

from __future__ import annotations

import sys

import click

from shoal.cli._options import drive, print_json, say
from shoal.cli._table import table
from shoal.conformance import Report, load, run, select


@click.command()
@click.option("--runtime", default="native", show_default=True, help="The wall to try.")
@click.option("--image", default="base", show_default=True, help="Needs sh, coreutils and python3.")
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Checks whose id fits (EX-*), or whose sentence has this in it. May be given more than once.",
)
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="At once.")
@click.option("--list", "listed", is_flag=True, help="Print the checks and run none.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(
    runtime: str, image: str, only: tuple[str, ...], jobs: int, listed: bool, as_json: bool
) -> None:
    """Try on this machine whether a runtime keeps the whole contract. Exits with 1 if a check fails.

    \b
    shoal conformance
    shoal conformance --only 'PO-*' --only stdin
    """
    checks = select(load(), only)
    if not checks:
        raise click.UsageError(f"no check fits {' '.join(only)}")
    if listed:
        if as_json:
            print_json([{"id": one.id, "holds": one.holds} for one in checks])
        else:
            table(("ID", "WHAT HOLDS"), [(one.id, one.holds) for one in checks])
        return
    done: list[Report] = []

    def told(report: Report) -> None:
        done.append(report)
        if sys.stderr.isatty():
            click.echo(f"\r{len(done)} of {len(checks)} ", err=True, nl=len(done) == len(checks))

    reports = drive(run(checks, image=image, runtime=runtime, jobs=jobs, told=told))
    count = {
        result: sum(one.result == result for one in reports)
        for result in ("passed", "failed", "not supported")
    }
    if as_json:
        print_json({"runtime": runtime, "image": image, "counts": count, "checks": reports})
    else:
        table(
            ("ID", "WHAT HOLDS", "RESULT", "MS"),
            [(one.id, one.holds, one.result, str(one.ms)) for one in reports],
        )
        for one in reports:
            if one.detail:
                click.echo(f"\n{one.id} {one.result}: {one.holds}")
                click.echo("\n".join(f"  {line}" for line in one.detail.splitlines()))
        say(", ".join(f"{number} {result}" for result, number in count.items() if number))
    raise SystemExit(1 if count["failed"] else 0)
