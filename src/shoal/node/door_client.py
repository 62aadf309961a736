"""The front door, as the engine sees it and over its control socket.

Lines of JSON. The front door may be started after us or again while sandboxes run, so the connection is made anew
whenever it breaks, and the engine is told: it then shows the new door every running sandbox.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio
import msgspec
import structlog

from shoal.errors import NodeUnavailableError, StartFailedError, StartTimeoutError
from shoal.types import Outcome, Ready, Reason

log = structlog.get_logger(__name__)

_GRACE = 2.0
_PROBE_GRACE = 5.0
"""More: a command that is over its time has to be killed, and then the main command is looked at."""
_QUICK = 5.0
_MAX_LINE = 1 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0

T = TypeVar("T")


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults of every exec."""

    env: list[str]
    cwd: str
    user: str
    """As `types.SandboxSpec.user`; empty: root."""


class Attached(msgspec.Struct, frozen=True):
    """What the guest agent said in READY."""

    generation: int


class Ended(msgspec.Struct, frozen=True):
    """How an exec ended; as `types.ExecExit`."""

    outcome: Outcome
    exit_code: int | None = None
    signal: int | None = None
    stdout_tail: str = ""
    """The last that it printed, some 2 KiB at the most; what is no UTF-8 is replaced."""
    stderr_tail: str = ""


class Probed(msgspec.Struct, frozen=True):
    """What came of one attempt to see whether a sandbox is ready."""

    ready: bool
    detail: str = ""
    """Why not, for a person."""
    ended: Ended | None = None
    """Set when the main command is over."""


class Door(Protocol):
    """What the engine asks of the front door."""

    on_connect: Callable[[], None]
    """Called whenever a front door is there that was not before; it knows no sandbox yet."""
    on_lost: Callable[[str, str], None]
    """Called with the id of a sandbox whose guest agent went away or broke the protocol, and how, for a person."""

    async def attach(
        self,
        sandbox: str,
        *,
        socket: str,
        token: str,
        process: Process,
        public_ports: Sequence[int],
        deadline: float,
    ) -> Attached:
        """Connect to a guest agent and serve its sandbox; returns when the agent said READY.

        Raises:
            StartTimeoutError: It said nothing within `deadline` seconds.
            StartFailedError: It ended or said something else.
        """
        ...

    async def detach(self, sandbox: str, *, reason: Reason | None = None) -> None:
        """Stop serving a sandbox and end its streams, which tell `reason`. An unknown id is fine."""
        ...

    async def publish(self, sandbox: str, public_ports: Sequence[int]) -> None:
        """Let these ports be used without a token from now on, and no others.

        A front door that is gone needs no word: the next one gets them with `attach`.

        Raises:
            NodeUnavailableError: It does not serve this sandbox now, or does not answer.
        """
        ...

    async def exec(
        self, sandbox: str, exec_id: str, argv: Sequence[str], *, deadline: float
    ) -> None:
        """Start the main command, detached and with the sandbox's defaults; returns once it runs.

        Raises:
            StartFailedError: It did not start; stage `main`.
        """
        ...

    async def probe(
        self, sandbox: str, ready: Ready, *, main: str | None, deadline: float
    ) -> Probed:
        """See once whether a sandbox is ready.

        Args:
            sandbox: An attached one.
            ready: What makes it so. Its `interval` and `timeout` are the caller's to keep.
            main: Exec id of the main command, whose end shall be told.
            deadline: Seconds after which this attempt has failed.

        Raises:
            StartFailedError: It could not be tried.
        """
        ...


class _Error(msgspec.Struct, frozen=True):
    code: str
    message: str = ""
    errno: int | None = None
    """With `not_started`: the kernel's word, and where starting failed."""
    stage: str | None = None


class _Line(msgspec.Struct, frozen=True):
    """An answer, or an event that nobody asked for."""

    id: int | None = None
    """Whose answer it is; None: an event, or the answer to a request that the front door could not read."""
    ok: msgspec.Raw = msgspec.Raw()
    error: _Error | None = None
    event: str | None = None
    sandbox: str = ""
    message: str = ""


def _ignore_connect() -> None:
    return


def _ignore_lost(sandbox: str, _message: str) -> None:
    log.debug("loss_unheard", sandbox=sandbox)


class DoorClient:
    """The front door over `door.sock`; `run` keeps the connection.

    Args:
        path: The socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_id = 0
        self._writer: asyncio.StreamWriter | None = None
        self._connected = anyio.Event()
        self._waiting: dict[int, asyncio.Future[_Line]] = {}
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(_Line).decode
        self.on_connect: Callable[[], None] = _ignore_connect
        self.on_lost: Callable[[str, str], None] = _ignore_lost

    async def run(self) -> None:
        """Connect, read what comes, and connect again when the connection broke. Ends when it is cancelled."""
        pause = _FIRST_PAUSE
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(
                    str(self._path), limit=_MAX_LINE
                )
            except OSError as error:
                log.debug("door_absent", path=str(self._path), error=str(error))
                await anyio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            pause = _FIRST_PAUSE
            self._writer = writer
            self._connected.set()
            log.info("door_connected", path=str(self._path))
            self.on_connect()
            try:
                await self._read(reader)
            finally:
                self._disconnect()
            log.warning("door_lost", path=str(self._path))

    async def attach(
        self,
        sandbox: str,
        *,
        socket: str,
        token: str,
        process: Process,
        public_ports: Sequence[int],
        deadline: float,
    ) -> Attached:
        """See `Door`."""
        request = {
            "op": "attach",
            "sandbox": sandbox,
            "socket": socket,
            "token": token,
            "process": process,
            "deadline_ms": _milliseconds(deadline),
        }
        if public_ports:
            request["public_ports"] = public_ports
        try:
            with anyio.fail_after(deadline + _GRACE):
                answer = await self._call(request)
        except TimeoutError as error:
            raise StartTimeoutError(f"its guest agent was silent for {deadline:g} s") from error
        if answer.error is not None:
            kind = StartTimeoutError if answer.error.code == "start_timeout" else StartFailedError
            raise kind(
                answer.error.message or f"the front door answered {answer.error.code}",
                stage="ready",
            )
        return _read(answer, Attached, stage="ready")

    async def detach(self, sandbox: str, *, reason: Reason | None = None) -> None:
        """See `Door`."""
        if self._writer is None:
            return  # a front door that is gone serves nobody
        with anyio.fail_after(_QUICK):
            await self._call({"op": "detach", "sandbox": sandbox, "reason": reason})

    async def publish(self, sandbox: str, public_ports: Sequence[int]) -> None:
        """See `Door`."""
        if self._writer is None:
            return
        request = {"op": "ports", "sandbox": sandbox, "public_ports": public_ports}
        try:
            with anyio.fail_after(_QUICK):
                answer = await self._call(request)
        except TimeoutError as error:
            raise NodeUnavailableError(
                f"the front door was silent for {_QUICK:g} s", hint="retry in a moment"
            ) from error
        if answer.error is not None:
            raise NodeUnavailableError(
                answer.error.message or f"the front door answered {answer.error.code}",
                hint="retry in a moment",
            )

    async def exec(
        self, sandbox: str, exec_id: str, argv: Sequence[str], *, deadline: float
    ) -> None:
        """See `Door`."""
        request = {
            "op": "exec",
            "sandbox": sandbox,
            "exec_id": exec_id,
            "argv": argv,
            "deadline_ms": _milliseconds(deadline),
        }
        try:
            with anyio.fail_after(deadline + _GRACE):
                answer = await self._call(request)
        except TimeoutError as error:
            raise StartTimeoutError(
                f"its main command did not start within {deadline:g} s", stage="main"
            ) from error
        fault = answer.error
        if fault is None:
            return
        if fault.code != "not_started":
            kind = StartTimeoutError if fault.code == "deadline_exceeded" else StartFailedError
            why = fault.message or fault.code
            raise kind(f"its main command cannot be started: {why}", stage="main")
        failed = StartFailedError(
            f"its main command: {fault.message}",
            hint=_START_ADVICE.get(fault.errno or 0, _ADVICE),
            stage="main",
            **_given(errno=fault.errno, exec_stage=fault.stage),
        )
        failed.is_infra = False
        raise failed

    async def probe(
        self, sandbox: str, ready: Ready, *, main: str | None, deadline: float
    ) -> Probed:
        """See `Door`."""
        request = {
            "op": "probe",
            "sandbox": sandbox,
            "probe": _given(port=ready.port, path=ready.path, command=ready.command),
            "main": main,
            "deadline_ms": _milliseconds(deadline),
        }
        try:
            with anyio.fail_after(deadline + _PROBE_GRACE):
                answer = await self._call(request)
        except TimeoutError as error:
            raise StartTimeoutError(
                f"the front door was silent for {deadline:g} s", stage="ready"
            ) from error
        if answer.error is not None:
            raise StartFailedError(
                f"whether it is ready cannot be seen: {answer.error.message or answer.error.code}",
                stage="ready",
            )
        return _read(answer, Probed, stage="ready")

    async def _call(self, request: dict[str, Any]) -> _Line:
        while self._writer is None:
            await self._connected.wait()
        self._last_id += 1
        number = self._last_id
        answer: asyncio.Future[_Line] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._writer.write(self._encode({"id": number, **request}) + b"\n")
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except (OSError, asyncio.IncompleteReadError):
                return
            except asyncio.LimitOverrunError as error:
                log.error("door_line_too_long", error=str(error))
                return
            self._take(line)

    def _take(self, data: bytes) -> None:
        try:
            line = self._decode(data)
        except msgspec.DecodeError as error:
            log.error("door_line_unreadable", error=str(error))
            return
        if line.id is not None:
            waiter = self._waiting.get(line.id)
            if waiter is not None and not waiter.done():
                waiter.set_result(line)
        elif line.event == "sandbox_lost":
            try:
                self.on_lost(line.sandbox, line.message)
            except Exception:  # the reader must live on whatever one sandbox's story is
                log.exception("loss_unhandled", sandbox=line.sandbox)
        elif line.event is not None:
            log.warning("door_event_unknown", door_event=line.event)
        else:
            # Whose request it was is not said; the caller's own deadline ends its wait.
            fault = line.error or _Error("unknown")
            log.error("door_request_refused", code=fault.code, error=fault.message)

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self._connected = anyio.Event()
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(NodeUnavailableError("the front door is gone"))


_ADVICE = "try it with exec, in a sandbox without `command`"
_START_ADVICE = {
    errno.ENOENT: "the program, or the interpreter that a script names, must be in the image; a name without a slash is searched in PATH",
    errno.EACCES: "make it executable with chmod +x, for the user that it runs as",
    errno.ENOEXEC: "it is no program for this machine; a script needs a first line such as #!/bin/sh",
}


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _read(answer: _Line, kind: type[T], *, stage: str) -> T:
    try:
        return msgspec.json.decode(answer.ok, type=kind)
    except msgspec.DecodeError as error:
        raise StartFailedError(
            f"the front door's answer makes no sense: {error}", stage=stage
        ) from error
