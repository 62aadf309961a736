"""The life of one exec as its client sees it: output that survives a broken connection, and bounded buffers."""

from __future__ import annotations

import asyncio
import os
from base64 import b32encode
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import aiohttp
import msgspec

from shoal.errors import InternalError, NodeUnavailableError, from_problem
from shoal.sdk._client import Address, Client, client, quote
from shoal.sdk._frames import FrameParser, Kind
from shoal.types import ExecExit, ExecRequest, ExecStarted

T = TypeVar("T")

RESUME_TRIES = 8
"""Broken connections in a row, without a byte between them, after which the node counts as gone."""


def new_exec_id() -> str:
    """An exec id that nobody has: `ex-` and 26 characters."""
    return "ex-" + b32encode(os.urandom(17)).decode().lower().rstrip("=")[:26]


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
    """An exec's frames. When the connection breaks it attaches again, at the first byte not seen yet."""

    def __init__(
        self, access: Access, request: ExecRequest | None, exec_id: str, offsets: tuple[int, int]
    ) -> None:
        self.access = access
        self.exec_id = exec_id
        self.offsets = list(offsets)
        """Bytes of stdout and of stderr seen."""
        self.lost = 0
        """Bytes that nobody has any more: they were sent into a connection that broke."""
        self._request = request

    async def frames(self) -> AsyncGenerator[ExecStarted | ExecExit | tuple[Kind, bytes]]:
        """Started, output, and the exit as the last one.

        Raises:
            NodeUnavailableError: The node is gone and stayed gone.
            ShoalError: What the node said, at the start or in the middle.
        """
        tries = 0
        while True:
            try:
                async with self._open() as response:
                    parser = FrameParser()
                    async for chunk in response.content.iter_any():
                        for kind, payload in parser.feed(chunk):
                            tries = 0
                            if kind is Kind.STDOUT or kind is Kind.STDERR:
                                self.offsets[kind - Kind.STDOUT] += len(payload)
                                yield kind, payload
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
            tries += 1
            if tries > RESUME_TRIES:
                raise broken
            await asyncio.sleep(min(0.02 * 2**tries, 1.0))

    def _open(self) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        if self._request is not None:
            # The id is ours, so a second try of a start that arrived is the same exec.
            return self.access.client.open(
                "POST", self.access.path("execs"), body=self._request, token=self.access.token
            )
        out, err = self.offsets
        return self.access.client.open(
            "GET",
            self.access.path(f"execs/{quote(self.exec_id)}/stream"),
            query={"stdout_offset": str(out), "stderr_offset": str(err)},
            token=self.access.token,
        )

    def _started(self, started: ExecStarted) -> ExecStarted:
        self._request = None
        self.exec_id = started.exec_id
        for index, offset in enumerate((started.stdout_offset, started.stderr_offset)):
            self.lost += max(0, offset - self.offsets[index])
            self.offsets[index] = offset
        return started


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
