"""The life of one exec as its client sees it: output that survives a broken connection, and bounded buffers."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import re
from base64 import b32encode
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import aiohttp
import msgspec

from shoal.errors import (
    ConflictError,
    InternalError,
    InvalidArgumentError,
    NodeUnavailableError,
    ShoalError,
    from_problem,
)
from shoal.sdk._client import Address, Client, client, quote
from shoal.sdk._frames import FrameParser, Kind
from shoal.sdk._receipts import Receipts
from shoal.types import ExecExit, ExecRequest, ExecStarted

T = TypeVar("T")

RESUME_PATIENCE = 30.0
"""Seconds without a byte, after a stream broke, until the node counts as gone."""
START_PATIENCE = 3.0
"""The same for a stream that was never answered."""
STRAY_SECONDS = 5.0
"""How long after a break a request of ours that seemed lost may still arrive, and take the stream over."""
_EXEC_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
KEPT_BACK = 4 << 10
"""Bytes of a stream that must not stand still which the node keeps all the same for who attaches next."""
RECEIPT_LEAST = 8 << 10
"""Bytes of a stream with one reader for good that the node is told of: short of memory it may keep little more."""
LAST_RECEIPT_LEAST = 1 << 10
"""The same when it has ended: that much of a finished command costs its sandbox less than a request costs everybody."""


def new_exec_id() -> str:
    """An exec id that nobody has: `ex-` and 26 characters."""
    return "ex-" + b32encode(os.urandom(17)).decode().lower().rstrip("=")[:26]


def check_exec_id(exec_id: str) -> str:
    """An exec id as it is, if it is one. It stands in paths, where `.` and `..` mean something else."""
    if _EXEC_ID.fullmatch(exec_id) and exec_id not in (".", ".."):
        return exec_id
    raise InvalidArgumentError(
        f"exec id {exec_id[:200]!r} is none",
        hint="1 to 128 of the characters A-Z a-z 0-9 _ . -, and neither `.` nor `..`",
    )


@dataclass(frozen=True)
class Access:
    """What reaches one sandbox's data plane, from any loop and any process."""

    address: Address
    sandbox: str
    token: str = field(repr=False)

    @property
    def client(self) -> Client:
        """The running loop's client."""
        return client(self.address)

    def path(self, rest: str) -> str:
        """A path of this sandbox's data plane."""
        return f"/v1/sandboxes/{quote(self.sandbox)}/{rest}"


class ExecStream:
    """An exec's frames. When the connection breaks it attaches again.

    The node keeps what has not been consumed here: whoever takes the stream over goes on there, and so does this
    one after a break, less what it has seen already.
    """

    def __init__(
        self,
        access: Access,
        request: ExecRequest | None,
        exec_id: str,
        offsets: Sequence[int] = (0, 0),
        unread: Sequence[int] = (0, 0),
    ) -> None:
        if request is not None and request.timeout is not None:
            _check_timeout(request.timeout)
        self.access = access
        self.exec_id = exec_id
        self.offsets = list(offsets)
        """Bytes of stdout and of stderr seen."""
        self.consumed = [seen - more for seen, more in zip(offsets, unread, strict=True)]
        """How much of them the node need not keep."""
        self.lost = 0
        """Bytes that nobody has any more."""
        self._repeated = [0, 0]
        self._request = request
        self._answered = False
        self._receipts = Receipts(access, exec_id, self.consumed)
        access.client.receipts.add(self._receipts)

    def consume(self, unread: Sequence[int] = (0, 0), *, least: int = 1) -> None:
        """What has come by now has been consumed, except for so many bytes of stdout and of stderr.

        Args:
            unread: Their number.
            least: Below so many new bytes the node is not told yet.
        """
        for index in (0, 1):
            upto = self.offsets[index] - unread[index]
            self.consumed[index] = max(self.consumed[index], upto)
        if self._receipts.new >= least:
            self._receipts.due()

    async def frames(self) -> AsyncGenerator[ExecStarted | ExecExit | tuple[Kind, bytes]]:
        """Started, output, and the exit as the last one.

        Raises:
            NodeUnavailableError: The node is gone and stayed gone.
            ShoalError: What the node said, at the start or in the middle; see `taken_over`.
        """
        loop = asyncio.get_running_loop()
        tries, broken_at, stray_until = 0, loop.time(), 0.0
        if self._request is None:
            await self._flush_others()
        while True:
            answered = stray = False
            try:
                async with self._open() as response:
                    parser = FrameParser()
                    async for chunk in response.content.iter_any():
                        for kind, payload in parser.feed(chunk):
                            self._answered = answered = True
                            if kind is Kind.STDOUT or kind is Kind.STDERR:
                                tries = 0
                                if fresh := self._fresh(kind - Kind.STDOUT, payload):
                                    yield kind, fresh
                            elif kind is Kind.EXIT:
                                yield _decode(payload, ExecExit)
                                return
                            elif kind is Kind.ERROR:
                                raise from_problem(_decode(payload, dict))
                            else:
                                yield self._started(_decode(payload, ExecStarted))
                broken = NodeUnavailableError("the exec's stream ended without an exit")
            except NodeUnavailableError as error:
                broken = error
            except ConflictError as error:
                if not taken_over(error) or loop.time() > stray_until:
                    raise
                stray = True
                broken = NodeUnavailableError("an earlier request came late")
            if answered:
                broken_at = loop.time()
            if not stray:
                stray_until = loop.time() + STRAY_SECONDS
            tries += 1
            patience = RESUME_PATIENCE if self._answered else START_PATIENCE
            if loop.time() - broken_at > patience:
                raise broken
            await asyncio.sleep(min(0.02 * 2 ** min(tries, 6), 1.0))

    def _open(self) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._request is not None:
            # The id is ours, so a second try of a start that arrived is the same exec.
            return self.access.client.open(
                "POST",
                self.access.path("execs"),
                query={"ack": "client"},
                body=self._request,
                token=self.access.token,
            )
        out, err = self.consumed
        return self.access.client.open(
            "GET",
            self.access.path(f"execs/{quote(self.exec_id)}/stream"),
            query={"stdout_offset": str(out), "stderr_offset": str(err), "ack": "client"},
            token=self.access.token,
        )

    async def _flush_others(self) -> None:
        """Have told, before we attach, what other handles here have read of this exec."""
        for one in list(self.access.client.receipts):
            if (one.access.sandbox, one.exec_id) == (self.access.sandbox, self.exec_id):
                await one.flush()

    def _started(self, started: ExecStarted) -> ExecStarted:
        self._request = None
        self.exec_id = started.exec_id
        for index, start in enumerate((started.stdout_offset, started.stderr_offset)):
            seen = self.offsets[index]
            self._repeated[index] = max(0, seen - start)
            self.lost += max(0, start - seen)
            self.offsets[index] = max(seen, start)
            self.consumed[index] = max(self.consumed[index], start)
        return started

    def _fresh(self, index: int, payload: bytes) -> bytes:
        """What has not been seen yet of the next output."""
        if repeated := min(self._repeated[index], len(payload)):
            self._repeated[index] -= repeated
            payload = payload[repeated:]
        self.offsets[index] += len(payload)
        return payload


def taken_over(error: ShoalError) -> bool:
    """Whether a stream ended because a newer reader has it now."""
    return isinstance(error, ConflictError) and error.details.get("errno") == errno.ESTALE


def _check_timeout(seconds: float) -> None:
    """Refuse what JSON cannot carry, and what nobody can wait for."""
    if not 0 < seconds < math.inf:
        raise InvalidArgumentError(
            f"timeout is {seconds}",
            hint="give seconds above 0, or leave it out to let the command live as long as the sandbox",
        )


def _decode(payload: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(payload, type=kind)
    except msgspec.DecodeError as error:
        raise InternalError(f"malformed frame in an exec's stream: {error}") from error


class Capped:
    """Bytes up to a limit: what comes first and what comes last is kept, the middle is dropped."""

    def __init__(self, limit: int) -> None:
        self._head_room = (limit + 1) // 2
        self._tail_room = limit - self._head_room
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self.dropped = 0

    def add(self, data: bytes) -> None:
        """Take the next bytes."""
        if room := self._head_room - len(self._head):
            self._head += data[:room]
            data = data[room:]
        if not data:
            return
        self._tail.append(data)
        self._tail_size += len(data)
        while (over := self._tail_size - self._tail_room) > 0:
            first = self._tail[0]
            cut = min(over, len(first))
            if cut == len(first):
                self._tail.popleft()
            else:
                self._tail[0] = first[cut:]
            self._tail_size -= cut
            self.dropped += cut

    def value(self) -> bytes:
        """All of it, with a line in place of what was dropped."""
        gap = b"\n[... %d bytes left out ...]\n" % self.dropped if self.dropped else b""
        return bytes(self._head) + gap + b"".join(self._tail)


class Buffer:
    """Output of a running process that has not been read yet."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self.size = 0
        self.ended = False
        self.dropped = 0

    def put(self, data: bytes) -> None:
        """Take the next bytes."""
        if data:
            self._chunks.append(data)
            self.size += len(data)

    def put_back(self, parts: list[bytes]) -> None:
        """Give back what was taken last."""
        self._chunks.extendleft(reversed(parts))
        self.size += sum(len(part) for part in parts)

    def cut(self, limit: int) -> None:
        """Forget what comes after the first `limit` bytes."""
        while self.size > limit:
            last = self._chunks.pop()
            self.size -= len(last)
            self.put(last[: max(0, limit - self.size)])

    def drop(self, limit: int) -> None:
        """Forget the oldest bytes over `limit`."""
        while self.size > limit:
            self.dropped += len(self.take(self.size - limit))

    def take(self, limit: int) -> bytes:
        """Up to `limit` bytes from the front, as many as come in one piece."""
        first = self._chunks.popleft()
        if len(first) > limit:
            self._chunks.appendleft(first[limit:])
            first = first[:limit]
        self.size -= len(first)
        return first

    def line(self) -> bytes | None:
        """The first line with its end, or None when no line is complete."""
        before = 0
        for chunk in self._chunks:
            if (at := chunk.find(b"\n")) >= 0:
                return self.exactly(before + at + 1)
            before += len(chunk)
        return None

    def exactly(self, count: int) -> bytes:
        """Exactly `count` bytes, which are there."""
        if self._chunks and len(self._chunks[0]) >= count:
            return self.take(count)
        parts = []
        while count:
            parts.append(self.take(count))
            count -= len(parts[-1])
        return b"".join(parts)
