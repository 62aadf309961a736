"""Ports: what strangers, hostile servers and hostile pages try on the way into a sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import struct
import threading
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.node import PrivateNode

if TYPE_CHECKING:
    import shoal

MIB = 1 << 20

HOSTILE = r'''
"""A server that answers as it must not: the path says how. It writes down what it was sent."""
import pathlib, socket, threading

OK = b"HTTP/1.1 200 OK\r\n"
NEXT = OK + b"Content-Length: 6\r\n\r\nforged"
ANSWERS = {
    "length-twice": OK + b"Content-Length: 4, 4\r\n\r\ngood" + NEXT,
    "length-and-chunks": OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n" + NEXT,
    "length-hidden": OK + b"Connection: content-length\r\nContent-Length: 4\r\n\r\ngood" + NEXT,
    "early-answers": b"HTTP/1.1 103 Early\r\n\r\n" * 50 + OK + b"Content-Length: 4\r\n\r\ngood" + NEXT,
    "more-than-said": OK + b"Content-Length: 4\r\n\r\ngood" + NEXT,
    "no-body-with-body": b"HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\ngood" + NEXT,
    "upgrade-unasked": b"HTTP/1.1 101 Go on\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n" + NEXT,
    "folded": OK + b"A: 1\r\n Content-Length: 9\r\nContent-Length: 4\r\n\r\ngood" + NEXT,
    "old": b"<html>good",
}
FLOODS = {"header": (OK, b"A: " + b"a" * 4096 + b"\r\n"), "line": (OK + b"A: ", b"a" * 65536), "body": (OK + b"\r\n", bytes(65536))}

def serve(connection):
    with connection:
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(65536)
            if not data:
                return
            head += data
        with SEEN.open("ab") as seen:
            seen.write(head)
        path = head.split()[1].decode().strip("/")
        if path in FLOODS:
            connection.sendall(FLOODS[path][0])
            while True:
                connection.sendall(FLOODS[path][1])
        connection.sendall(ANSWERS.get(path, OK + b"Content-Length: 4\r\n\r\nfine"))

def run(connection):
    try:
        serve(connection)
    except OSError:
        pass

SEEN = pathlib.Path("/seen")
listener = socket.create_server(("127.0.0.1", 8000), backlog=1024)
threading.stack_size(1 << 16)
while True:
    threading.Thread(target=run, args=(listener.accept()[0],), daemon=True).start()
'''


class Attacker:
    """Raw bytes to the node's TCP port."""

    def __init__(self, sandbox: shoal.Sandbox) -> None:
        self.url = urllib.parse.urlsplit(sandbox.url(8000))
        self.token = sandbox.port_token(8000)

    def connect(self) -> socket.socket:
        """A connection that has said nothing."""
        assert self.url.port
        return socket.create_connection(("127.0.0.1", self.url.port), timeout=20)

    def head(self, path: str, more: str = "", *, method: str = "GET") -> bytes:
        """A request that is let in."""
        lines = f"Host: {self.url.netloc}\r\nX-Shoal-Token: {self.token}\r\n{more}"
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()

    def ask(self, *heads: bytes) -> bytes:
        """Everything that is answered to these requests, the last of which closes the connection."""
        with self.connect() as connection:
            connection.sendall(b"".join(heads))
            got = b""
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(1 << 16):
                    got += data
            return got

    def last(self, path: str = "/") -> bytes:
        """A request after which the connection is closed."""
        return self.head(path, "Connection: close\r\n")


@pytest.fixture
def hostile(sandbox: shoal.Sandbox) -> shoal.Sandbox:
    """A sandbox with the hostile server on port 8000."""
    sandbox.files.write("/server.py", HOSTILE)
    sandbox.exec(["python3", "/server.py"], detached=True)
    sandbox.wait_for_port(8000)
    return sandbox


def _resident(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def _door(node: PrivateNode) -> int:
    pid = node.part("front door")
    assert pid is not None
    return pid


def test_net_07_no_port_leads_to_the_guest_agent(sandbox: shoal.Sandbox) -> None:
    import shoal

    for port in (1, 22, 80, 8000, 65535):
        with pytest.raises(shoal.errors.DeadlineExceededError):
            sandbox.wait_for_port(port, timeout=0)
    listeners = sandbox.run(["sh", "-c", "cat /proc/net/tcp /proc/net/tcp6"]).stdout
    assert not [line for line in listeners.splitlines() if line.split()[3] == "0A"]


def test_cp_04_no_token_reaches_the_server_or_a_log(
    hostile: shoal.Sandbox, node: PrivateNode
) -> None:
    attacker = Attacker(hostile)
    secret = node.token(hostile.id)
    cookie = f"Cookie: a=1; shoal_port={attacker.token}\r\n"
    for more in (cookie, f"Authorization: Bearer {secret}\r\n", "Connection: close\r\n"):
        request = attacker.head("/", more + ("" if "close" in more else "Connection: close\r\n"))
        assert attacker.ask(request).startswith(b"HTTP/1.1 200 "), more
    seen = bytes(hostile.files.read("/seen")).decode()
    assert seen.count("GET / ") == 3
    assert "a=1" in seen
    for told in (seen, node.log):
        assert secret not in told
        assert attacker.token.partition(".")[2] not in told


def test_cp_04_a_token_opens_its_port_of_its_sandbox_only(hostile: shoal.Sandbox) -> None:
    import shoal

    attacker = Attacker(hostile)
    with shoal.Sandbox.create() as other:
        for host in (other.url(8000), hostile.url(8001)):
            netloc = urllib.parse.urlsplit(host).netloc
            for secret in (
                f"X-Shoal-Token: {attacker.token}",
                f"Cookie: shoal_port={attacker.token}",
            ):
                request = (
                    f"GET / HTTP/1.1\r\nHost: {netloc}\r\n{secret}\r\nConnection: close\r\n\r\n"
                )
                assert attacker.ask(request.encode()).startswith(b"HTTP/1.1 401 ")
                # On a connection, and to a name, that were good for the request before.
                absolute = request.replace("GET /", f"GET http://{netloc}/")
                absolute = absolute.replace(f"Host: {netloc}", f"Host: {attacker.url.netloc}")
                answers = attacker.ask(attacker.head("/"), absolute.encode())
                assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"401"]


def test_cp_06_what_two_readers_could_understand_differently_is_refused(
    hostile: shoal.Sandbox,
) -> None:
    attacker = Attacker(hostile)
    body = "5\r\nhello\r\n0\r\n\r\n"
    for more in (
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding:\x0bchunked\r\n",
        "Content-Length: 5, 5\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "X: 1\r\n Content-Length: 5\r\n",
        "X: a\0b\r\n",
        "Host: x\r\n",
    ):
        request = attacker.head("/", more, method="POST") + body.encode()
        answer = attacker.ask(request, attacker.last("/never"))
        assert re.findall(rb"HTTP/1.1 (\d+)", answer)[0] == b"400", more
    # A length beside chunks is nobody's, and such a connection serves no second request.
    both = attacker.head("/", "Transfer-Encoding: chunked\r\nContent-Length: 1\r\n", method="POST")
    answer = attacker.ask(both + body.encode(), attacker.last("/never"))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200"]


def test_cp_07_no_answer_of_a_server_becomes_two(hostile: shoal.Sandbox) -> None:
    attacker = Attacker(hostile)
    for path in (
        *("length-twice", "length-and-chunks", "length-hidden", "early-answers", "more-than-said"),
        *("no-body-with-body", "upgrade-unasked", "folded", "old", "header", "line"),
    ):
        answer = attacker.ask(attacker.head(f"/{path}"), attacker.last())
        statuses = re.findall(rb"HTTP/1.1 (\d+)", answer)
        assert len(statuses) == 2, (path, answer[:500])
        assert statuses[0] in (b"200", b"204", b"502"), path
        assert statuses[1] == b"200", path
        assert answer.endswith(b"fine"), path
        assert b"forged" not in answer, path


def test_rs_09_readers_that_stand_still_harm_neither_the_sandbox_nor_the_node(
    hostile: shoal.Sandbox, node: PrivateNode
) -> None:
    attacker = Attacker(hostile)
    door = _door(node)
    before = _resident(door)
    count = 500
    with contextlib.ExitStack() as open_:
        for _ in range(count):
            reader = open_.enter_context(attacker.connect())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(attacker.head("/body"))
            assert reader.recv(17) == b"HTTP/1.1 200 OK\r\n"
        assert hostile.run(["echo", "alive"], timeout=30).stdout == "alive\n"
        assert _resident(door) - before < count * MIB
    assert hostile.run(["echo", "alive"], timeout=30).stdout == "alive\n"


def test_cl_02_clients_that_vanish_at_any_point_leave_no_descriptor(
    hostile: shoal.Sandbox, node: PrivateNode
) -> None:
    attacker = Attacker(hostile)
    door = Path(f"/proc/{_door(node)}/fd")
    data_plane = f"Host: x\r\nAuthorization: Bearer {node.token(hostile.id)}\r\n"
    top = f"/v1/sandboxes/{hostile.id}"
    upgrade = "Connection: upgrade\r\nUpgrade: "
    requests: list[bytes | str] = [
        b"GET / HT",
        attacker.head("/body"),
        attacker.head("/", "Content-Length: 100000\r\n", method="POST") + b"abc",
        attacker.head("/", f"{upgrade}websocket\r\n"),
        f"POST {top}/ports/8000/connect HTTP/1.1\r\n{data_plane}{upgrade}tcp\r\n\r\nGET /body X\r\n\r\n",
        f"GET {top}/ports/9/wait?timeout=100 HTTP/1.1\r\n{data_plane}\r\n",
        f"GET {top}/files/watch?path=/ HTTP/1.1\r\n{data_plane}\r\n",
    ]
    assert hostile.run(["true"]).ok
    before = len(os.listdir(door))

    def vanish() -> None:
        for request in requests * 10:
            with attacker.connect() as connection:
                connection.sendall(request if isinstance(request, bytes) else request.encode())
                time.sleep(random.choice((0, 0.002, 0.02)))
                if random.random() < 0.5:
                    reset = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)

    threads = [threading.Thread(target=vanish) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    end = time.monotonic() + 20
    while (now := len(os.listdir(door))) > before:
        assert time.monotonic() < end, f"{now} descriptors, {before} before"
        time.sleep(0.1)
    assert attacker.ask(attacker.last()).endswith(b"fine")


def test_cp_01_attributes_change_nothing_outside_the_sandbox(sandbox: shoal.Sandbox) -> None:
    import shoal

    sandbox.run(["ln", "-s", "/proc/1/root/etc/passwd", "/link"], check=True)
    sandbox.run(["ln", "-s", "/proc/self/exe", "/exe"], check=True)
    paths = [
        "/link",
        "/exe",
        "/proc/1/exe",
        "/proc/self/fd/3",
        "/proc/1/root",
        "/dev/null",
        "/proc",
    ]
    for path in paths:
        with pytest.raises(shoal.errors.PathError):
            sandbox.files.chmod(path, 0o777)
        with pytest.raises(shoal.errors.PathError):
            sandbox.files.chown(path, "1000")
    sandbox.files.chmod("/etc/passwd", 0o777)
    with shoal.Sandbox.create() as other:
        assert other.run(["stat", "-c", "%a", "/etc/passwd"]).stdout == "644\n"


def test_cp_05_a_page_of_another_origin_is_refused(hostile: shoal.Sandbox) -> None:
    attacker = Attacker(hostile)
    cookie = f"Cookie: shoal_port={attacker.token}\r\nConnection: close\r\n"
    host = f"Host: {attacker.url.netloc}\r\n"
    for origin, status in (
        ("http://evil.example", b"403"),
        (f"http://{attacker.url.netloc}", b"200"),
    ):
        request = f"POST / HTTP/1.1\r\n{host}{cookie}Origin: {origin}\r\nContent-Length: 0\r\n\r\n"
        assert attacker.ask(request.encode()).split()[1] == status
    for path in ("/v1/node", f"/v1/sandboxes/{hostile.id}/execs"):
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: http://{attacker.url.netloc}\r\n\r\n"
        answer = attacker.ask(request.encode())
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "forbidden"
