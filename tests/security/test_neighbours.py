"""What one sandbox takes, and one node does, is not felt by those beside it; a broken node leaves nothing."""

from __future__ import annotations

import errno
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import images
from tests.support.node import Part, PrivateNode

if TYPE_CHECKING:
    import shoal

MIB = 1 << 20

CALLS = """
import ctypes, errno, fcntl, json, os, platform, resource, signal, socket, sys

libc = ctypes.CDLL(None, use_errno=True)
TIMER_CREATE = {"x86_64": 222, "aarch64": 107}[platform.machine()]
SIGNAL = signal.SIGRTMIN + 1
signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])

def errno_of(function, *arguments):
    ctypes.set_errno(0)
    return ctypes.get_errno() if function(*arguments) < 0 else 0

def inotify():
    return errno_of(libc.inotify_init1, os.O_NONBLOCK)

def queue():
    # The C library's name for rt_sigqueueinfo(2).
    return errno_of(libc.sigqueue, os.getpid(), int(SIGNAL), ctypes.c_void_p(0))

def timer():
    return errno_of(libc.syscall, TIMER_CREATE, 1, None, ctypes.byref(ctypes.c_int()))

def tell(**facts):
    print(json.dumps(facts), flush=True)
"""

TAKE = (
    CALLS
    + """
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
# What is held stays charged to the user who took it, while the process goes on as the next one.
others = range(2000, 10_000) if os.getuid() == 0 else ()
taken, refusals = 0, []
for user in (os.getuid(), 1000, *others):
    if others:
        os.setresuid(-1, 0, -1)
        os.setresuid(user, user, 0)
    before = taken
    while not (refusal := %s()):
        taken += 1
    refusals.append(refusal)
    if taken == before:
        break
os.close(os.open("/", os.O_RDONLY))  # it is not for want of descriptors
tell(taken=taken, refusals=sorted(set(refusals)), last=taken - before)
sys.stdin.readline()
"""
)

NEEDS = CALLS + "tell(inotify=inotify(), queue=queue(), timer=timer())"
NOTHING_REFUSED = {"inotify": 0, "queue": 0, "timer": 0}


@contextmanager
def attack(attacker: shoal.Sandbox, program: str, user: str = "0") -> Iterator[dict[str, Any]]:
    """What the program took; it holds that until the block ends."""
    process = attacker.exec(["python3", "-c", program], user=user, stdin=True)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read_text()
        yield json.loads(line)
    finally:
        process.kill()


def _ask(sandbox: shoal.Sandbox, program: str, user: str = "0") -> dict[str, Any]:
    result = sandbox.run(["python3", "-c", program], user=user, timeout=20)
    assert result.ok, f"{result.outcome} {result.exit_code}: {result.stderr}"
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def _needs_of_the_hosts_root() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", NEEDS], capture_output=True, timeout=20, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _nobody_else_is_refused(neighbour: shoal.Sandbox) -> None:
    import shoal

    assert _needs_of_the_hosts_root() == NOTHING_REFUSED, "the host's root"
    with shoal.Sandbox.create() as new:
        for one, user in itertools.product((neighbour, new), ("0", "1000")):
            assert _ask(one, NEEDS, user) == NOTHING_REFUSED, (one is new, user)


@pytest.mark.parametrize("user", ["0", "1000"], ids=["root", "user"])
def test_rs_10_inotify_instances_taken_to_refusal_are_the_takers_own(
    sandbox: shoal.Sandbox, user: str
) -> None:
    import shoal

    assert _needs_of_the_hosts_root() == NOTHING_REFUSED, "this host is full already"
    with shoal.Sandbox.create() as neighbour, attack(sandbox, TAKE % "inotify", user) as got:
        assert got["taken"] > 0
        assert (got["last"], got["refusals"]) == (0, [errno.EMFILE]), got
        _nobody_else_is_refused(neighbour)


def test_rs_10_signals_queued_to_refusal_are_the_takers_own(sandbox: shoal.Sandbox) -> None:
    import shoal

    assert _needs_of_the_hosts_root() == NOTHING_REFUSED, "this host is full already"
    with shoal.Sandbox.create() as neighbour, attack(sandbox, TAKE % "queue") as got:
        assert got["taken"] > 0
        assert (got["last"], got["refusals"]) == (0, [errno.EAGAIN]), got
        _nobody_else_is_refused(neighbour)


PLACES = """
lines = [line.split() for line in open("/proc/self/mountinfo")]
devices = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")
shared = ["/dev", *(f"/dev/{name}" for name in devices), "/etc/passwd", "/usr/bin/python3"]
# Mount points in /proc are its masks.
places = sorted({*shared, *(line[4] for line in lines)})

def opened(path):
    # Not /dev/tty or /dev/ptmx themselves: nobody here has a terminal, and the other makes one.
    return None if path in {"/dev/tty", "/dev/ptmx"} else os.open(path, os.O_RDONLY | os.O_NONBLOCK)

def lock(handle):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
"""
LOCK_ALL = (
    CALLS
    + PLACES
    + """
handles = {path: opened(path) for path in places}
locked, seen = {}, set()
for path, handle in handles.items():
    if handle is not None:
        which = (os.fstat(handle).st_dev, os.fstat(handle).st_ino)
        locked[path] = which in seen or lock(handle)  # a mask is a device or a directory of /dev
        seen.add(which)
tell(locked=locked)
sys.stdin.readline()
"""
)
LOCK_EACH = (
    CALLS
    + PLACES
    + """
locked = {}
for path in places:
    handle = opened(path)
    if handle is not None:
        locked[path] = lock(handle)
        os.close(handle)
tell(locked=locked)
"""
)
WATCH_ALL = (
    CALLS
    + PLACES
    + """
watcher = libc.inotify_init1(os.O_NONBLOCK)
watched = {}
for path in places:
    number = libc.inotify_add_watch(watcher, path.encode(), 0xfff)
    assert number >= 0, path
    watched[number] = path

def heard():
    try:
        data = os.read(watcher, 1 << 20)
    except BlockingIOError:
        return []
    found = set()
    while data:
        found.add(watched[int.from_bytes(data[:4], sys.byteorder)])
        data = data[16 + int.from_bytes(data[12:16], sys.byteorder):]
    return sorted(found)

heard()
tell(watched=sorted(watched.values()))
sys.stdin.readline()
others = heard()
os.close(os.open("/dev/null", os.O_RDWR))
tell(others=others, own=heard())
"""
)
TOUCH_ALL = (
    CALLS
    + PLACES
    + """
for path in places:
    handle = opened(path)
    if handle is not None:
        if not os.path.isdir(path):
            os.read(handle, 1)
        os.close(handle)
for path in ("/dev/null", "/dev/zero"):
    os.write(os.open(path, os.O_RDWR), b"x")
os.listdir("/dev")
tell(touched=places)
"""
)
AT_LEAST = {"/dev", "/dev/null", "/proc/kmsg", "/etc/passwd", "/usr/bin/python3"}


def _expected() -> set[str]:
    return AT_LEAST | ({"/proc/acpi"} if Path("/proc/acpi").is_dir() else set())


def test_fs_13_a_lock_on_a_device_a_mask_or_a_base_file_is_nobody_elses(
    sandbox: shoal.Sandbox,
) -> None:
    import shoal

    with shoal.Sandbox.create() as neighbour, attack(sandbox, LOCK_ALL) as got:
        assert got["locked"].keys() >= _expected()
        assert all(got["locked"].values()), got
        # The lock is one: in the attacker's own sandbox nobody else gets it.
        own = _ask(sandbox, LOCK_EACH)["locked"]
        assert not own["/dev/null"]
        assert not own["/proc/kmsg"]
        for user in ("0", "1000"):
            answer = _ask(neighbour, LOCK_EACH, user)["locked"]
            assert answer.keys() >= _expected()
            assert [path for path, free in answer.items() if not free] == [], user


def test_fs_13_a_watch_on_a_device_a_mask_or_a_base_file_tells_of_nobody_else(
    sandbox: shoal.Sandbox,
) -> None:
    import shoal

    with shoal.Sandbox.create() as neighbour:
        process = sandbox.exec(["python3", "-c", WATCH_ALL], stdin=True)
        line = process.stdout.readline()
        assert line, process.stderr.read_text()
        # Of two names of one inode the later counts.
        assert len(set(json.loads(line)["watched"]) & _expected()) >= 3
        assert set(_ask(neighbour, TOUCH_ALL)["touched"]) >= _expected()
        process.stdin.write(b"\n")
        process.stdin.close()
        answer = json.loads(process.stdout.readline())
        assert answer["others"] == []
        assert answer["own"], "a watch that sees nothing at all proves nothing"


BECOME = (
    CALLS
    + """
AGENT, SAME = 65536, -1
FEW = (ctypes.c_uint64 * 2)(3, 3)  # RLIMIT_NOFILE: with so many no command can be started any more
tries = {
    "setuid": lambda: libc.setuid(AGENT),
    "setreuid, real": lambda: libc.setreuid(AGENT, SAME),
    "setreuid, effective": lambda: libc.setreuid(SAME, AGENT),
    "setresuid, real": lambda: libc.setresuid(AGENT, SAME, SAME),
    "setresuid, effective": lambda: libc.setresuid(SAME, AGENT, SAME),
    "setresuid, saved": lambda: libc.setresuid(SAME, SAME, AGENT),
    "setresuid, all": lambda: libc.setresuid(AGENT, AGENT, AGENT),
    "setfsuid": lambda: libc.setfsuid(AGENT),
}

def in_a_child(act):
    read, write = os.pipe()
    if os.fork() == 0:
        libc.setresgid(AGENT, AGENT, AGENT)  # prlimit(2) wants the group to match, too
        refusal = errno_of(act)
        users = open("/proc/self/status").read().partition("Uid:")[2].split()[:4]
        limit = errno_of(libc.prlimit, 1, resource.RLIMIT_NOFILE, FEW, None)
        os.write(write, json.dumps([refusal, users, limit]).encode())
        os._exit(0)
    os.close(write)
    os.wait()
    return json.loads(os.read(read, 65536))

tell(done={name: in_a_child(act) for name, act in tries.items()})
"""
)


def test_pr_02_root_inside_cannot_become_the_guest_agents_user(sandbox: shoal.Sandbox) -> None:
    done = _ask(sandbox, BECOME)["done"]
    assert len(done) == 8
    for name, answer in done.items():
        assert answer == [errno.EPERM, ["0"] * 4, errno.EPERM], name
    assert sandbox.run(["sh", "-c", "echo alive | cat"], check=True).stdout == "alive\n"


FILL = (
    CALLS
    + """
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
listener = socket.create_server(("127.0.0.1", 0))

def udp():
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 30)
    one.bind(("127.0.0.1", 0))
    one.connect(one.getsockname())
    return [one]

def tcp():
    one = socket.create_connection(listener.getsockname(), timeout=2)
    return [one, listener.accept()[0]]

kept, sent = [], 0
for _ in range(%d):
    ends = %s()
    kept += ends
    for end in ends:
        end.setblocking(False)
        try:
            for _ in range(200):
                sent += end.send(b"x" * 60_000)
        except OSError:
            pass
tell(sent=sent, sockets=len(kept))
sys.stdin.readline()
"""
)
# The first segment that a TCP socket receives is charged whatever the limit says, so that connections do not
# starve (sk_forced_mem_schedule in the kernel's tcp_input.c); 64 KiB of data and what is around it.
FORCED = 80 << 10


@pytest.mark.parametrize(
    ("kind", "count", "forced"), [("udp", 300, 0), ("tcp", 20, FORCED)], ids=["udp", "tcp"]
)
def test_rs_01_socket_buffers_are_counted_and_bounded(
    node: PrivateNode, kind: str, count: int, forced: int
) -> None:
    import shoal

    with shoal.Sandbox.create(memory_mib=128) as hog, attack(hog, FILL % (count, kind)) as got:
        assert got["sent"] > 0
        judged = 0
        for group in node.sandbox_cgroups(hog.id):
            limited, stat = (
                group / "work" / name for name in ("memory.kmem.tcp.limit_in_bytes", "memory.stat")
            )
            if limited.exists():
                judged += 1
                limit = int(limited.read_text())
                used = int(limited.with_name("memory.kmem.tcp.usage_in_bytes").read_text())
                assert limit <= 128 * MIB, "unlimited"
                assert limit // 2 < used <= limit + got["sockets"] * forced, got
            elif stat.exists() and "\nsock " in stat.read_text():
                judged += 1
                used = int(stat.read_text().partition("\nsock ")[2].split()[0])
                assert MIB < used <= 128 * MIB, got
        assert judged == 1


# ---- nodes side by side, and nodes whose processes die


@pytest.fixture(scope="module")
def made(as_root: None) -> Iterator[PrivateNode]:
    private = PrivateNode.make()
    try:
        private.start()
        done = private.cli("image", "import", str(images.base_tar()), "base")
        assert done.returncode == 0, f"{done.stderr.decode()}\n{private.log}"
        yield private
    finally:
        private.stop()
    assert not private.owners()
    private.remove()


@pytest.fixture
def beside(made: PrivateNode) -> PrivateNode:
    """A node of this module's own, running whatever the test before did to it."""
    if not made.answers():
        made.stop()
        made.start()
    return made


def _create(node: PrivateNode) -> str:
    answer = node.request("POST", "/v1/sandboxes", body=b"{}")
    assert answer.status == 201, answer.body
    return str(answer.json()["sandbox"]["id"])


def _echo(node: PrivateNode, sandbox: str) -> bytes:
    done = node.cli("exec", sandbox, "--", "echo", "alive")
    return done.stdout or done.stderr


def _spans(node: PrivateNode, sandbox: str) -> set[tuple[str, int, int]]:
    """The ranges of host ids in a sandbox: kind, first, behind the last."""
    found = set()
    for pid in node.sandbox_pids(sandbox):
        for kind in ("uid_map", "gid_map"):
            for line in Path(f"/proc/{pid}/{kind}").read_text().splitlines():
                _, first, length = map(int, line.split())
                found.add((kind, first, first + length))
    assert {kind for kind, _, _ in found} == {"uid_map", "gid_map"}
    return found


def test_pr_05_sandboxes_of_two_nodes_share_no_host_id(
    node: PrivateNode, beside: PrivateNode
) -> None:
    owners = [(one, _create(one)) for one in (node, beside) for _ in range(2)]
    spans = [_spans(one, sandbox) for one, sandbox in owners]
    for mine, others in itertools.combinations(spans, 2):
        for (kind, low, high), (other, first, behind) in itertools.product(mine, others):
            assert kind != other or high <= first or behind <= low, (mine, others)
    for one, sandbox in owners:
        assert one.request("DELETE", f"/v1/sandboxes/{sandbox}").status < 300


def _same(data_dir: Path) -> Path:
    return data_dir


def _through_a_link(data_dir: Path) -> Path:
    link = data_dir.parent / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(data_dir)
    return link


def _roundabout(data_dir: Path) -> Path:
    (data_dir.parent / "x").mkdir(exist_ok=True)
    return data_dir.parent / "x" / ".." / data_dir.name


@pytest.mark.parametrize("spelled", [_same, _through_a_link, _roundabout])
def test_a_second_node_on_a_data_directory_is_refused_and_the_first_goes_on(
    beside: PrivateNode, spelled: Callable[[Path], Path]
) -> None:
    from shoal.local.serve import binaries

    data_dir, run_dir = spelled(beside.data_dir), beside.run_dir.with_name("run2")
    kept = _create(beside)
    inside = beside.sandbox_pids(kept)
    with beside.unchanged():
        told = PrivateNode(data_dir, run_dir).cli("serve", timeout=15)
        assert told.returncode == 1, told
        first, *rest = told.stderr.decode().splitlines()
        assert first == f"error: another node uses {data_dir}"
        assert [line.partition(":")[0] for line in rest] == ["hint"]
        # The keeper itself, which `shoal serve` asks only when it found nobody.
        noded, agent = binaries()
        keeper = subprocess.run(
            [
                *(str(noded), "serve", "--data-dir", str(data_dir), "--run-dir", str(run_dir)),
                *("--agent", str(agent), "--python", sys.executable),
                *("--pool", f"{data_dir}/pool.btrfs"),
            ],
            env=beside.env,
            capture_output=True,
            timeout=15,
            check=False,
        )
        assert keeper.returncode != 0
        assert keeper.stderr.decode().count(f"another node uses {beside.data_dir}") == 1
        assert beside.sandbox_pids(kept) == inside
        assert _echo(beside, kept) == b"alive\n"
        new = _create(beside)
        assert _echo(beside, new) == b"alive\n"
        beside.request("DELETE", f"/v1/sandboxes/{new}")
    assert beside.request("DELETE", f"/v1/sandboxes/{kept}").status < 300


def _all_end(pids: list[int], stack: ExitStack) -> Callable[[float], bool]:
    """Pin processes; the answer tells whether all of them end within so many seconds.

    None of them outlives the stack, whatever the answer was.
    """
    pinned = {os.pidfd_open(pid) for pid in pids}
    for fd in pinned:
        stack.callback(os.close, fd)
        stack.callback(_end, fd)

    def judge(seconds: float) -> bool:
        end = time.monotonic() + seconds
        for fd in pinned:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                return False
        return True

    return judge


def _end(process: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)


@pytest.mark.parametrize(
    ("victim", "seconds"),
    [(None, 5), ("front door", 10), ("server", 10)],
    ids=["keeper", "front_door", "server"],
)
def test_cr_06_a_node_that_loses_its_keeper_or_a_part_for_good_ends_whole_and_starts_again(
    beside: PrivateNode, victim: Part | None, seconds: float
) -> None:
    before = beside.census()
    sandbox = _create(beside)
    hidden = (
        "trap '' TERM HUP; for i in 1 2 3; do setsid sleep 600 > /dev/null 2>&1 & done; "
        "kill -STOP $!"
    )
    for user in ("0", "1000"):
        done = beside.cli("exec", "--user", user, sandbox, "--", "sh", "-c", hidden)
        assert done.returncode == 0, done.stderr
    inside = beside.sandbox_pids(sandbox)
    groups = beside.sandbox_cgroups(sandbox)
    assert len(inside) >= 7
    assert groups
    assert beside.process is not None
    if victim is not None:
        for _ in range(5):
            beside.kill(victim)
    last = beside.process.pid if victim is None else beside.part(victim)
    assert last is not None
    with ExitStack() as stack:
        sandbox_ends = _all_end(inside, stack)
        node_ends = _all_end(beside.daemons(), stack)
        start = time.monotonic()
        os.kill(last, signal.SIGKILL)
        assert sandbox_ends(seconds), beside.sandbox_pids(sandbox)
        assert node_ends(start + 10 - time.monotonic()), beside.owners()
    assert beside.process.wait(5) != 0
    assert not beside.owners()
    if victim is not None:  # which is who would have tidied up
        assert not [group for group in groups if group.exists()]
        left = beside.census()
        assert (left.cgroups, left.loops) == ([], [])
        assert not [path for path in beside.run_dir.rglob("*") if path.is_socket()]
    beside.start()
    assert not [group for group in groups if group.exists()]
    told = beside.request("GET", f"/v1/sandboxes/{sandbox}").json()
    assert (told["status"], told["reason"]) == ("stopped", "lost"), told
    assert beside.census().differs_from(before) == {}
    new = _create(beside)
    assert _echo(beside, new) == b"alive\n"
    assert beside.request("DELETE", f"/v1/sandboxes/{new}").status < 300
