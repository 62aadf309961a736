"""How big the guest agent is: on disk, in the memory of an idle sandbox, and how fast it is ready.

    sudo .venv/bin/python bench/agent_size.py [--n 50] [--json]

Memory is the private part (`Private_Clean` + `Private_Dirty` in smaps_rollup) of PID 1 of N idle sandboxes.
Ready is from the start of the bare program, outside of any sandbox, to the first byte of its READY frame;
that includes the fork and the exec.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.resources
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from _report import need_root, quantiles, show

import shoal


def agent_path() -> Path:
    """The static program that the package carries."""
    path = Path(str(importlib.resources.files("shoal"))) / "_bin" / "shoal-agent"
    if not path.is_file():
        sys.exit(f"error: {path} does not exist\nhint: just build")
    return path


def private_kib(pid: int) -> int:
    """KiB of memory that nobody shares with the process."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(
        int(line.split()[1])
        for line in rollup.splitlines()
        if line.startswith(("Private_Clean:", "Private_Dirty:"))
    )


def guest_agents(sandboxes: set[str]) -> dict[str, int]:
    """Host pid of PID 1 by sandbox: the process whose cgroup is `…/<sandbox id>/agent`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            groups = entry.joinpath("cgroup").read_text()
        except OSError:  # it ended meanwhile
            continue
        for line in groups.splitlines():
            parts = line.rsplit("/", 2)
            if len(parts) == 3 and parts[2] == "agent" and parts[1] in sandboxes:
                found[parts[1]] = int(entry.name)
    return found


async def idle_memory(count: int, image: str) -> list[float]:
    """Private KiB of each guest agent of so many sandboxes, a second after the last was used."""
    async with AsyncExitStack() as stack:
        boxes = []
        for _ in range(count):
            box = await shoal.AsyncSandbox.create(image, memory_mib=64, disk_mib=64)
            boxes.append(await stack.enter_async_context(box))
        for box in boxes:
            await box.run(["true"], check=True)
        await asyncio.sleep(1)
        agents = guest_agents({box.id for box in boxes})
        if len(agents) != count:
            sys.exit(f"error: found {len(agents)} guest agents of {count}")
        return [float(private_kib(pid)) for pid in agents.values()]


@contextmanager
def listener() -> Iterator[tuple[socket.socket, Path]]:
    """A listening unix socket and its path."""
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening,
    ):
        path = Path(scratch, "agent.sock")
        listening.bind(str(path))
        listening.listen()
        yield listening, path


def ready_once(agent: Path) -> float:
    """Milliseconds from starting the program to the first byte that it says."""
    with (
        listener() as (listening, path),
        open("/dev/null", "wb") as null,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
    ):
        client.settimeout(5)
        # Connected before the program runs: the connection waits in the listener's queue.
        client.connect(str(path))
        for file in (listening, null):
            os.set_inheritable(file.fileno(), True)
        argv = [
            "shoal-agent", "--listen", str(listening.fileno()),
            "--cgroup", str(null.fileno()), "--generation", "1",
        ]  # fmt: skip
        began = time.perf_counter()
        pid = os.posix_spawn(agent, argv, {})
        try:
            first = client.recv(1)
            elapsed = time.perf_counter() - began
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if not first:
        sys.exit("error: the guest agent ended instead of becoming ready")
    return elapsed * 1000


def main() -> int:
    """Run it as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=50, help="idle sandboxes (default: 50)")
    parser.add_argument("--image", default="base")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    need_root()

    agent = agent_path()
    disk_kib = agent.stat().st_size / 1024
    ready = quantiles([ready_once(agent) for _ in range(200)])
    private = quantiles(asyncio.run(idle_memory(options.n, options.image)))
    rows = [
        ["size on disk, KiB", *[f"{disk_kib:.0f}"] * 4],
        [f"idle private memory, KiB, n={options.n}", *(f"{v:.0f}" for v in private.values())],
        ["start to READY, ms, n=200", *(f"{v:.2f}" for v in ready.values())],
    ]
    show(
        "The guest agent",
        ["", "p50", "p95", "p99", "max"],
        rows,
        note="memory: Private_Clean + Private_Dirty of /proc/PID/smaps_rollup",
        as_json=options.json,
        document={
            "bench": "agent_size",
            "disk_kib": disk_kib,
            "idle_private_kib": private,
            "ready_ms": ready,
            "n": options.n,
        },
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except shoal.ShoalError as failure:
        sys.exit(f"error: {failure}\nhint: {failure.hint}")
