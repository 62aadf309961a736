from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer

from shoal import types
from shoal.api.app import Node, build_app
from shoal.api.problems import Activity
from shoal.api.tests.fakes import FakeShelf
from shoal.errors import ShoalError, StartFailedError, from_problem
from shoal.node.door_client import Ended, Probed
from shoal.node.lifecycle import Exited
from shoal.node.tests.fakes import World, until, world


class Api:
    """A control plane among fakes, and a client of it."""

    def __init__(self, one: World, shelf: FakeShelf, client: Any, activity: Activity) -> None:
        self.world = one
        self.shelf = shelf
        self.client = client
        self.activity = activity
        self.stops = 0

    async def call(
        self, method: str, path: str, body: object = None, **more: Any
    ) -> tuple[int, Any]:
        if body is not None:
            raw_body = body if isinstance(body, bytes) else msgspec.json.encode(body)
            more["data"] = io.BytesIO(raw_body)
        async with self.client.request(method, path, **more) as response:
            raw = await response.read()
            if response.status >= 400:
                assert response.content_type == "application/problem+json"
                problem = msgspec.json.decode(raw)
                assert problem["status"] == response.status
                assert problem["code"]
                assert "Traceback" not in raw.decode()
            return response.status, msgspec.json.decode(raw) if raw else None

    async def error(self, method: str, path: str, body: object = None, **more: Any) -> ShoalError:
        status, problem = await self.call(method, path, body, **more)
        assert status >= 400
        return from_problem(problem)


@asynccontextmanager
async def api(tmp_path: Path, **changes: Any) -> AsyncIterator[Api]:
    spool = tmp_path / "spool"
    spool.mkdir()
    async with world(tmp_path) as one:
        shelf = FakeShelf(spool)
        activity = Activity()

        def stop() -> None:
            made.stops += 1

        node = Node(
            engine=one.engine,
            images=shelf,
            stop=stop,
            version="1",
            walls={"runtime": "native"},
            **changes,
        )
        server = TestServer(build_app(node, activity), handler_cancellation=True)
        async with TestClient(server) as client:
            made = Api(one, shelf, client, activity)
            yield made
        assert activity.in_flight == 0
        assert list(spool.iterdir()) == []


async def test_a_sandbox_over_http(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        status, made = await one.call("POST", "/v1/sandboxes", {"labels": {"a": "b"}, "cpu": 2})
        assert status == 201
        access = msgspec.convert(made, types.SandboxAccess)
        sandbox = access.sandbox.id
        assert access.sandbox.cpu == 2.0
        assert (await one.call("GET", f"/v1/sandboxes/{sandbox}"))[1] == made["sandbox"]
        assert (await one.call("POST", f"/v1/sandboxes/{sandbox}/connect"))[1] == made
        for query in ("", "?label=a=b", "?all=true&label=a=b&limit=5", "?all=false"):
            status, page = await one.call("GET", f"/v1/sandboxes{query}")
            assert [each["id"] for each in page["sandboxes"]] == [sandbox]
        assert (await one.call("GET", "/v1/sandboxes?label=a=c"))[1] == {"sandboxes": []}

        status, ended = await one.call("DELETE", f"/v1/sandboxes/{sandbox}")
        assert (status, ended["status"], ended["reason"]) == (200, "stopped", "terminated")
        assert await one.call("DELETE", f"/v1/sandboxes/{sandbox}") == (200, ended)
        assert (await one.call("GET", f"/v1/sandboxes/{sandbox}"))[1] == ended
        assert (await one.call("GET", "/v1/sandboxes"))[1] == {"sandboxes": []}
        assert (await one.call("GET", "/v1/sandboxes?all=1"))[1] == {"sandboxes": [ended]}
        error = await one.error("POST", f"/v1/sandboxes/{sandbox}/connect")
        assert (error.code, error.details["reason"]) == ("sandbox_gone", "terminated")


BAD_SPECS: list[tuple[bytes, str, str]] = [
    (b"", "empty", "{}"),
    (b"  \n", "empty", "{}"),
    (b"{", "not JSON", ""),
    (b"[]", "expected", ""),
    (b"null", "expected", ""),
    (b'"x"', "expected", ""),
    (b"\xff\xfe", "JSON", ""),
    (b'{"image": "\xff"}', "", ""),
    (b'{"cpu": NaN}', "JSON", ""),
    (b'{"cpu": 1e999}', "", ""),
    (b'{"memory_mb": 5}', "memory_mb", "did you mean memory_mib?"),
    (b'{"imgae": "base"}', "imgae", "did you mean image?"),
    (b'{"zzz": 1}', "zzz", "known: command, cpu"),
    (b'{"cpu": "1"}', "cpu", ""),
    (b'{"cpu": true}', "cpu", ""),
    (b'{"cpu": null}', "cpu", ""),
    (b'{"memory_mib": 1.5}', "memory_mib", ""),
    (b'{"memory_mib": 99999999999999999999999}', "memory_mib", ""),
    (b'{"network": "open"}', "network", "one of: none"),
    (b'{"runtime": "gvisor"}', "runtime", "one of: native"),
    (b'{"env": {"A": 1}}', "env", ""),
    (b'{"env": ["A=b"]}', "env", ""),
    (b'{"labels": {"a": null}}', "labels", ""),
    (b'{"cpu": 0}', "cpu must be above 0", ""),
    (b'{"cpu": -1}', "cpu must be above 0", ""),
    (b'{"cpu": 64}', "this host has: 4 CPUs", "4 or less"),
    (b'{"memory_mib": 0}', "memory_mib", ""),
    (b'{"memory_mib": 8193}', "8192", "8192 or less"),
    (b'{"disk_mib": -5}', "disk_mib", ""),
    (b'{"pids": 0}', "pids", ""),
    (b'{"timeout": 0}', "timeout", ""),
    (b'{"timeout": 1e9}', "timeout", ""),
    (b'{"user": "4294967296"}', "user", ""),
    (b'{"workdir": "a"}', "workdir", ""),
    (b'{"env": {"A": "\\u0000"}}', "NUL", ""),
    (b"[" * 100_000, "", ""),
]


@pytest.mark.parametrize(("body", "message", "hint"), BAD_SPECS)
async def test_a_bad_spec_is_named_and_nothing_is_done(
    tmp_path: Path, body: bytes, message: str, hint: str
) -> None:
    async with api(tmp_path) as one:
        error = await one.error("POST", "/v1/sandboxes", body)
        assert error.code == "invalid_argument"
        assert message in error.message
        assert "\n" not in error.message
        assert len(error.message) < 500
        assert hint in error.hint
        assert one.world.steps.done == []
        assert one.world.state.all() == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v2/sandboxes", 404, "not_found"),
        ("PUT", "/v1/sandboxes", 405, "invalid_argument"),
        ("PATCH", "/v1/sandboxes/sb-x", 405, "invalid_argument"),
        ("POST", "/v1/node", 405, "invalid_argument"),
        ("GET", "/v1/sandboxes?labels=a=b", 400, "invalid_argument"),
        ("GET", "/v1/sandboxes?label=a", 400, "invalid_argument"),
        ("GET", "/v1/sandboxes?label=a=b&label=a=c", 400, "invalid_argument"),
        ("GET", "/v1/sandboxes?all=maybe", 400, "invalid_argument"),
        ("GET", "/v1/sandboxes?limit=0", 400, "invalid_argument"),
        ("GET", "/v1/sandboxes?limit=-1", 400, "invalid_argument"),
        ("GET", "/v1/sandboxes?limit=99999999999999", 400, "invalid_argument"),
        ("GET", "/v1/sandboxes?all=true&all=false", 400, "invalid_argument"),
        ("GET", "/v1/sandboxes/sb-nope", 404, "sandbox_not_found"),
        ("DELETE", "/v1/sandboxes/sb-nope", 404, "sandbox_not_found"),
        ("POST", "/v1/sandboxes/sb-nope/connect", 404, "sandbox_not_found"),
        ("POST", "/v1/sandboxes/sb-nope/execs", 404, "sandbox_not_found"),
        ("GET", "/v1/sandboxes/sb-nope/execs/e/stream", 404, "sandbox_not_found"),
        ("PUT", "/v1/sandboxes/a%2Fb/files/content?path=/x", 404, "sandbox_not_found"),
        ("DELETE", "/v1/sandboxes/sb-nope/files?path=/", 404, "sandbox_not_found"),
        ("GET", "/v1/images/nope", 404, "image_not_found"),
        ("GET", "/v1/images/team/app:v1", 404, "image_not_found"),
        ("DELETE", "/v1/images/nope", 404, "image_not_found"),
        ("POST", "/v1/images", 400, "invalid_argument"),
        ("POST", "/v1/images?name=a&format=zip", 400, "invalid_argument"),
        ("POST", "/v1/images?name=a&fromat=oci", 400, "invalid_argument"),
        ("POST", "/v1/images?name=a", 400, "invalid_argument"),
        ("POST", "/v1/node/stop?force=perhaps", 400, "invalid_argument"),
    ],
)
async def test_a_bad_request_is_a_problem(
    tmp_path: Path, method: str, path: str, status: int, code: str
) -> None:
    async with api(tmp_path) as one:
        got, problem = await one.call(method, path)
        assert (got, problem["code"]) == (status, code)
        assert one.stops == 0


async def test_an_unknown_parameter_shows_the_nearest(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        assert "label" in (await one.error("GET", "/v1/sandboxes?lable=a=b")).hint
        assert "format" in (await one.error("POST", "/v1/images?name=a&fromat=oci", b"x")).hint


async def test_a_body_that_is_too_large(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        body = b'{"image": "' + b"x" * (9 << 20) + b'"}'
        status, problem = await one.call("POST", "/v1/sandboxes", body)
        assert (status, problem["code"]) == (413, "invalid_argument")


async def test_the_data_plane_of_an_ended_sandbox_says_why(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        _, made = await one.call("POST", "/v1/sandboxes", {})
        sandbox = made["sandbox"]["id"]
        error = await one.error("POST", f"/v1/sandboxes/{sandbox}/execs", {"argv": ["true"]})
        assert error.code == "node_unavailable"  # alive: it is the front door that does not know it
        one.world.keeper.on_exit(sandbox, Exited(oom_kills=1, wait_status=9))
        await one.call("DELETE", f"/v1/sandboxes/{sandbox}")
        for path in (
            "execs",
            "execs/e/stream",
            "files",
            "files/content?path=/x",
            "ports/80/wait?timeout=1",
            "ports/80/connect",
        ):
            error = await one.error("GET", f"/v1/sandboxes/{sandbox}/{path}")
            assert error.code == "sandbox_gone"
            assert error.details["reason"] == "oom"
            assert error.details["is_infra"] is False
            assert "memory" in error.hint


async def test_a_start_that_fails_carries_its_story(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        one.world.steps.failing["attach"] = StartFailedError("died", stage="ready")
        status, problem = await one.call("POST", "/v1/sandboxes", {})
        assert (status, problem["code"], problem["is_infra"]) == (500, "start_failed", True)
        assert problem["details"] == {"stage": "ready"}


async def test_a_main_command_and_a_probe_over_http(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        door = one.world.door
        door.answers = [Probed(ready=False, detail="refused"), Probed(ready=True)]
        status, made = await one.call(
            "POST",
            "/v1/sandboxes",
            {
                "command": ["serve", "--port", "8000"],
                "ready": {"port": 8000, "path": "/health", "interval": 0.01},
                "public_ports": [8000],
            },
        )
        assert status == 201
        assert made["sandbox"]["public_ports"] == [8000]
        assert door.started == [(made["sandbox"]["id"], "main", ["serve", "--port", "8000"])]
        asked = types.Ready(port=8000, path="/health", interval=0.01)
        assert door.probes == [(asked, "main")] * 2

        over = Ended(outcome=types.Outcome.EXITED, exit_code=3)
        door.answers = [Probed(ready=False, ended=over)]
        status, problem = await one.call(
            "POST", "/v1/sandboxes", {"command": ["serve"], "ready": {"port": 8000}}
        )
        assert (status, problem["code"], problem["is_infra"]) == (500, "start_failed", False)
        assert problem["details"] == {"stage": "main", "outcome": "exited", "exit_code": 3}
        assert not from_problem(problem).is_infra


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"command": "serve"}, "command"),
        ({"command": [""]}, "command"),
        ({"ready": 8000}, "ready"),
        ({"ready": {"prot": 8000}}, "prot"),
        ({"ready": {"port": 8000.5}}, "ready.port"),
        ({"ready": {"port": 70_000}}, "ready.port"),
        ({"ready": {"path": "/"}}, "ready"),
        ({"public_ports": ["80"]}, "public_ports"),
        ({"public_ports": [80, 80]}, "public_ports"),
    ],
)
async def test_a_main_command_or_a_probe_that_cannot_be_is_named(
    tmp_path: Path, spec: dict[str, Any], word: str
) -> None:
    async with api(tmp_path) as one:
        error = await one.error("POST", "/v1/sandboxes", spec)
        assert error.code == "invalid_argument"
        assert word in error.message
        assert one.world.steps.done == []


async def test_ports_over_http(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        _, made = await one.call("POST", "/v1/sandboxes", {})
        sandbox = f"/v1/sandboxes/{made['sandbox']['id']}"
        status, info = await one.call("PUT", f"{sandbox}/ports/8000")
        assert (status, info["public_ports"]) == (200, [8000])
        assert one.world.door.public[info["id"]] == [8000]
        status, again = await one.call("GET", sandbox)
        assert again == info
        for port in ("0", "65536", "x", "-1", "08.0", "٣"):
            for method in ("PUT", "DELETE"):
                error = await one.error(method, f"{sandbox}/ports/{port}")
                assert error.code == "invalid_argument"
                assert "port must be a number of 1 to 65535" in error.message
        status, info = await one.call("DELETE", f"{sandbox}/ports/8000")
        assert (status, info["public_ports"]) == (200, [])
        assert one.world.door.public[info["id"]] == []

        # Alive: it is the front door that does not know it.
        for method, path in (("GET", "ports/80/wait"), ("POST", "ports/80/connect")):
            assert (await one.error(method, f"{sandbox}/{path}")).code == "node_unavailable"
        await one.call("DELETE", sandbox)
        for method in ("PUT", "DELETE"):
            assert (await one.error(method, f"{sandbox}/ports/80")).code == "sandbox_gone"
            error = await one.error(method, "/v1/sandboxes/sb-nope/ports/80")
            assert error.code == "sandbox_not_found"


async def test_a_bug_of_ours_shows_nothing_of_itself(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        status, problem = await one.call("POST", "/v1/images?name=a", b"bug")
        assert (status, problem["code"]) == (500, "internal")
        assert "secret detail" not in str(problem)


async def test_the_nodes_own_defaults_fill_what_the_spec_leaves_out(tmp_path: Path) -> None:
    async with api(tmp_path, default_spec={"memory_mib": 64, "timeout": 7.0}) as one:
        _, made = await one.call("POST", "/v1/sandboxes", {"timeout": 300.0})
        info = msgspec.convert(made["sandbox"], types.SandboxInfo)
        assert info.memory_mib == 64
        assert info.expires_at - info.created_at == 300.0
        assert (
            await one.error("POST", "/v1/sandboxes", {"memroy_mib": 1})
        ).code == "invalid_argument"


async def test_a_client_that_hangs_up_gives_the_sandbox_up(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        one.world.steps.hold("attach")
        call = asyncio.ensure_future(one.client.post("/v1/sandboxes", data=b"{}"))
        await one.world.steps.reached["attach"].wait()
        call.cancel()
        await until(lambda: not one.world.engine.alive)
        one.world.assert_nothing_held()
        [record] = one.world.state.all()
        assert record.message == "its creator went away"


async def test_images(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        _, page = await one.call("GET", "/v1/images")
        assert [each["name"] for each in page["images"]] == ["base"]
        assert (await one.call("GET", "/v1/images/base"))[0] == 200
        one.shelf.pinned.add("base")
        assert (await one.error("DELETE", "/v1/images/base")).code == "conflict"
        one.shelf.pinned.clear()
        assert await one.call("DELETE", "/v1/images/base") == (204, None)
        assert await one.call("POST", "/v1/images/gc") == (200, {"removed": ["sha256:2"]})


async def test_an_import_streams_to_the_spool_and_leaves_nothing(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        block = os.urandom(1 << 16)

        async def body() -> AsyncIterator[bytes]:
            for _ in range(200):
                yield block

        async with one.client.post(
            "/v1/images?name=team/app:v1&format=oci", data=body()
        ) as response:
            assert response.status == 201
        digest = hashlib.sha256(block * 200).hexdigest()
        assert one.shelf.imported == [("team/app:v1", "oci", 200 << 16, digest)]
        assert (await one.error("POST", "/v1/images?name=a", b"bad")).code == "invalid_image"


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        gate = anyio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b"x" * (3 << 20)
            await gate.wait()

        call = asyncio.ensure_future(one.client.post("/v1/images?name=a", data=body()))
        await until(lambda: any(each.stat().st_size for each in one.shelf.spool_dir.iterdir()))
        call.cancel()
        await until(lambda: not list(one.shelf.spool_dir.iterdir()))
        assert one.shelf.imported == []


async def test_an_upload_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with api(tmp_path, max_image_bytes=1 << 20) as one:

        async def body() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * (1 << 19)

        for data in (io.BytesIO(b"x" * ((1 << 20) + 1)), body()):
            try:
                async with one.client.post("/v1/images?name=a", data=data) as response:
                    assert response.status == 400
                    assert (await response.json(content_type=None))["code"] == "invalid_argument"
            except aiohttp.ClientConnectionError:
                pass  # the server may close while the client still sends
        assert one.shelf.imported == []


async def test_a_full_disk_refuses_an_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with api(tmp_path) as one:

        def full(_descriptor: int, _data: bytes) -> None:
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr("shoal.api.spool._write_all", full)
        error = await one.error("POST", "/v1/images?name=a", b"x" * 100)
        assert error.code == "resource_exhausted"
        assert error.hint


async def test_the_node_tells_what_is_left(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        await one.call("POST", "/v1/sandboxes", {"cpu": 0.3, "memory_mib": 100})
        _, raw = await one.call("GET", "/v1/node")
        node = msgspec.convert(raw, types.NodeInfo)
        assert (node.sandboxes, node.cpu_total, node.cpu_reserved) == (1, 4.0, 0.3)
        assert (node.memory_total_mib, node.memory_reserved_mib) == (8192, 100)
        assert node.walls == {"runtime": "native"}


async def test_a_node_with_sandboxes_stops_only_when_forced(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        await one.call("POST", "/v1/sandboxes", {})
        error = await one.error("POST", "/v1/node/stop")
        assert (error.code, one.stops) == ("conflict", 0)
        assert "force" in error.hint
        assert (await one.call("POST", "/v1/node/stop?force=true"))[0] == 202
        assert one.stops == 1


async def test_a_hundred_creates_at_once_over_http(tmp_path: Path) -> None:
    async with api(tmp_path) as one:
        results: list[int] = []

        async def create() -> None:
            results.append((await one.call("POST", "/v1/sandboxes", {}))[0])

        async with anyio.create_task_group() as tasks:
            for _ in range(120):
                tasks.start_soon(create)
        assert results == [201] * 120
        assert one.world.keeper.most_at_once <= 4
