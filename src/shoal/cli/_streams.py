"""A running process joined to this program's own stdin, stdout and stderr, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

from shoal.errors import ShoalError
from shoal.sdk import AsyncProcess, AsyncStreamReader
from shoal.sdk._async import MAX_OUTPUT_BYTES
from shoal.sdk._exec import Capped
from shoal.types import ExecExit, ExecResult, Outcome

_CHUNK = 1 << 18
Sink = Callable[[bytes], Awaitable[None]]
"""Takes the next bytes of an output."""


class Writer:
    """Writes to a descriptor from a thread of its own: a reader who stalls stalls nothing else, nor our exit."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._work: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._main, name=f"shoal-write-{fd}", daemon=True).start()

    async def write(self, data: bytes) -> None:
        """Write all of it."""
        done = self._loop.create_future()
        self._work.put((data, done))
        await done

    def _main(self) -> None:
        while True:
            data, done = self._work.get()
            error: OSError | None = None
            name = {1: "stdout", 2: "stderr"}.get(self._fd)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except OSError as caught:
                error = OSError(caught.errno, caught.strerror, name)
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(_settle, done, error)


def _settle(done: asyncio.Future[None], error: OSError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


async def read_fd(fd: int) -> AsyncIterator[bytes]:
    """What comes on a descriptor, up to its end; read in a thread that our exit does not wait for."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[bytes] = asyncio.Queue()
    room = threading.Semaphore(4)

    def main() -> None:
        while True:
            room.acquire()
            try:
                data = os.read(fd, _CHUNK)
            except OSError:
                data = b""
            try:
                loop.call_soon_threadsafe(arrived.put_nowait, data)
            except RuntimeError:
                return
            if not data:
                return

    threading.Thread(target=main, name=f"shoal-read-{fd}", daemon=True).start()
    while data := await arrived.get():
        yield data
        room.release()


async def join(process: AsyncProcess, *, stdin: bool) -> ExecExit:
    """Pass bytes both ways until the process has ended and all its output is written.

    Args:
        process: What to join.
        stdin: Send it what comes on our stdin.
    """
    return await _converse(process, Writer(1).write, Writer(2).write, stdin=stdin)


async def watch(process: AsyncProcess, *, stdin: bool) -> ExecExit:
    """As `join`, of a process that is not ours: it goes on when we are cancelled."""
    async with _feeding(process, stdin=stdin):
        return await pump(process, Writer(1).write, Writer(2).write)


async def collect(
    process: AsyncProcess, *, stdin: bool, max_output_bytes: int = MAX_OUTPUT_BYTES
) -> ExecResult:
    """As `join`, but keep the output: what `AsyncSandbox.run` returns, with our stdin sent as it comes."""
    outputs = Capped(max_output_bytes), Capped(max_output_bytes)

    async def keep_stdout(data: bytes) -> None:
        outputs[0].add(data)

    async def keep_stderr(data: bytes) -> None:
        outputs[1].add(data)

    end = await _converse(process, keep_stdout, keep_stderr, stdin=stdin)
    return ExecResult(
        outcome=end.outcome,
        exit_code=end.exit_code,
        stdout_bytes=outputs[0].value(),
        stderr_bytes=outputs[1].value(),
        signal=end.signal,
        errno=end.errno,
        stage=end.stage,
        usage=end.usage,
        truncated=process.stdout.dropped_bytes + process.stderr.dropped_bytes > 0
        or any(output.dropped for output in outputs),
    )


@contextlib.asynccontextmanager
async def killed_with_us(process: AsyncProcess) -> AsyncIterator[None]:
    """Kill the process if the block fails or is cancelled."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ShoalError):
            await asyncio.shield(process.kill())
        raise


async def pump(process: AsyncProcess, stdout: Sink, stderr: Sink) -> ExecExit:
    """Pass a process's output on until it has ended and all of it is written."""

    async def out(reader: AsyncStreamReader, sink: Sink) -> None:
        while data := await reader.read(_CHUNK):
            await sink(data)

    outputs = [
        asyncio.create_task(out(process.stdout, stdout)),
        asyncio.create_task(out(process.stderr, stderr)),
    ]
    try:
        await asyncio.gather(*outputs)
        await process.wait()
    finally:
        for task in outputs:
            task.cancel()
    assert process.exit is not None  # noqa: S101 - wait returned
    return process.exit


async def _converse(process: AsyncProcess, stdout: Sink, stderr: Sink, *, stdin: bool) -> ExecExit:
    async with _feeding(process, stdin=stdin), killed_with_us(process):
        return await pump(process, stdout, stderr)


@contextlib.asynccontextmanager
async def _feeding(process: AsyncProcess, *, stdin: bool) -> AsyncIterator[None]:
    """Send what comes on our stdin while the block runs, if `stdin`."""

    async def feed() -> None:
        with contextlib.suppress(ShoalError):  # it does not read any more
            async for data in read_fd(0):
                await process.stdin.write(data)
            await process.stdin.close()

    feeder = asyncio.create_task(feed()) if stdin else None
    try:
        yield
    finally:
        if feeder is not None:
            feeder.cancel()


_START_HINTS = {
    None: "is it in the image, and on its PATH?",
    "exec": "is it in the image, and on its PATH?",
    "cwd": "the working directory must be a directory in the sandbox",
    "user": "users are those of the image's own /etc/passwd, or numbers",
}


def exit_code(end: ExecExit | ExecResult, program: str) -> tuple[int, str]:
    """Our exit code for a command's end, and what to say about it (mostly nothing).

    The command's own; 127 and 126 as a shell's for one that does not start; 124 as timeout(1)'s; 128+n for
    signal n.
    """
    match end.outcome:
        case Outcome.EXITED:
            return end.exit_code or 0, ""
        case Outcome.NOT_STARTED:
            why = os.strerror(end.errno) if end.errno else "refused"
            missing = end.errno == 2 and end.stage in (None, "exec")
            remark = f"{program} did not start: {why} (at {end.stage or 'exec'})"
            hint = _START_HINTS.get(end.stage)
            if end.errno == errno.EACCES and end.stage in (None, "exec"):
                hint = "is it an executable file?"
            if hint:
                remark += f"\nhint: {hint}"
            return 127 if missing else 126, remark
        case Outcome.TIMED_OUT:
            return 124, f"{program} was killed: its time was up"
        case Outcome.OOM_KILLED:
            return (
                137,
                f"{program} was killed: it went over the sandbox's memory limit\nhint: see --memory",
            )
        case _:
            return 128 + (end.signal or 9), ""
