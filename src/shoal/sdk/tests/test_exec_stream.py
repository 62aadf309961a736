"""An exec's stream, from a node that keeps output until its client says that it was consumed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec
import pytest
from aiohttp import web

from shoal.errors import ConflictError, NodeUnavailableError
from shoal.sdk import _exec
from shoal.sdk._client import Address
from shoal.sdk._exec import RECEIPT_LEAST, Access, ExecStream
from shoal.sdk._frames import Kind, frame
from shoal.types import ExecExit, ExecRequest, ExecStarted, Outcome

WINDOW = 1 << 20
EXIT = frame(Kind.EXIT, msgspec.json.encode(ExecExit(outcome=Outcome.EXITED, exit_code=0)))


@dataclass
class Node:
    """One exec with this output, at the routes of `/v1`; a break loses what was sent into the connection."""

    output: bytes
    window: int = WINDOW
    cut_every: int | None = None
    """Cut a stream after so many bytes of it."""
    refusals: int = 0
    """Streams to cut before they are answered."""
    consumed: int = 0
    told: list[int] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[ExecStream]:
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/sandboxes/sb/execs", self._stream),
                web.get("/v1/sandboxes/sb/execs/e/stream", self._stream),
                web.post("/v1/sandboxes/sb/execs/e/consumed", self._consumed),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        access = Access(Address(f"http://127.0.0.1:{self.port}"), "sb", "token")
        try:
            yield ExecStream(access, ExecRequest(argv=["x"], exec_id="e"), "e", (0, 0))
        finally:
            await runner.cleanup()

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path_qs}")
        self.asked.set()
        assert request.query["ack"] == "client"
        assert request.transport is not None
        if self.refusals:
            self.refusals -= 1
            request.transport.abort()
            return web.Response()
        at = int(request.query.get("stdout_offset", "0"))
        self.consumed = max(self.consumed, at)
        response = web.StreamResponse()
        await response.prepare(request)
        started = ExecStarted(
            exec_id="e", pid=7, existing=at > 0, stdout_offset=at, stderr_offset=0
        )
        await response.write(frame(Kind.STARTED, msgspec.json.encode(started)))
        sent = 0
        while at < len(self.output):
            async with self.changed:
                while at >= self.consumed + self.window:
                    await self.changed.wait()
            piece = self.output[at : min(at + 4096, self.consumed + self.window)]
            at += len(piece)
            sent += len(piece)
            await response.write(frame(Kind.STDOUT, piece))
            if self.cut_every is not None and sent >= self.cut_every:
                request.transport.abort()
                return response
        await response.write(EXIT)
        return response

    async def _consumed(self, request: web.Request) -> web.Response:
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        body = msgspec.json.decode(await request.read())
        await asyncio.sleep(0.005)
        self.busy -= 1
        async with self.changed:
            assert body["stdout"] >= self.consumed, "an offset went back"
            self.told.append(body["stdout"])
            self.consumed = body["stdout"]
            self.changed.notify_all()
        return web.Response(status=204)


async def _read(stream: ExecStream) -> bytes:
    """All of the output, each piece consumed as it comes."""
    output = b""
    async with contextlib.aclosing(stream.frames()) as frames:
        async for item in frames:
            if isinstance(item, tuple):
                output += item[1]
                stream.consume()
    return output


def _bytes(count: int) -> bytes:
    return b"".join(number.to_bytes(4, "big") for number in range(count // 4))


async def test_what_is_consumed_is_told_in_few_calls_one_at_a_time_and_at_the_end_in_full() -> None:
    node = Node(_bytes(8 << 20))
    async with node.serve() as stream, asyncio.timeout(30):
        assert await _read(stream) == node.output
        async with node.changed:
            await node.changed.wait_for(lambda: node.consumed == len(node.output))
    assert node.most_busy == 1
    assert len(node.told) < len(node.output) // (32 << 10)


async def test_a_node_that_keeps_little_is_told_of_little() -> None:
    node = Node(_bytes(20 * RECEIPT_LEAST), window=RECEIPT_LEAST)
    async with node.serve() as stream, asyncio.timeout(30):
        assert await _read(stream) == node.output


async def test_output_that_came_and_was_not_consumed_stays_with_the_node_across_breaks() -> None:
    node = Node(_bytes(600_000), cut_every=200_000)
    async with node.serve() as stream, asyncio.timeout(30):
        output = b""
        async for item in stream.frames():
            if isinstance(item, ExecStarted) and item.existing:
                node.cut_every = None
            elif isinstance(item, tuple):
                output += item[1]
                stream.consume((len(output) - min(len(output), 50_000), 0))
        assert output == node.output
    assert node.consumed == 50_000
    assert [request for request in node.requests if "stdout_offset=50000" in request]


async def test_a_stream_that_breaks_again_and_again_loses_and_repeats_nothing() -> None:
    node = Node(_bytes(2 << 20), cut_every=100_000)
    async with node.serve() as stream, asyncio.timeout(60):
        assert await _read(stream) == node.output
    assert stream.lost == 0
    assert len(node.requests) > 10


async def test_a_start_that_breaks_before_its_answer_is_sent_again() -> None:
    node = Node(b"x", refusals=3)
    async with node.serve() as stream, asyncio.timeout(30):
        assert await _read(stream) == b"x"
    assert node.requests == ["POST /v1/sandboxes/sb/execs?ack=client"] * 4


async def test_a_node_that_comes_back_within_the_patience_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_exec, "START_PATIENCE", 0.0)
    node = Node(_bytes(300_000), cut_every=200_000)
    async with contextlib.AsyncExitStack() as first, asyncio.timeout(60):
        stream = await first.enter_async_context(node.serve())
        reading = asyncio.create_task(_read(stream))
        await node.asked.wait()
        await first.aclose()
        await asyncio.sleep(2)  # longer than a fixed count of tries would last
        node.cut_every = None
        async with node.serve():
            assert await reading == node.output


async def test_a_node_that_never_comes_back_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exec, "RESUME_PATIENCE", 0.5)
    node = Node(_bytes(300_000), window=100_000)
    async with node.serve() as stream:
        reading = asyncio.create_task(_read(stream))
        await node.asked.wait()
    with pytest.raises(NodeUnavailableError):
        async with asyncio.timeout(20):
            await reading


@pytest.mark.parametrize("broken", [True, False])
async def test_a_late_request_of_its_own_does_not_end_a_stream_another_reader_does(
    broken: bool,
) -> None:
    node = Node(b"x" * 10)
    stale = {"code": "conflict", "detail": "another reader", "details": {"errno": 116}}

    async def taken_over(request: web.Request) -> web.StreamResponse:
        if len(node.requests) >= 1 + broken:
            return await Node._stream(node, request)
        node.requests.append("")
        response = web.StreamResponse()
        await response.prepare(request)
        started = ExecStarted(exec_id="e", pid=7, existing=False, stdout_offset=0, stderr_offset=0)
        await response.write(frame(Kind.STARTED, msgspec.json.encode(started)))
        if broken and len(node.requests) == 1:
            assert request.transport is not None
            await asyncio.sleep(0.05)
            request.transport.abort()
        else:
            await response.write(frame(Kind.ERROR, msgspec.json.encode(stale)))
        return response

    node._stream = taken_over  # type: ignore[method-assign]  # what the node says instead
    async with node.serve() as stream, asyncio.timeout(30):
        if broken:
            assert await _read(stream) == node.output
        else:
            with pytest.raises(ConflictError):
                await _read(stream)


async def test_a_node_that_keeps_less_than_it_must_is_told_of_as_a_gap() -> None:
    node = Node(_bytes(300_000))
    stream_of, gap = node._stream, 70_000

    async def forgetful(request: web.Request) -> web.StreamResponse:
        if node.cut_every is not None:
            node.cut_every = None
            at = int(request.query["stdout_offset"]) + gap
            request = request.clone(rel_url=request.rel_url.update_query(stdout_offset=str(at)))
        else:
            node.cut_every = 100_000
        return await stream_of(request)

    node._stream = forgetful  # type: ignore[method-assign]  # what the node says instead
    async with node.serve() as stream, asyncio.timeout(30):
        output = await _read(stream)
    assert stream.lost > 0
    assert len(output) + stream.lost == len(node.output)
