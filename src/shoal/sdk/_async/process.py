"""A command in a sandbox: its streams, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal as signals
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Sequence,
)
from types import NoneType

import msgspec

from shoal._compat import override
from shoal.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    NodeUnavailableError,
    NotFoundError,
    PathError,
    SandboxGoneError,
    ShoalError,
    from_problem,
)
from shoal.sdk._client import (
    CALL_DEADLINE,
    CLEANUP_DEADLINE,
    START_DEADLINE,
    flag,
    patiently,
    quote,
)
from shoal.sdk._exec import (
    KEPT_BACK,
    RESUME_PATIENCE,
    Access,
    Buffer,
    ExecStream,
    taken_over,
)
from shoal.sdk._frames import FrameParser, Kind, frame
from shoal.types import (
    ExecExit,
    ExecPage,
    ExecRequest,
    ExecStarted,
    ExecState,
    ExecStatus,
    Outcome,
    PtySize,
)

Item = ExecStarted | ExecExit | tuple[Kind, bytes]

MAX_OUTPUT_BYTES = 10 << 20
"""Default bound on what `run` keeps, and on what a process's stream holds unread, per stream."""
END_WAIT = 30.0
"""Seconds that one question about a process's end lasts."""


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
        # Of a process that somebody else may have written to nobody here knows how far its stdin is.
        self._stdin_offset = 0 if request is not None else None
        self._stream: ExecStream | None = None
        self._taken_over: ConflictError | None = None
        self._unfinished: dict[Kind, int] = {}
        self._stdin_lock = asyncio.Lock()
        self._awaited: dict[Kind | None, int] = {}
        self._changed = asyncio.Condition()
        self._pump: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_stdin = request is None or request.stdin
        self._detached = request is not None and request.detached

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
            if self._request is not None:
                await kill_quietly(self._access, self._exec_id)
            raise
        if self._error is not None and not self._pid:
            raise self._error

    async def _launch(self, request: ExecRequest) -> None:
        """Start detached: the node answers at once, and nothing is read before somebody asks for it."""

        async def once() -> bytes:
            async with self._access.client.open(
                "POST",
                self._access.path("execs"),
                body=request,
                token=self._access.token,
                stream=False,
            ) as response:
                raw = await response.read()
                return frame(Kind.STARTED, raw) if response.status == 201 else raw

        try:
            async with asyncio.timeout(START_DEADLINE):
                answer = await patiently(once)  # the id is ours: a second start is the same exec
        except (TimeoutError, asyncio.CancelledError) as error:
            await kill_quietly(self._access, self._exec_id)
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError(
                    f"the command did not start within {START_DEADLINE:g} s"
                ) from error
            raise
        try:
            for kind, payload in FrameParser().feed(answer):
                if kind is Kind.STARTED:
                    self._started(msgspec.json.decode(payload, type=ExecStarted))
                elif kind is Kind.EXIT:
                    self._exit = msgspec.json.decode(payload, type=ExecExit)
                elif kind is Kind.ERROR:
                    raise from_problem(msgspec.json.decode(payload, type=dict))
        except msgspec.DecodeError as error:
            raise InternalError(f"unexpected answer to a detached start: {error}") from error
        for buffer in self._buffers.values():
            buffer.ended = self._exit is not None

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
        self._stream = self._asking = None
        if not self._over:
            self._pump = self._access.client.own(self._follow())

    async def _follow(self) -> None:
        """Take what comes until the end; if a newer reader gets the output, learn the end alone."""
        try:
            if self._taken_over is None:
                try:
                    await self._read_on()
                except ConflictError as error:
                    if not taken_over(error):
                        raise
                    await self._lose_output(error)
            if self._taken_over is not None:
                await self._await_end()
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

    async def _read_on(self) -> None:
        """Take frames until the end, into buffers that the node's window bounds, or else we."""
        request = None if self._pid else self._request
        unread = [buffer.size for buffer in self._buffers.values()]
        stream = ExecStream(self._access, request, self._exec_id, self._offsets, unread)
        self._stream = stream
        async with contextlib.aclosing(stream.frames()) as frames:
            async for item in frames:
                async with self._changed:
                    if isinstance(item, tuple):
                        self._buffers[item[0]].put(item[1])
                    elif isinstance(item, ExecStarted):
                        self._started(item)
                    else:
                        self._exit = item
                    self._offsets = (stream.offsets[0], stream.offsets[1])
                    self._settle()
                    self._changed.notify_all()

    def _started(self, told: ExecStarted) -> None:
        again = self._pid != 0
        self._pid, self._exec_id = told.pid, told.exec_id
        self._detached = self._detached or told.detached
        for kind, at in ((Kind.STDOUT, told.stdout_offset), (Kind.STDERR, told.stderr_offset)):
            gone = max(0, at - self._offsets[kind - Kind.STDOUT])
            if gone and (again or self._detached):
                self._buffers[kind].dropped += gone
            if gone and again and not self._detached:
                raise ConflictError(
                    f"{gone} bytes of {kind.name.lower()} went to another reader, or are lost",
                    hint="attach again to read what comes after them",
                    errno=errno.ESTALE,
                )

    def _settle(self) -> None:
        """Tell how much of the output the node need not keep: what was read, as a rule.

        The node holds back a process of which it keeps much. Where that could be for ever, it is told of nearly all
        that has come, and we keep it, up to a bound: of a detached process; of a line that does not end; and of a
        stream that nobody reads while somebody waits for something else of the process. Beyond the bound the oldest
        is dropped, unless somebody has begun to read: then the process is held back after all.
        """
        waited_for = any(self._awaited.values())
        unread = []
        for kind, buffer in self._buffers.items():
            passed_by = self._detached or (waited_for and not self._awaited.get(kind))
            if self._detached or (passed_by and kind not in self._awaited):
                buffer.drop(MAX_OUTPUT_BYTES)
            flows = passed_by or self._unfinished.get(kind, 0) > 0
            keep = min(buffer.size, KEPT_BACK)
            unread.append(keep if flows and buffer.size <= MAX_OUTPUT_BYTES else buffer.size)
        if self._stream is not None:
            self._stream.consume(unread)

    async def _lose_output(self, error: ConflictError) -> None:
        """Keep only what no other reader gets; `error` tells who reads on here."""
        stream = self._stream
        async with self._changed:
            for kind, buffer in self._buffers.items():
                if stream is not None:
                    index = kind - Kind.STDOUT
                    buffer.cut(buffer.size - (stream.offsets[index] - stream.consumed[index]))
                buffer.ended = True
            self._taken_over = error
            self._changed.notify_all()

    @property
    def _held_back(self) -> bool:
        """The end may not come with the output, for somebody began to read that and stopped."""
        return any(
            buffer.size > 0 and self._awaited.get(kind) == 0
            for kind, buffer in self._buffers.items()
        )

    async def _ask_for_end(self) -> None:
        with contextlib.suppress(ShoalError):  # the stream says why, too
            await self._await_end()

    async def _await_end(self) -> None:
        """Learn the end, whatever becomes of the output."""
        clock = asyncio.get_running_loop().time
        given_up = clock() + RESUME_PATIENCE
        while self._exit is None:
            try:
                # Who starts or attaches waits for the pid.
                state = await exec_state(self._access, self._exec_id, END_WAIT if self._pid else 0)
            except (NodeUnavailableError, DeadlineExceededError):
                if clock() > given_up:
                    raise
                await asyncio.sleep(0.2)
                continue
            given_up = clock() + RESUME_PATIENCE
            async with self._changed:
                self._pid, self._exit = state.pid, self._exit or state.exit
                self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def _waiting(self, kind: Kind | None) -> AsyncIterator[None]:
        """Enter the condition as one who waits for `kind`, or for the end."""
        self._revive()
        async with self._changed:
            self._awaited[kind] = self._awaited.get(kind, 0) + 1
            self._settle()
            try:
                yield
            finally:
                self._awaited[kind] -= 1
                self._settle()

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

        Every handle learns the end, also one whose output a newer reader gets.

        Of a stream that is never read, the latest 10 MiB are kept. One that somebody began to read is kept whole,
        so beyond that much it must be read on for the process to go on, unless it is detached.

        Args:
            timeout: Seconds to wait at most; None: as long as the sandbox lives.

        Raises:
            DeadlineExceededError: It still runs.
            SandboxGoneError: The sandbox ended first.
            SandboxLostError: The infrastructure lost it.
        """
        try:
            async with asyncio.timeout(timeout), self._waiting(None):
                while not self._over:
                    if self._held_back and self._asking is None:
                        self._asking = self._access.client.own(self._ask_for_end())
                    await self._changed.wait()
        except TimeoutError as error:
            raise DeadlineExceededError(f"the process still runs after {timeout} s") from error
        if self._exit is None:
            raise self._error or SandboxGoneError("the process's end is not known")
        return _returncode(self._exit)

    async def poll(self) -> int | None:
        """Return the return code, or None while it runs."""
        if self._pump is None and not self._over:  # detached: to ask is not to read
            state = await exec_state(self._access, self._exec_id, 0)
            return None if state.exit is None else await self.wait(CALL_DEADLINE)
        self._revive()
        await asyncio.sleep(0)
        return self.returncode

    async def signal(self, number: int | str, *, tree: bool = False) -> None:
        """Send a signal, by number or name (`"TERM"`, `"SIGINT"`), to its own process alone.

        With `tree` all its descendants get it too. What ^C does in a terminal is neither: write the byte 3 to stdin.
        """
        if isinstance(number, str):
            name = number.upper()
            try:
                number = signals.Signals[name if name.startswith("SIG") else f"SIG{name}"]
            except KeyError as error:
                raise InvalidArgumentError(f"no such signal: {name}") from error
        await send_signal(self._access, self._exec_id, int(number), tree=tree)

    async def send_signal(self, number: int | str) -> None:
        """Send a signal; the name that `subprocess` uses."""
        await self.signal(number)

    async def kill(self) -> None:
        """Kill it and all its descendants. Does nothing if it has ended."""
        if self._exit is None:
            with contextlib.suppress(NotFoundError):
                await send_signal(self._access, self._exec_id, 9, tree=True)

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
    """A process's output, bytes exactly as it wrote them. Iterating gives lines.

    The newest handle on a process gets its output, from the first byte on that nobody has read. Reading from an older
    one then raises `ConflictError`, after what it had taken already.
    """

    def __init__(self, process: AsyncProcess, kind: Kind) -> None:
        self._process = process
        self._kind = kind

    async def read(self, n: int = -1) -> bytes:
        """Read all there will be, or with `n` up to `n` bytes as soon as there are any; empty at the end.

        Raises:
            ConflictError: A newer reader has the output now.
            SandboxGoneError: The sandbox ended first. What had come by any error is still there for `read(n)`.
        """
        if n == 0:
            return b""
        buffer = self._process._buffers[self._kind]
        parts: list[bytes] = []
        try:
            async with self._process._waiting(self._kind):
                while True:
                    await self._process._changed.wait_for(lambda: buffer.size or buffer.ended)
                    if not buffer.size:
                        self._raise_if_lost()
                        return b"".join(parts)
                    if n > 0:
                        return buffer.exactly(min(n, buffer.size))
                    parts.append(buffer.exactly(buffer.size))
                    self._process._settle()
        except BaseException:
            buffer.put_back(parts)
            raise

    async def read_text(self) -> str:
        """Read all there will be, as text; what is not UTF-8 shows as U+FFFD."""
        return (await self.read()).decode("utf-8", "replace")

    async def readline(self) -> bytes:
        """Read one line with its end; the last one may lack it; empty at the end."""
        process = self._process
        buffer, unfinished = process._buffers[self._kind], process._unfinished
        async with process._waiting(self._kind):
            unfinished[self._kind] = unfinished.get(self._kind, 0) + 1
            try:
                while (line := buffer.line()) is None:
                    if buffer.ended or buffer.size >= MAX_OUTPUT_BYTES:
                        if not buffer.size:
                            self._raise_if_lost()
                        return buffer.exactly(buffer.size)
                    process._settle()
                    await process._changed.wait()
                return line
            finally:
                unfinished[self._kind] -= 1

    @property
    def dropped_bytes(self) -> int:
        """Bytes that this handle never got: dropped, of a detached process or of a stream that nobody read while
        something else was waited for; or gone to another reader, or lost, while the connection was broken.
        """
        return self._process._buffers[self._kind].dropped

    def _raise_if_lost(self) -> None:
        process = self._process
        if process._taken_over is not None:
            raise process._taken_over
        if process._error is not None:
            raise process._error

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
            await send_input(
                process._access,
                process._exec_id,
                data,
                offset=process._stdin_offset,
                eof=eof,
                deadline=None,
            )
            if process._stdin_offset is not None:
                process._stdin_offset += len(data)


async def first_soon(frames: AsyncGenerator[Item]) -> AsyncGenerator[Item]:
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


def argv_of(command: str | Sequence[str], args: tuple[str, ...]) -> list[str]:
    """The argument vector behind `run`'s way of naming a command.

    Raises:
        InvalidArgumentError: It is none.
    """
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


def _returncode(end: ExecExit) -> int:
    if end.outcome is Outcome.NOT_STARTED:
        return 127 if end.errno == 2 and end.stage in (None, "exec") else 126
    if end.exit_code is not None:
        return end.exit_code
    return -(end.signal or 9)


def failure(argv: list[str], end: ExecExit) -> str:
    """How a command failed, for a person."""
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


async def send_signal(access: Access, exec_id: str, number: int, *, tree: bool) -> None:
    """Send a signal to a command; with `tree` to its descendants too."""
    await access.client.call(
        NoneType,
        "POST",
        access.path(f"execs/{quote(exec_id)}/signal"),
        body={"signal": number, "tree": tree},
        token=access.token,
        deadline=CLEANUP_DEADLINE,
    )


async def kill_quietly(access: Access, exec_id: str) -> None:
    """Kill a command that nobody waits for any more; done even if the caller is being cancelled."""

    async def kill() -> None:
        with contextlib.suppress(ShoalError):
            await send_signal(access, exec_id, 9, tree=True)

    here = access.client
    if here.closed:
        return
    task = here.own(kill())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2):
            await asyncio.shield(task)


async def send_input(
    access: Access,
    exec_id: str,
    data: bytes,
    *,
    offset: int | None,
    eof: bool,
    deadline: float | None,
) -> None:
    """Put bytes into a command's stdin.

    The offset makes a second try after a broken connection repeat nothing. With None they go after what is there, in
    one try.
    """

    async def once() -> None:
        await access.client.call(
            NoneType,
            "POST",
            access.path(f"execs/{quote(exec_id)}/stdin"),
            query={"eof": flag(eof)} | ({} if offset is None else {"offset": str(offset)}),
            data=data,
            token=access.token,
            deadline=deadline,
            stream=True,
        )

    await (once() if offset is None else patiently(once, RESUME_PATIENCE))


async def exec_state(access: Access, exec_id: str, wait: float) -> ExecState:
    """What is known of a command, as soon as it has ended or so many seconds have passed."""
    return await access.client.call(
        ExecState,
        "GET",
        access.path(f"execs/{quote(exec_id)}"),
        query={"wait": f"{wait:g}"},
        token=access.token,
        deadline=wait + CALL_DEADLINE,
        stream=wait > 0,
        again=False,
    )


async def exec_list(access: Access) -> list[ExecStatus]:
    """The commands that a sandbox knows, oldest first."""
    page = await access.client.call(ExecPage, "GET", access.path("execs"), token=access.token)
    return page.execs
