"""The inner loop of reinforcement learning on code: many programs nobody has read, each tried apart.

    python examples/fanout.py            # 100 sandboxes at once
    python examples/fanout.py --n 1000 --json > results.json

Exit code 0 when each program came out as it had to, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from candidates import Candidate, candidates, kinds
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import shoal

# What runs inside, next to the program: it prints one answer a line and knows none itself.
HARNESS = """\
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from candidate import solve
for case in json.load(open("inputs.json")):
    print(json.dumps(solve(*case)), file=answers, flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What became of one candidate; times in seconds."""

    task: str
    kind: str
    expected: str
    verdict: str
    note: str
    create: float
    exec: float
    total: float

    @property
    def as_expected(self) -> bool:
        """The verdict is the one that had to come."""
        return self.verdict == self.expected


def judge(candidate: Candidate, result: shoal.ExecResult) -> str:
    """Name what became of a program; what the infrastructure did is never blamed on it."""
    if result.outcome.is_infra:
        return "infra"
    if result.outcome == "exited" and result.exit_code == 0:
        try:
            answers = [json.loads(line) for line in result.stdout.splitlines()]
        except ValueError:
            return "wrong"
        return "passed" if answers == candidate.answers else "wrong"
    if result.outcome in {"exited", "signaled"}:
        return "crashed"
    return str(result.outcome)


async def attempt(candidate: Candidate, *, deadline: float) -> Attempt:
    """Try one candidate in a sandbox of its own."""
    verdict, note = "infra", ""
    began = created = ready = ran = time.perf_counter()
    try:
        async with await shoal.AsyncSandbox.create(
            "base", memory_mib=128, disk_mib=64, pids=64, timeout=300
        ) as sandbox:
            created = time.perf_counter()
            await sandbox.files.write("/work/candidate.py", candidate.source.encode())
            await sandbox.files.write("/work/inputs.json", json.dumps(candidate.inputs).encode())
            await sandbox.files.write("/work/harness.py", HARNESS.encode())
            ready = time.perf_counter()
            result = await sandbox.run(["python3", "harness.py"], cwd="/work", timeout=deadline)
            ran = time.perf_counter()
        verdict = judge(candidate, result)
        note = (result.stderr.strip().splitlines() or [""])[-1]
    except shoal.ShoalError as error:
        note = f"{type(error).__name__}: {error}"
    return Attempt(
        task=candidate.task,
        kind=candidate.kind,
        expected=candidate.verdict,
        verdict=verdict,
        note=note,
        create=created - began,
        exec=ran - ready,
        total=time.perf_counter() - began,
    )


async def fan_out(pool: Sequence[Candidate], *, deadline: float, console: Console) -> list[Attempt]:
    """Try all candidates at once."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting a node, once with the base image", total=None)
        async with await shoal.AsyncSandbox.create("base") as first:
            await first.run(["true"])
        progress.update(bar, description="programs tried", total=len(pool), completed=0)

        async def one(candidate: Candidate) -> Attempt:
            done = await attempt(candidate, deadline=deadline)
            progress.advance(bar)
            return done

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(candidate)) for candidate in pool]
    return [task.result() for task in tasks]


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least `q` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def show(attempts: Sequence[Attempt], *, elapsed: float, console: Console) -> None:
    """Print the two tables."""
    table = Table(title="What became of the programs")
    for heading in ("program", "expected", "tried", "as expected", "e.g."):
        table.add_column(
            heading, justify="right" if heading in {"tried", "as expected"} else "left"
        )
    for kind in kinds():
        rows = [attempt for attempt in attempts if attempt.kind == kind]
        if not rows:
            continue
        good = sum(row.as_expected for row in rows)
        odd = next(
            (f"{row.verdict}: {row.note}" for row in rows if not row.as_expected), rows[0].note
        )
        style = "" if good == len(rows) else "bold red"
        # The programs chose these words: no markup and no control characters from them.
        words = "".join(letter if letter.isprintable() else "?" for letter in odd[:60])
        table.add_row(kind, rows[0].expected, str(len(rows)), str(good), Text(words), style=style)
    console.print(table)

    times = Table(title="Seconds per sandbox, all at once")
    for heading in ("", "p50", "p95", "max"):
        times.add_column(heading, justify="right" if heading else "left")
    for name in ("create", "exec", "total"):
        values = [getattr(attempt, name) for attempt in attempts if attempt.verdict != "infra"]
        if not values:
            continue
        times.add_row(name, *(f"{quantile(values, q):.3f}" for q in (0.5, 0.95, 1.0)))
    console.print(times)
    good = sum(attempt.as_expected for attempt in attempts)
    passed = sum(attempt.verdict == "passed" for attempt in attempts)
    console.print(
        f"{len(attempts)} sandboxes in {elapsed:.1f} s: {passed} programs passed, "
        f"{good} of {len(attempts)} came out as expected"
    )


def main() -> int:
    """Run it as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="how many candidates (default: 100)")
    parser.add_argument(
        "--deadline", type=float, default=10.0, help="seconds that a program may take (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    options = parser.parse_args()
    if options.n < 1:
        parser.error("--n: at least 1")

    console = Console(stderr=options.json)
    began = time.perf_counter()
    try:
        attempts = asyncio.run(
            fan_out(candidates(options.n), deadline=options.deadline, console=console)
        )
    except shoal.ShoalError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        if error.hint:
            console.print(f"hint: {error.hint}", highlight=False)
        return 1
    elapsed = time.perf_counter() - began
    show(attempts, elapsed=elapsed, console=console)
    if options.json:
        document = {"elapsed": elapsed, "attempts": [asdict(attempt) for attempt in attempts]}
        json.dump(document, sys.stdout, indent=1)
        sys.stdout.write("\n")
    return 0 if all(attempt.as_expected for attempt in attempts) else 1


if __name__ == "__main__":
    sys.exit(main())
