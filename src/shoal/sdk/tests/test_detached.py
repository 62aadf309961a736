from __future__ import annotations

import asyncio

import pytest

from shoal import AsyncSandbox, Sandbox, errors
from shoal.sdk.tests.fake_node import FakeNode


def _streams(node: FakeNode) -> list[str]:
    return [request for request in node.requests if "/stream" in request]


async def test_a_detached_command_is_read_when_somebody_asks(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("echo out; echo err >&2; sleep 0.2; exit 3", detached=True)
        assert process.pid > 0
        assert await process.poll() is None
        assert _streams(node) == []
        assert await process.wait() == 3
        assert await process.stdout.read() == b"out\n"
        assert await process.stderr.read() == b"err\n"
        assert len(_streams(node)) == 1


async def test_polling_a_detached_command_tells_its_end(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("exit 4", detached=True)
        while (code := await process.poll()) is None:
            assert _streams(node) == []
            await asyncio.sleep(0.01)
        assert code == 4


async def test_a_detached_command_that_does_not_start_says_why(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec(["/nonexistent"], detached=True)
        assert await process.wait() == 127
        assert process.exit is not None
        assert process.exit.errno == 2
        assert await process.stdout.read() == b""


async def test_a_detached_start_that_was_not_answered_is_made_again_and_is_the_same(
    node: FakeNode,
) -> None:
    from aiohttp import web

    async with await AsyncSandbox.create() as sb:
        tries = 0

        async def cut_once(request: web.Request) -> web.StreamResponse | None:
            nonlocal tries
            if request.method == "POST" and request.path.endswith("/execs"):
                tries += 1
                if tries == 1:
                    await node._exec(request)
                    assert request.transport is not None
                    request.transport.abort()
            return None

        node.answer = cut_once
        process = await sb.exec("echo x >> ran; sleep 60", detached=True)
        assert tries == 2
        assert len(node.sandboxes[sb.id].execs) == 1
        await process.kill()


async def test_a_detached_command_is_not_held_back_by_a_reader_that_stopped(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("echo first; head -c 30000000 /dev/zero; echo >&2", detached=True)
        assert await process.stdout.readline() == b"first\n"
        async with process._changed:  # nothing is awaited of it meanwhile
            await process._changed.wait_for(lambda: process._over)
        left = await process.stdout.read()
        assert len(left) + process.stdout.dropped_bytes == 30_000_000
        assert len(left) <= 10 << 20


async def test_giving_up_on_an_attach_kills_nothing(node: FakeNode) -> None:
    from aiohttp import web

    async with await AsyncSandbox.create() as sb:
        await sb.exec(["sleep", "60"], exec_id="mine")

        async def hang(request: web.Request) -> web.StreamResponse | None:
            if "/stream" in request.path:
                await asyncio.sleep(30)
            return None

        node.answer = hang
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sb.attach("mine"), 0.1)
        assert node.signals == []


async def test_what_is_written_after_attaching_follows_what_is_there(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("cat", stdin=True)
        await process.stdin.write("one ")
        again = await sb.attach(process.exec_id)
        await again.stdin.write("two ")
        await again.stdin.write("three")
        await again.stdin.close()
        assert await again.stdout.read() == b"one two three"


def test_detached_in_sync(node: FakeNode) -> None:
    with Sandbox.create() as sb:
        process = sb.exec("cat", stdin=True, detached=True)
        process.stdin.write("hi")
        process.stdin.close()
        assert process.stdout.read() == b"hi"
        assert process.wait() == 0
        with pytest.raises(errors.ExecNotFoundError):
            sb.attach("nobody")
