"""The SDK, written once, in async. `_sync.py` is generated from this file by `tools/gen_sync.py`."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import signal as signals
import stat
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from types import NoneType, TracebackType
from typing import Self, TypeVar

import aiohttp
import msgspec

from shoal._compat import override
from shoal.errors import (
    ConflictError,
    DeadlineExceededError,
    ExecFailedError,
    ImageError,
    ImageNotFoundError,
    InvalidArgumentError,
    NodeUnavailableError,
    NotFoundError,
    PathError,
    PathNotFoundError,
    SandboxGoneError,
    ShoalError,
)
from shoal.sdk._client import Client, client, default_address, quote
from shoal.sdk._exec import RESUME_TRIES, Access, Buffer, Capped, ExecStream, new_exec_id
from shoal.sdk._frames import Kind
from shoal.sdk._pack import in_thread, pack
from shoal.sdk._unpack import Unpacker
from shoal.types import (
    ExecExit,
    ExecPage,
    ExecRequest,
    ExecResult,
    ExecStarted,
    ExecStatus,
    FileInfo,
    FilePage,
    ImageInfo,
    ImagePage,
    Network,
    NodeInfo,
    Outcome,
    PtySize,
    Runtime,
    SandboxAccess,
    SandboxInfo,
    SandboxPage,
    SandboxSpec,
)

T = TypeVar("T")
Item = ExecStarted | ExecExit | tuple[Kind, bytes]

MAX_OUTPUT_BYTES = 10 << 20
"""Default bound on what `run` keeps, and on what a process's stream holds unread, per stream."""
START_DEADLINE = 60.0
"""Seconds for a sandbox to come up, and for a command to start."""
GRACE = 30.0
"""Seconds beyond a command's own timeout after which its answer is no longer waited for."""
CLEANUP_DEADLINE = 15.0
"""Seconds that ending a sandbox may take when its `with` block is left."""
TRANSFER_DEADLINE = 3600.0
"""Seconds for one file or tree to move."""
_CREATES_AT_ONCE = 64
_READ_CHUNK = 1 << 20


class AsyncSandbox:
    """A sandbox: an isolated, short-lived machine for code that nobody has read yet.

        async with await AsyncSandbox.create() as sb:
            result = await sb.run("python3 -c 'print(6*7)'")
            print(result.stdout)

    It ends when the `with` block is left, when `terminate` is called, or by its own timeout.
    """

    def __init__(self, access: Access, info: SandboxInfo) -> None:
        self._access = access
        self._info = info
        self._made_in = os.getpid()

    @classmethod
    async def create(
        cls,
        image: str = "base",
        *,
        cpu: float | None = None,
        memory_mib: int | None = None,
        disk_mib: int | None = None,
        pids: int | None = None,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        network: Network | None = None,
        runtime: Runtime | None = None,
        user: str | None = None,
        workdir: str | None = None,
        start_timeout: float = START_DEADLINE,
    ) -> AsyncSandbox:
        """Bring up a sandbox and wait until it is ready for commands.

        With no node configured (`SHOAL_URL`) this machine's own is started, and the first use of `base` builds it.

        Args:
            image: Name, `name:tag` or `sha256:` digest of an image that the node has.
            cpu: CPUs it may use at most; fractions allowed. None: the node's default, which is 1.
            memory_mib: Memory limit in MiB; never swapped. None: the node's default, 512.
            disk_mib: Hard limit in MiB on what it writes. None: the node's default, 1024.
            pids: Processes and threads at most. None: the node's default, 512.
            timeout: Seconds until it is ended, whatever it does. None: the node's default, 300.
            env: Environment of every command, on top of the image's.
            labels: Words of yours, to list and select by.
            network: `none`, which is the default: a loopback interface and nothing else.
            runtime: The wall around it; `native` is the default.
            user: Default user of commands, by name or id; None: the image's, else root.
            workdir: Default working directory of commands; None: the image's, else `/`.
            start_timeout: Seconds to wait for it.

        Raises:
            ImageNotFoundError: The node has no such image.
            ResourceExhaustedError: It does not fit now; nothing was reserved.
            StartFailedError: It could not be brought up; nothing is left of it.
            HostUnsupportedError: This machine cannot run sandboxes; the hint says what is missing.
            DeadlineExceededError: `start_timeout` passed; what may still come up is ended.
        """
        asked: dict[str, object] = {
            "image": image,
            "cpu": cpu,
            "memory_mib": memory_mib,
            "disk_mib": disk_mib,
            "pids": pids,
            "timeout": timeout,
            "env": dict(env) if env else None,
            "labels": dict(labels) if labels else None,
            "network": network,
            "runtime": runtime,
            "user": user,
            "workdir": workdir,
        }
        # What is not asked for is the node's to choose.
        return await cls._create(
            {key: value for key, value in asked.items() if value is not None}, start_timeout
        )

    @classmethod
    async def _create(cls, spec: dict[str, object], start_timeout: float) -> AsyncSandbox:
        try:
            msgspec.convert(spec, SandboxSpec)
        except msgspec.ValidationError as error:
            raise InvalidArgumentError(f"not a sandbox: {error}") from error
        here = client(default_address())
        try:
            return await cls._request(here, spec, start_timeout)
        except ImageNotFoundError:
            if spec["image"] != "base" or not here.address.embedded:
                raise
        async with here.base_lock:
            node = AsyncNode()
            if not any(image.name.partition(":")[0] == "base" for image in await node.images()):
                await node.build_base()
        return await cls._request(here, spec, start_timeout)

    @classmethod
    async def _request(
        cls, here: Client, spec: dict[str, object], start_timeout: float
    ) -> AsyncSandbox:
        call = here.own(
            here.call(
                SandboxAccess, "POST", "/v1/sandboxes", body=spec, deadline=start_timeout + GRACE
            )
        )
        try:
            async with asyncio.timeout(start_timeout):
                answer = await asyncio.shield(call)
        except (TimeoutError, asyncio.CancelledError) as error:
            # The node may be half way: whatever comes of it is ended, so that nothing is left behind.
            here.own(_end_when_up(here, call))
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError(
                    f"the sandbox did not come up within {start_timeout:g} s"
                ) from error
            raise
        return cls(Access(here.address, answer.sandbox.id, answer.access_token), answer.sandbox)

    @classmethod
    async def create_many(
        cls, specs: Iterable[SandboxSpec], *, start_timeout: float = START_DEADLINE
    ) -> builtins.list[AsyncSandbox | ShoalError]:
        """Bring up many sandboxes at once.

        Args:
            specs: What each shall be.
            start_timeout: Seconds to wait for each, from when it is its turn.

        Returns:
            For each spec, in order, the sandbox or the error that kept it from coming up.
        """
        turns = asyncio.Semaphore(_CREATES_AT_ONCE)

        async def one(spec: SandboxSpec) -> AsyncSandbox | ShoalError:
            async with turns:
                try:
                    return await cls._create(_sparse(spec), start_timeout)
                except ShoalError as error:
                    return error

        tasks = [asyncio.create_task(one(spec)) for spec in specs]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            for sandbox in done:
                if isinstance(sandbox, AsyncSandbox):
                    here = sandbox._access.client
                    here.own(_end(here, sandbox.id))
            raise

    @classmethod
    async def connect(cls, sandbox_id: str) -> AsyncSandbox:
        """Get hold of a running sandbox by its id.

        Raises:
            SandboxNotFoundError: No sandbox has this id.
            SandboxGoneError: It has ended; `details["reason"]` tells why.
        """
        here = client(default_address())
        answer = await here.call(
            SandboxAccess, "POST", f"/v1/sandboxes/{quote(sandbox_id)}/connect"
        )
        return cls(Access(here.address, answer.sandbox.id, answer.access_token), answer.sandbox)

    @classmethod
    async def list(
        cls, *, labels: Mapping[str, str] | None = None, all: bool = False
    ) -> builtins.list[SandboxInfo]:
        """List sandboxes, newest first.

        Args:
            labels: Only those that have all of these.
            all: Also those that ended within the last day.
        """
        query = [("label", f"{key}={value}") for key, value in (labels or {}).items()]
        if all:
            query.append(("all", "true"))
        here = client(default_address())
        page = await here.call(SandboxPage, "GET", "/v1/sandboxes", query=query)
        return page.sandboxes

    @property
    def id(self) -> str:
        """Its id: `sb-` and 26 characters."""
        return self._access.sandbox

    @property
    def files(self) -> AsyncFiles:
        """Its file system."""
        return AsyncFiles(self._access)

    async def info(self) -> SandboxInfo:
        """Ask what the node knows about it now; also for a day after its end."""
        self._info = await self._access.client.call(
            SandboxInfo, "GET", f"/v1/sandboxes/{quote(self.id)}"
        )
        return self._info

    async def run(
        self,
        command: str | Sequence[str],
        *args: str,
        stdin: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        check: bool = False,
        max_output_bytes: int = MAX_OUTPUT_BYTES,
    ) -> ExecResult:
        """Run a command, wait for it and return everything it printed.

            await sb.run("ls | wc -l")               # one string: a shell runs it
            await sb.run("python3", "-c", program)   # or program and arguments, untouched
            await sb.run(["git", "status"])

        If the caller is cancelled, the command is killed.

        Args:
            command: A shell command line, or the program, or program and arguments.
            args: Arguments, when `command` is a program.
            stdin: What the command reads; None: nothing.
            env: Environment on top of the sandbox's.
            cwd: Working directory.
            user: User, by name or id.
            timeout: Seconds after which it is killed; the outcome is then `timed_out`.
            check: Raise if it does not exit with code 0.
            max_output_bytes: Bound on stdout and on stderr, each; beyond it the middle is dropped and
                `truncated` is set.

        Raises:
            ExecFailedError: With `check`, the command failed; `result` has its output.
            SandboxGoneError: The sandbox has ended, or ended meanwhile.
            SandboxLostError: The infrastructure lost it.
        """
        exec_id = new_exec_id()
        request = ExecRequest(
            argv=_argv(command, args),
            exec_id=exec_id,
            env=dict(env or {}),
            cwd=cwd,
            user=user,
            stdin=stdin is not None,
            timeout=timeout,
        )
        stream = ExecStream(self._access, request, exec_id, (0, 0))
        outputs = {Kind.STDOUT: Capped(max_output_bytes), Kind.STDERR: Capped(max_output_bytes)}
        feeder: asyncio.Task[None] | None = None
        end: ExecExit | None = None
        try:
            async with (
                asyncio.timeout(None if timeout is None else timeout + GRACE),
                contextlib.aclosing(stream.frames()) as frames,
            ):
                async for item in _first_soon(frames):
                    if isinstance(item, tuple):
                        outputs[item[0]].add(item[1])
                    elif isinstance(item, ExecExit):
                        end = item
                    elif stdin is not None and feeder is None:
                        feeder = self._access.client.own(self._feed(exec_id, stdin))
        except BaseException as error:
            if not isinstance(error, ShoalError):
                await _kill_quietly(self._access, exec_id)
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError(
                    f"the command's end was not told within {timeout} s + {GRACE:g} s"
                ) from error
            raise
        finally:
            if feeder is not None:
                feeder.cancel()
        if feeder is not None and feeder.done() and not feeder.cancelled():
            feeder.result()
        assert end is not None  # noqa: S101 - the stream ends with an exit or raises
        result = ExecResult(
            outcome=end.outcome,
            exit_code=end.exit_code,
            stdout_bytes=outputs[Kind.STDOUT].value(),
            stderr_bytes=outputs[Kind.STDERR].value(),
            signal=end.signal,
            errno=end.errno,
            stage=end.stage,
            usage=end.usage,
            truncated=stream.lost > 0 or any(output.dropped for output in outputs.values()),
        )
        if check and not result.ok:
            raise ExecFailedError(_failure(request.argv, end), result=result)
        return result

    async def _feed(self, exec_id: str, stdin: bytes | str) -> None:
        """Send all of stdin. A command that reads only some of it, or ends first, is no error."""
        data = stdin.encode() if isinstance(stdin, str) else bytes(stdin)
        try:
            await _send_input(self._access, exec_id, data, offset=0, eof=True, deadline=None)
        except ShoalError:
            pass
        except Exception:
            # It would wait for the rest for ever.
            await _kill_quietly(self._access, exec_id)
            raise

    async def exec(
        self,
        command: str | Sequence[str],
        *args: str,
        stdin: bool = False,
        pty: bool | PtySize = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        exec_id: str | None = None,
    ) -> AsyncProcess:
        """Start a command and return at once with a handle on it.

        Args:
            command: As in `run`.
            args: As in `run`.
            stdin: Give it a pipe that `process.stdin` fills; otherwise it reads nothing.
            pty: Give it a terminal (and stdin); stderr then comes with stdout.
            env: Environment on top of the sandbox's.
            cwd: Working directory.
            user: User, by name or id.
            timeout: Seconds after which it is killed.
            exec_id: Id of your choice; a second call with the same one gets the same process.

        Raises:
            SandboxGoneError: The sandbox has ended.
        """
        size = pty if isinstance(pty, PtySize) else PtySize() if pty else None
        request = ExecRequest(
            argv=_argv(command, args),
            exec_id=exec_id or new_exec_id(),
            env=dict(env or {}),
            cwd=cwd,
            user=user,
            stdin=stdin or size is not None,
            pty=size,
            timeout=timeout,
        )
        process = AsyncProcess(self._access, request.exec_id or "", request)
        await process._begin()
        return process

    async def attach(self, exec_id: str) -> AsyncProcess:
        """Get hold of a process by its exec id; output that nobody has read yet comes first.

        Raises:
            ExecNotFoundError: The sandbox knows no such exec.
        """
        process = AsyncProcess(self._access, exec_id, None)
        await process._begin()
        return process

    async def execs(self) -> builtins.list[ExecStatus]:
        """List the commands that the sandbox knows, oldest first."""
        page = await self._access.client.call(
            ExecPage, "GET", self._access.path("execs"), token=self._access.token
        )
        return page.execs

    async def terminate(self) -> None:
        """End the sandbox and wait until it is gone. Does nothing if it has ended already."""
        await _end(self._access.client, self.id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._made_in:
            return  # a forked child that leaves the block leaves its parent's sandbox alone
        # Owned by the client: leaving the block must end the sandbox even if the leaver is cancelled.
        here = self._access.client
        ending = here.own(_end(here, self.id, deadline=CLEANUP_DEADLINE))
        try:
            await asyncio.shield(ending)
        except ShoalError:
            if error is None:
                raise

    @override
    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"


class AsyncProcess:
    """A command that runs in a sandbox, or ran.

    Losing the handle or the connection does not end it; `sandbox.attach(process.exec_id)` finds it again.
    """

    def __init__(self, access: Access, exec_id: str, request: ExecRequest | None) -> None:
        self._access = access
        self._exec_id = exec_id
        self._request = request
        self._pid = 0
        self._exit: ExecExit | None = None
        self._error: ShoalError | None = None
        self._buffers = {Kind.STDOUT: Buffer(), Kind.STDERR: Buffer()}
        self._offsets = (0, 0)
        self._lost = 0
        self._stdin_offset = 0
        self._stdin_lock = asyncio.Lock()
        self._awaited: dict[Kind | None, int] = {}
        self._changed = asyncio.Condition()
        self._pump: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_stdin = request is None or request.stdin

    async def _begin(self) -> None:
        """Start or attach, and wait until the node has said something."""
        self._revive()
        try:
            async with asyncio.timeout(START_DEADLINE), self._changed:
                await self._changed.wait_for(lambda: bool(self._pid) or self._over)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the command did not start within {START_DEADLINE:g} s"
            ) from error
        except asyncio.CancelledError:
            await _kill_quietly(self._access, self._exec_id)
            raise
        if self._error is not None and not self._pid:
            raise self._error

    @property
    def _over(self) -> bool:
        return self._exit is not None or self._error is not None

    def _revive(self) -> None:
        """Read the stream on the running loop; in a forked process or another loop, attach anew from there."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        self._loop = loop
        self._stdin_lock, self._changed, self._awaited = asyncio.Lock(), asyncio.Condition(), {}
        if not self._over:
            request = None if self._pid else self._request
            stream = ExecStream(self._access, request, self._exec_id, self._offsets)
            self._pump = self._access.client.own(self._read_on(stream))

    async def _read_on(self, stream: ExecStream) -> None:
        """Take frames until the end, into buffers that do not grow without bound."""
        try:
            async with contextlib.aclosing(stream.frames()) as frames:
                async for item in frames:
                    async with self._changed:
                        if isinstance(item, tuple):
                            self._buffers[item[0]].put(item[1])
                        elif isinstance(item, ExecStarted):
                            self._pid, self._exec_id = item.pid, item.exec_id
                        else:
                            self._exit = item
                        self._offsets = (stream.offsets[0], stream.offsets[1])
                        self._lost = stream.lost
                        self._changed.notify_all()
                        if isinstance(item, tuple):
                            await self._make_room(item[0])
        except ShoalError as error:
            self._error = error
        except asyncio.CancelledError:
            self._error = SandboxGoneError(
                "the event loop that read this process's output has ended"
            )
            raise
        finally:
            for buffer in self._buffers.values():
                buffer.ended = True
            if not self._over:
                self._error = SandboxGoneError("the process's output could not be read on")
            with contextlib.suppress(
                RuntimeError
            ):  # a condition cannot be entered while its loop is closing
                async with self._changed:
                    self._changed.notify_all()

    async def _make_room(self, kind: Kind) -> None:
        """Hold the process back while `kind` is not read on.

        If nobody has ever read it, and somebody waits for something else of the process, that would be for
        ever: then the oldest of it is dropped.
        """
        buffer = self._buffers[kind]
        while buffer.size > MAX_OUTPUT_BYTES:
            if kind not in self._awaited and any(self._awaited.values()):
                buffer.drop(MAX_OUTPUT_BYTES)
                return
            await self._changed.wait()

    @contextlib.asynccontextmanager
    async def _waiting(self, kind: Kind | None) -> AsyncIterator[None]:
        """Enter the condition as one who waits for `kind`, or for the end."""
        self._revive()
        async with self._changed:
            self._awaited[kind] = self._awaited.get(kind, 0) + 1
            self._changed.notify_all()
            try:
                yield
            finally:
                self._awaited[kind] -= 1
                self._changed.notify_all()

    @property
    def exec_id(self) -> str:
        """Its id, by which `sandbox.attach` finds it again."""
        return self._exec_id

    @property
    def pid(self) -> int:
        """Its process id as the sandbox sees it; 0 if it never started."""
        return self._pid

    @property
    def exit(self) -> ExecExit | None:
        """How it ended, in full; None while it runs."""
        return self._exit

    @property
    def returncode(self) -> int | None:
        """Its exit code; minus the signal that ended it; 127 or 126 if it never started; None while it runs."""
        return None if self._exit is None else _returncode(self._exit)

    @property
    def stdout(self) -> AsyncStreamReader:
        """What it prints."""
        return AsyncStreamReader(self, Kind.STDOUT)

    @property
    def stderr(self) -> AsyncStreamReader:
        """What it prints to stderr."""
        return AsyncStreamReader(self, Kind.STDERR)

    @property
    def stdin(self) -> AsyncStreamWriter:
        """What it reads.

        Raises:
            InvalidArgumentError: It was started without.
        """
        if not self._has_stdin:
            raise InvalidArgumentError("this process has no stdin", hint="start it with stdin=True")
        return AsyncStreamWriter(self)

    async def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the return code; `exit` then has the rest.

        Of a stream that is never read, the latest is kept, up to a bound. One that somebody began to read is
        kept whole, so it must be read on for the process to go on.

        Args:
            timeout: Seconds to wait at most; None: as long as the sandbox lives.

        Raises:
            DeadlineExceededError: It still runs.
            SandboxGoneError: The sandbox ended first.
            SandboxLostError: The infrastructure lost it.
        """
        try:
            async with asyncio.timeout(timeout), self._waiting(None):
                await self._changed.wait_for(lambda: self._over)
        except TimeoutError as error:
            raise DeadlineExceededError(f"the process still runs after {timeout} s") from error
        if self._exit is None:
            raise self._error or SandboxGoneError("the process's end is not known")
        return _returncode(self._exit)

    async def poll(self) -> int | None:
        """Return the return code, or None while it runs."""
        self._revive()
        await asyncio.sleep(0)
        return self.returncode

    async def signal(self, number: int | str, *, tree: bool = False) -> None:
        """Send a signal, by number or name (`"TERM"`, `"SIGINT"`); with `tree` also to all its descendants."""
        if isinstance(number, str):
            name = number.upper()
            try:
                number = signals.Signals[name if name.startswith("SIG") else f"SIG{name}"]
            except KeyError as error:
                raise InvalidArgumentError(f"no such signal: {name}") from error
        await _signal(self._access, self._exec_id, int(number), tree=tree)

    async def send_signal(self, number: int | str) -> None:
        """Send a signal; the name that `subprocess` uses."""
        await self.signal(number)

    async def kill(self) -> None:
        """Kill it and all its descendants. Does nothing if it has ended."""
        if self._exit is None:
            with contextlib.suppress(NotFoundError):
                await _signal(self._access, self._exec_id, 9, tree=True)

    async def resize(self, rows: int, cols: int) -> None:
        """Tell its terminal a new size, in characters."""
        await self._access.client.call(
            NoneType,
            "POST",
            self._access.path(f"execs/{quote(self._exec_id)}/resize"),
            body=PtySize(rows=rows, cols=cols),
            token=self._access.token,
        )

    @override
    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._exec_id} returncode={self.returncode}>"


class AsyncStreamReader:
    """A process's output, bytes exactly as it wrote them. Iterating gives lines."""

    def __init__(self, process: AsyncProcess, kind: Kind) -> None:
        self._process = process
        self._kind = kind

    async def read(self, n: int = -1) -> bytes:
        """Read all there will be, or with `n` up to `n` bytes as soon as there are any; empty at the end."""
        if n == 0:
            return b""
        buffer = self._process._buffers[self._kind]
        parts: list[bytes] = []
        async with self._process._waiting(self._kind):
            while True:
                await self._process._changed.wait_for(lambda: buffer.size or buffer.ended)
                if not buffer.size:
                    self._raise_if_lost()
                    return b"".join(parts)
                if n > 0:
                    return buffer.exactly(min(n, buffer.size))
                parts.append(buffer.exactly(buffer.size))
                self._process._changed.notify_all()

    async def read_text(self) -> str:
        """Read all there will be, as text; what is not UTF-8 shows as U+FFFD."""
        return (await self.read()).decode("utf-8", "replace")

    async def readline(self) -> bytes:
        """Read one line with its end; the last one may lack it; empty at the end."""
        buffer = self._process._buffers[self._kind]
        async with self._process._waiting(self._kind):
            while (line := buffer.line()) is None:
                if buffer.ended or buffer.size > MAX_OUTPUT_BYTES:
                    if not buffer.size:
                        self._raise_if_lost()
                    return buffer.exactly(buffer.size)
                await self._process._changed.wait()
            return line

    @property
    def dropped_bytes(self) -> int:
        """Bytes that were dropped because the process was waited for and these were never read."""
        return self._process._buffers[self._kind].dropped

    def _raise_if_lost(self) -> None:
        if self._process._exit is None and self._process._error is not None:
            raise self._process._error

    def __aiter__(self) -> AsyncStreamReader:
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line


class AsyncStreamWriter:
    """A process's standard input."""

    def __init__(self, process: AsyncProcess) -> None:
        self._process = process

    async def write(self, data: bytes | str) -> None:
        """Write, and wait until all of it is in the pipe.

        Raises:
            ShoalError: The process has closed its stdin, or has ended.
        """
        await self._send(data.encode() if isinstance(data, str) else data, eof=False)

    async def write_eof(self) -> None:
        """Close it: the process reads the end."""
        await self._send(b"", eof=True)

    async def close(self) -> None:
        """Close it; does nothing if the process has ended."""
        if self._process._exit is None:
            with contextlib.suppress(NotFoundError, PathError, ConflictError):
                await self.write_eof()

    async def _send(self, data: bytes, *, eof: bool) -> None:
        process = self._process
        process._revive()
        async with process._stdin_lock:
            await _send_input(
                process._access,
                process._exec_id,
                data,
                offset=process._stdin_offset,
                eof=eof,
                deadline=None,
            )
            process._stdin_offset += len(data)


class AsyncFiles:
    """A sandbox's file system. Paths are absolute."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Read a file, or `length` bytes of it from `offset` on.

        Raises:
            PathNotFoundError: No such file.
            PathError: It is a directory, or cannot be read.
        """
        query = {"path": path}
        if offset:
            query["offset"] = str(offset)
        if length is not None:
            query["length"] = str(length)
        async with self._transfer(), self._open("GET", "files/content", query) as response:
            return await response.read()

    async def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """Read a file as text."""
        return (await self.read(path)).decode(encoding)

    async def write(
        self,
        path: str,
        data: bytes | str,
        *,
        mode: int | None = None,
        user: str | None = None,
        parents: bool = True,
    ) -> FileInfo:
        """Write a file. It appears whole or not at all.

        Args:
            path: Where.
            data: What; text as UTF-8.
            mode: Permission bits; None: those of the file it replaces, else 0644.
            user: Owner, by name or id; None: that of the file it replaces, else root.
            parents: Make missing directories above it.
        """
        query = {"path": path, "parents": _flag(parents)}
        if mode is not None:
            query["mode"] = f"{mode:04o}"
        if user is not None:
            query["user"] = user
        content = data.encode() if isinstance(data, str) else bytes(data)
        return await self._call(FileInfo, "PUT", "files/content", query, data=content)

    async def list(self, path: str, *, depth: int = 1) -> builtins.list[FileInfo]:
        """List a directory, sorted by path; with `depth` also what lies that many levels below."""
        page = await self._call(FilePage, "GET", "files/list", {"path": path, "depth": str(depth)})
        return page.entries

    async def stat(self, path: str) -> FileInfo:
        """Tell what a path is; a link is not followed.

        Raises:
            PathNotFoundError: There is nothing.
        """
        return await self._call(FileInfo, "GET", "files/info", {"path": path})

    async def exists(self, path: str) -> bool:
        """Tell whether there is anything at a path; a link counts, wherever it points."""
        try:
            await self.stat(path)
        except PathNotFoundError:
            return False
        return True

    async def make_dir(
        self, path: str, *, parents: bool = True, user: str | None = None
    ) -> FileInfo:
        """Make a directory; with `parents` also those above it, and one that is there already is fine."""
        query = {"path": path, "parents": _flag(parents)} | (
            {"user": user} if user is not None else {}
        )
        return await self._call(FileInfo, "POST", "files/directory", query)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link or an empty directory; with `recursive` a directory with all in it."""
        await self._call(NoneType, "DELETE", "files", {"path": path, "recursive": _flag(recursive)})

    async def rename(self, source: str, target: str) -> None:
        """Give a path another name; a file of that name is replaced."""
        await self._call(NoneType, "POST", "files/rename", {}, body={"from": source, "to": target})

    async def upload(
        self,
        local: str | os.PathLike[str],
        remote: str,
        *,
        user: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Copy a file or a directory tree from this machine into the sandbox, with modes, links and times.

        `upload("a.txt", "/app/b.txt")` makes /app/b.txt; `upload("tree", "/app/tree")` makes or fills
        /app/tree with what is in tree. A file whose `remote` ends in `/` keeps its name.

        Args:
            local: What to copy. A link here is followed; links inside a tree are copied as links.
            remote: Where to, absolute.
            user: Owner of everything copied; None: root.
            progress: Called with the bytes sent so far.

        Raises:
            FileNotFoundError: Nothing is at `local`.
        """
        source, directory, name = await asyncio.to_thread(_upload_plan, os.fspath(local), remote)
        query = {"path": directory} | ({"user": user} if user is not None else {})
        body = in_thread(pack(source, name), progress)
        await self._call(
            NoneType, "PUT", "files/archive", query, data=body, deadline=TRANSFER_DEADLINE
        )

    async def download(
        self,
        remote: str,
        local: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> builtins.list[str]:
        """Copy a file or a directory tree from the sandbox to this machine, with modes, links and times.

        `download("/app/b.txt", "a.txt")` makes a.txt; `download("/app/tree", "tree")` makes or fills tree.
        If `local` is a directory, or ends in `/`, a file keeps its name in it.

        The sandbox is not trusted: nothing is written outside `local`, links that are in the way there are
        replaced and never followed, and a link that would point outside `local` is left out.

        Args:
            remote: What to copy, absolute; a link is followed.
            local: Where to.
            max_bytes: End with an error beyond so many bytes of file content.
            progress: Called with the bytes received so far.

        Returns:
            What was left out: links that point outside, devices, FIFOs, sockets.

        Raises:
            PathNotFoundError: Nothing is at `remote`.
            PathError: The stream is malformed or asks for something outside; what came before it stays.
        """
        skipped = await self._fetch(remote, local, max_bytes=max_bytes, progress=progress)
        return [name for name, _ in skipped]

    async def _fetch(
        self,
        remote: str,
        local: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> builtins.list[tuple[str, str]]:
        """As `download`; of what was left out also the reasons."""
        found = await self._follow(remote)
        single = found.kind != "directory"
        target, name = await asyncio.to_thread(_download_plan, remote, os.fspath(local), single)
        unpacker = await asyncio.to_thread(Unpacker, target, name, max_bytes)
        try:
            async with (
                self._transfer(),
                self._open("GET", "files/archive", {"path": found.path}) as response,
            ):
                received = 0
                gathered = bytearray()
                async for chunk in response.content.iter_any():
                    gathered += chunk
                    if len(gathered) >= _READ_CHUNK:
                        await asyncio.to_thread(unpacker.feed, bytes(gathered))
                        received += len(gathered)
                        gathered.clear()
                        if progress is not None:
                            progress(received)
                await asyncio.to_thread(unpacker.feed, bytes(gathered))
                await asyncio.to_thread(unpacker.finish)
                if progress is not None:
                    progress(received + len(gathered))
        finally:
            unpacker.close()
        return unpacker.skipped

    async def _follow(self, path: str) -> FileInfo:
        """What a path is in the end, links followed as the sandbox would."""
        for _ in range(40):
            found = await self.stat(path)
            if found.kind != "symlink" or found.target is None:
                return found
            parent = path.rstrip("/").rpartition("/")[0]
            path = found.target if found.target.startswith("/") else f"{parent}/{found.target}"
        raise PathError("too many links", path=path, errno=40)

    def _open(
        self, method: str, path: str, query: Mapping[str, str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        access = self._access
        return access.client.open(method, access.path(path), query=query, token=access.token)

    @contextlib.asynccontextmanager
    async def _transfer(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(TRANSFER_DEADLINE):
                yield
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the transfer took longer than {TRANSFER_DEADLINE:g} s"
            ) from error

    async def _call(
        self,
        kind: type[T],
        method: str,
        path: str,
        query: Mapping[str, str],
        *,
        body: object = None,
        data: bytes | AsyncIterable[bytes] | None = None,
        deadline: float = TRANSFER_DEADLINE,
    ) -> T:
        access = self._access
        return await access.client.call(
            kind,
            method,
            access.path(path),
            query=query,
            body=body,
            data=data,
            token=access.token,
            deadline=deadline,
            stream=data is not None,
        )


class AsyncNode:
    """The node behind it all: its images, its state."""

    def __init__(self) -> None:
        self._address = default_address()

    @property
    def url(self) -> str:
        """Where it is."""
        return self._address.url

    async def info(self) -> NodeInfo:
        """Tell what it is and what is left of it."""
        return await client(self._address).call(NodeInfo, "GET", "/v1/node")

    async def stop(self, *, force: bool = False) -> None:
        """Ask it to end; with `force` also while sandboxes run, which end with it."""
        await client(self._address).call(
            NoneType, "POST", "/v1/node/stop", query={"force": _flag(force)}
        )

    async def images(self) -> list[ImageInfo]:
        """List its images, by name."""
        return (await client(self._address).call(ImagePage, "GET", "/v1/images")).images

    async def image(self, reference: str) -> ImageInfo:
        """Tell about one image.

        Raises:
            ImageNotFoundError: It has none of this name or digest.
        """
        return await client(self._address).call(ImageInfo, "GET", f"/v1/images/{quote(reference)}")

    async def import_image(
        self,
        source: str | os.PathLike[str],
        name: str,
        *,
        format: str = "auto",
        expected_digest: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ImageInfo:
        """Bring an image from this machine to the node.

        Args:
            source: An OCI layout (directory or tar), a docker-archive, or a root file system (directory or
                tar); a tar may be gzipped. Of a root file system directory owners, hard links and extended
                attributes are kept.
            name: Name, or `name:tag`.
            format: `auto`, `oci`, `docker` or `rootfs`.
            expected_digest: `sha256:` digest that it must have.
            progress: Called with the bytes sent so far.

        Raises:
            ImageError: It is malformed, or not of that format; nothing of it was kept.
            FileNotFoundError: Nothing is at `source`.
        """
        chunks, format = await asyncio.to_thread(_import_plan, os.fspath(source), format)
        query = {"name": name, "format": format}
        if expected_digest is not None:
            query["expected_digest"] = expected_digest
        return await client(self._address).call(
            ImageInfo,
            "POST",
            "/v1/images",
            query=query,
            data=in_thread(chunks, progress),
            deadline=TRANSFER_DEADLINE,
            stream=True,
        )

    async def build_base(self, name: str = "base", *, refresh: bool = False) -> ImageInfo:
        """Build the `base` image from the Debian archive, or take the one built before, and import it.

        Progress goes to stderr, if that is a terminal. Needs root on this machine and mmdebstrap.

        Args:
            name: Name it gets on the node.
            refresh: Build it anew, with the archive's packages of today.
        """
        from shoal.local import base_image, progress

        given_up = threading.Event()

        def build() -> tuple[str, int]:
            with progress.bar("building the base image") as tell:

                def told(fraction: float | None, text: str) -> None:
                    if given_up.is_set():
                        raise InterruptedError("nobody waits for this build any more")
                    tell(fraction, text)

                path = base_image.build(told, refresh=refresh)
            return str(path), path.stat().st_size

        try:
            path, total = await asyncio.to_thread(build)
        except asyncio.CancelledError:
            given_up.set()
            raise
        with progress.bar("importing the base image") as tell:
            return await self.import_image(
                path, name, format="rootfs", progress=lambda done: tell(done / total, "")
            )

    async def remove_image(self, reference: str) -> None:
        """Remove an image's name; its layers go with `collect_garbage` once nothing uses them.

        Raises:
            ConflictError: A sandbox uses it.
        """
        await client(self._address).call(NoneType, "DELETE", f"/v1/images/{quote(reference)}")

    async def collect_garbage(self) -> list[str]:
        """Remove layers that no image and no sandbox uses, and return what was removed."""
        answer = await client(self._address).call(
            dict[str, list[str]], "POST", "/v1/images/gc", deadline=TRANSFER_DEADLINE
        )
        return answer.get("removed", [])


async def _first_soon(frames: AsyncGenerator[Item]) -> AsyncGenerator[Item]:
    """`frames`, the first of which must come soon.

    Raises:
        DeadlineExceededError: It did not.
    """
    try:
        async with asyncio.timeout(START_DEADLINE):
            yield await anext(frames)
    except TimeoutError as error:
        raise DeadlineExceededError(
            f"the command did not start within {START_DEADLINE:g} s"
        ) from error
    async for item in frames:
        yield item


def _argv(command: str | Sequence[str], args: tuple[str, ...]) -> list[str]:
    if isinstance(command, str):
        argv = [command, *args] if args else ["/bin/sh", "-c", command]
    elif args:
        raise InvalidArgumentError("arguments after a list", hint="put them into the list")
    else:
        argv = list(command)
    if not argv or not argv[0]:
        raise InvalidArgumentError("no command")
    for word in argv:
        if not isinstance(word, str) or "\0" in word:
            raise InvalidArgumentError(
                f"not an argument: {word!r}", hint="arguments are strings without NUL"
            )
    return argv


def _sparse(spec: SandboxSpec) -> dict[str, object]:
    """What a spec asks for, less what it leaves at the default."""
    plain = SandboxSpec()
    fields = {name: getattr(spec, name) for name in spec.__struct_fields__}
    return {"image": spec.image} | {
        name: value for name, value in fields.items() if value != getattr(plain, name)
    }


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _returncode(end: ExecExit) -> int:
    if end.outcome is Outcome.NOT_STARTED:
        return 127 if end.errno == 2 and end.stage in (None, "exec") else 126
    if end.exit_code is not None:
        return end.exit_code
    return -(end.signal or 9)


def _failure(argv: list[str], end: ExecExit) -> str:
    what = argv[2] if argv[:2] == ["/bin/sh", "-c"] else argv[0]
    if len(what) > 80:
        what = what[:77] + "..."
    match end.outcome:
        case Outcome.EXITED:
            return f"{what!r} exited with code {end.exit_code}"
        case Outcome.NOT_STARTED:
            reason = os.strerror(end.errno) if end.errno else "refused"
            return f"{what!r} did not start: {reason} ({end.stage})"
        case _:
            signal = f", signal {end.signal}" if end.signal else ""
            return f"{what!r} ended: {end.outcome}{signal}"


async def _signal(access: Access, exec_id: str, number: int, *, tree: bool) -> None:
    await access.client.call(
        NoneType,
        "POST",
        access.path(f"execs/{quote(exec_id)}/signal"),
        body={"signal": number, "tree": tree},
        token=access.token,
        deadline=CLEANUP_DEADLINE,
    )


async def _kill_quietly(access: Access, exec_id: str) -> None:
    """Kill a command that nobody waits for any more; done even if the caller is being cancelled."""

    async def kill() -> None:
        with contextlib.suppress(ShoalError):
            await _signal(access, exec_id, 9, tree=True)

    here = access.client
    if here.closed:
        return
    task = here.own(kill())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2):
            await asyncio.shield(task)


async def _send_input(
    access: Access, exec_id: str, data: bytes, *, offset: int, eof: bool, deadline: float | None
) -> None:
    """Put bytes into a command's stdin. The offset makes a second try after a broken connection repeat nothing."""
    for attempt in range(RESUME_TRIES):
        try:
            await access.client.call(
                NoneType,
                "POST",
                access.path(f"execs/{quote(exec_id)}/stdin"),
                query={"eof": _flag(eof), "offset": str(offset)},
                data=data,
                token=access.token,
                deadline=deadline,
                stream=True,
            )
            return
        except NodeUnavailableError:
            if attempt == RESUME_TRIES - 1:
                raise
            await asyncio.sleep(min(0.02 * 2**attempt, 1.0))


async def sandbox_info(sandbox_id: str) -> SandboxInfo:
    """What the node knows about a sandbox, alive or ended."""
    here = client(default_address())
    return await here.call(SandboxInfo, "GET", f"/v1/sandboxes/{quote(sandbox_id)}")


async def end_sandbox(sandbox_id: str) -> None:
    """End a sandbox by its id.

    Raises:
        SandboxNotFoundError: There never was one.
    """
    here = client(default_address())
    with contextlib.suppress(SandboxGoneError):
        await here.call(NoneType, "DELETE", f"/v1/sandboxes/{quote(sandbox_id)}")


async def _end(here: Client, sandbox_id: str, *, deadline: float = START_DEADLINE) -> None:
    with contextlib.suppress(NotFoundError, SandboxGoneError):
        await here.call(NoneType, "DELETE", f"/v1/sandboxes/{quote(sandbox_id)}", deadline=deadline)


async def _end_when_up(here: Client, call: asyncio.Task[SandboxAccess]) -> None:
    with contextlib.suppress(ShoalError):
        answer = await call
        await _end(here, answer.sandbox.id)


def _file_chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_READ_CHUNK):
            yield chunk


def _upload_plan(local: str, remote: str) -> tuple[str, str, str]:
    """What to pack, the directory to unpack it in, and its name there (empty: its entries)."""
    source = os.path.realpath(local)
    if stat.S_ISDIR(os.stat(source).st_mode):
        return source, remote, ""
    directory, _, name = remote.rpartition("/")
    return source, directory or "/", name or os.path.basename(local)


def _download_plan(remote: str, local: str, single: bool) -> tuple[str, str | None]:
    """The directory to unpack in, and the name there if it is one file."""
    if not single:
        return local, None
    if os.path.isdir(local) or local.endswith((os.sep, "/")):
        local = os.path.join(local, remote.rstrip("/").rpartition("/")[2])
    directory, name = os.path.split(os.path.abspath(local))
    return directory, name


def _import_plan(source: str, format: str) -> tuple[Iterator[bytes], str]:
    """The bytes to send, and what they are."""
    if not os.path.isdir(source):
        os.stat(source)
        return _file_chunks(source), format
    path = os.path.realpath(source)
    format = directory_format(path, format)
    return pack(path, whole=format == "rootfs"), format


_MARKS = {"oci": ("oci-layout", "OCI layout"), "docker": ("manifest.json", "docker-archive")}


def directory_format(path: str, format: str) -> str:
    """What an image in a directory is: `oci`, `docker` or `rootfs`.

    Raises:
        ImageError: It is not what `format` says.
    """
    if format == "auto":
        return "oci" if os.path.exists(os.path.join(path, "oci-layout")) else "rootfs"
    mark, name = _MARKS.get(format, ("", ""))
    if mark and not os.path.exists(os.path.join(path, mark)):
        raise ImageError(
            f"no {name} in {path}",
            hint=f"it has no {mark}; a directory that is a root file system is of the format rootfs",
        )
    return format
