"""A node at the HTTP seam: the routes of `/v1`, with host processes and a host directory in place of sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import signal
import stat
import tarfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from aiohttp import web

from shoal.errors import (
    AuthenticationError,
    ConflictError,
    DeadlineExceededError,
    ExecNotFoundError,
    ImageNotFoundError,
    PathError,
    PathNotFoundError,
    PortUnreachableError,
    SandboxGoneError,
    SandboxNotFoundError,
    ShoalError,
)
from shoal.sdk._frames import Kind, frame
from shoal.sdk._tunnel import splice
from shoal.types import (
    ExecExit,
    ExecRequest,
    ExecStarted,
    ExecState,
    FileInfo,
    FilePage,
    ImageInfo,
    ImagePage,
    NodeInfo,
    Outcome,
    Reason,
    SandboxAccess,
    SandboxInfo,
    SandboxPage,
    SandboxSpec,
    Status,
)


@dataclass
class FakeExec:
    """One command, run on the host."""

    process: asyncio.subprocess.Process | None
    outputs: dict[Kind, bytearray] = field(
        default_factory=lambda: {Kind.STDOUT: bytearray(), Kind.STDERR: bytearray()}
    )
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    open_outputs: int = 2
    end: ExecExit | None = None
    detached: bool = False
    consumed: dict[Kind, int] = field(default_factory=lambda: {Kind.STDOUT: 0, Kind.STDERR: 0})
    reader: web.Request | None = None
    """The newest; it gets the output."""
    stdin_seen: int = 0
    killed_by: int | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


@dataclass
class FakeSandbox:
    """One sandbox: a directory."""

    info: SandboxInfo
    root: Path
    token: str
    execs: dict[str, FakeExec] = field(default_factory=dict)
    watches: dict[asyncio.Queue[bytes | None], None] = field(default_factory=dict)
    """Lines for each watch; None ends its connection."""


WINDOW = 1 << 20
"""Bytes of a stream that may be sent and not be consumed."""


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


class FakeNode:
    """Serves on a unix socket, from a thread of its own, between `start` and `stop`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "shoal.sock"
        self.sandboxes: dict[str, FakeSandbox] = {}
        self.images: dict[str, ImageInfo] = {"base": _image("base")}
        self.uploads: list[bytes] = []
        self.specs: list[dict[str, object]] = []
        self.signals: list[tuple[str, int, bool]] = []
        self.requests: list[str] = []
        self.break_after: int | None = None
        """Cut an exec's stream once, after so many bytes of frames."""
        self.create_delay = 0.0
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
        """Answers in place of the routes, where it answers."""
        self.url_template: str | None = "http://{port}-{id}.localhost:1234"
        self.archive: bytes | None = None
        """What a download gets, whatever is there."""
        self.archive_error: ShoalError | None = None
        """What goes wrong at a download's end."""
        self._started: list[FakeExec] = []
        self._spawning = asyncio.Lock()
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> FakeNode:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def stop(self) -> None:
        if self._loop is not None and self._stopping is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)

    async def _main(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._errors], client_max_size=1 << 30)
        box = "/v1/sandboxes/{id}"
        app.add_routes(
            [
                web.post("/v1/sandboxes", self._create),
                web.get("/v1/sandboxes", self._list),
                web.get(box, self._inspect),
                web.delete(box, self._delete),
                web.post(f"{box}/connect", self._connect),
                web.put(f"{box}/ports/{{port}}", self._publish),
                web.delete(f"{box}/ports/{{port}}", self._publish),
                web.get(f"{box}/ports/{{port}}/wait", self._wait_port),
                web.post(f"{box}/ports/{{port}}/connect", self._connect_port),
                web.post(f"{box}/execs", self._exec),
                web.get(f"{box}/execs", self._execs),
                web.get(f"{box}/execs/{{eid}}", self._state),
                web.get(f"{box}/execs/{{eid}}/stream", self._attach),
                web.post(f"{box}/execs/{{eid}}/consumed", self._consumed),
                web.post(f"{box}/execs/{{eid}}/stdin", self._stdin),
                web.post(f"{box}/execs/{{eid}}/signal", self._signal),
                web.post(f"{box}/execs/{{eid}}/resize", self._resize),
                web.get(f"{box}/files/content", self._read),
                web.put(f"{box}/files/content", self._write),
                web.get(f"{box}/files/info", self._stat),
                web.get(f"{box}/files/list", self._listing),
                web.post(f"{box}/files/directory", self._make_dir),
                web.delete(f"{box}/files", self._remove),
                web.post(f"{box}/files/rename", self._rename),
                web.post(f"{box}/files/attributes", self._attributes),
                web.get(f"{box}/files/watch", self._watch),
                web.get(f"{box}/files/archive", self._pack),
                web.put(f"{box}/files/archive", self._unpack),
                web.get("/v1/images", self._image_list),
                web.post("/v1/images", self._image_import),
                web.post("/v1/images/gc", self._gc),
                web.get("/v1/images/{ref}", self._image_info),
                web.delete("/v1/images/{ref}", self._image_remove),
                web.get("/v1/node", self._node),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.5)
        await runner.setup()
        await web.UnixSite(runner, str(self.socket)).start()
        self._ready.set()
        await self._stopping.wait()
        for sandbox in self.sandboxes.values():
            self._end(sandbox, Reason.HOST_SHUTDOWN)
        await runner.cleanup()
        for running in self._started:
            _kill(running, 9)
            await asyncio.gather(*running.tasks)
        self.socket.unlink(missing_ok=True)

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path_qs}")
        try:
            if self.answer is not None and (given := await self.answer(request)) is not None:
                return given
            return await handler(request)
        except ConnectionResetError:
            return web.Response()  # the client has left
        except ShoalError as error:
            return web.Response(
                body=msgspec.json.encode(error.to_problem()),
                status=error.status,
                content_type="application/problem+json",
            )

    # ---- sandboxes

    async def _create(self, request: web.Request) -> web.Response:
        self.specs.append(msgspec.json.decode(await request.read()))
        spec = msgspec.convert(self.specs[-1], SandboxSpec)
        await asyncio.sleep(self.create_delay)
        if spec.image not in self.images:
            raise ImageNotFoundError(f"no image {spec.image!r}", hint="see `shoal image ls`")
        number = len(self.sandboxes)
        sandbox_id = f"sb-{number:026d}".replace("0", "a").replace("1", "b")
        now = time.time()
        info = SandboxInfo(
            id=sandbox_id,
            status=Status.RUNNING,
            image=spec.image,
            image_digest=self.images[spec.image].digest,
            runtime="native",
            network="none",
            cpu=spec.cpu,
            memory_mib=spec.memory_mib,
            disk_mib=spec.disk_mib,
            pids=spec.pids,
            labels=spec.labels,
            created_at=now,
            expires_at=now + spec.timeout,
        )
        root = self.directory / sandbox_id
        root.mkdir()
        self.sandboxes[sandbox_id] = FakeSandbox(info, root, f"token-{number}")
        return _json(self._access(self.sandboxes[sandbox_id]), 201)

    def _access(self, sandbox: FakeSandbox) -> SandboxAccess:
        return SandboxAccess(
            sandbox=sandbox.info, access_token=sandbox.token, url_template=self.url_template
        )

    async def _list(self, request: web.Request) -> web.Response:
        wanted = [tuple(label.split("=", 1)) for label in request.query.getall("label", [])]
        found = [
            sandbox.info
            for sandbox in reversed(self.sandboxes.values())
            if ("all" in request.query or sandbox.info.status is Status.RUNNING)
            and all(sandbox.info.labels.get(key) == value for key, value in wanted)
        ]
        return _json(SandboxPage(sandboxes=found))

    def _find(self, request: web.Request) -> FakeSandbox:
        if (sandbox := self.sandboxes.get(request.match_info["id"])) is None:
            raise SandboxNotFoundError(f"no sandbox {request.match_info['id']}")
        return sandbox

    def _alive(self, request: web.Request, *, token: bool = True) -> FakeSandbox:
        sandbox = self._find(request)
        if sandbox.info.reason is not None:
            reason = sandbox.info.reason
            raise SandboxGoneError(f"sandbox {sandbox.info.id} has ended: {reason}", reason=reason)
        if token and request.headers.get("Authorization") != f"Bearer {sandbox.token}":
            raise AuthenticationError("wrong token")
        return sandbox

    async def _inspect(self, request: web.Request) -> web.Response:
        return _json(self._find(request).info)

    async def _delete(self, request: web.Request) -> web.Response:
        sandbox = self._find(request)
        self._end(sandbox, Reason.TERMINATED)
        return _json(sandbox.info)

    def _end(self, sandbox: FakeSandbox, reason: Reason) -> None:
        if sandbox.info.reason is not None:
            return
        sandbox.info = msgspec.structs.replace(
            sandbox.info, status=Status.STOPPED, reason=reason, ended_at=time.time()
        )
        for running in sandbox.execs.values():
            _kill(running, 9)
        for lines in sandbox.watches:
            lines.put_nowait(None)

    async def _connect(self, request: web.Request) -> web.Response:
        sandbox = self._alive(request, token=False)
        return _json(self._access(sandbox))

    # ---- ports: of the host, in place of the sandbox's

    async def _publish(self, request: web.Request) -> web.Response:
        sandbox, port = self._alive(request, token=False), int(request.match_info["port"])
        public = set(sandbox.info.public_ports) - {port}
        if request.method == "PUT":
            public.add(port)
        sandbox.info = msgspec.structs.replace(sandbox.info, public_ports=sorted(public))
        return _json(sandbox.info)

    async def _wait_port(self, request: web.Request) -> web.Response:
        self._alive(request)
        end = time.monotonic() + float(request.query["timeout"])
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", request.match_info["port"])
            except OSError:
                if time.monotonic() > end:
                    raise DeadlineExceededError("nothing listens") from None
                await asyncio.sleep(0.01)
            else:
                writer.close()
                return web.Response(status=204)

    async def _connect_port(self, request: web.Request) -> web.Response:
        self._alive(request)
        assert request.headers["Connection"] == "Upgrade"
        assert request.headers["Upgrade"] == "tcp"
        try:
            inside = await asyncio.open_connection("127.0.0.1", request.match_info["port"])
        except OSError:
            raise PortUnreachableError("nothing listens", hint="start a server") from None
        transport, loop = request.transport, asyncio.get_running_loop()
        if transport is None:
            inside[1].transport.abort()
            raise ConnectionResetError
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\r\n")
        await splice((reader, writer), inside)
        raise ConnectionResetError  # there is nobody to answer

    # ---- execs

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        sandbox = self._alive(request)
        wanted = msgspec.json.decode(await request.read(), type=ExecRequest)
        exec_id = wanted.exec_id or f"ex-{len(sandbox.execs)}"
        async with self._spawning:
            if not (existing := exec_id in sandbox.execs):
                sandbox.execs[exec_id] = await self._spawn(sandbox, wanted)
        running = sandbox.execs[exec_id].process
        if wanted.detached and running is not None:
            started = ExecStarted(
                exec_id=exec_id,
                pid=running.pid,
                existing=existing,
                stdout_offset=0,
                stderr_offset=0,
            )
            return _json(started, 201)
        return await self._stream(request, sandbox, exec_id, existing)

    async def _spawn(self, sandbox: FakeSandbox, wanted: ExecRequest) -> FakeExec:
        try:
            process = await asyncio.create_subprocess_exec(
                *wanted.argv,
                stdin=asyncio.subprocess.PIPE if wanted.stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={"PATH": os.environ["PATH"], **wanted.env},
                cwd=wanted.cwd or sandbox.root,
                start_new_session=True,
            )
        except OSError as error:
            end = ExecExit(outcome=Outcome.NOT_STARTED, errno=error.errno, stage="exec")
            return FakeExec(None, open_outputs=0, end=end)
        running = FakeExec(process, detached=wanted.detached)
        running.tasks = [
            asyncio.create_task(_collect(running, process.stdout, Kind.STDOUT)),
            asyncio.create_task(_collect(running, process.stderr, Kind.STDERR)),
            asyncio.create_task(_watch(running, wanted.timeout)),
        ]
        self._started.append(running)
        return running

    async def _attach(self, request: web.Request) -> web.StreamResponse:
        sandbox = self._alive(request)
        exec_id = request.match_info["eid"]
        self._consume(self._running(sandbox, exec_id), request.query, "_offset")
        return await self._stream(request, sandbox, exec_id, True)

    @staticmethod
    def _consume(running: FakeExec, told: Mapping[str, str], suffix: str = "") -> None:
        for kind, name in ((Kind.STDOUT, "stdout"), (Kind.STDERR, "stderr")):
            running.consumed[kind] = max(running.consumed[kind], int(told.get(name + suffix, "0")))

    async def _consumed(self, request: web.Request) -> web.Response:
        running = self._running(self._alive(request), request.match_info["eid"])
        body = msgspec.json.decode(await request.read(), type=dict[str, int])
        async with running.changed:
            self._consume(running, {name: str(offset) for name, offset in body.items()})
            running.changed.notify_all()
        return web.Response(status=204)

    async def _state(self, request: web.Request) -> web.Response:
        running = self._running(self._alive(request), request.match_info["eid"])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(float(request.query.get("wait", "0"))), running.changed:
                await running.changed.wait_for(lambda: running.end is not None)
        pid = running.process.pid if running.process else 0
        return _json(ExecState(exec_id=request.match_info["eid"], pid=pid, exit=running.end))

    def _running(self, sandbox: FakeSandbox, exec_id: str) -> FakeExec:
        if exec_id not in sandbox.execs:
            raise ExecNotFoundError(f"no exec {exec_id}")
        return sandbox.execs[exec_id]

    async def _stream(
        self,
        request: web.Request,
        sandbox: FakeSandbox,
        exec_id: str,
        existing: bool,
    ) -> web.StreamResponse:
        running = sandbox.execs[exec_id]
        by_client = request.query.get("ack") == "client"
        offsets = dict(running.consumed)
        async with running.changed:
            running.reader = request
            running.changed.notify_all()
        response = web.StreamResponse(headers={"Content-Type": "application/vnd.shoal.stream"})
        await response.prepare(request)
        sent = 0

        async def send(kind: Kind, payload: bytes) -> bool:
            nonlocal sent
            data = frame(kind, payload)
            if self.break_after is not None and sent + len(data) > self.break_after:
                await response.write(data[: self.break_after - sent])
                self.break_after = None
                await asyncio.sleep(0.01)
                if request.transport is not None:
                    request.transport.close()
                return False
            sent += len(data)
            await response.write(data)
            return True

        if running.process is not None:
            started = ExecStarted(
                exec_id=exec_id,
                pid=running.process.pid,
                existing=existing,
                stdout_offset=offsets[Kind.STDOUT],
                stderr_offset=offsets[Kind.STDERR],
                detached=running.detached,
            )
            if not await send(Kind.STARTED, msgspec.json.encode(started)):
                return response
        while True:
            for kind, data in running.outputs.items():
                while piece := bytes(
                    data[
                        offsets[kind] : min(offsets[kind] + 65536, running.consumed[kind] + WINDOW)
                    ]
                ):
                    if not await send(kind, piece):
                        return response
                    offsets[kind] += len(piece)
                    if not by_client:
                        running.consumed[kind] = offsets[kind]
            if running.reader is not request:
                stale = ConflictError("another reader has taken over", errno=errno.ESTALE)
                await send(Kind.ERROR, msgspec.json.encode(stale.to_problem()))
                return response
            if sandbox.info.reason is not None:
                reason = sandbox.info.reason
                gone = SandboxGoneError(
                    f"sandbox {sandbox.info.id} has ended: {reason}", reason=reason
                )
                await send(Kind.ERROR, msgspec.json.encode(gone.to_problem()))
                return response
            async with running.changed:
                done = running.end is not None and not running.open_outputs
                behind = any(
                    offsets[kind] < min(len(data), running.consumed[kind] + WINDOW)
                    for kind, data in running.outputs.items()
                )
                rest = any(len(data) > offsets[kind] for kind, data in running.outputs.items())
                if running.reader is request and not behind and (rest or not done):
                    await running.changed.wait()
                    continue
            if done and not rest and running.reader is request:
                await send(Kind.EXIT, msgspec.json.encode(running.end))
                return response

    async def _execs(self, request: web.Request) -> web.Response:
        sandbox = self._alive(request)
        return _json(
            {
                "execs": [
                    {
                        "exec_id": name,
                        "pid": running.process.pid if running.process else 0,
                        "argv": ["?"],
                        "outcome": running.end.outcome if running.end else "running",
                    }
                    for name, running in sandbox.execs.items()
                ]
            }
        )

    async def _stdin(self, request: web.Request) -> web.Response:
        running = self._running(self._alive(request), request.match_info["eid"])
        at = int(request.query.get("offset", running.stdin_seen))
        process = running.process
        assert process is not None
        assert process.stdin is not None
        async for chunk in request.content.iter_any():
            fresh = chunk[max(0, running.stdin_seen - at) :]
            at += len(chunk)
            running.stdin_seen = max(running.stdin_seen, at)
            try:
                process.stdin.write(fresh)
                await process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                raise PathError("stdin is closed", errno=32) from None
        if request.query["eof"] == "true":
            process.stdin.close()
        return web.Response(status=204)

    async def _signal(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        exec_id = request.match_info["eid"]
        self.signals.append((exec_id, body["signal"], body["tree"]))
        _kill(self._running(self._alive(request), exec_id), body["signal"])
        return web.Response(status=204)

    async def _resize(self, request: web.Request) -> web.Response:
        self._running(self._alive(request), request.match_info["eid"])
        return web.Response(status=204)

    # ---- files

    def _path(self, request: web.Request, name: str = "path") -> Path:
        return self._alive(request).root / request.query[name].lstrip("/")

    def _info(self, request: web.Request, path: Path) -> FileInfo:
        root = self._alive(request).root
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise PathNotFoundError(f"no such path: /{path.relative_to(root)}", errno=2) from None
        kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
        return FileInfo(
            path=f"/{path.relative_to(root)}",
            kind=kinds.get(stat.S_IFMT(status.st_mode), "other"),  # type: ignore[arg-type]
            size=status.st_size,
            mode=stat.S_IMODE(status.st_mode),
            uid=0,
            gid=0,
            mtime=status.st_mtime,
            target=os.readlink(path) if path.is_symlink() else None,
        )

    async def _read(self, request: web.Request) -> web.StreamResponse:
        path = self._path(request)
        if self._info(request, path).kind == "directory":
            raise PathError("is a directory", errno=21)
        offset = int(request.query.get("offset", "0"))
        length = int(request.query.get("length", str(1 << 60)))
        sandbox = self._alive(request)
        framed = request.query.get("framed") == "true"
        response = web.StreamResponse()
        left = max(0, min(length, path.stat().st_size - offset))
        if not framed:
            response.content_length = left
        await response.prepare(request)
        with path.open("rb") as file:
            file.seek(offset)
            while left and sandbox.info.reason is None:
                left -= len(piece := file.read(min(left, 1 << 16)))
                await response.write(frame(Kind.STDOUT, piece) if framed else piece)
        if left and request.transport is not None:
            request.transport.close()
        return response

    async def _write(self, request: web.Request) -> web.Response:
        path = self._path(request)
        if request.query.get("parents") == "true":
            path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        try:
            with fresh.open("wb") as file:
                async for piece in request.content.iter_any():
                    file.write(piece)
            fresh.chmod(int(request.query.get("mode", "0644"), 8))
            fresh.rename(path)
        finally:
            fresh.unlink(missing_ok=True)
        return _json(self._info(request, path))

    async def _attributes(self, request: web.Request) -> web.Response:
        path = self._path(request)
        info = self._info(request, path)
        if mode := request.query.get("mode"):
            path.chmod(int(mode, 8))
        uid = int(request.query.get("user", info.uid))
        return _json(msgspec.structs.replace(self._info(request, path), uid=uid))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        sandbox = self._alive(request)
        self._info(request, self._path(request))
        lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        sandbox.watches[lines] = None
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        await response.write(b'{"type":"ready"}\n')
        while (line := await lines.get()) is not None:
            await response.write(line)
        del sandbox.watches[lines]
        return response

    def tell(self, event: dict[str, object] | None) -> None:
        """Tell every watch; None ends their connections."""
        line = None if event is None else msgspec.json.encode(event) + b"\n"

        def put() -> None:
            for sandbox in self.sandboxes.values():
                for lines in sandbox.watches:
                    lines.put_nowait(line)

        assert self._loop is not None
        self._loop.call_soon_threadsafe(put)

    async def _stat(self, request: web.Request) -> web.Response:
        return _json(self._info(request, self._path(request)))

    async def _listing(self, request: web.Request) -> web.Response:
        found = sorted(self._path(request).iterdir())
        return _json(FilePage(entries=[self._info(request, path) for path in found]))

    async def _make_dir(self, request: web.Request) -> web.Response:
        path = self._path(request)
        path.mkdir(parents=True, exist_ok=request.query["parents"] == "true")
        return _json(self._info(request, path))

    async def _remove(self, request: web.Request) -> web.Response:
        path = self._path(request)
        self._info(request, path)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        return web.Response(status=204)

    async def _rename(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        root = self._alive(request).root
        (root / body["from"].lstrip("/")).rename(root / body["to"].lstrip("/"))
        return web.Response(status=204)

    async def _pack(self, request: web.Request) -> web.Response:
        path = self._path(request)
        if self.archive is not None:
            return self._archived(request, self.archive)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            if path.is_dir():
                for below in sorted(path.rglob("*")):
                    tar.add(below, str(below.relative_to(path)), recursive=False)
            else:
                tar.add(path, path.name)
        return self._archived(request, buffer.getvalue())

    def _archived(self, request: web.Request, body: bytes) -> web.Response:
        assert request.query["framed"] == "true"
        framed = b"".join(
            frame(Kind.STDOUT, body[at : at + 65536]) for at in range(0, len(body), 65536)
        )
        if self.archive_error is not None:
            framed += frame(Kind.ERROR, msgspec.json.encode(self.archive_error.to_problem()))
        return web.Response(body=framed, content_type="application/vnd.shoal.stream")

    async def _unpack(self, request: web.Request) -> web.Response:
        path = self._path(request)
        path.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(await request.read())) as tar:
            tar.extractall(path, filter="tar")
        return web.Response(status=204)

    # ---- images and node

    async def _image_list(self, request: web.Request) -> web.Response:
        return _json(ImagePage(images=sorted(self.images.values(), key=lambda image: image.name)))

    async def _image_info(self, request: web.Request) -> web.Response:
        if (image := self.images.get(request.match_info["ref"])) is None:
            raise ImageNotFoundError(f"no image {request.match_info['ref']!r}")
        return _json(image)

    async def _image_import(self, request: web.Request) -> web.Response:
        self.uploads.append(await request.read())
        image = _image(request.query["name"])
        self.images[image.name] = image
        return _json(image, 201)

    async def _image_remove(self, request: web.Request) -> web.Response:
        if self.images.pop(request.match_info["ref"], None) is None:
            raise ImageNotFoundError(f"no image {request.match_info['ref']!r}")
        return web.Response(status=204)

    async def _gc(self, request: web.Request) -> web.Response:
        return _json({"removed": ["0" * 64]})

    async def _node(self, request: web.Request) -> web.Response:
        return _json(
            NodeInfo(
                version="0",
                started_at=0,
                sandboxes=0,
                cpu_total=1,
                cpu_reserved=0,
                memory_total_mib=1,
                memory_reserved_mib=0,
                disk_total_mib=1,
                disk_reserved_mib=0,
            )
        )


def _image(name: str) -> ImageInfo:
    return ImageInfo(
        name=name,
        digest=f"sha256:{name.encode().hex():0<64}",
        layers=[],
        size_bytes=1 << 20,
        created_at=0,
    )


def _kill(running: FakeExec, number: int) -> None:
    if running.process is not None and running.end is None:
        running.killed_by = number
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, number)


async def _collect(running: FakeExec, stream: asyncio.StreamReader | None, kind: Kind) -> None:
    assert stream is not None
    while data := await stream.read(65536):
        async with running.changed:
            running.outputs[kind] += data
            running.changed.notify_all()
    async with running.changed:
        running.open_outputs -= 1
        running.changed.notify_all()


async def _watch(running: FakeExec, timeout: float | None) -> None:
    process = running.process
    assert process is not None
    late = False
    try:
        await asyncio.wait_for(process.wait(), timeout)
    except TimeoutError:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    code = process.returncode
    assert code is not None
    if late:
        end = ExecExit(outcome=Outcome.TIMED_OUT, signal=9)
    elif code >= 0:
        end = ExecExit(outcome=Outcome.EXITED, exit_code=code)
    else:
        end = ExecExit(
            outcome=Outcome.KILLED if running.killed_by else Outcome.SIGNALED, signal=-code
        )
    async with running.changed:
        running.end = end
        running.changed.notify_all()
