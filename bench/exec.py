"""Using a sandbox that is there: round trips of commands, and bytes out of it and into it.

    sudo .venv/bin/python bench/exec.py [--n 1000] [--neighbours 1000] [--json]

A round trip is from asking for `true` to knowing its exit code, with one such request under way and with 64, alone on
the machine and beside so many idle sandboxes of Shoal. Peers (`docker exec`, `podman exec`, `crun exec`, `runsc exec`)
run the same command in a container of their own on a copy of the same root file system, turn by turn in the same run;
their neighbours are Shoal's sandboxes too. `bench/peers.sh` installs them; one that is not there is printed as missing.

Bytes: `head` of zeros to stdout; one large file and one tree of many small files, in and out. Shoal copies with its
file calls, peers with `cat` and `tar` through their exec, which is what they all have.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _peers import DEADLINE, Missing, Peer, peers
from _report import need_root, quantiles, show
from create_exec import rootfs
from rich.console import Console

import shoal

WIDTHS = (1, 64)
CHUNK = 1 << 20
_SAY = Console(stderr=True)


@dataclass
class Series:
    """What was measured of one thing with one tool."""

    values: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def share(self) -> str:
        """How many of the attempts succeeded."""
        attempts = len(self.values) + self.failed
        return f"{len(self.values) / attempts:.1%}" if attempts else "-"


def peer_once(peer: Peer) -> float:
    """Milliseconds for `true` in a peer's container."""
    began = time.perf_counter()
    subprocess.run(
        [*peer.prefix, "true"],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=DEADLINE,
    )
    return (time.perf_counter() - began) * 1000


async def shoal_once(sandbox: shoal.AsyncSandbox) -> float:
    """Milliseconds for `true` in a sandbox."""
    began = time.perf_counter()
    await sandbox.run(["true"], check=True)
    return (time.perf_counter() - began) * 1000


async def flight(
    once: Callable[[], Awaitable[float]], count: int, width: int, into: Series
) -> None:
    """So many round trips, `width` of them under way at any time."""
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            try:
                into.values.append(await once())
            except (shoal.ShoalError, OSError, subprocess.SubprocessError) as error:
                into.failed += 1
                _SAY.print(f"failed: {error}", markup=False)

    await asyncio.gather(*(worker() for _ in range(width)))


async def round_trips(
    sandbox: shoal.AsyncSandbox, others: Sequence[Peer], count: int, rounds: int
) -> dict[tuple[int, str], Series]:
    """Round trips by width and tool, each round a part of each."""
    found: dict[tuple[int, str], Series] = {}
    loop = asyncio.get_running_loop()
    for width in WIDTHS:
        with ThreadPoolExecutor(width) as threads:
            for _ in range(rounds):
                ours = found.setdefault((width, "shoal"), Series())
                await flight(lambda: shoal_once(sandbox), count // rounds, width, ours)
                for peer in others:
                    theirs = found.setdefault((width, peer.name), Series())

                    def once(peer: Peer = peer) -> Awaitable[float]:
                        return loop.run_in_executor(threads, peer_once, peer)

                    # A peer takes so much longer that it gets a tenth of the turns.
                    share = max(width, count // rounds // 10)
                    await flight(once, share, width, theirs)
        _SAY.print(f"{width} in flight: done")
    return found


async def neighbours(count: int, image: str, stack: AsyncExitStack) -> None:
    """So many idle sandboxes until `stack` is closed."""
    spec = shoal.SandboxSpec(image=image, memory_mib=64, disk_mib=64, pids=64, timeout=7200)
    for made in await shoal.AsyncSandbox.create_many([spec] * count):
        if isinstance(made, shoal.ShoalError):
            raise made
        stack.push_async_exit(made)


class Wrong(Exception):
    """Fewer or more bytes or files came than were sent."""


def equal(found: int, expected: int) -> None:
    """Refuse a transfer that is not whole."""
    if found != expected:
        raise Wrong(f"{found} instead of {expected}")


def count_files(root: Path) -> int:
    """How many files lie below a directory."""
    return sum(len(files) for _, _, files in os.walk(root))


@dataclass(frozen=True)
class Load:
    """What is moved, and where on this machine it comes from and goes to."""

    stdout_bytes: int
    file: Path
    tree: Path
    files: int
    scratch: Path

    def fresh(self, name: str) -> Path:
        """A path below the scratch directory where nothing is."""
        path = self.scratch / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        return path


async def shoal_moves(sandbox: shoal.AsyncSandbox, load: Load) -> dict[str, float]:
    """Seconds for each kind of transfer."""
    took = {}
    await sandbox.run("rm -rf /moved /moved-tree", check=True)
    began = time.perf_counter()
    process = await sandbox.exec(["head", "-c", str(load.stdout_bytes), "/dev/zero"])
    received = 0
    while chunk := await process.stdout.read(CHUNK):
        received += len(chunk)
    took["stdout"] = time.perf_counter() - began
    equal(received, load.stdout_bytes)

    began = time.perf_counter()
    await sandbox.files.upload(load.file, "/moved")
    took["upload, one file"] = time.perf_counter() - began
    equal((await sandbox.files.stat("/moved")).size, load.file.stat().st_size)

    target = load.fresh("file")
    began = time.perf_counter()
    await sandbox.files.download("/moved", target)
    took["download, one file"] = time.perf_counter() - began
    equal(target.stat().st_size, load.file.stat().st_size)

    began = time.perf_counter()
    await sandbox.files.upload(load.tree, "/moved-tree")
    took["upload, tree"] = time.perf_counter() - began
    there = await sandbox.run("find /moved-tree -type f | wc -l", check=True)
    equal(int(there.stdout), load.files)

    target = load.fresh("tree-back")
    began = time.perf_counter()
    await sandbox.files.download("/moved-tree", target)
    took["download, tree"] = time.perf_counter() - began
    equal(count_files(target), load.files)
    return took


def peer_moves(peer: Peer, load: Load) -> dict[str, float]:
    """Seconds for each kind of transfer, through the peer's exec."""
    took = {}

    def run(argv: list[str], **streams: Any) -> None:
        subprocess.run(
            argv, check=True, timeout=DEADLINE, **({"stdin": subprocess.DEVNULL} | streams)
        )

    def told(script: str) -> int:
        argv = [*peer.prefix, "sh", "-c", script]
        return int(subprocess.check_output(argv, stdin=subprocess.DEVNULL, timeout=DEADLINE))

    run([*peer.prefix, "rm", "-rf", "/moved", "/moved-tree"])
    began = time.perf_counter()
    with subprocess.Popen(
        [*peer.prefix, "head", "-c", str(load.stdout_bytes), "/dev/zero"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdout is not None  # noqa: S101 - asked for above
        received = 0
        while chunk := process.stdout.read(CHUNK):
            received += len(chunk)
    took["stdout"] = time.perf_counter() - began
    equal(received, load.stdout_bytes)

    with load.file.open("rb") as source:
        began = time.perf_counter()
        run([*peer.prefix_stdin, "sh", "-c", "cat > /moved"], stdin=source)
        took["upload, one file"] = time.perf_counter() - began
    equal(told("stat -c %s /moved"), load.file.stat().st_size)

    target = load.fresh("file")
    with target.open("wb") as sink:
        began = time.perf_counter()
        run([*peer.prefix, "cat", "/moved"], stdout=sink)
        took["download, one file"] = time.perf_counter() - began
    equal(target.stat().st_size, load.file.stat().st_size)

    began = time.perf_counter()
    with subprocess.Popen(["tar", "-C", load.tree, "-cf", "-", "."], stdout=subprocess.PIPE) as tar:
        unpack = "mkdir /moved-tree && tar -C /moved-tree -xf -"
        run([*peer.prefix_stdin, "sh", "-c", unpack], stdin=tar.stdout)
    took["upload, tree"] = time.perf_counter() - began
    equal(told("find /moved-tree -type f | wc -l"), load.files)

    target = load.fresh("tree-back")
    target.mkdir()
    began = time.perf_counter()
    with subprocess.Popen(
        [*peer.prefix, "tar", "-C", "/moved-tree", "-cf", "-", "."],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as tar:
        run(["tar", "-C", str(target), "-xf", "-"], stdin=tar.stdout)
    took["download, tree"] = time.perf_counter() - began
    equal(count_files(target), load.files)
    return took


async def transfers(
    sandbox: shoal.AsyncSandbox, others: Sequence[Peer], load: Load, rounds: int
) -> dict[tuple[str, str], Series]:
    """Speeds by kind and tool: MB/s (10^6), of trees files/s."""
    amounts = {
        "stdout": load.stdout_bytes / 1e6,
        "upload, one file": load.file.stat().st_size / 1e6,
        "download, one file": load.file.stat().st_size / 1e6,
        "upload, tree": float(load.files),
        "download, tree": float(load.files),
    }
    found: dict[tuple[str, str], Series] = {}

    async def one(name: str, moves: Awaitable[dict[str, float]]) -> None:
        try:
            took = await moves
        except (Wrong, shoal.ShoalError, OSError, ValueError, subprocess.SubprocessError) as error:
            _SAY.print(f"{name}: {error}", markup=False)
            took = {}
        for kind, amount in amounts.items():
            series = found.setdefault((kind, name), Series())
            if kind in took:
                series.values.append(amount / took[kind])
            else:
                series.failed += 1

    for turn in range(rounds):
        await one("shoal", shoal_moves(sandbox, load))
        for peer in others:
            await one(peer.name, asyncio.to_thread(peer_moves, peer, load))
        _SAY.print(f"transfers: round {turn + 1} of {rounds} done")
    return found


def make_load(scratch: Path, options: argparse.Namespace) -> Load:
    """The file and the tree that are moved."""
    file = scratch / "large"
    block = os.urandom(CHUNK)
    with file.open("wb") as sink:
        for _ in range(options.file_mib):
            sink.write(block)
    tree = scratch / "tree"
    for number in range(options.files):
        directory = tree / f"{number % 50:02}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number:06}.txt").write_bytes(block[:2048])
    return Load(options.stdout_mib << 20, file, tree, options.files, scratch)


async def measure(
    options: argparse.Namespace, running: list[Peer], load: Load
) -> tuple[dict[tuple[int, int, str], Series], dict[tuple[str, str], Series]]:
    """All of it, in one sandbox beside the peers' containers."""
    trips: dict[tuple[int, int, str], Series] = {}
    async with await shoal.AsyncSandbox.create(
        options.image,
        cpu=os.cpu_count() or 1,
        memory_mib=1024,
        disk_mib=2 * options.file_mib + 1024,
        pids=1024,
        timeout=7200,
    ) as sandbox:
        await sandbox.run(["true"], check=True)
        speeds = await transfers(sandbox, running, load, options.rounds)
        for count in (0, options.neighbours):
            async with AsyncExitStack() as stack:
                await neighbours(count, options.image, stack)
                _SAY.print(f"{count} idle neighbours are up")
                for (width, name), series in (
                    await round_trips(sandbox, running, options.n, options.rounds)
                ).items():
                    trips[count, width, name] = series
    return trips, speeds


def main() -> int:
    """Run it as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=1000, help="round trips a row (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each tool (default: 3)")
    parser.add_argument(
        "--neighbours", type=int, default=1000, help="idle sandboxes (default: 1000)"
    )
    parser.add_argument("--stdout-mib", type=int, default=1024)
    parser.add_argument("--file-mib", type=int, default=512)
    parser.add_argument("--files", type=int, default=5000, help="files in the tree (default: 5000)")
    parser.add_argument("--image", default="base")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    need_root()

    # Told to end, it still takes its containers and its dockerd with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    missing: list[Missing] = []
    running: list[Peer] = []
    with ExitStack() as undo:
        scratch = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="shoal-bench-")))
        with rootfs(options.image) as root:
            for peer in peers(undo, root, scratch):
                if isinstance(peer, Peer):
                    running.append(peer)
                else:
                    missing.append(peer)
        trips, speeds = asyncio.run(measure(options, running, make_load(scratch, options)))
    report(options, trips, speeds, missing)
    return 1 if any(series.failed for series in (*trips.values(), *speeds.values())) else 0


def report(
    options: argparse.Namespace,
    trips: dict[tuple[int, int, str], Series],
    speeds: dict[tuple[str, str], Series],
    missing: list[Missing],
) -> None:
    """Print both tables, or one document."""
    note = "\n".join(f"{peer.name}: {peer.why}" for peer in missing) or "no peer is missing"
    latency = [
        {"neighbours": count, "in_flight": width, "tool": name, "n": len(series.values),
         "failed": series.failed, **(quantiles(series.values) if series.values else {})}
        for (count, width, name), series in trips.items()
    ]  # fmt: skip
    speed = [
        {"kind": kind, "tool": name, "n": len(series.values), "failed": series.failed,
         **(spread(series.values) if series.values else {})}
        for (kind, name), series in sorted(speeds.items(), key=lambda item: item[0][0])
    ]  # fmt: skip
    if options.json:
        document = {"bench": "exec", "ms": latency, "speed": speed, "missing": note}
        show("", [], [], note=note, as_json=True, document=document)
        return
    rows = [
        [name, str(count), str(width), str(len(series.values)), series.share,
         *(plain(value) for value in quantiles(series.values or [float("nan")]).values())]
        for (count, width, name), series in trips.items()
    ]  # fmt: skip
    show(
        "Round trip of `true`, milliseconds, interleaved",
        ["", "idle", "in flight", "n", "ok", "p50", "p95", "p99", "max"],
        rows,
        note=note,
        as_json=False,
        document={},
    )
    rows = [
        [name, kind, str(len(series.values)), series.share,
         *(f"{value:.0f}" for value in spread(series.values or [float("nan")]).values())]
        for (kind, name), series in sorted(speeds.items(), key=lambda item: item[0][0])
    ]  # fmt: skip
    show(
        "Throughput, MB/s (10^6 bytes), of trees files/s, interleaved",
        ["", "what", "n", "ok", "median", "min", "max"],
        rows,
        note=f"stdout {options.stdout_mib} MiB, file {options.file_mib} MiB, tree {options.files} of 2 KiB",
        as_json=False,
        document={},
    )


def plain(value: float) -> str:
    """Milliseconds for a table: no more digits than mean anything."""
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": quantiles(values)["p50"], "min": min(values), "max": max(values)}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except shoal.ShoalError as failure:
        sys.exit(f"error: {failure}\nhint: {failure.hint}")
