"""Who gets a process's output: the newest handle, from the first byte on that nobody has read."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from shoal import AsyncSandbox, Outcome, errors
from shoal.sdk.tests.fake_node import WINDOW, FakeNode

LINES = b"".join(b"%d\n" % number for number in range(1, 200_001))


async def test_what_a_handle_got_and_did_not_read_is_for_who_attaches_next(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        first = await sb.exec("seq 1 200000; echo oops >&2")
        seen = [await first.stdout.read(5), await first.stdout.readline()]
        seen += [await first.stdout.readline() for _ in range(30)]
        await asyncio.sleep(0.2)
        second = await sb.attach(first.exec_id)
        rest, error = await asyncio.gather(second.stdout.read(), second.stderr.read())
        assert b"".join(seen) + rest == LINES
        assert error == b"oops\n"
        assert [await first.wait(), await second.wait()] == [0, 0]
        with pytest.raises(errors.ConflictError, match="another reader"):
            await first.stdout.read()


async def test_a_handle_that_is_only_waited_on_learns_the_end_while_another_reads(
    node: FakeNode,
) -> None:
    async with await AsyncSandbox.create() as sb:
        first = await sb.exec("read line; exit 7", stdin=True)
        waiting = asyncio.create_task(first.wait())
        second = await sb.attach(first.exec_id)
        third = await sb.attach(first.exec_id)
        await third.stdin.write("go\n")
        assert [await waiting, await second.wait(), await third.wait()] == [7, 7, 7]
        assert first.exit == third.exit
        assert first.exit is not None
        assert first.exit.outcome is Outcome.EXITED


async def test_repeats_of_one_exec_at_once_all_get_a_handle(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        made = await asyncio.gather(
            *(sb.exec("sleep 0.3; exit 3", exec_id="mine") for _ in range(8))
        )
        assert len({process.pid for process in made}) == 1
        assert await asyncio.gather(*(process.wait() for process in made)) == [3] * 8


async def test_the_end_is_learned_across_a_node_that_is_away(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        first = await sb.exec("sleep 0.5; exit 4")
        cuts = 0

        async def cut(request: web.Request) -> web.StreamResponse | None:
            nonlocal cuts
            if request.path.endswith(first.exec_id) and cuts < 3:
                cuts += 1
                assert request.transport is not None
                request.transport.abort()
            return None

        node.answer = cut
        await sb.attach(first.exec_id)
        assert await first.wait(20) == 4
        assert cuts == 3


async def test_a_cancelled_read_leaves_what_had_come_for_the_next(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("seq 1 200000; read line; echo end", stdin=True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.stdout.read(), 0.5)
        await process.stdin.write("\n")
        assert await process.stdout.read() == LINES + b"end\n"


async def test_a_line_longer_than_the_node_keeps_is_read(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec(f"head -c {3 * WINDOW} /dev/zero; echo; echo next")
        assert len(await process.stdout.readline()) == 3 * WINDOW + 1
        assert await process.stdout.readline() == b"next\n"


async def test_a_prompt_that_somebody_waits_on_is_for_who_attaches_next(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        first = await sb.exec("printf 'login: '; sleep 60")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(first.stdout.readline(), 0.3)
        second = await sb.attach(first.exec_id)
        assert await second.stdout.read(7) == b"login: "
        await second.kill()


async def test_output_of_an_ended_process_that_nobody_read_is_still_there(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        first = await sb.exec("echo result")
        assert await first.wait() == 0
        second = await sb.attach(first.exec_id)
        assert await second.stdout.read() == b"result\n"


async def test_a_gap_is_an_error_for_a_reader_and_the_end_is_learned_all_the_same(
    node: FakeNode,
) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("echo one; read line; echo two; exit 5", stdin=True)
        assert await process.stdout.readline() == b"one\n"
        running = node.sandboxes[sb.id].execs[process.exec_id]

        async def forget(request: web.Request) -> web.StreamResponse | None:
            if request.path.endswith("/stream"):
                node._consume(running, {"stdout": "6"})
            return None

        node.answer, node.break_after = forget, 1
        await process.stdin.write("\n")
        with pytest.raises(errors.ConflictError, match="2 bytes of stdout"):
            await process.stdout.read()
        assert process.stdout.dropped_bytes == 2
        assert await process.wait() == 5


async def test_a_gap_in_a_run_is_told(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:

        async def forget(request: web.Request) -> web.StreamResponse | None:
            if request.path.endswith("/stream"):
                (running,) = node.sandboxes[sb.id].execs.values()
                node._consume(running, {"stdout": "300000"})
            return None

        node.answer, node.break_after = forget, 100_000
        result = await sb.run("seq 1 200000")
        assert result.truncated
        assert result.ok
        assert LINES.endswith(result.stdout_bytes[-10_000:])


async def test_a_short_run_costs_one_request(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        before = len(node.requests)
        assert (await sb.run("echo hi")).stdout == "hi\n"
        await asyncio.sleep(0.1)
        assert len(node.requests) == before + 1


async def test_a_bound_on_output_below_zero_is_refused(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        with pytest.raises(errors.InvalidArgumentError, match="max_output_bytes"):
            await sb.run("true", max_output_bytes=-1)


async def test_the_end_is_learned_though_somebody_began_to_read_and_stopped(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        process = await sb.exec("cat /dev/zero | head -c 20000000; exit 6")
        assert await process.stdout.read(1) == b"\0"
        assert await process.wait(10) == 6
        rest = 0
        while data := await process.stdout.read(1 << 20):
            rest += len(data)
        assert rest == 20_000_000 - 1
        assert process.stdout.dropped_bytes == 0
