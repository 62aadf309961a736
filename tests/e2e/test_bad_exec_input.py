"""Execs and files that make no sense, or too much of it: a typed error in time, and nobody else is hurt."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.node import PrivateNode

if TYPE_CHECKING:
    import shoal

DEADLINE = 20.0
"""Seconds within which anything here must be over."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.contextmanager
def _stream(
    node: PrivateNode, sandbox: str, method: str, tail: str, body: object = None
) -> Iterator[http.client.HTTPResponse]:
    """An answer that is read by hand."""
    connection = http.client.HTTPConnection("shoal", timeout=DEADLINE)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(DEADLINE)
    connection.sock.connect(str(node.socket))
    with contextlib.closing(connection):
        connection.request(
            method,
            f"/v1/sandboxes/{sandbox}/{tail}",
            body=None if body is None else json.dumps(body),
            headers={"Authorization": f"Bearer {node.token(sandbox)}"},
        )
        yield connection.getresponse()


@pytest.mark.parametrize("timeout", [0, -1, -1e9, math.inf, -math.inf, math.nan])
def test_a_deadline_that_is_none_is_refused(timeout: float, sandbox: shoal.Sandbox) -> None:
    from shoal import errors

    with pytest.raises(errors.InvalidArgumentError):
        sandbox.run("touch /ran", timeout=timeout)
    with pytest.raises(errors.InvalidArgumentError):
        sandbox.exec("touch /ran", timeout=timeout)
    assert not sandbox.files.exists("/ran")


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "x\0y"}])
def test_an_environment_that_is_none_is_refused(
    env: dict[str, str], sandbox: shoal.Sandbox
) -> None:
    from shoal import errors

    with pytest.raises(errors.InvalidArgumentError):
        sandbox.run("true", env=env)


def test_an_environment_may_hold_anything_else(sandbox: shoal.Sandbox) -> None:
    odd = {"A.b-c d": "=x=\n", "ü": "\x01", "EMPTY": ""}
    program = "import os, sys; sys.stdout.buffer.write(repr(sorted(os.environb.items())).encode())"
    text = sandbox.run(["python3", "-c", program], env=odd).stdout
    for name, value in odd.items():
        assert repr((name.encode(), value.encode())) in text


@pytest.mark.parametrize(
    "argv",
    [["true", "x" * 200_000], ["true", *["y" * 1000] * 3000]],
    ids=["one argument", "all together"],
)
def test_arguments_beyond_the_kernels_limit_do_not_start(
    argv: list[str], sandbox: shoal.Sandbox
) -> None:
    result = sandbox.run(argv)
    assert (result.outcome, result.errno, result.stage) == ("not_started", 7, "exec")
    assert sandbox.run("echo on").stdout == "on\n"


@pytest.mark.parametrize("size", [5_000_000, 20_000_000])
def test_arguments_beyond_all_measure_are_refused(size: int, sandbox: shoal.Sandbox) -> None:
    from shoal import errors

    with pytest.raises(errors.InvalidArgumentError):
        sandbox.run(["true", "x" * size])
    assert sandbox.run("echo on").stdout == "on\n"


@pytest.mark.parametrize(
    ("options", "stage", "errno"),
    [
        ({"cwd": "/no/such"}, "cwd", 2),
        ({"cwd": "/etc/passwd"}, "cwd", 20),
        ({"cwd": "/" + "x" * 5000}, "cwd", 36),
        ({"user": "nobody-of-this-name"}, "user", 2),
        ({"user": "70000"}, "user", 22),
        ({"user": "-1"}, "user", 2),
        ({"user": "root:nogroup-of-this-name"}, "user", 2),
    ],
)
def test_a_directory_or_user_that_does_not_exist_is_told(
    options: dict[str, Any], stage: str, errno: int, sandbox: shoal.Sandbox
) -> None:
    result = sandbox.run("true", **options)
    assert (result.outcome, result.stage, result.errno) == ("not_started", stage, errno)


def test_any_bytes_come_through_on_both_streams(sandbox: shoal.Sandbox) -> None:
    # Halves of characters, at the start, in the middle of writes and at the end; and all 256 bytes.
    program = r"""
import os
halves = [b"\xe2\x82", b"\xac", b"\xff\xfe\x00", b"\xf0\x9f", bytes(range(256)), b"\r\n\x1b[2J", b"\xe2"]
for n in range(300):
    for piece in halves:
        os.write(1, piece)
        os.write(2, piece[::-1])
"""
    halves = [
        *(b"\xe2\x82", b"\xac", b"\xff\xfe\x00", b"\xf0\x9f"),
        *(bytes(range(256)), b"\r\n\x1b[2J", b"\xe2"),
    ]
    result = sandbox.run(["python3", "-c", program], check=True)
    assert result.stdout_bytes == b"".join(halves) * 300
    assert result.stderr_bytes == b"".join(half[::-1] for half in halves) * 300
    assert isinstance(result.stdout, str)


def test_stdin_that_was_closed_is_an_error_and_no_hang(sandbox: shoal.Sandbox) -> None:
    from shoal import errors

    process = sandbox.exec("exec 0<&-; echo closed; sleep 60", stdin=True)
    assert process.stdout.readline() == b"closed\n"
    with pytest.raises(errors.ConflictError):
        process.stdin.write(b"x" * 1_000_000)
    process.kill()
    process.wait(timeout=DEADLINE)
    with pytest.raises(errors.ShoalError):
        process.stdin.write(b"x")
    without = sandbox.exec("sleep 60")
    with pytest.raises(errors.InvalidArgumentError):
        without.stdin.write(b"x")


# ---- more than anybody reads

FLOOD = "head -c 1G /dev/zero & head -c 1G /dev/zero >&2 & wait; echo done > /done"


def _rss_mib(node: PrivateNode) -> float:
    """What the daemons and the guest agents take; not what is in the sandboxes."""
    total = 0
    for pid in node.pids():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if Path(f"/proc/{pid}/comm").read_text().strip().startswith("shoal-"):
                status = Path(f"/proc/{pid}/status").read_text()
                total += int(status.split("VmRSS:")[1].split()[0])
    return total / 1024


@contextlib.contextmanager
def _bounded(node: PrivateNode, sandbox: shoal.Sandbox, mib: float = 48) -> Iterator[None]:
    """The daemons stay small and others are served meanwhile."""
    before, most, slowest = _rss_mib(node), 0.0, 0.0
    over = threading.Event()

    def look() -> None:
        nonlocal most, slowest
        while not over.is_set():
            start = time.monotonic()
            assert sandbox.run("echo on").stdout == "on\n"
            slowest = max(slowest, time.monotonic() - start)
            most = max(most, _rss_mib(node))
            over.wait(0.05)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join(DEADLINE)
    assert most - before < mib, f"{before} MiB before, {most} MiB at the most"
    assert 0 < slowest < DEADLINE / 2


def test_output_without_a_reader_waits(node: PrivateNode, sandbox: shoal.Sandbox) -> None:
    with (
        _bounded(node, sandbox),
        _stream(node, sandbox.id, "POST", "execs", {"argv": ["sh", "-c", FLOOD]}) as response,
    ):
        assert response.status == 200
        time.sleep(2)
        assert not sandbox.files.exists("/done")


def test_output_with_a_slow_reader_comes_whole(node: PrivateNode, sandbox: shoal.Sandbox) -> None:
    with (
        _bounded(node, sandbox),
        _stream(node, sandbox.id, "POST", "execs", {"argv": ["sh", "-c", FLOOD]}) as response,
    ):
        for _ in range(40):
            assert response.read(1 << 18)
            time.sleep(0.02)
        assert not sandbox.files.exists("/done")
        left = (2 << 30) - (40 << 18)
        while data := response.read(1 << 20):
            left -= len(data)
        assert left <= 0, f"{left} bytes are missing"
    assert sandbox.files.exists("/done")


def test_output_whose_reader_vanished_is_kept_for_the_next(
    node: PrivateNode, sandbox: shoal.Sandbox
) -> None:
    asked = {"argv": ["sh", "-c", FLOOD], "exec_id": "flood"}
    with _bounded(node, sandbox):
        with _stream(node, sandbox.id, "POST", "execs", asked) as response:
            assert len(response.read(5 << 20)) == 5 << 20
        time.sleep(1)
        assert not sandbox.files.exists("/done")
        with _stream(node, sandbox.id, "GET", "execs/flood/stream?stdout_offset=0") as response:
            assert response.read(1 << 20)
        sandbox.attach("flood").kill()


def test_detached_output_is_dropped_and_the_command_ends(
    node: PrivateNode, sandbox: shoal.Sandbox
) -> None:
    asked = {"argv": ["sh", "-c", FLOOD], "exec_id": "flood", "detached": True}
    with _bounded(node, sandbox):
        with _stream(node, sandbox.id, "POST", "execs", asked) as response:
            assert (response.status, json.loads(response.read())["exec_id"]) == (201, "flood")
        process = sandbox.attach("flood")
        process.wait(timeout=60)
        assert sandbox.files.exists("/done")


# ---- paths

LONG = "/" + "/".join(["x" * 250] * 16) + "/" + "y" * 79  # 4,096 bytes
assert len(LONG) == 4096

PREPARE = r"""
mkdir -p /t/dir/sub && cd /t && mkfifo fifo && echo x > file
ln -s loop loop && ln -s a b && ln -s b a && ln -s /nowhere dangling
mknod null c 1 3 2>/dev/null || ln -s /dev/null null
python3 -c "
import socket; socket.socket(socket.AF_UNIX).bind('/t/sock')
open(b'/t/\xff', 'w').close()"; echo x > /t/other"""

ODD = {
    "directory": "/t/dir",
    "fifo": "/t/fifo",
    "socket": "/t/sock",
    "device": "/dev/zero",
    "full device": "/dev/full",
    "terminal": "/dev/ptmx",
    "link loop": "/t/loop",
    "link ring": "/t/a",
    "through a loop": "/t/loop/x",
    "through a file": "/t/file/x",
    "dangling": "/t/dangling",
    "root": "/",
    "root's parent": "/..",
    "4096 bytes": LONG,
    "long name": "/" + "n" * 256,
    "not UTF-8": "/t/\udcff",
    "magic link": "/proc/1/root/etc/passwd",
    "empty": "",
    "relative": "t/file",
    "NUL": "/t/fi\0le",
}


async def _of(call: Awaitable[object]) -> str:
    """How a call ends: `ok`, or the name of its error; never later than the deadline."""
    from shoal import errors

    try:
        async with asyncio.timeout(DEADLINE):
            await call
    except errors.ShoalError as error:
        return type(error).__name__
    return "ok"


REFUSED = {
    "fifo": {"read", "write", "list", "download", "make_dir"},
    "socket": {"read", "write", "list", "download", "make_dir"},
    "device": {"read", "write", "list", "download", "make_dir", "upload"},
    "full device": {"read", "write", "list", "download", "make_dir", "upload"},
    "terminal": {"read", "write", "list", "download", "make_dir", "upload"},
    "directory": {"read", "write", "make_dir", "upload", "rename onto", "remove"},
    "root": {"read", "write", "make_dir", "rename", "rename onto", "remove"},
    "root's parent": {"read", "write", "make_dir", "rename", "rename onto", "remove"},
    "link loop": {"read", "write", "list", "download", "make_dir"},
    "link ring": {"read", "write", "list", "download", "make_dir"},
    "dangling": {"read", "list", "download", "make_dir"},
    "4096 bytes": {"read", "stat", "list", "download", "rename"},
}
"""What is an error; of the other odd paths everything is."""
OF_THE_NODE = {"device", "full device", "terminal", "root"}
"""Not to be removed in earnest."""


async def test_odd_paths_are_answered_in_time(node: PrivateNode, tmp_path: Path) -> None:
    import shoal

    here = tmp_path / "local"
    here.write_text("x")
    outcomes: dict[str, dict[str, str]] = {}
    async with await shoal.AsyncSandbox.create() as sandbox:
        files = sandbox.files
        operations: dict[str, Callable[[str], Awaitable[object]]] = {
            "read": lambda path: files.read(path, length=10),
            "stat": files.stat,
            "list": files.list,
            "download": lambda path: files.download(path, tmp_path / "down"),
            "make_dir": lambda path: files.make_dir(path, parents=False),
            "write": lambda path: files.write(path, "x", parents=False),
            "rename": lambda path: files.rename(path, "/t/moved"),
            "upload": lambda path: files.upload(here, path),
            "rename onto": lambda path: files.rename("/t/other", path),
            "remove": files.remove,
        }
        for kind, path in ODD.items():
            for name, operation in operations.items():
                if name in ("read", "rename", "upload", "rename onto", "remove"):
                    made = await sandbox.run(f"rm -rf /t /xxx*; {PREPARE}")
                    assert made.ok, made.stderr
                if kind == "root" and name == "download":
                    continue  # all of /proc would come with it
                if name != "remove" or kind not in OF_THE_NODE - {"root"}:
                    outcomes.setdefault(kind, {})[name] = await _of(operation(path))
        assert (await sandbox.run("echo on")).stdout == "on\n"
    typed = {"ok", "PathError", "PathNotFoundError", "InvalidArgumentError"}
    for kind, of_kind in outcomes.items():
        assert set(of_kind.values()) <= typed, (kind, of_kind)
        refused = {name for name, outcome in of_kind.items() if outcome != "ok"}
        expected = REFUSED.get(kind, set(of_kind)) & set(of_kind)
        if kind in ("empty", "NUL", "not UTF-8"):
            expected -= {"upload"}  # the name travels in the archive
            refused -= {"upload"}
        assert refused >= expected, (kind, of_kind)


def test_odd_paths_are_answered_in_time_to_those_who_speak_http(
    node: PrivateNode, sandbox: shoal.Sandbox
) -> None:
    made = sandbox.run(PREPARE)
    assert made.ok, made.stderr
    token = node.token(sandbox.id)
    for kind, path in ODD.items():
        quoted = urllib.parse.quote(os.fsencode(path), safe="")
        for method, tail in (
            ("POST", "files/attributes?mode=0644&path="),
            ("GET", "files/content?length=5&path="),
            ("DELETE", "files?path=/t/none/"),
        ):
            if kind in OF_THE_NODE and "attributes" in tail:
                continue
            start = time.monotonic()
            answer = node.request(
                method, f"/v1/sandboxes/{sandbox.id}/{tail}{quoted}", token=token, timeout=DEADLINE
            )
            assert answer.status < 500, (kind, tail, answer)
            assert time.monotonic() - start < DEADLINE, (kind, tail)
        with _stream(node, sandbox.id, "GET", f"files/watch?path={quoted}") as response:
            said = json.loads(response.readline())
            assert said == {"type": "ready"} or 400 <= said["status"] < 500, (kind, said)
    content = f"/v1/sandboxes/{sandbox.id}/files/content?path=/t/%FF"
    assert node.request("PUT", content, body=b"raw", token=token).status == 200
    assert node.request("GET", content, token=token).body == b"raw"
    assert sandbox.run("echo on").stdout == "on\n"


def test_changes_are_told_through_the_front_door(node: PrivateNode, sandbox: shoal.Sandbox) -> None:
    sandbox.files.make_dir("/w")
    with _stream(node, sandbox.id, "GET", "files/watch?path=/w&recursive=true") as response:
        assert json.loads(response.readline()) == {"type": "ready"}
        sandbox.run("mkdir /w/d; echo x > /w/d/f; mv /w/d/f /w/g; chmod 600 /w/g; rm /w/g")
        told: list[dict[str, Any]] = []
        while not told or told[-1]["type"] != "remove":
            told.append(json.loads(response.readline()))
    kinds = {(line["type"], line["path"]) for line in told}
    assert kinds >= {("create", "/w/d"), ("chmod", "/w/g"), ("remove", "/w/g")}, told
    assert {line["directory"] for line in told if line["path"] == "/w/d"} == {True}


# ---- clients and sandboxes that go away

BODY = json.dumps({"argv": ["sh", "-c", "head -c 30M /dev/zero"], "exec_id": "left"}).encode()


def _half_requests(sandbox: str, token: str) -> Iterator[tuple[bytes, int]]:
    """What a client sends, and how much of an answer it reads, before it leaves."""

    def head(line: str, length: int) -> bytes:
        fields = f"Host: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {length}\r\n"
        method, tail = line.split()
        return f"{method} /v1/sandboxes/{sandbox}/{tail} HTTP/1.1\r\n{fields}\r\n".encode()

    start = head("POST execs", len(BODY))
    for sent in (b"", start[:20], start, start + BODY[:5]):
        yield sent, 0
    for read in (0, 10, 300, 1_000_000):
        yield start + BODY, read
        yield head("POST execs?ack=client", len(BODY)) + BODY, read
        yield head("GET execs/left/stream", 0), read
    for read in (0, 300, 1_000_000):
        yield head("GET files/archive?path=/usr/lib", 0), read
        yield head("GET files/content?path=/big", 0), read
    for read in (0, 100):
        yield head("GET files/watch?path=/usr", 0), read
    for size in (0, 1000, 3_000_000):
        yield head("PUT files/content?path=/half", 5_000_000) + b"x" * size, 0
        yield head("PUT files/archive?path=/halves", 5_000_000) + b"\0" * size, 0
        yield head("POST execs/left/stdin", 5_000_000) + b"x" * size, 0


def test_a_client_may_leave_at_any_moment(node: PrivateNode) -> None:
    import shoal

    with node.unchanged(), shoal.Sandbox.create() as sandbox:
        sandbox.run("head -c 20M /dev/zero > /big", check=True)
        for sent, read in _half_requests(sandbox.id, node.token(sandbox.id)):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(DEADLINE)
                client.connect(str(node.socket))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(sent)
                    left = read
                    while left > 0 and (data := client.recv(min(left, 1 << 16))):
                        left -= len(data)
            assert sandbox.run("echo on").stdout == "on\n"
        assert not sandbox.files.exists("/half")
        assert sandbox.run("ls -A / | grep -c shoal- || true").stdout == "0\n"
        assert len(sandbox.attach("left").stdout.read(1000)) == 1000


async def test_execs_of_a_sandbox_that_dies_end_with_a_reason(node: PrivateNode) -> None:
    import shoal
    from shoal import errors

    async def ends(sandbox: shoal.AsyncSandbox, command: str) -> None:
        while True:
            await sandbox.run(command)

    for _ in range(3):
        sandbox = await shoal.AsyncSandbox.create()
        running = [
            *(asyncio.create_task(ends(sandbox, "sleep 60")) for _ in range(5)),
            *(asyncio.create_task(ends(sandbox, "yes")) for _ in range(3)),
            *(asyncio.create_task(ends(sandbox, "true")) for _ in range(10)),
        ]
        await asyncio.sleep(0.3)
        async with asyncio.timeout(DEADLINE):
            await sandbox.terminate()
            reasons = await asyncio.gather(*running, return_exceptions=True)
        for reason in reasons:
            assert isinstance(reason, errors.SandboxGoneError), repr(reason)
