"""Servers in a sandbox, reached from outside: over HTTP by URL or headers, and raw through a local port."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

import shoal
from shoal import Ready, Sandbox, errors
from tests.support.node import PrivateNode

APP = r'''
"""The server in the sandbox: python3 app.py HOST PORT."""
import base64, hashlib, http.server, json, os, socket, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body, kind="text/plain"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def chunked(self, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(hashlib.sha256(body).hexdigest().encode())

    def do_GET(self):
        getattr(self, "get_" + self.path.strip("/").partition("?")[0], self.get_hello)()

    def get_hello(self):
        self.answer(self.path.encode())

    def get_headers(self):
        self.answer(json.dumps(self.headers.items()).encode(), "application/json")

    def get_events(self):
        self.chunked("text/event-stream")
        for number in range(3):
            while not os.path.exists(f"/go-{number}"):
                time.sleep(0.01)
            self.chunk(b"data: %d\n\n" % number)
        self.chunk(b"")

    def get_endless(self):
        self.chunked("application/octet-stream")
        try:
            while True:
                self.chunk(bytes(1 << 16))
        except OSError:
            open("/gone", "w").close()

    def get_ws(self):
        magic = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(magic.encode()).digest()).decode())
        self.end_headers()
        self.wfile.flush()
        while head := self.rfile.read(2):
            length = head[1] & 127
            if length == 126:
                length = int.from_bytes(self.rfile.read(2), "big")
            mask = self.rfile.read(4)
            data = bytes(byte ^ mask[i % 4] for i, byte in enumerate(self.rfile.read(length)))
            if head[0] & 15 == 8:
                self.connection.sendall(b"\x88\x00")
                break
            size = bytes([length]) if length < 126 else b"\x7e" + length.to_bytes(2, "big")
            self.connection.sendall(bytes([head[0]]) + size + data.upper())
        self.close_connection = True

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET

    def handle_error(self, *args):
        pass

Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
'''

ECHO = r"""
import hashlib, socket, threading

def serve(connection):
    digest = hashlib.sha256()
    with connection:
        while data := connection.recv(1 << 16):
            digest.update(data)
            connection.sendall(data)
        connection.sendall(digest.digest())  # after the other side has ended its half

listener = socket.create_server(("127.0.0.1", 7000), backlog=256)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


@dataclass(frozen=True)
class Reply:
    """An HTTP answer, whole."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def code(self) -> str:
        """The code of a problem."""
        return str(json.loads(self.body)["code"])


def _connection(sb: Sandbox) -> http.client.HTTPConnection:
    """To the node's TCP port. Names below localhost need not resolve."""
    port = urllib.parse.urlsplit(sb.url(1)).port
    return http.client.HTTPConnection("127.0.0.1", port, timeout=30)


def _ask(
    sb: Sandbox,
    path: str = "/",
    *,
    headers: Mapping[str, str],
    method: str = "GET",
    body: bytes | None = None,
) -> Reply:
    with contextlib.closing(_connection(sb)) as connection:
        connection.request(method, path, body=body, headers=dict(headers))
        answer = connection.getresponse()
        return Reply(answer.status, answer.headers, answer.read())


def _by_host(sb: Sandbox, port: int, token: str | None = None) -> dict[str, str]:
    """Headers that route by name, as a browser's do."""
    named = {"Host": urllib.parse.urlsplit(sb.url(port)).netloc}
    return named if token is None else {**named, "X-Shoal-Token": token}


def _serve(sb: Sandbox, port: int, host: str = "127.0.0.1") -> None:
    sb.files.write("/app.py", APP)
    sb.exec(["python3", "/app.py", host, str(port)], detached=True)
    sb.wait_for_port(port)


@pytest.fixture(scope="module")
def served(node: PrivateNode) -> Iterator[Sandbox]:
    """A sandbox with the server on 8000 and the echo on 7000."""
    with Sandbox.create(timeout=900) as sb:
        _serve(sb, 8000)
        sb.exec(["python3", "-c", ECHO], detached=True)
        sb.wait_for_port(7000)
        yield sb


def test_a_plain_web_server_is_reached_by_headers_and_by_name(sandbox: Sandbox) -> None:
    sandbox.files.write("/www/a.txt", "hello\n")
    sandbox.exec(["python3", "-m", "http.server", "8080", "-d", "/www"], detached=True)
    sandbox.wait_for_port(8080)
    by_headers = _ask(sandbox, "/a.txt", headers=sandbox.port_headers(8080))
    assert (by_headers.status, by_headers.body) == (200, b"hello\n")
    by_name = _ask(sandbox, "/a.txt", headers=_by_host(sandbox, 8080, sandbox.port_token(8080)))
    assert (by_name.status, by_name.body) == (200, b"hello\n")
    assert _ask(sandbox, "/none", headers=sandbox.port_headers(8080)).status == 404


def test_a_body_arrives_whole_and_one_connection_serves_many_requests(served: Sandbox) -> None:
    body = os.urandom(10 << 20)
    headers = served.port_headers(8000)
    with contextlib.closing(_connection(served)) as connection:
        for _ in range(3):
            connection.request("POST", "/", body=body, headers=headers)
            assert connection.getresponse().read() == hashlib.sha256(body).hexdigest().encode()
        connection.request("GET", "/a?b=%2F&c", headers=headers)
        assert connection.getresponse().read() == b"/a?b=%2F&c"


def test_events_arrive_one_by_one(served: Sandbox) -> None:
    with contextlib.closing(_connection(served)) as connection:
        connection.request("GET", "/events", headers=served.port_headers(8000))
        answer = connection.getresponse()
        assert answer.headers["Content-Type"] == "text/event-stream"
        for number in range(3):
            served.files.write(f"/go-{number}", "")  # the server writes no event before
            assert answer.readline() == b"data: %d\n" % number
            assert answer.readline() == b"\n"
        assert answer.read() == b""


class WebSocket:
    """As much of RFC 6455 as an echo needs."""

    def __init__(self, sb: Sandbox, headers: Mapping[str, str], path: str = "/ws") -> None:
        port = urllib.parse.urlsplit(sb.url(1)).port
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.file = self.socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        lines = {
            "Host": f"127.0.0.1:{port}",
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": key,
            **headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.socket.sendall(f"GET {path} HTTP/1.1\r\n{head}\r\n".encode())
        self.status = int(self.file.readline().split()[1])
        self.headers = http.client.parse_headers(self.file)
        magic = (key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()
        self.accept = base64.b64encode(hashlib.sha1(magic).digest()).decode()

    def send(self, data: bytes, opcode: int = 1) -> None:
        """One masked frame."""
        mask = os.urandom(4)
        size = (
            bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        )
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
        self.socket.sendall(bytes([0x80 | opcode]) + size + mask + masked)

    def receive(self) -> tuple[int, bytes]:
        """One frame: its opcode and what it holds."""
        first, length = self.file.read(2)
        if length == 126:
            length = int.from_bytes(self.file.read(2), "big")
        return first & 15, self.file.read(length)

    def close(self) -> None:
        """Drop the connection."""
        self.file.close()
        self.socket.close()


def test_a_websocket_carries_frames_both_ways(served: Sandbox) -> None:
    for headers in (
        served.port_headers(8000),
        _by_host(served, 8000, served.port_token(8000)),
    ):
        with contextlib.closing(WebSocket(served, headers)) as ws:
            assert ws.status == 101
            assert ws.headers["Sec-WebSocket-Accept"] == ws.accept
            for text in (b"hello", b"a" * 125, b"b" * 60_000, b""):
                ws.send(text)
                assert ws.receive() == (1, text.upper())
            ws.send(b"", opcode=8)
            assert ws.receive() == (8, b"")
            assert ws.file.read(1) == b""


def test_a_websocket_without_a_token_is_refused(served: Sandbox) -> None:
    headers = {name: v for name, v in served.port_headers(8000).items() if "Token" not in name}
    with contextlib.closing(WebSocket(served, headers)) as ws:
        assert ws.status == 401


def test_a_forward_carries_ten_megabytes_both_ways_and_half_close(served: Sandbox) -> None:
    data = os.urandom(10_000_000)
    with served.forward(7000) as forward:
        with socket.create_connection(("127.0.0.1", forward.port), timeout=60) as here:

            def send() -> None:
                here.sendall(data)
                here.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            received = bytearray()
            while piece := here.recv(1 << 16):
                received += piece
            sender.join()
        assert received[: len(data)] == data
        assert received[len(data) :] == hashlib.sha256(data).digest()
        assert forward.error is None


def test_a_forward_serves_http_as_well(served: Sandbox) -> None:
    with (
        served.forward(8000) as forward,
        contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", forward.port, timeout=30)
        ) as connection,
    ):
        connection.request("GET", "/x")
        assert connection.getresponse().read() == b"/x"


def test_waiting_for_a_port_before_after_and_never(sandbox: Sandbox) -> None:
    with pytest.raises(errors.DeadlineExceededError):
        sandbox.wait_for_port(8000, timeout=0.3)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(sandbox.wait_for_port, 8000, timeout=30)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        _serve(sandbox, 8000)
        waiting.result(30)
    sandbox.wait_for_port(8000, timeout=1)


def test_waiting_for_a_port_of_a_sandbox_that_ends_says_so(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(sandbox.wait_for_port, 8000, timeout=30)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        sandbox.terminate()
        with pytest.raises((errors.SandboxGoneError, errors.SandboxLostError)):
            waiting.result(20)


def _token(sb: Sandbox, key: str, port: int, expires: int, sandbox_id: str | None = None) -> str:
    message = f"port:{sandbox_id or sb.id}:{port}:{expires}"
    return f"{expires}.{hmac.new(key.encode(), message.encode(), hashlib.sha256).hexdigest()}"


def test_only_the_right_token_opens_a_port(served: Sandbox, node: PrivateNode) -> None:
    key, soon = node.token(served.id), int(time.time()) + 600
    good = _token(served, key, 8000, soon)
    route = {"X-Shoal-Sandbox": served.id, "X-Shoal-Port": "8000"}
    assert _ask(served, headers={**route, "X-Shoal-Token": good}).status == 200
    assert _ask(served, headers={**route, "X-Shoal-Token": key}).status == 200
    with Sandbox.create() as other:
        wrong = {
            "none": None,
            "empty": "",
            "of another port": _token(served, key, 8001, soon),
            "of another sandbox": other.port_token(8000),
            "of another sandbox's key": _token(served, node.token(other.id), 8000, soon),
            "for another sandbox": _token(served, key, 8000, soon, other.id),
            "expired": _token(served, key, 8000, int(time.time()) - 1),
            "with a later end": good.replace(str(soon), str(soon + 1)),
            "cut": good[:-1],
            "longer": good + "0",
            "in capitals": good.upper(),
            "without an end": good.partition(".")[2],
            "nonsense": "x.y",
            "huge": "9" * 4000,
            "another key": key[:-1] + ("a" if key[-1] != "a" else "b"),
        }
        for name, token in wrong.items():
            sent = {} if token is None else {"X-Shoal-Token": token}
            for headers in ({**route, **sent}, {**_by_host(served, 8000), **sent}):
                reply = _ask(served, headers=headers)
                assert (name, reply.status) == (name, 401)
                assert reply.code == "unauthenticated"


def test_a_port_token_opens_nothing_but_its_port(served: Sandbox, node: PrivateNode) -> None:
    token = served.port_token(8000)
    for path in ("files/info?path=/", "execs", "ports/8000/wait?timeout=1"):
        answer = node.request("GET", f"/v1/sandboxes/{served.id}/{path}", token=token)
        assert answer.status == 401


def test_a_sandbox_that_is_not_answers_as_one_that_never_was(served: Sandbox) -> None:
    with Sandbox.create() as ended:
        pass
    bodies = []
    for sandbox_id in (ended.id, "sb-" + "a" * 26):
        reply = _ask(
            served,
            headers={
                "X-Shoal-Sandbox": sandbox_id,
                "X-Shoal-Port": "8000",
                "X-Shoal-Token": ended.port_token(8000),
            },
        )
        bodies.append((reply.status, reply.body.replace(sandbox_id.encode(), b"ID")))
    assert bodies[0][0] == 404
    assert bodies[0] == bodies[1]


def test_a_public_port_needs_no_token_until_it_is_taken_back(sandbox: Sandbox) -> None:
    _serve(sandbox, 8000)
    bare = _by_host(sandbox, 8000)
    assert _ask(sandbox, headers=bare).status == 401
    assert sandbox.publish(8000).public_ports == [8000]
    assert sandbox.info().public_ports == [8000]
    assert _ask(sandbox, "/x", headers=bare).body == b"/x"
    assert _ask(sandbox, headers=_by_host(sandbox, 8001)).status == 401
    assert sandbox.unpublish(8000).public_ports == []
    assert _ask(sandbox, headers=bare).status == 401


def test_a_sandbox_comes_up_with_its_server_ready_and_its_port_public(node: PrivateNode) -> None:
    with Sandbox.create(
        command="echo up > index.html; sleep 0.3; exec python3 -m http.server 8000",
        workdir="/tmp",
        ready=Ready.on_http(8000, "/index.html"),
        public_ports=[8000],
    ) as sb:
        assert _ask(sb, "/index.html", headers=_by_host(sb, 8000)).body == b"up\n"
        assert [known.exec_id for known in sb.execs()] == ["main"]
        process = sb.attach("main")
        process.kill()
        assert process.wait() != 0
    with pytest.raises(errors.StartTimeoutError):
        Sandbox.create(command=["sleep", "60"], ready=Ready.on_port(8000, timeout=0.5))
    with pytest.raises(errors.StartFailedError) as caught:
        Sandbox.create(command="exit 3", ready=8000)
    assert caught.value.details["exit_code"] == 3
    assert not Sandbox.list()[1:]  # the module's own at most


def test_nothing_listening_says_so_with_a_hint(sandbox: Sandbox) -> None:
    reply = _ask(sandbox, headers=sandbox.port_headers(9))
    assert (reply.status, reply.code) == (502, "port_unreachable")
    assert json.loads(reply.body)["hint"]
    with (
        sandbox.forward(9) as forward,
        socket.create_connection(("127.0.0.1", forward.port), timeout=30) as here,
    ):
        with pytest.raises(ConnectionResetError):
            here.recv(1)
        assert isinstance(forward.error, errors.PortUnreachableError)


@pytest.mark.parametrize("host", ["::1", "0.0.0.0", "::"])
def test_a_server_is_found_whichever_loopback_it_bound(sandbox: Sandbox, host: str) -> None:
    _serve(sandbox, 8000, host)
    assert _ask(sandbox, "/x", headers=sandbox.port_headers(8000)).body == b"/x"
    with (
        sandbox.forward(8000) as forward,
        contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", forward.port, timeout=30)
        ) as connection,
    ):
        connection.request("GET", "/y")
        assert connection.getresponse().read() == b"/y"


def test_many_connections_at_once_each_get_their_own_answer(served: Sandbox) -> None:
    headers = served.port_headers(8000)

    def one(number: int) -> bool:
        return _ask(served, f"/{number}", headers=headers).body == f"/{number}".encode()

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(one, range(500)))
    with served.forward(7000) as forward, contextlib.ExitStack() as all_open:
        sockets = [
            all_open.enter_context(
                socket.create_connection(("127.0.0.1", forward.port), timeout=30)
            )
            for _ in range(100)
        ]
        for number, here in enumerate(sockets):
            here.sendall(b"%03d" % number)
        for number, here in enumerate(sockets):
            assert here.recv(3, socket.MSG_WAITALL) == b"%03d" % number


@pytest.mark.parametrize("way", ["http", "forward"])
def test_a_client_that_vanishes_in_the_middle_is_noticed_by_the_server(
    sandbox: Sandbox, way: str
) -> None:
    _serve(sandbox, 8000)
    with contextlib.ExitStack() as stack:
        if way == "http":
            connection = stack.enter_context(contextlib.closing(_connection(sandbox)))
        else:
            forward = stack.enter_context(sandbox.forward(8000))
            connection = http.client.HTTPConnection("127.0.0.1", forward.port, timeout=30)
        connection.request("GET", "/endless", headers=sandbox.port_headers(8000))
        answer = connection.getresponse()
        assert len(answer.read(1 << 20)) == 1 << 20
        assert not sandbox.files.exists("/gone")
        answer.close()
        connection.close()
        _until(lambda: sandbox.files.exists("/gone"))


def _until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


@pytest.mark.parametrize("way", ["http", "websocket", "forward"])
def test_the_end_of_the_sandbox_ends_what_is_open(node: PrivateNode, way: str) -> None:
    with Sandbox.create() as sb, contextlib.ExitStack() as stack:
        _serve(sb, 8000)
        if way == "http":
            connection = stack.enter_context(contextlib.closing(_connection(sb)))
            connection.request("GET", "/endless", headers=sb.port_headers(8000))
            answer = connection.getresponse()
            answer.read(1000)
            sb.terminate()
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                _drain(answer)
        elif way == "websocket":
            ws = stack.enter_context(contextlib.closing(WebSocket(sb, sb.port_headers(8000))))
            ws.send(b"x")
            assert ws.receive() == (1, b"X")
            sb.terminate()
            with contextlib.suppress(ConnectionError):
                assert ws.file.read(1) == b""
        else:
            forward = stack.enter_context(sb.forward(8000))
            here = stack.enter_context(
                socket.create_connection(("127.0.0.1", forward.port), timeout=30)
            )
            here.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            assert here.recv(1)
            sb.terminate()
            with contextlib.suppress(ConnectionError):
                while here.recv(1 << 20):
                    pass


def _drain(answer: http.client.HTTPResponse) -> None:
    while answer.read(1 << 20):
        pass
    raise AssertionError("an answer that was cut looks as if it were whole")


def test_the_server_sees_neither_token_nor_our_cookie(served: Sandbox, node: PrivateNode) -> None:
    token = served.port_token(8000)
    for sent in (
        {"X-Shoal-Token": token, "Cookie": "a=b"},
        {"Cookie": f"a=b; shoal_port={token}; c=d"},
        {"Cookie": f"shoal_port={token}"},
    ):
        reply = _ask(served, "/headers", headers={**_by_host(served, 8000), **sent, "X-Mine": "1"})
        assert reply.status == 200
        seen = {name.lower(): value for name, value in json.loads(reply.body)}
        assert token not in reply.body.decode()
        assert "shoal_port" not in reply.body.decode()
        assert "x-shoal-token" not in seen
        assert seen["x-mine"] == "1"
        assert seen["host"] == urllib.parse.urlsplit(served.url(8000)).netloc
        assert seen["x-forwarded-for"] == "127.0.0.1"
        assert seen["x-forwarded-host"] == seen["host"]
        assert seen["x-forwarded-proto"] == "http"
        if "a=b" in sent["Cookie"]:
            assert "a=b" in seen["cookie"]
    by_headers = _ask(served, "/headers", headers=served.port_headers(8000)).body.decode()
    assert "shoal-token" not in by_headers.lower()
    assert node.token(served.id) not in by_headers


def test_a_browser_is_let_in_by_a_cookie_and_a_page_elsewhere_is_not(served: Sandbox) -> None:
    parts = urllib.parse.urlsplit(served.browser_url(8000, "/x?y"))
    token = urllib.parse.parse_qs(parts.fragment)["token"][0]
    here = {"Host": parts.netloc}
    page = _ask(served, parts.path, headers=here)
    assert page.status == 200
    assert page.headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert token.encode() not in page.body
    refused = _ask(served, parts.path, headers=here, method="POST", body=b"1.x")
    assert refused.status == 401
    assert "Set-Cookie" not in refused.headers
    entered = _ask(served, parts.path, headers=here, method="POST", body=token.encode())
    assert entered.status == 204
    cookie = entered.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    held = {**here, "Cookie": cookie.partition(";")[0]}
    assert _ask(served, "/x?y", headers=held).body == b"/x?y"
    ours = {**held, "Origin": f"http://{parts.netloc}"}
    foreign = {**held, "Origin": "http://evil.example"}
    assert _ask(served, headers=ours, method="POST", body=b"x").status == 200
    assert _ask(served, headers=foreign, method="POST", body=b"x").status == 403
    for headers, status in ((ours, 101), (foreign, 403)):
        with contextlib.closing(WebSocket(served, headers)) as ws:
            assert ws.status == status


def test_control_and_data_plane_refuse_pages_and_strangers_over_tcp(served: Sandbox) -> None:
    port = urllib.parse.urlsplit(served.url(1)).port
    here = {"Host": f"127.0.0.1:{port}"}
    assert _ask(served, "/v1/sandboxes", headers=here).code == "unauthenticated"
    data = f"/v1/sandboxes/{served.id}/files/info?path=/"
    assert _ask(served, data, headers=here).status == 401
    page = {**here, "Origin": "http://evil.example"}
    for path in ("/v1/sandboxes", data):
        reply = _ask(served, path, headers=page)
        assert (reply.status, reply.code) == (403, "forbidden")


def test_no_port_leads_to_the_guest_agent(sandbox: Sandbox) -> None:
    listening = sandbox.run("cat /proc/net/tcp /proc/net/tcp6 | awk '$4 == \"0A\"'")
    assert listening.stdout == ""
    for port in (1, 22, 80, 111, 443, 1024, 2375, 5000, 8000, 10000, 32768, 49152, 65535):
        reply = _ask(sandbox, headers=sandbox.port_headers(port))
        assert (reply.status, reply.code) == (502, "port_unreachable")
    for word in ("0", "65536", "-1", "80x", "/run/agent.sock", "%2frun", ""):
        headers = {**sandbox.port_headers(80), "X-Shoal-Port": word}
        assert _ask(sandbox, headers=headers).status in (400, 404)


def test_reaching_ports_leaves_nothing_behind(node: PrivateNode) -> None:
    with node.unchanged(), Sandbox.create() as sb:
        _serve(sb, 8000)
        _ask(sb, headers=sb.port_headers(8000))
        with sb.forward(8000) as forward:
            for _ in range(20):
                socket.create_connection(("127.0.0.1", forward.port)).close()
        with contextlib.closing(WebSocket(sb, sb.port_headers(8000))) as ws:
            ws.send(b"x")
            ws.receive()


async def test_ports_in_async(node: PrivateNode) -> None:
    import asyncio

    async with (
        await shoal.AsyncSandbox.create(command=["python3", "-c", ECHO], ready=7000) as sb,
        sb.forward(7000) as forward,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        writer.write(b"x" * 1_000_000)
        writer.write_eof()
        assert len(await reader.read(-1)) == 1_000_000 + 32
        writer.close()
