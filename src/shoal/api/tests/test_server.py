"""The server process as the keeper starts it, with a keeper and a front door that hold nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import sqlite3
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest

from shoal.node.keeper_client import MAX_PACKET
from shoal.node.tests.fakes import until
from shoal.settings import Settings
from shoal.types import SandboxSpec


class KeeperPeer:
    """Answers the whole closed list of operations from memory."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.held: set[str] = set()
        self.layers: set[str] = set()
        self.unpacked: dict[str, str] = {}
        self.operations: list[str] = []
        self.pool_bytes = 64 << 30
        self.listen: str | None = None

    async def serve(self) -> None:
        while True:
            await anyio.wait_readable(self.sock)
            data, fds, _, _ = socket.recv_fds(self.sock, MAX_PACKET, 1)
            if not data:
                return
            request = json.loads(data)
            self.operations.append(request["op"])
            answer = self.answer(request, fds)
            for fd in fds:
                os.close(fd)
            self.sock.send(json.dumps({"id": request["id"], "ok": answer}).encode())

    def answer(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        match request["op"]:
            case "hello":
                pool = {"total_bytes": self.pool_bytes, "free_bytes": self.pool_bytes}
                return {
                    "version": "0",
                    "kernel": "6.18",
                    "cgroup": "v1",
                    "pool": pool,
                    "walls": {"x": 1},
                    "listen": self.listen,
                    "id_blocks": [0] if "claim_ids" in self.operations else [],
                    "ids_per_block": 64,
                }
            case "claim_ids":
                return {"first": 0, "count": 64}
            case "create":
                self.held.add(request["sandbox"])
                assert request["spec"]["root"]["layers"]
                return {"pid": 1, "socket": f"/agents/{request['sandbox']}.sock"}
            case "destroy":
                self.held.discard(request["sandbox"])
            case "list":
                alive = [
                    {
                        "sandbox": one,
                        "pid": 1,
                        "generation": 1,
                        "socket": f"/agents/{one}.sock",
                    }
                    for one in sorted(self.held)
                ]
                return {"sandboxes": alive, "exited": [], "more": False}
            case "layer_unpack":
                with os.fdopen(os.dup(fds[0]), "rb") as blob:
                    content = (
                        blob.read() if request["length"] is None else blob.read(request["length"])
                    )
                digest = hashlib.sha256(content).hexdigest()
                self.unpacked[request["layer"]] = digest
                return {
                    "diff_id": digest,
                    "entries": 1,
                    "bytes": len(content),
                    "compression": "none",
                }
            case "layer_commit":
                existing = request["diff_id"] in self.layers
                self.layers.add(request["diff_id"])
                return {"existing": existing}
            case "layer_list":
                return {"layers": sorted(self.layers)}
            case "layer_remove":
                self.layers.discard(request["diff_id"])
        return {}


async def _door(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            request = json.loads(line)
            ready = {"generation": 1, "version": 1, "ready_us": 1}
            answer = ready if request["op"] == "attach" else {}
            writer.write(json.dumps({"id": request["id"], "ok": answer}).encode() + b"\n")
    writer.close()


class Server:
    """A running server process and its surroundings."""

    def __init__(
        self, directory: Path, keeper: KeeperPeer, process: asyncio.subprocess.Process
    ) -> None:
        self.directory = directory
        self.keeper = keeper
        self.process = process

    async def exit_code(self) -> int:
        with anyio.fail_after(20):
            return await self.process.wait()

    async def log(self) -> list[dict[str, Any]]:
        assert self.process.stderr is not None
        lines = (await self.process.stderr.read()).decode().splitlines()
        return [json.loads(line) for line in lines]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.UnixConnector(path=str(self.directory / "run/server.sock"), limit=0)
        async with aiohttp.ClientSession("http://node", connector=connector) as session:
            yield session

    def records(self) -> dict[str, tuple[str, str | None]]:
        with contextlib.closing(sqlite3.connect(self.directory / "data/state.db")) as db:
            rows = db.execute("SELECT id, status, reason FROM sandboxes").fetchall()
        return {row[0]: (row[1], row[2]) for row in rows}


@asynccontextmanager
async def server(
    directory: Path, *options: str, keeper: KeeperPeer | None = None
) -> AsyncIterator[Server]:
    run = directory / "run"
    (directory / "data").mkdir(exist_ok=True)
    run.mkdir(exist_ok=True)
    for name in ("server.sock", "door.sock"):
        (run / name).unlink(missing_ok=True)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if keeper is None:
        keeper = KeeperPeer(ours)
    else:
        keeper.sock = ours
        ours.setblocking(False)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(run / "server.sock"))
    listener.listen(128)
    door = await asyncio.start_unix_server(_door, str(run / "door.sock"))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", "-m", "shoal.node"),
        *("--data-dir", str(directory / "data"), "--run-dir", str(run), *options),
        env={
            "PYTHONPATH": ":".join(entry for entry in sys.path if entry),
            "SHOAL_KEEPER_FD": str(theirs.fileno()),
            "SHOAL_SERVER_FD": str(listener.fileno()),
        },
        pass_fds=[theirs.fileno(), listener.fileno()],
        stderr=asyncio.subprocess.PIPE,
    )
    theirs.close()
    made = Server(directory, keeper, process)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keeper.serve)
            yield made
            tasks.cancel_scope.cancel()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        door.close()
        listener.close()
        ours.close()


async def add_image(client: aiohttp.ClientSession, name: str = "base") -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in ("bin", "etc"):
            member = tarfile.TarInfo(path)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
    buffer.seek(0)
    async with client.post(f"/v1/images?name={name}&format=rootfs", data=buffer) as response:
        assert response.status == 201, await response.text()


async def create(client: aiohttp.ClientSession, **spec: Any) -> str:
    async with client.post("/v1/sandboxes", json=spec) as response:
        assert response.status == 201, await response.text()
        return str((await response.json())["sandbox"]["id"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_sandboxes_first_and_exits_with_0(
    tmp_path: Path, number: int
) -> None:
    async with server(tmp_path) as one, one.client() as client:
        await add_image(client)
        made = {await create(client) for _ in range(5)}
        assert one.keeper.held == made
        one.process.send_signal(number)
        assert await one.exit_code() == 0
        assert not one.keeper.held
        assert one.records() == dict.fromkeys(made, ("stopped", "host_shutdown"))
        events = [line["event"] for line in await one.log()]
        assert events[-1] == "server_stopped"
        assert "server_ready" in events


@pytest.mark.parametrize(
    ("listen", "options", "template"),
    [
        (None, (), None),
        ("127.0.0.1:41234", (), "http://{port}-{id}.localhost:41234"),
        ("[::1]:80", ("--port-domain", "sb.test"), "http://{port}-{id}.sb.test:80"),
    ],
)
async def test_a_sandbox_tells_where_its_ports_are(
    tmp_path: Path, listen: str | None, options: tuple[str, ...], template: str | None
) -> None:
    async with server(tmp_path, *options) as one, one.client() as client:
        one.keeper.listen = listen
        await add_image(client)
        async with client.post("/v1/sandboxes", json={}) as response:
            assert (await response.json())["url_template"] == template
        one.process.terminate()
        assert await one.exit_code() == 0


async def test_a_stop_over_http_is_answered_and_exits_with_0(tmp_path: Path) -> None:
    async with server(tmp_path) as one, one.client() as client:
        await add_image(client)
        await create(client)
        async with client.post("/v1/node/stop") as response:
            assert response.status == 409
        async with client.post("/v1/node/stop?force=true") as response:
            assert response.status == 202
        assert await one.exit_code() == 0
        assert not one.keeper.held


async def test_an_idle_node_leaves_and_a_busy_one_stays(tmp_path: Path) -> None:
    async with server(tmp_path, "--idle-exit", "0.6") as one, one.client() as client:
        await add_image(client)
        sandbox = await create(client, timeout=1.5)
        assert await one.exit_code() == 0
        # Its own timeout ended it, long after the node would have left if it were idle.
        assert one.records() == {sandbox: ("stopped", "timeout")}
        events = [line["event"] for line in await one.log()]
        assert events.index("sandbox_stopped") < events.index("idle_for_long")


async def test_requests_that_meet_the_exit_are_whole_or_refused(tmp_path: Path) -> None:
    async with server(tmp_path) as one, one.client() as client:
        await add_image(client)
        answers: list[int | str] = []
        stopped = anyio.Event()

        async def ask() -> None:
            while not stopped.is_set():
                try:
                    async with client.post("/v1/sandboxes", json={}) as response:
                        body = await response.json(content_type=None)
                        assert body["sandbox"]["id"] if response.status == 201 else body["code"]
                        answers.append(response.status)
                except aiohttp.ClientConnectionError:
                    answers.append("refused")
                    return

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(ask)
            await until(lambda: len(answers) > 20)
            one.process.terminate()
            assert await one.exit_code() == 0
            stopped.set()
            tasks.cancel_scope.cancel()
        assert set(answers) <= {201, 410, 503, "refused"}
        assert not one.keeper.held
        assert {status for status, _ in one.records().values()} == {"stopped"}


async def test_a_keeper_that_dies_ends_the_server_with_1(tmp_path: Path) -> None:
    async with server(tmp_path) as one, one.client() as client:
        await add_image(client)
        one.keeper.sock.shutdown(socket.SHUT_RDWR)
        assert await one.exit_code() == 1


async def test_a_server_that_was_killed_finds_its_sandboxes_again(tmp_path: Path) -> None:
    async with server(tmp_path) as one, one.client() as client:
        await add_image(client)
        made = {await create(client, timeout=5) for _ in range(3)}
        one.process.kill()
        await one.exit_code()
    assert set(one.records().values()) == {("running", None)}
    lost = min(made)
    one.keeper.held.remove(lost)
    one.keeper.held.add("sb-nobodys")
    async with server(tmp_path, keeper=one.keeper) as two, two.client() as client:
        async with client.get("/v1/sandboxes?all=true") as response:
            page = await response.json()
        found = {each["id"]: (each["status"], each["reason"]) for each in page["sandboxes"]}
        assert found == dict.fromkeys(made, ("running", None)) | {lost: ("stopped", "lost")}
        assert two.keeper.held == made - {lost}
        async with client.post(f"/v1/sandboxes/{lost}/execs", json={}) as response:
            problem = await response.json(content_type=None)
            assert (response.status, problem["details"]["reason"]) == (410, "lost")
        first, second = made - {lost}
        async with client.delete(f"/v1/sandboxes/{first}") as response:
            assert (await response.json())["reason"] == "terminated"
        await create(client)
        # The rest of its five seconds still ends it.
        await until(lambda: two.records()[second] == ("stopped", "timeout"), within=10)
        two.process.terminate()
        assert await two.exit_code() == 0


async def test_state_of_a_newer_shoal_is_refused_before_the_node_is_ready(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "data/state.db")) as db:
        db.execute("PRAGMA user_version = 1000")
    async with server(tmp_path) as one:
        assert await one.exit_code() == 1
        [line] = await one.log()
        assert line["event"] == "server_failed"
        assert "1000" in line["error"]
        assert line["hint"]
        assert "hello" not in one.keeper.operations


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (("--start-timeout", "never"), 1, "start_timeout"),
        (("--max-sandboxes", "0"), 1, "max_sandboxes"),
        (("--overcommit-cpu", "nan"), 1, "overcommit_cpu"),
        (("--listen", "0.0.0.0:80"), 1, "loopback"),
        (("--port-domain", "a b"), 1, "port_domain"),
        (("--no-such-option", "1"), 2, "no-such-option"),
    ],
)
async def test_an_option_that_makes_no_sense(
    tmp_path: Path, options: tuple[str, ...], code: int, word: str
) -> None:
    async with server(tmp_path, *options) as one:
        assert one.process.stderr is not None
        text = (await one.process.stderr.read()).decode()
        assert await one.exit_code() == code
        assert word in text
        assert "Traceback" not in text


LIBRARY = """
import logging, sys, warnings
from shoal.api.server import configure_log
configure_log("info", sys.stderr)
configure_log("debug", sys.stderr)
token = "".join(["sec", "ret"])
try:
    token.index("x")
except ValueError:
    logging.getLogger("aiohttp.server").exception("error %s a request", "handling")
logging.getLogger("asyncio").info("of no importance")
warnings.warn("old")
"""


async def test_what_libraries_log_is_a_line_of_json_with_message_and_traceback() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LIBRARY),
        env={"PYTHONPATH": ":".join(entry for entry in sys.path if entry)},
        stderr=asyncio.subprocess.PIPE,
    )
    _, text = await process.communicate()
    assert process.returncode == 0
    failed, warned = (json.loads(line) for line in text.decode().splitlines())
    assert (failed["logger"], failed["level"]) == ("aiohttp.server", "error")
    assert failed["event"] == "error handling a request"
    assert failed["timestamp"]
    assert "ValueError: substring not found" in failed["exception"]
    assert "Traceback" in failed["exception"]
    assert "secret" not in text.decode()
    assert "UserWarning: old" in warned["event"]


def test_the_defaults_of_the_settings_are_those_of_the_spec(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    settings = Settings()
    spec = SandboxSpec()
    names = [name for name in Settings.model_fields if name.startswith("default_")]
    assert len(names) == 6
    for name in names:
        assert getattr(settings, name) == getattr(spec, name.removeprefix("default_")), name


async def test_without_a_keeper_it_says_who_starts_it(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shoal.node", "--data-dir", str(tmp_path)),
        env={"PYTHONPATH": ":".join(entry for entry in sys.path if entry)},
        stderr=asyncio.subprocess.PIPE,
    )
    _, text = await process.communicate()
    assert process.returncode == 1
    assert "shoal serve" in text.decode()
