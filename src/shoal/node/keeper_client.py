"""The keeper, as the engine sees it and over its socket.

One JSON object a packet on a SOCK_SEQPACKET pair that the keeper made; a descriptor may travel with a request.
Answers come in any order. What is sent here is a closed list of operations with values that were checked before;
no client's byte reaches the keeper unread.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import anyio
import msgspec
import structlog

from shoal.errors import (
    DeadlineExceededError,
    ImageError,
    InternalError,
    NodeUnavailableError,
    ResourceExhaustedError,
)
from shoal.images import UnpackedLayer
from shoal.node.lifecycle import Exited

log = structlog.get_logger(__name__)

MAX_PACKET = 128 * 1024
_PACKETS_A_WAKE = 64
_QUICK = 30.0
_GRACE = 5.0
"""Seconds on top of a deadline that the keeper itself keeps, so that its own, better error arrives first."""

T = TypeVar("T")


class Pool(msgspec.Struct, frozen=True):
    """The disk pool."""

    total_bytes: int
    free_bytes: int


class KeeperHello(msgspec.Struct, frozen=True):
    """What the keeper says of itself and of the host."""

    version: str
    kernel: str
    cgroup: str
    pool: Pool
    walls: dict[str, Any] = {}
    listen: str | None = None
    """Address and port of the front door's TCP listener; None: it has none."""
    id_blocks: list[int] = []
    """First slot of each block of host ids that this keeper has taken."""
    ids_per_block: int = 0


class IdBlock(msgspec.Struct, frozen=True):
    """Ranges of host ids, by the numbers of their slots; ours until the keeper ends."""

    first: int
    count: int


class Created(msgspec.Struct, frozen=True):
    """A sandbox whose PID 1 was started; READY is still to come."""

    pid: int
    socket: str


class Alive(msgspec.Struct, frozen=True):
    """A sandbox whose PID 1 has not ended."""

    sandbox: str
    socket: str


class Held(msgspec.Struct, frozen=True):
    """The sandboxes of a keeper at one moment."""

    alive: dict[str, Alive]
    exited: dict[str, Exited]
    """The last that ended by themselves, by id."""


class Fault(msgspec.Struct, frozen=True):
    """Why the keeper could not do it."""

    code: str
    message: str = ""
    stage: str = ""
    call: str = ""
    object: str = ""
    errno: int = 0


class KeeperError(InternalError):
    """An operation of the keeper failed; `fault` is its account."""

    def __init__(self, op: str, fault: Fault) -> None:
        at = f" at {fault.stage}" if fault.stage else ""
        details = {name: value for name, value in msgspec.structs.asdict(fault).items() if value}
        details.pop("message", None)
        super().__init__(f"{op} failed{at}: {fault.message or fault.code}", **details)
        self.fault = fault

    @property
    def is_full(self) -> bool:
        """There was no room for it."""
        return self.fault.errno in (errno.ENOSPC, errno.EDQUOT)


class Keeper(Protocol):
    """What the engine asks of the keeper."""

    on_exit: Callable[[str, Exited], None]
    """Called with the id of each sandbox whose PID 1 ended by itself."""

    async def create(
        self, sandbox: str, *, generation: int, spec: dict[str, Any], deadline: float
    ) -> Created:
        """Build a sandbox and start its PID 1. On any error something may be left: call `destroy`."""
        ...

    async def destroy(self, sandbox: str, *, deadline: float) -> None:
        """Remove a sandbox with all it holds; returns when nothing is left. An unknown id is fine."""
        ...

    async def claim_ids(self) -> IdBlock:
        """Take a block of id ranges that no other node on this machine has.

        Raises:
            KeeperError: All are taken.
        """
        ...

    async def sandboxes(self) -> Held:
        """What the keeper holds, and what ended by itself lately."""
        ...


class _Packet(msgspec.Struct, frozen=True):
    id: int | None = None
    ok: msgspec.Raw = msgspec.Raw()
    error: Fault | None = None
    event: str | None = None
    sandbox: str = ""
    oom_kills: int = 0
    status: int = 0


class _Exited(msgspec.Struct, frozen=True):
    sandbox: str
    oom_kills: int
    status: int


class _Page(msgspec.Struct, frozen=True):
    sandboxes: list[Alive]
    exited: list[_Exited]
    more: bool


class _Layers(msgspec.Struct, frozen=True):
    layers: list[str]


class _Committed(msgspec.Struct, frozen=True):
    existing: bool


def _ignore_exit(sandbox: str, _event: Exited) -> None:
    log.debug("exit_unheard", sandbox=sandbox)


class KeeperClient:
    """The keeper over its socket. As a context manager it listens; when it is left, the socket is closed.

    Args:
        sock: Our end of the pair, SOCK_SEQPACKET. This object owns it from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._last_id = 0
        self._waiting: dict[int, asyncio.Future[msgspec.Raw | Fault]] = {}
        self._unsent: collections.deque[tuple[bytes, int | None]] = collections.deque()
        self._buffer = bytearray(MAX_PACKET + 1)
        self._view = memoryview(self._buffer)
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(_Packet).decode
        self._fd = sock.fileno()
        self.on_exit: Callable[[str, Exited], None] = _ignore_exit
        self.lost = anyio.Event()
        """Set when the keeper is gone: from then on every call fails."""

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._readable)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_up("closed")

    async def hello(self) -> KeeperHello:
        """Who the keeper is and what the host has."""
        return await self._ask({"op": "hello"}, KeeperHello, deadline=_QUICK)

    async def create(
        self, sandbox: str, *, generation: int, spec: dict[str, Any], deadline: float
    ) -> Created:
        """See `Keeper`."""
        request = {"op": "create", "sandbox": sandbox, "generation": generation, "spec": spec}
        return await self._ask(request, Created, deadline=deadline)

    async def destroy(self, sandbox: str, *, deadline: float) -> None:
        """See `Keeper`."""
        await self._call({"op": "destroy", "sandbox": sandbox}, deadline=deadline)

    async def claim_ids(self) -> IdBlock:
        """See `Keeper`."""
        return await self._ask({"op": "claim_ids"}, IdBlock, deadline=_QUICK)

    async def sandboxes(self) -> Held:
        """See `Keeper`."""
        alive: dict[str, Alive] = {}
        last = ""
        while True:
            page = await self._ask({"op": "list", "after": last}, _Page, deadline=_QUICK)
            alive |= {one.sandbox: one for one in page.sandboxes}
            if not page.more:
                break
            last = page.sandboxes[-1].sandbox
        exited = {
            one.sandbox: Exited(oom_kills=one.oom_kills, wait_status=one.status)
            for one in page.exited
        }
        return Held(alive=alive, exited=exited)

    async def layer(
        self, op: str, kind: type[T], *, deadline: float, fd: int | None = None, **fields: Any
    ) -> T:
        """One of the `layer_…` operations; `op` is what follows the underscore."""
        return await self._ask({"op": f"layer_{op}", **fields}, kind, deadline=deadline, fd=fd)

    async def _ask(
        self, request: dict[str, Any], kind: type[T], *, deadline: float, fd: int | None = None
    ) -> T:
        raw = await self._call(request, deadline=deadline, fd=fd)
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.DecodeError as error:
            raise InternalError(
                f"the keeper's answer to {request['op']} makes no sense: {error}"
            ) from error

    async def _call(
        self, request: dict[str, Any], *, deadline: float, fd: int | None = None
    ) -> msgspec.Raw:
        if self.lost.is_set():
            raise NodeUnavailableError("the keeper is gone")
        op = str(request["op"])
        self._last_id += 1
        number = self._last_id
        packet = self._encode({"id": number, **request})
        if len(packet) > MAX_PACKET:
            raise InternalError(f"{op} has {len(packet)} bytes, a packet holds {MAX_PACKET}")
        answer: asyncio.Future[msgspec.Raw | Fault] = self._loop.create_future()
        self._waiting[number] = answer
        try:
            with anyio.fail_after(deadline):
                self._send(packet, fd)
                result = await answer
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the keeper did not finish {op} within {deadline:g} s", op=op
            ) from error
        finally:
            self._waiting.pop(number, None)
        if isinstance(result, Fault):
            raise KeeperError(op, result)
        return result

    def _send(self, packet: bytes, fd: int | None) -> None:
        if self._unsent or not self._sent(packet, fd):
            # The caller may be gone, and its descriptor closed, before there is room: keep one of our own.
            self._unsent.append((packet, None if fd is None else os.dup(fd)))
            self._loop.add_writer(self._fd, self._writable)

    def _sent(self, packet: bytes, fd: int | None) -> bool:
        try:
            if fd is None:
                self._sock.send(packet)
            else:
                socket.send_fds(self._sock, [packet], [fd])
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._give_up(str(error))
        return True

    def _writable(self) -> None:
        while self._unsent:
            packet, fd = self._unsent[0]
            if not self._sent(packet, fd):
                return
            if self._unsent:  # empty when the socket broke just now
                self._unsent.popleft()
                if fd is not None:
                    os.close(fd)
        if not self.lost.is_set():
            self._loop.remove_writer(self._fd)

    def _readable(self) -> None:
        for _ in range(_PACKETS_A_WAKE):
            try:
                size = self._sock.recv_into(self._buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._give_up(str(error))
                return
            if size == 0:
                self._give_up("end of file")
                return
            self._take(self._view[:size])
            if self.lost.is_set():
                return

    def _take(self, data: memoryview) -> None:
        try:
            if len(data) > MAX_PACKET:
                raise msgspec.DecodeError("packet too long")
            packet = self._decode(data)
        except msgspec.DecodeError as error:
            log.error("keeper_packet_unreadable", error=str(error))
            return
        if packet.id is not None:
            answer = self._waiting.get(packet.id)
            if answer is None or answer.done():
                log.debug("keeper_answer_unawaited", id=packet.id)
            elif packet.error is not None:
                answer.set_result(packet.error)
            else:
                # A Raw looks into the buffer, which the next packet overwrites.
                answer.set_result(msgspec.Raw(bytes(packet.ok) or b"{}"))
        elif packet.event == "sandbox_exited":
            try:
                self.on_exit(
                    packet.sandbox, Exited(oom_kills=packet.oom_kills, wait_status=packet.status)
                )
            except Exception:  # the reader must live on whatever one sandbox's story is
                log.exception("exit_unhandled", sandbox=packet.sandbox)
        else:
            log.warning("keeper_event_unknown", keeper_event=packet.event)

    def _give_up(self, why: str) -> None:
        if self.lost.is_set():
            return
        self.lost.set()
        with contextlib.suppress(ValueError, OSError):
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
        self._sock.close()
        for _, fd in self._unsent:
            if fd is not None:
                os.close(fd)
        self._unsent.clear()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(NodeUnavailableError(f"the keeper is gone ({why})"))


class KeeperLayers:
    """The image store's layers, kept by the keeper; an `images.LayerStore`."""

    def __init__(self, keeper: KeeperClient) -> None:
        self._keeper = keeper

    async def unpack(
        self,
        name: str,
        blob: int,
        *,
        length: int | None,
        max_bytes: int,
        max_entries: int,
        deadline: float,
    ) -> UnpackedLayer:
        """See `LayerStore`."""
        try:
            return await self._keeper.layer(
                "unpack",
                UnpackedLayer,
                deadline=deadline + _GRACE,
                fd=blob,
                layer=name,
                max_bytes=max_bytes,
                max_entries=max_entries,
                length=length,
                deadline_ms=round(deadline * 1000),
            )
        except KeeperError as error:
            if error.fault.code == "bad_layer":
                raise ImageError(error.fault.message or "layer refused") from error
            if error.fault.code == "deadline_exceeded":
                raise DeadlineExceededError(
                    f"the layer was not unpacked within {deadline:g} s", op="layer_unpack"
                ) from error
            if error.is_full:
                raise ResourceExhaustedError(
                    "the disk pool has no room for the layer",
                    hint="remove images with `shoal image rm`, or make pool_mib larger",
                ) from error
            raise

    async def commit(self, name: str, diff_id: str) -> bool:
        """See `LayerStore`."""
        return (
            await self._keeper.layer(
                "commit", _Committed, deadline=_QUICK, layer=name, diff_id=diff_id
            )
        ).existing

    async def discard(self, name: str) -> None:
        """See `LayerStore`."""
        await self._keeper.layer("discard", dict[str, Any], deadline=_QUICK, layer=name)

    async def remove(self, diff_id: str) -> None:
        """See `LayerStore`."""
        await self._keeper.layer("remove", dict[str, Any], deadline=_QUICK, diff_id=diff_id)

    async def list(self) -> list[str]:
        """See `LayerStore`."""
        return (await self._keeper.layer("list", _Layers, deadline=_QUICK)).layers
