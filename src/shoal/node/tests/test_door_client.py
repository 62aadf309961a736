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
from shoal.node.door_client import DoorClient, Ended, Probed, Process
from shoal.node.tests.fakes import until
from shoal.types import Outcome, Ready, Reason

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
        ready = await client.attach(
            "sb-a", socket="/a", token="t", process=PROCESS, public_ports=[], deadline=1
        )
        assert ready.generation == 1
        await client.detach("sb-a", reason=Reason.OOM)
        assert [one["op"] for one in door.requests] == ["attach", "detach"]
        first = door.requests[0]
        assert first["process"] == {"env": ["A=b"], "cwd": "/", "user": ""}
        assert first["deadline_ms"] == 1000
        assert (first["socket"], first["token"]) == ("/a", "t")
        assert "public_ports" not in first
        assert door.requests[1]["reason"] == "oom"


async def test_public_ports_are_told_when_attaching_and_afterwards(tmp_path: Path) -> None:
    door = FakeDoorServer(tmp_path / "door.sock", {"attach": READY, "ports": {"ok": {}}})
    async with door.running(), connected(door.path) as client:
        await client.attach(
            "sb-a", socket="/a", token="t", process=PROCESS, public_ports=[80, 443], deadline=1
        )
        await client.publish("sb-a", [80])
        await client.publish("sb-a", [])
        assert door.requests[0]["public_ports"] == [80, 443]
        assert [one | {"id": 0} for one in door.requests[1:]] == [
            {"id": 0, "op": "ports", "sandbox": "sb-a", "public_ports": [80]},
            {"id": 0, "op": "ports", "sandbox": "sb-a", "public_ports": []},
        ]
        door.answers["ports"] = {"error": {"code": "unknown_sandbox", "message": "no sb-a"}}
        with pytest.raises(NodeUnavailableError, match="no sb-a"):
            await client.publish("sb-a", [80])


async def test_a_publish_waits_for_a_silent_front_door_only_so_long_and_for_none_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.door_client._QUICK", 0.03)
    door = FakeDoorServer(tmp_path / "door.sock", {"ports": None})
    async with connected(door.path) as client:
        await client.publish("sb-a", [80])
        async with door.running():
            await until(lambda: door.writers)
            with pytest.raises(NodeUnavailableError, match="silent"):
                await client.publish("sb-a", [80])


async def test_a_main_command_is_started(tmp_path: Path) -> None:
    door = FakeDoorServer(tmp_path / "door.sock", {"exec": {"ok": {"pid": 7}}})
    async with door.running(), connected(door.path) as client:
        await client.exec("sb-a", "main", ["sleep", "9"], deadline=1)
        [request] = door.requests
        assert request | {"id": 0} == {
            "id": 0,
            "op": "exec",
            "sandbox": "sb-a",
            "exec_id": "main",
            "argv": ["sleep", "9"],
            "deadline_ms": 1000,
        }


@pytest.mark.parametrize(
    ("error", "details", "infra", "advice"),
    [
        (
            {"code": "not_started", "message": "exec: ENOENT", "errno": 2, "stage": "exec"},
            {"stage": "main", "errno": 2, "exec_stage": "exec"},
            False,
            "PATH",
        ),
        (
            {"code": "not_started", "message": "exec: EACCES", "errno": 13, "stage": "exec"},
            {"stage": "main", "errno": 13, "exec_stage": "exec"},
            False,
            "chmod",
        ),
        (
            {"code": "not_started", "message": "cwd: ENOTDIR"},
            {"stage": "main"},
            False,
            "try it with exec",
        ),
        ({"code": "unknown_sandbox", "message": "gone"}, {"stage": "main"}, True, ""),
    ],
)
async def test_a_main_command_that_does_not_start_says_why(
    tmp_path: Path, error: dict[str, Any], details: dict[str, Any], infra: bool, advice: str
) -> None:
    door = FakeDoorServer(tmp_path / "door.sock", {"exec": {"error": error}})
    async with door.running(), connected(door.path) as client:
        with pytest.raises(StartFailedError, match=error["message"]) as caught:
            await client.exec("sb-a", "main", ["nope"], deadline=1)
        assert (caught.value.details, caught.value.is_infra) == (details, infra)
        assert advice in caught.value.hint


async def test_a_main_command_of_which_nothing_is_heard_is_a_start_timeout(tmp_path: Path) -> None:
    door = FakeDoorServer(tmp_path / "door.sock", {"exec": None})
    async with door.running(), connected(door.path) as client:
        with pytest.raises(StartTimeoutError, match=r"within 0\.03 s") as caught:
            await client.exec("sb-a", "main", ["sleep"], deadline=0.03)
        assert (caught.value.details, caught.value.is_infra) == ({"stage": "main"}, True)


@pytest.mark.parametrize(
    ("ready", "probe"),
    [
        (Ready.on_port(80), {"port": 80}),
        (Ready.on_http(80, "/health"), {"port": 80, "path": "/health"}),
        (Ready.on_command(["pg_isready", "-q"]), {"command": ["pg_isready", "-q"]}),
    ],
)
async def test_a_probe_is_one_question_and_one_answer(
    tmp_path: Path, ready: Ready, probe: dict[str, Any]
) -> None:
    over = {"outcome": "signaled", "exit_code": None, "signal": 11, "stderr_tail": "ouch\n"}
    door = FakeDoorServer(
        tmp_path / "door.sock", {"probe": {"ok": {"ready": True, "detail": "", "ended": None}}}
    )
    async with door.running(), connected(door.path) as client:
        assert await client.probe("sb-a", ready, main=None, deadline=0.5) == Probed(ready=True)
        door.answers["probe"] = {"ok": {"ready": False, "detail": "refused", "ended": over}}
        assert await client.probe("sb-a", ready, main="main", deadline=0.5) == Probed(
            ready=False,
            detail="refused",
            ended=Ended(outcome=Outcome.SIGNALED, signal=11, stderr_tail="ouch\n"),
        )
        asked = {"op": "probe", "sandbox": "sb-a", "probe": probe, "deadline_ms": 500}
        assert [one | {"id": 0} for one in door.requests] == [
            {"id": 0, "main": None, **asked},
            {"id": 0, "main": "main", **asked},
        ]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"error": {"code": "unknown_sandbox", "message": "no sb-a"}}, StartFailedError),
        ({"ok": {"ready": "perhaps"}}, StartFailedError),
        ({"ok": {"ready": False, "ended": {"outcome": "bored"}}}, StartFailedError),
        (None, StartTimeoutError),
    ],
)
async def test_a_probe_that_cannot_be_made_is_an_error_and_no_no(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: dict[str, Any] | None,
    kind: type[StartFailedError],
) -> None:
    monkeypatch.setattr("shoal.node.door_client._PROBE_GRACE", 0.0)
    door = FakeDoorServer(tmp_path / "door.sock", {"probe": answer})
    async with door.running(), connected(door.path) as client:
        deadline = 0.03 if answer is None else 5.0
        with pytest.raises(kind) as caught:
            await client.probe("sb-a", Ready.on_port(80), main=None, deadline=deadline)
        assert caught.value.details["stage"] == "ready"
        assert caught.value.is_infra


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
            await client.attach(
                "sb-a", socket="/a", token="t", process=PROCESS, public_ports=[], deadline=1
            )


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
        await client.attach(
            "sb-a", socket="/a", token="t", process=PROCESS, public_ports=[], deadline=1
        )


async def test_no_front_door_within_the_deadline_is_a_start_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.door_client._GRACE", 0.0)
    async with connected(tmp_path / "door.sock") as client:
        with pytest.raises(StartTimeoutError):
            await client.attach(
                "sb-a", socket="/a", token="t", process=PROCESS, public_ports=[], deadline=0.03
            )
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
                            "sb-a",
                            socket="/a",
                            token="t",
                            process=PROCESS,
                            public_ports=[],
                            deadline=5,
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
                await client.attach(
                    "sb-a", socket="/a", token="t", process=PROCESS, public_ports=[], deadline=5
                )

        async with door.running():
            tasks.start_soon(attach)
            await until(lambda: door.requests)
