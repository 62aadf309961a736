"""What every bench prints around its numbers, so that a number can be judged."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LOAD_BEFORE = os.getloadavg()[0]
"""Other people's load: taken before this run adds its own."""


def machine() -> dict[str, Any]:
    """Facts about where and on what this run was made."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": LOAD_BEFORE,
        "commit": _commit(),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Untrimmed p50, p95, p99 and max: each the smallest value that so many do not exceed."""
    ordered = sorted(values)
    picked = {
        name: ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }
    return picked | {"max": ordered[-1]}


def need_root() -> None:
    """Leave with one clear line when this is not root on Linux."""
    if sys.platform != "linux" or os.geteuid() != 0:
        sys.exit(
            "error: this bench starts a node and so needs root on Linux\nhint: run it with sudo"
        )


def show(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, note: str, as_json: bool,
    document: dict[str, Any],
) -> None:  # fmt: skip
    """Print a table for a person, or one JSON document for a program."""
    facts = machine()
    if as_json:
        json.dump({"machine": facts, **document}, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    console = Console()
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(note, highlight=False)
    console.print(
        "{cpu}, {cores} cores, {memory_gib} GiB, Linux {kernel}, Python {python}, load {load_before:.1f}, "
        "commit {commit}".format(**facts),
        highlight=False,
    )


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        commit, changed = (
            subprocess.run(
                [*git, *words], check=True, capture_output=True, text=True
            ).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")
