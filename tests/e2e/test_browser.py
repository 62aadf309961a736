"""A web page in a sandbox without a network, opened in a browser."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import shoal
from tests.support.node import PrivateNode

SITE = '''
import base64, hashlib, http.server, socketserver, struct, time

PAGE = b"""<!doctype html><title>waiting</title><p id=p>a page from inside</p><script>
const seen = {cookie: document.cookie, events: []};
const tell = () => { document.title = JSON.stringify(seen); };
const socket = new WebSocket(`ws://${location.host}/echo`);
socket.onopen = () => socket.send("h\\u00e9llo through the wall");
socket.onmessage = (event) => { seen.echo = event.data; tell(); };
socket.onerror = () => { seen.error = "websocket"; tell(); };
const events = new EventSource("/events");
events.onmessage = (event) => {
  seen.events.push(event.data);
  if (seen.events.length == 3) events.close();
  tell();
};
fetch("/headers").then((answer) => answer.json()).then((all) => { seen.headers = all; tell(); });
</script>"""


class Site(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/":
            self.answer("text/html", PAGE)
        elif self.path == "/headers":
            import json
            self.answer("application/json", json.dumps(dict(self.headers.items())).encode())
        elif self.path == "/events":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for number in range(3):
                self.wfile.write(f"data: {number}\\n\\n".encode())
                self.wfile.flush()
                time.sleep(0.05)
            self.close_connection = True
        elif self.path == "/echo":
            self.echo()
        else:
            self.send_error(404)

    def echo(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        self.close_connection = True
        while True:
            head = self.rfile.read(2)
            if len(head) < 2 or head[0] & 15 == 8:
                return
            length = head[1] & 127
            if length == 126:
                (length,) = struct.unpack(">H", self.rfile.read(2))
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(length)))
            self.wfile.write(bytes([0x81, len(data)]) + data)
            self.wfile.flush()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


Server(("127.0.0.1", 8000), Site).serve_forever()
'''


class Browser:
    """A headless Chromium, driven over its DevTools protocol."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def title_of(self, url: str, done: Any, *, deadline: float = 60.0) -> tuple[str, str]:
        """Open `url` in a fresh profile page and wait until `done(title)`; the title, and the URL then shown."""
        async with asyncio.timeout(deadline), aiohttp.ClientSession() as session:
            async with session.put(f"{self.address}/json/new?about:blank") as answer:
                page = await answer.json(content_type=None)
            async with session.ws_connect(page["webSocketDebuggerUrl"]) as wire:
                await self._call(wire, 1, "Page.navigate", url=url)
                number = 2
                while True:
                    found = await self._call(
                        wire,
                        number,
                        "Runtime.evaluate",
                        expression="JSON.stringify([document.title, location.href])",
                    )
                    number += 1
                    title, shown = json.loads(found["result"].get("value", '["", ""]'))
                    if done(title):
                        return title, shown
                    await asyncio.sleep(0.05)

    async def _call(
        self, wire: aiohttp.ClientWebSocketResponse, number: int, method: str, **params: object
    ) -> dict[str, Any]:
        await wire.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await wire.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result


@pytest.fixture(scope="module")
def browser(as_root: None) -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program is not None, "chromium is missing: tools/setup dev installs it"
    profile = Path(tempfile.mkdtemp(prefix="shoal-browser-"))
    process = subprocess.Popen(
        [
            program,
            "--headless=new",
            "--no-sandbox",  # it runs as root here, and opens nothing but our page
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--no-proxy-server",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        address = ""
        for line in process.stderr:
            if line.startswith(b"DevTools listening on ws://"):
                address = line.split(b"ws://")[1].split(b"/")[0].decode()
                break
        assert address, "chromium ended before it listened"
        # What it says later is not for us, and must not fill the pipe.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield Browser(f"http://{address}")
        os.killpg(process.pid, 15)
        process.wait(10)
        drain.wait(10)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait(10)
        process.stderr.close()
        shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def site(node: PrivateNode) -> Iterator[shoal.Sandbox]:
    with shoal.Sandbox.create(
        command=["python3", "-c", SITE], ready=shoal.Ready.on_http(8000, "/"), network="none"
    ) as made:
        yield made


def _all_seen(title: str) -> bool:
    if not title.startswith("{"):
        return False
    seen = json.loads(title)
    return "error" in seen or ("echo" in seen and len(seen["events"]) == 3 and "headers" in seen)


def _check(title: str) -> dict[str, str]:
    seen = json.loads(title)
    assert seen.get("error") is None, seen
    assert seen["echo"] == "h\u00e9llo through the wall"
    assert seen["events"] == ["0", "1", "2"]
    headers: dict[str, str] = seen["headers"]
    return headers


async def test_a_public_page_its_websocket_and_its_events_reach_a_browser(
    browser: Browser, site: shoal.Sandbox
) -> None:
    site.publish(8000)
    title, shown = await browser.title_of(site.url(8000), _all_seen)
    headers = _check(title)
    assert shown.rstrip("/") == site.url(8000)
    assert headers["Host"] == site.url(8000).removeprefix("http://")


async def test_a_browser_is_let_in_by_a_token_that_stands_in_no_url_and_not_in_the_page(
    browser: Browser, site: shoal.Sandbox
) -> None:
    token = site.port_token(8000)
    title, shown = await browser.title_of(site.browser_url(8000), _all_seen)
    headers = _check(title)
    # The page's address is clean, its script cannot see the cookie, and the server never got it.
    assert shown.rstrip("/") == site.url(8000)
    assert json.loads(title)["cookie"] == ""
    told = json.dumps(headers)
    assert "shoal_port" not in told
    assert token.split(".")[1] not in told
