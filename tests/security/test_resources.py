"""RS: one sandbox takes what is its own and no more; its neighbour goes on answering."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.security.conftest import Judge
from tests.support.node import PrivateNode

if TYPE_CHECKING:
    import shoal

MIB = 1 << 20


@contextmanager
def neighbour_answers(slowest: float = 5.0) -> Iterator[None]:
    """A sandbox beside this block: every exec in it succeeds, and none takes longer than `slowest`."""
    import shoal

    with shoal.Sandbox.create() as neighbour:
        over = threading.Event()
        times: list[float] = []
        failures: list[str] = []

        def ask() -> None:
            while not over.is_set():
                start = time.monotonic()
                try:
                    result = neighbour.run(
                        ["sh", "-c", "echo hi | tee /var/tmp/written"], timeout=20
                    )
                except shoal.ShoalError as error:
                    failures.append(repr(error))
                    return
                if result.stdout != "hi\n":
                    failures.append(f"{result.outcome}: {result.stderr}")
                times.append(time.monotonic() - start)
                over.wait(0.1)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(60)
        assert not failures, failures[:3]
        assert times, "the neighbour was never asked"
        assert max(times) < slowest, f"the neighbour took {max(times):.1f} s"


HOGS = {
    "anonymous memory": "x = []\nwhile True: x.append(bytearray(b'x' * (8 << 20)))",
    "a file in memory": (
        "import os\nh = os.memfd_create('x')\nwhile True: os.write(h, b'x' * (8 << 20))"
    ),
}


@pytest.mark.parametrize("kind", HOGS)
def test_rs_01_a_memory_hog_is_killed_and_told_apart(kind: str) -> None:
    import shoal

    with neighbour_answers(), shoal.Sandbox.create(memory_mib=96) as hog:
        result = hog.run(["python3", "-c", HOGS[kind]], timeout=60)
        assert result.outcome is shoal.Outcome.OOM_KILLED, (result, result.stderr)
        assert not result.outcome.is_infra
        assert hog.run("echo alive", check=True).stdout == "alive\n"
        assert hog.info().status is shoal.Status.RUNNING


def test_rs_01_processes_are_counted_together() -> None:
    import shoal

    program = """
import os
for _ in range(12):
    if os.fork() == 0:
        x = bytearray(b'x' * (16 << 20)); input(); os._exit(0)
print([os.WTERMSIG(os.wait()[1]) for _ in range(3)])
"""
    with neighbour_answers(), shoal.Sandbox.create(memory_mib=96) as hog:
        process = hog.exec(["python3", "-c", program], stdin=True)
        assert process.stdout.readline() == b"[9, 9, 9]\n"
        process.kill()
        assert hog.run("echo alive", check=True).stdout == "alive\n"


def test_rs_01_files_in_tmpfs_are_charged(node: PrivateNode) -> None:
    import shoal

    with neighbour_answers(), shoal.Sandbox.create(memory_mib=96) as hog:
        result = hog.run(
            "for d in /tmp /dev/shm; do dd if=/dev/zero of=$d/x bs=1M count=400; done", timeout=60
        )
        refused = "No space left" in result.stderr or "Disk quota" in result.stderr
        assert refused or result.outcome is shoal.Outcome.OOM_KILLED or "Killed" in result.stderr
        for group in node.sandbox_cgroups(hog.id):
            for name in ("memory.usage_in_bytes", "memory.current"):
                if (group / name).exists():
                    assert int((group / name).read_text()) <= 128 * MIB


def test_rs_01_the_limit_is_set_and_swap_is_off(sandbox: shoal.Sandbox, node: PrivateNode) -> None:
    found = False
    for group in node.sandbox_cgroups(sandbox.id):
        for directory in (group, *group.rglob("*/")):
            swap = directory / "memory.swap.max"
            both = directory / "memory.memsw.limit_in_bytes"
            limit = directory / "memory.limit_in_bytes"
            if directory.name == "work" and swap.exists():
                found = True
                assert swap.read_text().strip() == "0"
            if directory.name == "work" and limit.exists():
                found = True
                assert int(limit.read_text()) <= 512 * MIB
                if both.exists():
                    assert both.read_text() == limit.read_text()
                assert int((directory / "memory.swappiness").read_text()) == 0 or both.exists()
    assert found


FORK_BOMB = """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("user", ["0", "1000"])
def test_rs_02_cl_01_a_fork_bomb_is_contained(user: str, node: PrivateNode) -> None:
    import shoal

    with neighbour_answers():
        bombed = shoal.Sandbox.create(pids=64, cpu=1)
        bomb = bombed.exec(["python3", "-c", FORK_BOMB], user=user)
        deadline = time.monotonic() + 20
        while len(node.sandbox_pids(bombed.id)) < 60 and time.monotonic() < deadline:
            time.sleep(0.1)
        inside = node.sandbox_pids(bombed.id)
        assert 60 <= len(inside) <= 70
        assert bomb.poll() is None
        # Still governable: files through the guest agent, and a command gets a definite outcome.
        bombed.files.write("/root/note", b"still here")
        assert bombed.files.read("/root/note") == b"still here"
        result = bombed.run(["true"], timeout=10)
        assert result.outcome in {shoal.Outcome.EXITED, shoal.Outcome.NOT_STARTED}
        groups = node.sandbox_cgroups(bombed.id)
        start = time.monotonic()
        bombed.terminate()
        assert time.monotonic() - start < 5
        assert not [group for group in groups if group.exists()]
        assert not [pid for pid in inside if _is_of(pid, bombed.id)]


def _is_of(pid: int, sandbox: str) -> bool:
    try:
        return sandbox in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return False


def test_rs_02_a_fork_bomb_can_be_killed_and_the_sandbox_goes_on() -> None:
    import shoal

    with shoal.Sandbox.create(pids=64) as bombed:
        result = bombed.run(["python3", "-c", FORK_BOMB], timeout=3)
        assert result.outcome is shoal.Outcome.TIMED_OUT
        deadline = time.monotonic() + 5
        while True:
            again = bombed.run(["echo", "alive"], timeout=10)
            if again.ok or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        assert again.stdout == "alive\n"


STUBBORN = """
import os, signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        print("up", flush=True)
        if _ % 2: os.kill(os.getpid(), signal.SIGSTOP)
        while True: time.sleep(1)
time.sleep(600)
"""


def test_cl_01_what_ignores_every_signal_is_gone_within_five_seconds(node: PrivateNode) -> None:
    import shoal

    stubborn = shoal.Sandbox.create()
    process = stubborn.exec(["python3", "-c", STUBBORN])
    for _ in range(5):
        assert process.stdout.readline() == b"up\n"
    pids = node.sandbox_pids(stubborn.id)
    assert len(pids) >= 6
    start = time.monotonic()
    threads = [threading.Thread(target=stubborn.terminate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 5
    assert not [pid for pid in pids if _is_of(pid, stubborn.id)]
    stubborn.terminate()


def test_rs_03_busy_threads_get_their_share_and_no_more() -> None:
    import shoal

    with neighbour_answers(), shoal.Sandbox.create(cpu=0.5) as busy:
        program = """
import os, time
for _ in range(7):
    if os.fork() == 0: break
end = time.monotonic() + 6
while time.monotonic() < end: pass
"""
        busy.exec(["python3", "-c", program])
        time.sleep(0.5)
        start = time.monotonic()
        assert busy.run("echo alive", timeout=10, check=True).stdout == "alive\n"
        assert time.monotonic() - start < 5
        measured = """
import resource, subprocess, sys, time
start = time.monotonic()
code = "import time\\nend = time.monotonic() + 5\\nwhile time.monotonic() < end: pass"
children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
[child.wait() for child in children]
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print((used.ru_utime + used.ru_stime) / (time.monotonic() - start))
"""
        time.sleep(6)
        share = float(busy.run(["python3", "-c", measured], timeout=60, check=True).stdout)
        assert share < 0.6


def test_rs_04_a_full_disk_is_the_offenders_only(node: PrivateNode) -> None:
    import shoal

    with neighbour_answers(), shoal.Sandbox.create(disk_mib=64, memory_mib=256) as filler:
        before = os.statvfs(node.data_dir)
        result = filler.run("dd if=/dev/urandom of=/big bs=1M count=300 && sync", timeout=120)
        assert result.exit_code != 0
        assert "No space left" in result.stderr or "Disk quota exceeded" in result.stderr
        size = filler.files.stat("/big").size
        assert 32 * MIB <= size <= 80 * MIB
        after = os.statvfs(node.data_dir)
        # Others write on this host too; a disk without a limit would take three times as much.
        assert (before.f_bfree - after.f_bfree) * before.f_frsize < 200 * MIB
        with pytest.raises(shoal.ShoalError) as caught:
            filler.files.write("/more", os.urandom(48 * MIB))
        assert caught.value.details.get("errno") in {28, 122}
        assert filler.run("rm /big && sync && echo again > /note && cat /note").stdout == "again\n"


def test_rs_04_so_are_too_many_files() -> None:
    import shoal

    program = """
import os
os.mkdir("/many")
try:
    for number in range(2_000_000):
        with open(f"/many/{number}", "w") as handle: handle.write("x" * 100)
except OSError as error:
    print(error.errno)
"""
    with neighbour_answers(), shoal.Sandbox.create(disk_mib=32, memory_mib=256) as filler:
        result = filler.run(["python3", "-c", program], timeout=120)
        assert result.stdout.strip() in {"28", "122"}, (result.outcome, result.stderr)


def test_rs_05_rlimits_are_finite(judge: Judge) -> None:
    judge("RS-05")


def test_rs_06_every_tmpfs_has_a_size(judge: Judge) -> None:
    judge("RS-06", memory_bytes=512 * MIB)


def test_rs_07_the_own_cgroup_is_not_writable(judge: Judge) -> None:
    judge("RS-07")


def test_rs_08_priorities_cannot_be_raised(judge: Judge) -> None:
    judge("RS-08")


def test_rs_08_the_daemons_outlive_any_sandbox(walled: shoal.Sandbox, node: PrivateNode) -> None:
    def scores(pids: list[int]) -> list[int]:
        return [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids]

    assert max(scores(node.daemons())) < min(scores(node.sandbox_pids(walled.id)))


def test_rs_09_endless_output_is_bounded(node: PrivateNode) -> None:
    import shoal

    def resident() -> int:
        total = 0
        for pid in node.daemons():
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS"):
                    total += int(line.split()[1]) * 1024
        return total

    with neighbour_answers(), shoal.Sandbox.create() as loud:
        before = resident()
        unread = loud.exec(["sh", "-c", "yes | head -c 300000000"])
        result = loud.run("yes abcdefg | head -c 200000000", timeout=90)
        assert result.truncated
        assert 10 * MIB <= len(result.stdout_bytes) <= 11 * MIB
        assert unread.wait(timeout=90) == 0
        assert resident() - before < 64 * MIB


EVERYTHING_AT_ONCE = {
    "memory": """
try:
    with open("/dev/shm/x", "wb") as held:  # which outlives whoever is killed
        while True: held.write(b"x" * (1 << 20))
except OSError:
    pass
held = []
while True: held.append(b"x" * (1 << 20))
""",
    "threads": """
import hashlib, threading
def work():
    go.wait()
    while True:
        hashlib.sha256(block)  # lets go of the interpreter's lock
go, block = threading.Event(), b"x" * 1_000_000
try:
    for _ in range(200):
        threading.Thread(target=work).start()
except RuntimeError:
    pass  # no room for more
print("full", flush=True)
go.set()
""",
    "processes": """
import os
told = False
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        if not told:
            os.write(1, b"full\\n")
        told = True
""",
}


def test_rs_02_rs_03_whatever_is_used_up_each_call_is_answered_in_time() -> None:
    import shoal

    slowest: dict[str, float] = {}
    over = threading.Event()

    def timed(what: str, call: Callable[[], object]) -> None:
        start = time.monotonic()
        call()
        slowest[what] = max(slowest.get(what, 0.0), time.monotonic() - start)

    with shoal.Sandbox.create(memory_mib=160, cpu=1, pids=256) as starved:
        starved.files.write("/app/data", b"data")

        def use_up(program: str, used_up: threading.Event) -> None:
            # The kernel kills one or the other when memory runs out; then it starts again.
            while not over.is_set():
                hog = starved.exec(["python3", "-c", program], user="1000")
                hog.stdout.readline()  # it says so, or has gone over the limit
                used_up.set()
                while not over.wait(0.05) and hog.poll() is None:
                    pass
                timed("a kill of a hog", hog.kill)
                assert hog.wait(timeout=60) != 0

        def command() -> None:
            end = starved.run(["cat", "/app/data"])
            # No memory or no process for it is a true answer.
            refused = end.outcome in {shoal.Outcome.OOM_KILLED, shoal.Outcome.NOT_STARTED}
            assert refused or end.stdout == "data", end

        def kill() -> None:
            process = starved.exec(["sleep", "1000"])
            process.kill()
            assert process.wait(timeout=60) != 0

        def read() -> None:
            assert starved.files.read("/app/data") == b"data"

        with ThreadPoolExecutor() as threads:
            hogs = []
            try:
                for program in EVERYTHING_AT_ONCE.values():
                    used_up = threading.Event()
                    hogs.append(threads.submit(use_up, program, used_up))
                    assert used_up.wait(60)
                for _ in range(20):
                    timed("a command", command)
                    timed("a kill", kill)
                    timed("a read", read)
            finally:
                over.set()
            for hog in hogs:
                hog.result()
        assert max(slowest.values()) < 5, slowest
        assert starved.run("echo alive", check=True).stdout == "alive\n"
