from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import hmac
import socket
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from shoal import AsyncSandbox, Ready, Sandbox, errors
from shoal.sdk.tests.fake_node import FakeNode

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def _server(handler: Handler) -> AsyncIterator[int]:
    """A server on a port of the host, which is the fake sandbox's port too."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def _shout_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    data = await reader.read(-1)
    writer.write(data.upper())
    await writer.drain()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_urls_tokens_and_headers_are_made_without_asking(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        asked = len(node.requests)
        assert sb.url(8000) == f"http://8000-{sb.id}.localhost:1234"
        before = int(time.time())
        expires, _, signature = sb.port_token(8000, ttl=60).partition(".")
        assert before + 60 <= int(expires) <= before + 61
        key, message = node.sandboxes[sb.id].token, f"port:{sb.id}:8000:{expires}"
        assert signature == hmac.new(key.encode(), message.encode(), hashlib.sha256).hexdigest()
        headers = sb.port_headers(8000)
        assert set(headers) == {"X-Shoal-Sandbox", "X-Shoal-Port", "X-Shoal-Token"}
        assert headers["X-Shoal-Port"] == "8000"
        assert key not in str(headers)
        parts = urllib.parse.urlsplit(sb.browser_url(8000, "/a b?x=1&y=+#z"))
        assert (parts.path, parts.query) == ("/.shoal/enter", "")
        told = urllib.parse.parse_qs(parts.fragment, strict_parsing=True)
        assert told["next"] == ["/a b?x=1&y=+#z"]
        assert told["token"][0].partition(".")[2]
        assert len(node.requests) == asked


@pytest.mark.parametrize("port", [0, -1, 65536, True, "80", 80.0])
async def test_what_is_no_port_is_refused_before_anything_is_asked(
    node: FakeNode, port: int
) -> None:
    async with await AsyncSandbox.create() as sb:
        asked = len(node.requests)
        for call in (sb.url, sb.port_token, sb.port_headers, sb.browser_url, sb.forward):
            with pytest.raises(errors.InvalidArgumentError, match="not a port"):
                call(port)
        for wait in (sb.wait_for_port, sb.publish, sb.unpublish):
            with pytest.raises(errors.InvalidArgumentError, match="not a port"):
                await wait(port)
        assert len(node.requests) == asked


async def test_a_browser_is_sent_to_a_path_only_and_a_token_lives_on(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        for path in ("", "x", "//evil.example", "https://evil.example"):
            with pytest.raises(errors.InvalidArgumentError, match="not a path"):
                sb.browser_url(80, path)
        with pytest.raises(errors.InvalidArgumentError):
            sb.port_token(80, ttl=0)


async def test_a_node_without_a_tcp_port_says_so_with_a_hint(node: FakeNode) -> None:
    node.url_template = None
    async with await AsyncSandbox.create() as sb:
        with pytest.raises(errors.ConflictError) as caught:
            sb.url(80)
        assert "forward" in caught.value.hint
        assert sb.port_token(80)


async def test_a_port_is_published_and_taken_back(node: FakeNode) -> None:
    async with await AsyncSandbox.create(public_ports=[70, 80]) as sb:
        assert node.specs == [{"image": "base", "public_ports": [70, 80]}]
        assert (await sb.publish(90)).public_ports == [90]
        assert (await sb.publish(90)).public_ports == [90]
        assert (await sb.unpublish(90)).public_ports == []


async def test_create_says_what_to_run_and_what_to_wait_for(node: FakeNode) -> None:
    await AsyncSandbox.create(command="serve | tee log", ready=8000)
    await AsyncSandbox.create(command=["serve"], ready=Ready.on_http(8000, "/up", timeout=3))
    asked = [{key: spec.get(key) for key in ("command", "ready")} for spec in node.specs]
    assert asked[0]["command"] == ["/bin/sh", "-c", "serve | tee log"]
    assert asked[1]["command"] == ["serve"]
    ready = [spec["ready"] for spec in asked]
    assert [(one["port"], one["path"], one["timeout"]) for one in ready] == [  # type: ignore[index]  # JSON
        (8000, None, 60),
        (8000, "/up", 3),
    ]


async def test_the_time_to_get_ready_is_added_to_the_time_to_come_up(node: FakeNode) -> None:
    node.create_delay = 0.5
    await AsyncSandbox.create(start_timeout=0.05, ready=Ready.on_port(80, timeout=30))
    with pytest.raises(errors.DeadlineExceededError):
        await AsyncSandbox.create(start_timeout=0.05, ready=Ready.on_port(80, timeout=0.05))


async def test_waiting_for_a_port_ends_when_something_listens_and_not_before(
    node: FakeNode,
) -> None:
    port = _free_port()
    async with await AsyncSandbox.create() as sb:
        with pytest.raises(errors.DeadlineExceededError):
            await sb.wait_for_port(port, timeout=0.1)
        waiting = asyncio.create_task(sb.wait_for_port(port, timeout=30))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        with socket.create_server(("127.0.0.1", port)):
            await waiting


async def test_a_forward_carries_bytes_both_ways_and_half_close(node: FakeNode) -> None:
    sent = bytes(range(256)) * 40_000
    async with _server(_shout_at_the_end) as port, await AsyncSandbox.create() as sb:
        async with sb.forward(port) as forward:
            assert forward.address == f"127.0.0.1:{forward.port}"
            reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
            writer.write(sent)
            writer.write_eof()
            assert await reader.read(-1) == sent.upper()
            writer.close()
        assert forward.error is None
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", forward.port)


async def test_each_connection_of_a_forward_stands_alone(node: FakeNode) -> None:
    async with (
        _server(_echo) as port,
        await AsyncSandbox.create() as sb,
        sb.forward(port) as forward,
    ):
        pipes = [await asyncio.open_connection("127.0.0.1", forward.port) for _ in range(20)]
        for number, (reader, writer) in enumerate(pipes):
            writer.write(b"%d\n" % number)
            assert await reader.readline() == b"%d\n" % number
        for _, writer in pipes[::2]:
            writer.transport.abort()
        for reader, writer in pipes[1::2]:
            writer.write(b"still\n")
            assert await reader.readline() == b"still\n"
            writer.close()


async def test_a_port_has_an_address_for_who_does_not_resolve_its_name(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        assert sb.local_url(8000) == "http://127.0.0.1:1234"
        with pytest.raises(errors.InvalidArgumentError):
            sb.local_url(0)
        node.url_template = None
        with pytest.raises(errors.ConflictError):
            (await AsyncSandbox.connect(sb.id)).local_url(8000)


async def test_nothing_listening_resets_the_connection_and_says_why(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb, sb.forward(_free_port()) as forward:
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(-1)
        writer.close()
        assert isinstance(forward.error, errors.PortUnreachableError)
        assert forward.error.hint == "start a server"


async def test_leaving_the_block_resets_what_is_still_connected(node: FakeNode) -> None:
    async with _server(_echo) as port, await AsyncSandbox.create() as sb:
        async with sb.forward(port) as forward:
            reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
            writer.write(b"x")
            assert await reader.read(1) == b"x"
        with pytest.raises(ConnectionResetError):
            await reader.read(-1)
        writer.close()


async def test_connections_that_arrive_as_the_block_is_left_are_closed_too(node: FakeNode) -> None:
    async with _server(_echo) as port, await AsyncSandbox.create() as sb:
        for turns in range(8):
            clients = []
            async with sb.forward(port) as forward:
                for _ in range(4):
                    client = socket.socket()
                    client.setblocking(False)
                    client.connect_ex(("127.0.0.1", forward.port))
                    clients.append(client)
                for _ in range(turns):  # so far into being accepted
                    await asyncio.sleep(0)
            await asyncio.sleep(0.02)
            for client in clients:
                with client, pytest.raises(ConnectionError):
                    client.recv(1)
        gc.collect()  # what was left open is told of now


async def test_a_client_that_takes_nothing_holds_the_sender_back(node: FakeNode) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16

    async with (
        _server(flood) as port,
        await AsyncSandbox.create() as sb,
        sb.forward(port) as forward,
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", forward.port, limit=1 << 10)
        seen = -1
        while sent != seen:
            seen = sent
            await asyncio.sleep(0.3)
        assert 0 < sent < 64 << 20  # every buffer on the way is full
        writer.transport.abort()


@pytest.mark.parametrize("answer", ["plain", "problem", "nothing"])
async def test_a_refused_upgrade_is_a_typed_error(node: FakeNode, answer: str) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse | None:
        if not request.path.endswith("/connect") or "ports" not in request.path:
            return None
        if answer == "problem":
            raise errors.SandboxGoneError("over", reason="timeout")
        if answer == "nothing":
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=500, text="oops")

    node.answer = refuse
    async with await AsyncSandbox.create() as sb, sb.forward(80) as forward:
        reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(-1)
        writer.close()
        kind = errors.SandboxGoneError if answer == "problem" else errors.NodeUnavailableError
        assert type(forward.error) is kind


def test_ports_in_sync(node: FakeNode) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            received = b""
            while data := connection.recv(1 << 16):
                received += data
            connection.sendall(received.upper())

    thread = threading.Thread(target=serve)
    thread.start()
    port = listener.getsockname()[1]
    with Sandbox.create(ready=80) as sb:
        assert sb.url(80).startswith("http://80-sb-")
        with sb.forward(port) as forward:
            assert forward.port != port
            with socket.create_connection(("127.0.0.1", forward.port), timeout=10) as here:
                here.sendall(b"abc" * 100_000)
                here.shutdown(socket.SHUT_WR)
                received = b""
                while data := here.recv(1 << 16):
                    received += data
        thread.join()
        listener.close()
        assert received == b"ABC" * 100_000
        with pytest.raises(errors.DeadlineExceededError):
            sb.wait_for_port(_free_port(), timeout=0.05)
        assert sb.publish(80).public_ports == [80]
