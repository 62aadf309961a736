from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from shoal.errors import (
    DeadlineExceededError,
    ImageError,
    InternalError,
    NodeUnavailableError,
    ResourceExhaustedError,
)
from shoal.node.keeper_client import MAX_PACKET, KeeperClient, KeeperError, KeeperLayers
from shoal.node.lifecycle import Exited
from shoal.node.tests.fakes import until

Answer = Callable[[dict[str, Any], list[int]], dict[str, Any] | None]


class Peer:
    """The keeper's end of the pair, driven by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        await anyio.wait_readable(self.sock)
        data, fds, _, _ = socket.recv_fds(self.sock, MAX_PACKET, 4)
        return json.loads(data), list(fds)

    def send(self, packet: object) -> None:
        self.sock.send(packet if isinstance(packet, bytes) else json.dumps(packet).encode())

    async def serve(self, answer: Answer) -> None:
        while True:
            request, fds = await self.receive()
            reply = answer(request, fds)
            for fd in fds:
                os.close(fd)
            if reply is not None:
                self.send({"id": request["id"], **reply})


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[KeeperClient, Peer]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        async with KeeperClient(ours) as client:
            yield client, Peer(theirs)


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[KeeperClient]:
    async with pair() as (client, peer), anyio.create_task_group() as tasks:
        tasks.start_soon(peer.serve, answer)
        yield client
        tasks.cancel_scope.cancel()


async def test_answers_in_any_order_find_their_callers() -> None:
    async with pair() as (client, peer), anyio.create_task_group() as tasks:
        found: dict[str, str] = {}

        async def create(sandbox: str) -> None:
            made = await client.create(sandbox, generation=1, spec={"a": 1}, deadline=1)
            found[sandbox] = made.socket

        for name in ("sb-1", "sb-2", "sb-3"):
            tasks.start_soon(create, name)
        requests = [(await peer.receive())[0] for _ in range(3)]
        assert requests[0]["op"] == "create"
        assert requests[0]["spec"] == {"a": 1}
        for request in reversed(requests):
            peer.send({"id": request["id"], "ok": {"pid": 1, "socket": f"/{request['sandbox']}"}})
    assert found == {name: f"/{name}" for name in ("sb-1", "sb-2", "sb-3")}


async def test_an_error_keeps_the_keepers_account() -> None:
    def answer(_request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        fault = {
            "code": "syscall_failed",
            "stage": "overlay",
            "call": "fsmount",
            "object": "upper",
            "errno": errno.ENOSPC,
            "message": "fsmount upper: no space",
            "later": "a field of a newer keeper",
        }
        return {"error": fault}

    async with answering(answer) as client:
        with pytest.raises(KeeperError, match="create failed at overlay: fsmount upper") as caught:
            await client.create("sb-a", generation=1, spec={}, deadline=1)
        assert caught.value.is_full
        assert caught.value.details["errno"] == errno.ENOSPC
        assert caught.value.to_problem()["code"] == "internal"


async def test_a_silent_keeper_ends_in_a_deadline_and_its_late_answer_is_dropped() -> None:
    async with pair() as (client, peer):
        with pytest.raises(DeadlineExceededError, match="destroy"):
            await client.destroy("sb-a", deadline=0.02)
        request, _ = await peer.receive()
        peer.send({"id": request["id"], "ok": {}})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(peer.serve, lambda _request, _fds: {"ok": {"layers": []}})
            assert await KeeperLayers(client).list() == []
            tasks.cancel_scope.cancel()


async def test_a_long_list_of_sandboxes_comes_in_pages() -> None:
    ids = [f"sb-{number:04}" for number in range(700)]

    def answer(request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        rest = [one for one in ids if one > request["after"]]
        page = [{"sandbox": one, "pid": 1, "socket": f"/{one}"} for one in rest[:256]]
        more = len(rest) > len(page)
        exited = [] if more else [{"sandbox": "sb-x", "oom_kills": 1, "status": 9}]
        return {"ok": {"sandboxes": page, "exited": exited, "more": more}}

    async with answering(answer) as client:
        held = await client.sandboxes()
    assert list(held.alive) == ids
    assert held.alive["sb-0699"].socket == "/sb-0699"
    assert held.exited == {"sb-x": Exited(oom_kills=1, wait_status=9)}


async def test_events_reach_the_listener_and_its_bugs_do_not_stop_the_reader() -> None:
    async with pair() as (client, peer):
        seen: list[tuple[str, Exited]] = []

        def listen(sandbox: str, event: Exited) -> None:
            seen.append((sandbox, event))
            raise ValueError("a bug")

        client.on_exit = listen
        peer.send({"event": "sandbox_exited", "sandbox": "sb-a", "oom_kills": 2, "status": 9})
        peer.send({"event": "something_new", "x": 1})
        peer.send(b"\xff not json")
        peer.send(b"x" * MAX_PACKET)
        peer.send({"event": "sandbox_exited", "sandbox": "sb-b", "oom_kills": 0, "status": 256})
        await until(lambda: len(seen) == 2)
        assert seen[0] == ("sb-a", Exited(oom_kills=2, wait_status=9))
        assert seen[1][0] == "sb-b"
        assert not client.lost.is_set()


async def test_a_keeper_that_goes_away_fails_every_call() -> None:
    async with pair() as (client, peer), anyio.create_task_group() as tasks:

        async def ask() -> None:
            with pytest.raises(NodeUnavailableError, match="keeper is gone"):
                await client.sandboxes()

        tasks.start_soon(ask)
        await peer.receive()
        peer.sock.close()
        with anyio.fail_after(1):
            await client.lost.wait()
        await ask()


async def test_a_full_socket_queues_in_order_and_loses_no_descriptor(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"content")
    fds_before = set(os.listdir("/proc/self/fd"))
    async with pair() as (client, peer):
        layers = KeeperLayers(client)
        order: list[str] = []

        async def unpack(number: int) -> None:
            with blob.open("rb") as file:
                task = asyncio.ensure_future(
                    layers.unpack(
                        f"tmp-{number}",
                        file.fileno(),
                        length=7,
                        max_bytes=1,
                        max_entries=1,
                        deadline=5,
                    )
                )
                await asyncio.sleep(0.05)
            # The caller's descriptor is closed before the packet may have been sent.
            unpacked = await task
            assert unpacked.diff_id == "ab"

        async with anyio.create_task_group() as tasks:
            for number in range(400):  # more packets than the kernel queues
                tasks.start_soon(unpack, number)
            await anyio.sleep(0.1)
            for _ in range(400):
                request, fds = await peer.receive()
                assert request["op"] == "layer_unpack"
                order.append(request["layer"])
                [fd] = fds
                assert os.pread(fd, 100, 0) == b"content"
                os.close(fd)
                answer = {"diff_id": "ab", "entries": 1, "bytes": 1, "compression": "none"}
                while True:
                    try:
                        peer.send({"id": request["id"], "ok": answer})
                        break
                    except BlockingIOError:
                        await anyio.sleep(0.001)
        assert order == [f"tmp-{number}" for number in range(400)]
    assert set(os.listdir("/proc/self/fd")) == fds_before


async def test_layer_operations() -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        asked.append(request)
        answers: dict[str, dict[str, Any]] = {
            "layer_commit": {"ok": {"existing": True}},
            "layer_list": {"ok": {"layers": ["aa"]}},
            "layer_unpack": {"error": {"code": "bad_layer", "message": "member escapes"}},
        }
        return answers.get(request["op"], {"ok": {}})

    async with answering(answer) as client:
        layers = KeeperLayers(client)
        assert await layers.commit("t", "aa") is True
        assert await layers.list() == ["aa"]
        await layers.discard("t")
        await layers.remove("aa")
        with pytest.raises(ImageError, match="member escapes"):
            await layers.unpack("t", 0, length=None, max_bytes=2, max_entries=3, deadline=1.5)
    assert asked[-1] | {"id": 0} == {
        "id": 0,
        "op": "layer_unpack",
        "layer": "t",
        "max_bytes": 2,
        "max_entries": 3,
        "length": None,
        "deadline_ms": 1500,
    }


async def test_a_full_pool_is_resource_exhausted() -> None:
    fault = {"code": "syscall_failed", "errno": errno.EDQUOT, "message": "write: quota"}
    async with answering(lambda _request, _fds: {"error": fault}) as client:
        with pytest.raises(ResourceExhaustedError):
            await KeeperLayers(client).unpack(
                "t", 0, length=None, max_bytes=2, max_entries=3, deadline=1.5
            )


async def test_an_unpacking_that_the_keeper_gave_up_is_a_deadline() -> None:
    fault = {"code": "deadline_exceeded", "message": "unpacking the layer took too long"}
    async with answering(lambda _request, _fds: {"error": fault}) as client:
        with pytest.raises(DeadlineExceededError, match=r"not unpacked within 1\.5 s"):
            await KeeperLayers(client).unpack(
                "t", 0, length=None, max_bytes=2, max_entries=3, deadline=1.5
            )


async def test_an_answer_that_makes_no_sense_and_a_packet_that_is_too_long() -> None:
    async with answering(lambda _request, _fds: {"ok": {"pid": "x"}}) as client:
        with pytest.raises(InternalError, match="makes no sense"):
            await client.create("sb-a", generation=1, spec={}, deadline=1)
        with pytest.raises(InternalError, match="a packet holds"):
            await client.create("sb-a", generation=1, spec={"x": "y" * MAX_PACKET}, deadline=1)
