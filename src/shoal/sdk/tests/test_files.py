from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from shoal import AsyncSandbox, FileEvent, Sandbox, errors
from shoal.sdk._frames import Kind, frame
from shoal.sdk._pack import measure
from shoal.sdk.tests.fake_node import FakeNode

BIG = bytes(range(256)) * 20_000


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    async for _ in pieces:
        pass


async def test_a_file_is_read_piece_by_piece(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        await sb.files.write("/a", BIG)
        pieces = [piece async for piece in sb.files.read_stream("/a")]
        assert b"".join(pieces) == BIG
        assert all(pieces)
        assert len(pieces) > 1
        part = sb.files.read_stream("/a", offset=5, length=7)
        assert b"".join([piece async for piece in part]) == BIG[5:12]
        with pytest.raises(errors.PathNotFoundError):
            await anext(sb.files.read_stream("/nothing"))
        stream = sb.files.read_stream("/a")
        await anext(stream)
        await stream.aclose()


async def test_a_sandbox_that_ends_while_a_file_is_read_says_so(node: FakeNode) -> None:
    sb = await AsyncSandbox.create()
    with (node.sandboxes[sb.id].root / "huge").open("wb") as file:
        file.truncate(1 << 30)
    stream = sb.files.read_stream("/huge")
    assert await anext(stream)
    await sb.terminate()
    with pytest.raises(errors.SandboxGoneError) as caught:
        await _drain(stream)
    assert caught.value.details["reason"] == "terminated"


async def test_what_stalls_is_given_up(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:

    async def stall(request: web.Request) -> web.StreamResponse | None:
        if not request.path.endswith("/content"):
            return None
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(frame(Kind.STDOUT, b"some"))
        await asyncio.sleep(30)
        return response

    monkeypatch.setattr("shoal.sdk._async.files.STALL_DEADLINE", 0.1)
    async with await AsyncSandbox.create() as sb:
        node.answer = stall
        stream = sb.files.read_stream("/x")
        assert await anext(stream) == b"some"
        with pytest.raises(errors.DeadlineExceededError, match="nothing came"):
            await anext(stream)


async def test_a_file_is_written_from_whatever_gives_bytes(node: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(BIG)

    async def later() -> AsyncIterator[bytes]:
        for at in range(0, len(BIG), 100_000):
            await asyncio.sleep(0)
            yield BIG[at : at + 100_000]

    async with await AsyncSandbox.create() as sb:
        cut = [BIG[:10], b"", memoryview(BIG)[10:]]
        with (tmp_path / "local").open("rb") as file:
            for data in (BIG, bytearray(BIG), cut, iter(cut), later(), file, io.BytesIO(BIG)):
                assert (await sb.files.write("/d/x", data)).size == len(BIG)  # type: ignore[arg-type]  # a memoryview too
                assert await sb.files.read("/d/x") == BIG
                await sb.files.remove("/d/x")
        assert (await sb.files.write("/empty", [])).size == 0
        await sb.files.write("/copy", sb.files.read_stream("/empty"))


async def test_a_write_that_fails_on_the_way_leaves_what_was_there(node: FakeNode) -> None:
    def broken() -> Iterator[bytes]:
        yield BIG
        raise ZeroDivisionError("of the caller's own")

    async with await AsyncSandbox.create() as sb:
        await sb.files.write("/x", b"before")
        with pytest.raises(ZeroDivisionError, match="own"):
            await sb.files.write("/x", broken())
        for wrong in (["text"], io.StringIO("text"), [1], 7):
            with pytest.raises(errors.InvalidArgumentError) as caught:
                await sb.files.write("/x", wrong)  # type: ignore[arg-type]  # what it is about
            assert caught.value.hint
        assert await sb.files.read("/x") == b"before"


async def test_modes_and_owners_are_set(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        await sb.files.write("/x", b"")
        assert (await sb.files.chmod("/x", 0o751)).mode == 0o751
        assert (await sb.files.chown("/x", "7")).uid == 7
        assert "mode" not in node.requests[-1]
        with pytest.raises(errors.PathNotFoundError):
            await sb.files.chmod("/nothing", 0o600)


async def test_progress_counts_what_the_files_hold(node: FakeNode, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(50):
        (tree / f"{number}").write_bytes(bytes(number))
    (tree / "big").write_bytes(bytes(5 << 20))
    up: list[int] = []
    down: list[int] = []
    async with await AsyncSandbox.create() as sb:
        await sb.files.upload(tree, "/tree", progress=up.append)
        await sb.files.download("/tree", tmp_path / "back", progress=down.append)
    for told in (up, down):
        assert told == sorted(told)
        assert told[-1] == measure(str(tree))
        assert len(told) > 1


def _event(kind: str, path: str, **more: object) -> dict[str, object]:
    return {"type": kind, "path": path, "directory": False, **more}


async def test_a_watch_tells_in_order_and_ends_with_its_block(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:
        async with sb.files.watch("/") as events:
            assert "recursive=true" in node.requests[-1]
            node.tell(_event("create", "/a", directory=True))
            node.tell(_event("rename", "/a", target="/b"))
            node.tell(_event("chmod", "/caf\ufffd", path_b64="L2NhZuk="))
            assert await anext(events) == FileEvent(kind="create", path="/a", directory=True)
            assert await anext(events) == FileEvent(kind="rename", path="/a", target="/b")
            assert (await anext(events)).path == "/caf\ufffd"
            waiting = asyncio.ensure_future(anext(events, None))
            await asyncio.sleep(0)
        assert await waiting is None
        assert [event async for event in events] == []


async def test_giving_up_on_one_event_loses_none(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb, sb.files.watch("/", recursive=False) as events:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 0.05)
        node.tell(_event("write", "/x"))
        assert (await anext(events)).kind == "write"


async def test_a_watch_whose_connection_broke_goes_on_and_tells_of_the_gap(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb, sb.files.watch("/") as events:
        node.tell(_event("write", "/x"))
        node.tell(None)
        assert (await anext(events)).path == "/x"
        gap = await anext(events)
        assert (gap.kind, gap.path) == ("overflow", "/")
        node.tell(_event("write", "/y"))
        assert (await anext(events)).path == "/y"


async def test_a_watch_of_nothing_and_one_whose_sandbox_ends_say_why(node: FakeNode) -> None:
    sb = await AsyncSandbox.create()
    with pytest.raises(errors.PathNotFoundError):
        async with sb.files.watch("/nothing"):
            pass
    async with sb.files.watch("/") as events:
        await sb.terminate()
        with pytest.raises(errors.SandboxGoneError):
            await anext(events)


async def test_many_events_are_taken_when_they_are_asked_for(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb, sb.files.watch("/") as events:
        for number in range(5000):
            node.tell(_event("write", f"/{number}"))
        await asyncio.sleep(0.2)
        assert len(events._events) <= 1024
        assert [(await anext(events)).path for _ in range(5000)] == [f"/{n}" for n in range(5000)]


def test_streams_and_watches_in_sync(node: FakeNode) -> None:
    with Sandbox.create() as one, Sandbox.create() as two:
        one.files.write("/a", BIG)
        two.files.write("/b", one.files.read_stream("/a"))
        assert b"".join(two.files.read_stream("/b")) == BIG
        stream = two.files.read_stream("/b")
        next(stream)
        del stream
        with pytest.raises(errors.PathNotFoundError):
            next(two.files.read_stream("/nothing"))
        with two.files.watch("/") as events:
            node.tell(_event("write", "/b"))
            assert next(events).path == "/b"
            thread = threading.Timer(0.1, events.__exit__, (None, None, None))
            thread.start()
            assert list(events) == []
            thread.join()
        assert two.files.chmod("/b", 0o600).mode == 0o600


async def test_what_could_not_be_read_is_said_by_a_download(node: FakeNode, tmp_path: Path) -> None:
    async with await AsyncSandbox.create() as sb:
        await sb.files.write("/tree/file", b"x")
        node.archive_error = errors.PathError("mem: input/output error", errno=5)
        with pytest.raises(errors.PathError, match="input/output"):
            await sb.files.download("/tree", tmp_path / "tree")


async def test_there_is_nothing_below_a_file(node: FakeNode) -> None:
    async with await AsyncSandbox.create() as sb:

        async def refuse(request: web.Request) -> web.StreamResponse | None:
            if not request.path.endswith("/info"):
                return None
            raise errors.PathError("/file/x: not a directory", errno=error)

        node.answer, error = refuse, 20
        assert not await sb.files.exists("/file/x")
        error = 13
        with pytest.raises(errors.PathError):
            await sb.files.exists("/file/x")


@pytest.mark.parametrize("path", ["", "relative", "./x", "/t/fi\0le"])
async def test_what_is_no_path_in_a_sandbox_is_refused_before_anything_is_copied(
    node: FakeNode, tmp_path: Path, path: str
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    async with await AsyncSandbox.create() as sb:
        before = len(node.requests)
        with pytest.raises(errors.InvalidArgumentError):
            await sb.files.upload(tmp_path / "file", path)
        with pytest.raises(errors.InvalidArgumentError):
            await sb.files.download(path, tmp_path / "there")
        assert len(node.requests) == before
