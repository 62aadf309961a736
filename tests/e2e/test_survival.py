"""Sandboxes, and what runs in them, outlive the front door and the server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import images
from tests.support.node import Part, PrivateNode

if TYPE_CHECKING:
    import shoal

DEADLINE = 120.0
"""Seconds within which anything here must be over on a slow machine."""
PIECE = random.Random(20).randbytes(32 << 10)
"""What the printers print, again and again."""
LATE = "printer-48"
PIECES_AT_ONCE = 1000
"""What that one prints before it looks whether it shall end; more than a client keeps that is not read."""
START = "echo x >> /runs/$0; "
PRINTER = START + "n=0; until [ -e /go ]; do cat $1; n=$((n+$2)); done; echo $n >&2; exit 5"
SLEEPER = START + "until [ -e /go ]; do sleep 0.05; done; echo done; exit 7"
READER = START + "cat; exit 9"
TERMINAL = (
    START
    + "n=0; until [ -e /go ]; do n=$((n+1)); echo line $n; sleep 0.02; done; echo end $n; exit 3"
)


@pytest.fixture
def own(as_root: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateNode]:
    """A node of the test's own, whose parts it may kill; at the end nothing of it may be left on the host."""
    tree = images.base_tar()
    private = PrivateNode.make()
    private.start()
    for name, value in private.env.items():
        if name.startswith("SHOAL_"):
            monkeypatch.setenv(name, value)
    try:
        done = private.cli("image", "import", str(tree), "base")
        assert done.returncode == 0, f"{done.stderr.decode()}\n{private.log}"
        warm = private.cli("run", "--", "true")
        assert warm.returncode == 0, f"{warm.stderr.decode()}\n{private.log}"
        yield private
    finally:
        private.stop()
    assert not private.owners()
    census = private.census()
    assert (census.cgroups, census.loops) == ([], [])
    private.remove()


async def _works_again(sandbox: shoal.AsyncSandbox) -> None:
    """Try for as long as the node is not whole."""
    import shoal

    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                await sandbox.run("true", check=True)
            except shoal.errors.NodeUnavailableError:
                await asyncio.sleep(0.05)
            else:
                return


class _Job:
    """An exec whose output is hashed as it comes."""

    def __init__(self, process: shoal.AsyncProcess) -> None:
        self.process = process
        self.output = hashlib.sha256()
        self.size = 0
        self.tail = b""
        self.errors = b""
        self.began = asyncio.Event()

    async def read(self, begin: asyncio.Event | None) -> None:
        if begin is not None:
            await begin.wait()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read_errors())
            while data := await self.process.stdout.read(1 << 16):
                self.output.update(data)
                self.size += len(data)
                self.tail = (self.tail + data)[-64:]
                self.began.set()
        await self.process.wait()

    async def _read_errors(self) -> None:
        self.errors = await self.process.stderr.read()


@contextlib.asynccontextmanager
async def _sandboxes(count: int) -> AsyncIterator[list[shoal.AsyncSandbox]]:
    import shoal

    async with contextlib.AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(await shoal.AsyncSandbox.create(timeout=600, pids=200))
            for _ in range(count)
        ]
        for sandbox in made:
            await sandbox.run("mkdir /runs", check=True)
            await sandbox.files.write("/piece", PIECE)
            await sandbox.run(
                f"for n in $(seq {PIECES_AT_ONCE}); do cat /piece; done > /pieces", check=True
            )
        yield made


async def _feed(job: _Job, pieces: list[bytes], stop: asyncio.Event) -> None:
    """Write a piece at a time for as long as parts are being killed, and then the end."""
    at = 0
    while not stop.is_set():
        await job.process.stdin.write(PIECE[at : at + 1000])
        pieces.append(PIECE[at : at + 1000])
        at = (at + 1000) % 30_000
        await asyncio.sleep(0.05)
    await job.process.stdin.close()


@pytest.mark.parametrize("parts", [("front door",), ("server",), ("front door", "server")])
async def test_cr_06_what_runs_goes_on_when_parts_of_the_node_are_killed(
    parts: tuple[Part, ...], own: PrivateNode
) -> None:
    import shoal

    with own.unchanged():
        async with _sandboxes(5) as sandboxes:
            jobs: dict[str, _Job] = {}

            async def start(number: int, sandbox: shoal.AsyncSandbox) -> None:
                kind, program = list(
                    {
                        "printer": PRINTER,
                        "sleeper": SLEEPER,
                        "reader": READER,
                        "pty": TERMINAL,
                    }.items()
                )[number % 4]
                name = f"{kind}-{number}"
                pieces = ["/pieces", str(PIECES_AT_ONCE)] if name == LATE else ["/piece", "1"]
                process = await sandbox.exec(
                    ["sh", "-c", program, name, *pieces], stdin=kind == "reader", pty=kind == "pty"
                )
                jobs[name] = _Job(process)

            fed: dict[str, list[bytes]] = {}
            stop = asyncio.Event()
            async with asyncio.timeout(DEADLINE * 2), asyncio.TaskGroup() as tasks:
                async with asyncio.TaskGroup() as starting:
                    for number in range(50):
                        starting.create_task(start(number, sandboxes[number % 5]))
                for name, job in jobs.items():
                    # One printer's output is looked at late: much of it is on its way at each kill.
                    late = name == LATE
                    tasks.create_task(job.read(stop if late else None))
                    if name.startswith("reader"):
                        tasks.create_task(_feed(job, fed.setdefault(name, []), stop))
                for name, job in jobs.items():
                    if not name.startswith("sleeper") and name != LATE:
                        await job.began.wait()
                for _ in range(4):
                    await asyncio.to_thread(own.kill, *parts)
                    for sandbox in sandboxes:
                        await _works_again(sandbox)
                    assert {one.returncode for one in (job.process for job in jobs.values())} == {
                        None
                    }
                stop.set()
                for sandbox in sandboxes:
                    await sandbox.run("touch /go", check=True)

            for name, job in jobs.items():
                sha, size = job.output.hexdigest(), job.size
                match name.partition("-")[0]:
                    case "printer":
                        count = int(job.errors)
                        expected, code = PIECE * count, 5
                        assert size == len(expected), name
                    case "sleeper":
                        expected, code = b"done\n", 7
                    case "reader":
                        expected, code = b"".join(fed[name]), 9
                    case _:
                        count = int(job.tail.rsplit(b" ", 1)[1])
                        lines = [b"line %d\r\n" % (n + 1) for n in range(count)]
                        expected, code = b"".join([*lines, b"end %d\r\n" % count]), 3
                assert (size, sha) == (len(expected), hashlib.sha256(expected).hexdigest()), name
                assert job.process.returncode == code, (name, job.process.exit)
            runs = [await one.run("cat /runs/*; ls /runs | wc -l", check=True) for one in sandboxes]
            # As many marks as execs: none ran twice.
            assert [run.stdout for run in runs] == ["x\n" * 10 + "10\n"] * 5

            async with await shoal.AsyncSandbox.create() as fresh:
                assert (await fresh.run("echo new", check=True)).stdout == "new\n"
            assert {row.id for row in await shoal.AsyncSandbox.list()} == {
                one.id for one in sandboxes
            }


async def test_cr_06_clocks_and_owners_still_end_what_a_new_server_took_up(
    own: PrivateNode,
) -> None:
    import shoal

    with own.unchanged():
        timed = await shoal.AsyncSandbox.create(timeout=12)
        kept = await shoal.AsyncSandbox.create(timeout=600, labels={"kept": "yes"}, memory_mib=100)
        before = {one.id: await one.info() for one in (timed, kept)}
        sleeping = [await one.exec("sleep 600") for one in (timed, kept)]
        for parts in (("server",), ("front door", "server")):
            await asyncio.to_thread(own.kill, *parts)
        for one in (timed, kept):
            await _works_again(one)
            assert await one.info() == before[one.id]
        # What it holds counts: there is no room for a second promise of the same.
        node = own.request("GET", "/v1/node").json()
        assert node["sandboxes"] == 2
        assert node["memory_reserved_mib"] == 512 + 100

        async with asyncio.timeout(DEADLINE):
            with pytest.raises(shoal.errors.SandboxGoneError) as caught:
                await sleeping[0].wait()
            assert caught.value.details["reason"] == "timeout"
        await timed.terminate()  # waits until it is gone, and changes nothing else
        info = await timed.info()
        assert info.reason is shoal.Reason.TIMEOUT
        assert info.ended_at is not None
        assert abs(info.ended_at - before[timed.id].expires_at) < 5
        assert sleeping[1].returncode is None
        await kept.terminate()
        with pytest.raises(shoal.errors.SandboxGoneError) as caught:
            await sleeping[1].wait(timeout=DEADLINE)
        assert caught.value.details["reason"] == "terminated"


async def test_cr_06_a_guest_agent_that_dies_together_with_the_server_ends_only_its_sandbox(
    own: PrivateNode,
) -> None:
    import shoal

    with own.unchanged():
        dead, alive = [await shoal.AsyncSandbox.create() for _ in range(2)]
        agent = min(own.sandbox_pids(dead.id))
        server = own.part("server")
        assert server is not None
        # Stopped first, so that it surely does not hear of the other's end.
        os.kill(server, signal.SIGSTOP)
        os.kill(agent, signal.SIGKILL)
        await asyncio.to_thread(own.kill, "server")
        await _works_again(alive)
        info = await dead.info()
        assert (info.status, info.reason) == ("stopped", shoal.Reason.LOST)
        assert "signal 9" in info.message
        await alive.terminate()


async def test_cr_06_creates_that_meet_the_server_s_death_end_in_infra_errors_and_leave_nothing(
    own: PrivateNode,
) -> None:
    import shoal

    async def create() -> shoal.AsyncSandbox | shoal.ShoalError:
        try:
            return await shoal.AsyncSandbox.create(memory_mib=64)
        except shoal.ShoalError as error:
            return error

    with own.unchanged():
        for _ in range(3):
            creates = [asyncio.create_task(create()) for _ in range(30)]
            # In the middle: some sandboxes are there, and some creates not answered.
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait(creates, timeout=DEADLINE, return_when=first)
            await asyncio.to_thread(own.kill, "server")
            async with asyncio.timeout(DEADLINE):
                ends = await asyncio.gather(*creates)
            errors = [end for end in ends if isinstance(end, shoal.ShoalError)]
            made = {end.id: end for end in ends if isinstance(end, shoal.AsyncSandbox)}
            assert errors
            assert made
            assert all(error.is_infra for error in errors), errors
            for one in made.values():
                assert (await one.run("echo up", check=True)).stdout == "up\n"
            # One that was up, but whose creator had not been told so yet, may be among them.
            listed = [row.id for row in await shoal.AsyncSandbox.list() if row.status != "stopping"]
            assert made.keys() <= set(listed)
            assert len(set(listed) - made.keys()) <= 4
            for sandbox in listed:
                await (await shoal.AsyncSandbox.connect(sandbox)).terminate()


def test_cr_06_an_import_that_meets_the_server_s_death_fails_and_leaves_nothing(
    own: PrivateNode,
) -> None:
    archive = images.base_docker_archive()
    with own.unchanged():
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-m", "shoal", "image", "import", str(archive), "other"],
                env=own.env,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
            end = time.monotonic() + DEADLINE
            while not any(entry.startswith("layers/.new-") for entry in own.pool_entries()):
                assert process.poll() is None
                assert time.monotonic() < end
            own.kill("server")
            _, said = process.communicate(timeout=DEADLINE)
            assert process.returncode != 0
            assert b"node" in said
            names = {row["name"] for row in own.request("GET", "/v1/images").json()["images"]}
            assert names == {"base:latest"}
    assert own.cli("image", "import", str(archive), "other").returncode == 0
    assert own.cli("run", "--image", "other", "--", "true").returncode == 0


def _standing(pid: int) -> dict[str, object]:
    """What a process may do and what it holds, apart from its connections."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    kept = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
    names = (*kept, "Seccomp", "SigBlk", "SigIgn", "Umask")
    held: dict[str, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed just now
            target = os.readlink(entry)
            if not target.startswith("socket:") and "/state.db" not in target:
                held[target] = held.get(target, 0) + 1
    return {
        **{name: status[name] for name in names},
        "limits": Path(f"/proc/{pid}/limits").read_text(),
        "root": os.readlink(f"/proc/{pid}/root"),
        "cwd": os.readlink(f"/proc/{pid}/cwd"),
        "cgroup": Path(f"/proc/{pid}/cgroup").read_text(),
        "oom_score_adj": Path(f"/proc/{pid}/oom_score_adj").read_text(),
        "spaces": {
            name: os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}")
            for name in ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
        },
        "held": held,
    }


@pytest.mark.parametrize("part", ["front door", "server"])
def test_cr_06_a_part_that_was_started_again_may_no_more_than_the_first(
    part: Part, own: PrivateNode
) -> None:
    first = own.part(part)
    assert first is not None
    before = _standing(first)
    own.kill(part)
    assert own.cli("run", "--", "true").returncode == 0
    again = own.part(part)
    assert again is not None
    assert _standing(again) == before
    environment = Path(f"/proc/{again}/environ").read_bytes()
    assert environment.count(b"SHOAL_KEEPER_FD=") == (part == "server")


async def test_cr_06_three_hundred_are_taken_up_and_nothing_is_given_to_two(
    own: PrivateNode,
) -> None:
    import shoal

    with own.unchanged(seconds=60):
        spec = shoal.SandboxSpec(memory_mib=24, cpu=0.1, pids=16, disk_mib=16)
        made = await shoal.AsyncSandbox.create_many([spec] * 300)
        before = {one.id for one in made if isinstance(one, shoal.AsyncSandbox)}
        assert len(before) == 300
        await asyncio.to_thread(own.kill, "front door", "server")
        rows = await shoal.AsyncSandbox.list()
        assert {row.id for row in rows if row.status == "running"} == before
        async with await shoal.AsyncSandbox.create(memory_mib=24) as fresh:
            assert (await fresh.run("echo new", check=True)).stdout == "new\n"
        found = [await shoal.AsyncSandbox.connect(row.id) for row in rows]
        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as tasks:
            for one in found:
                tasks.create_task(_works_again(one))
        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as tasks:
            for one in found:
                tasks.create_task(one.terminate())
