"""From nothing to the result of a first command: Shoal through its SDK, beside bare bubblewrap.

    sudo .venv/bin/python bench/create_exec.py [--n 200] [--json]

Both run `true` on the same root file system, turn by turn in one run, one at a time. Shoal's time is from
the call of `Sandbox.create` to the result of `run(["true"])`; bubblewrap's is from starting
`bwrap --unshare-all … true` to its exit. Removing the sandbox is timed apart: bubblewrap leaves nothing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _report import need_root, quantiles, show
from rich.console import Console
from rich.progress import Progress

import shoal


@contextmanager
def rootfs(image: str) -> Iterator[Path]:
    """The image's files in a directory of the host, for bubblewrap; removed at the end."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        archive = Path(scratch, "rootfs.tar")
        target = Path(scratch, "rootfs")
        target.mkdir()
        with shoal.Sandbox.create(image, timeout=600) as sandbox:
            skip = [
                f"--exclude=./{name}" for name in ("proc/*", "sys/*", "dev/*", "tmp/*", "out.tar")
            ]
            sandbox.run(["tar", "-C", "/", *skip, "-cf", "/out.tar", "."], check=True)
            archive.write_bytes(sandbox.files.read("/out.tar"))
        subprocess.run(["tar", "-C", target, "-xpf", archive], check=True)
        archive.unlink()
        yield target


def bwrap_once(program: str, root: Path) -> float:
    """Seconds for bubblewrap to make a sandbox, run `true` in it, and be gone."""
    command = [
        program, "--unshare-all", "--die-with-parent", "--bind", str(root), "/",
        "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run", "/bin/true",
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began


def shoal_once(image: str) -> tuple[float, float, float]:
    """Seconds until created, until the first result, and to terminate."""
    began = time.perf_counter()
    sandbox = shoal.Sandbox.create(image)
    created = time.perf_counter()
    try:
        if not sandbox.run(["true"]).ok:
            raise shoal.ShoalError("`true` did not succeed")
        answered = time.perf_counter()
    finally:
        ending = time.perf_counter()
        sandbox.terminate()
    return created - began, answered - began, time.perf_counter() - ending


def main() -> int:
    """Run it as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=200, help="measured turns (default: 200)")
    parser.add_argument("--warm-up", type=int, default=10, help="turns before (default: 10)")
    parser.add_argument("--image", default="base")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    need_root()
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        sys.exit(
            "error: bwrap is not on PATH\nhint: apt-get install bubblewrap, or tools/setup dev"
        )

    created: list[float] = []
    answered: list[float] = []
    ended: list[float] = []
    peers: list[float] = []
    failed = 0
    console = Console(stderr=True)
    with Progress(console=console) as progress, rootfs(options.image) as root:
        bar = progress.add_task("create and exec", total=options.n + options.warm_up)
        for turn in range(options.n + options.warm_up):
            peer = bwrap_once(bwrap, root)
            try:
                ours = shoal_once(options.image)
            except shoal.ShoalError as error:
                failed += 1
                progress.console.print(f"turn {turn}: {error}", markup=False)
            else:
                if turn >= options.warm_up:
                    for values, seconds in zip((created, answered, ended), ours, strict=True):
                        values.append(seconds * 1000)
                    peers.append(peer * 1000)
            progress.advance(bar)
    if not answered:
        sys.exit("error: no turn succeeded")

    shoals, bwraps = quantiles(answered), quantiles(peers)
    ratio = {name: shoals[name] / bwraps[name] for name in shoals}
    series = {
        "shoal: create → first result": shoals,
        "bwrap --unshare-all true": bwraps,
        "shoal: create alone": quantiles(created),
        "shoal: terminate": quantiles(ended),
    }
    rows = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in series.items()]
    rows.insert(2, ["ratio shoal / bwrap", *(f"{value:.2f}" for value in ratio.values())])
    attempts = options.n + options.warm_up
    show(
        f"Milliseconds, n={len(answered)}, one at a time, interleaved",
        ["", "p50", "p95", "p99", "max"],
        rows,
        note=f"{attempts - failed} of {attempts} turns succeeded",
        as_json=options.json,
        document={
            "bench": "create_exec",
            "unit": "ms",
            "n": len(answered),
            "attempts": attempts,
            "failed": failed,
            "series": series,
            "ratio": ratio,
        },
    )
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except shoal.ShoalError as failure:
        sys.exit(f"error: {failure}\nhint: {failure.hint}")
