"""A small server in the sandbox, and requests to it through the node."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from shoal.conformance._help import python
from shoal.sdk import AsyncProcess, AsyncSandbox

SERVER = """
import base64, hashlib, json, socket, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

go = threading.Event()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, body, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(body, "application/octet-stream")

    def do_GET(self):
        print(self.path, flush=True)
        if self.path == "/go":
            go.set()
        if self.path == "/bad":
            self.send_error(503)
        elif self.path == "/events":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for word in (b"data: 0\\n\\n", b"data: 1\\n\\n"):
                self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(word), word))
                self.wfile.flush()
                go.wait(20)
            self.wfile.write(b"0\\r\\n\\r\\n")
        elif self.headers.get("Upgrade", "").lower() == "websocket":
            self.websocket()
        else:
            seen = {"path": self.path, "headers": [[k.lower(), v] for k, v in self.headers.items()]}
            self.answer(json.dumps(seen).encode())

    def websocket(self):
        key = self.headers["Sec-WebSocket-Key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        accept = base64.b64encode(hashlib.sha1(key).digest()).decode()
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        self.close_connection = True
        while head := self.rfile.read(2):
            code, size = head[0] & 15, head[1] & 127
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[n % 4] for n, b in enumerate(self.rfile.read(size)))
            self.wfile.write(bytes([0x80 | code, size]) + data)
            self.wfile.flush()
            if code == 8:
                break

class Server(ThreadingHTTPServer):
    daemon_threads = True
    address_family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET

server = Server((sys.argv[2], int(sys.argv[1])), Handler)
print("listening", flush=True)
server.serve_forever()
"""

ECHO = """
import socket, sys, threading
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listening", flush=True)
def serve(peer):
    with peer:
        count = 0
        while data := peer.recv(65536):
            count += len(data)
            peer.sendall(data)
        peer.sendall(b"total %d" % count)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


def server(port: int, host: str = "127.0.0.1") -> list[str]:
    """The command that serves HTTP: `/`, `/events`, `/go`, `/bad`, POST echoes, websockets echo."""
    return python(SERVER, str(port), host)


async def serving(sandbox: AsyncSandbox, command: list[str]) -> AsyncProcess:
    """A server that listens already; it prints each path it is asked for."""
    process = await sandbox.exec(command)
    await process.stdout.readline()
    return process


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@contextlib.asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without cookies, proxies or redirects of its own."""
    limit = aiohttp.ClientTimeout(total=20)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(timeout=limit, cookie_jar=jar, trust_env=False) as made:
        yield made


def direct(url: str) -> tuple[str, dict[str, str]]:
    """The same address for a machine that does not resolve `*.localhost`: where to connect, and the Host."""
    parts = urlsplit(url)
    if not (parts.hostname or "").endswith(".localhost"):
        return url, {}
    there = parts._replace(netloc=f"127.0.0.1:{parts.port}")
    return there.geturl(), {"Host": parts.netloc}


async def fetch(
    url: str,
    path: str = "/",
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    data: Any = None,
) -> Answer:
    """One request to a port's own address."""
    there, host = direct(url.rstrip("/") + path)
    async with (
        session() as client,
        client.request(
            method, there, headers={**host, **(headers or {})}, data=data, allow_redirects=False
        ) as response,
    ):
        return Answer(response.status, response.headers, await response.read())
