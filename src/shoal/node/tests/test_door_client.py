from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from shoal.errors import NodeUnavailableError, StartFailedError, StartTimeoutError
from shoal.node.door_client import DoorClient, Process
from shoal.node.tests.fakes import until
from shoal.types import Reason

PROCESS = Process(env=["A=b"], cwd="/", user="")


class FakeDoorServer:
    """A front door that answers from a table, by operation; None: it stays silent."""

    def __init__(self, path: Path, answers: dict[str, dict[str, Any] | None]) -> None:
        self.path = path
        self.answers = answers
        self.requests: list[dict[str, Any]] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        while line := await reader.readline():
            request = json.loads(line)
            self.requests.append(request)
            answer = self.answers.get(request["op"])
            if answer is not None:
                writer.write(json.dumps({"id": request["id"], **answer}).encode() + b"\n")
        writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self.handle, str(self.path))
        try:
            yield
        finally:
            server.close()
            for writer in self.writers:
                writer.close()
            await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[DoorClient]:
    client = DoorClient(path)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.run)
        yield client
        tasks.cancel_scope.cancel()


READY = {"ok": {"generation": 1, "version": 1, "ready_us": 80}}


async def test_attach_and_detach(tmp_path: Path) -> None:
    door = FakeDoorServer(tmp_path / "door.sock", {"attach": READY, "detach": {"ok": {}}})
    async with door.running(), connected(door.path) as client:
        ready = await client.attach("sb-a", socket="/a", token="t", process=PROCESS, deadline=1)
        assert ready.generation == 1
        await client.detach("sb-a", reason=Reason.OOM)
        assert [one["op"] for one in door.requests] == ["attach", "detach"]
        first = door.requests[0]
        assert first["process"] == {"env": ["A=b"], "cwd": "/", "user": ""}
        assert first["deadline_ms"] == 1000
        assert (first["socket"], first["token"]) == ("/a", "t")
        assert door.requests[1]["reason"] == "oom"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"error": {"code": "start_timeout", "message": "silent"}}, StartTimeoutError),
        ({"error": {"code": "start_failed", "message": "closed"}}, StartFailedError),
        ({"error": {"code": "something"}}, StartFailedError),
        ({"ok": {"generation": "x"}}, StartFailedError),
        ({"ok": {}}, StartFailedError),
        ({}, StartFailedError),
    ],
)
async def test_an_attach_that_fails(
    tmp_path: Path, answer: dict[str, Any], kind: type[Exception]
) -> None:
    door = FakeDoorServer(tmp_path / "door.sock", {"attach": answer})
    async with door.running(), connected(door.path) as client:
        with pytest.raises(kind):
            await client.attach("sb-a", socket="/a", token="t", process=PROCESS, deadline=1)


async def test_what_comes_unasked_reaches_the_listener_or_the_log(tmp_path: Path) -> None:
    door = FakeDoorServer(tmp_path / "door.sock", {"attach": READY})
    lost: list[tuple[str, str]] = []

    def listen(sandbox: str, message: str) -> None:
        lost.append((sandbox, message))
        raise ValueError("a bug")

    async with door.running(), connected(door.path) as client:
        client.on_lost = listen
        await until(lambda: door.writers)
        with capture_logs() as logged:
            for line in (
                {"event": "sandbox_lost", "sandbox": "sb-a", "message": "noise"},
                {"event": "something_new"},
                {"id": None, "error": {"code": "invalid_request", "message": "request: eof"}},
                {"id": "x"},
                {"event": "sandbox_lost", "sandbox": "sb-b", "message": "more"},
            ):
                door.writers[0].write(json.dumps(line).encode() + b"\n")
            await until(lambda: len(lost) == 2)
        assert lost == [("sb-a", "noise"), ("sb-b", "more")]
        assert [one["event"] for one in logged] == [
            "loss_unhandled",
            "door_event_unknown",
            "door_request_refused",
            "door_line_unreadable",
            "loss_unhandled",
        ]
        assert logged[2]["error"] == "request: eof"
        # The reader lives on.
        await client.attach("sb-a", socket="/a", token="t", process=PROCESS, deadline=1)


async def test_no_front_door_within_the_deadline_is_a_start_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.door_client._GRACE", 0.0)
    async with connected(tmp_path / "door.sock") as client:
        with pytest.raises(StartTimeoutError):
            await client.attach("sb-a", socket="/a", token="t", process=PROCESS, deadline=0.03)
        await client.detach("sb-a")  # nobody serves it


async def test_a_front_door_that_comes_late_or_again_is_found_and_announced(tmp_path: Path) -> None:
    path = tmp_path / "door.sock"
    announced: list[int] = []
    async with connected(path) as client:
        client.on_connect = lambda: announced.append(1)
        for _ in range(2):
            door = FakeDoorServer(path, {"attach": READY})
            async with anyio.create_task_group() as tasks:

                async def attach() -> None:
                    with anyio.fail_after(5):
                        await client.attach(
                            "sb-a", socket="/a", token="t", process=PROCESS, deadline=5
                        )

                tasks.start_soon(attach)
                await anyio.sleep(0.02)
                async with door.running():
                    await until(partial(getattr, door, "requests"))
                    await anyio.sleep(0.02)
    assert len(announced) == 2


async def test_a_call_that_waits_fails_when_the_front_door_goes_away(tmp_path: Path) -> None:
    door = FakeDoorServer(tmp_path / "door.sock", {"attach": None})
    async with connected(door.path) as client, anyio.create_task_group() as tasks:

        async def attach() -> None:
            with pytest.raises(NodeUnavailableError):
                await client.attach("sb-a", socket="/a", token="t", process=PROCESS, deadline=5)

        async with door.running():
            tasks.start_soon(attach)
            await until(lambda: door.requests)
