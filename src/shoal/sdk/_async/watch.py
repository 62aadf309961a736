"""What happens to a sandbox's files, told as it happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from shoal.errors import (
    DeadlineExceededError,
    InternalError,
    NodeUnavailableError,
    ShoalError,
    from_problem,
)
from shoal.sdk._client import START_DEADLINE, flag, pauses
from shoal.sdk._exec import Access
from shoal.types import FileEvent

_WAITING = 1024
"""Events that may wait to be taken; beyond them the node's are not read, and it drops some with an `overflow`."""


class AsyncFileWatch:
    """Events of a path, in order, while its block lasts.

        async with sb.files.watch("/app") as events:
            async for event in events:
                print(event.kind, event.path)

    Once the block is entered nothing is missed: what could not be told, also because the connection broke,
    shows as an event of the kind `overflow`. Iterating ends when the block is left.

    Raises:
        PathNotFoundError: Nothing is at the path.
        SandboxGoneError: The sandbox has ended; raised in place of the next event.
    """

    def __init__(self, access: Access, path: str, *, recursive: bool) -> None:
        self._access = access
        self._path = path
        self._recursive = recursive
        self._events: deque[FileEvent] = deque()
        self._changed = asyncio.Condition()
        self._ready = False
        self._ended = False
        self._error: ShoalError | None = None
        self._pump: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._pump = self._access.client.own(self._read_on())
        try:
            async with asyncio.timeout(START_DEADLINE), self._changed:
                await self._changed.wait_for(lambda: self._ready or self._ended)
        except BaseException as error:
            self._pump.cancel()
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError(
                    f"the watch did not begin within {START_DEADLINE:g} s"
                ) from error
            raise
        if not self._ready and self._error is not None:
            raise self._error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])
        async with self._changed:
            self._events.clear()
            self._ended, self._error = True, None
            self._changed.notify_all()

    def __aiter__(self) -> AsyncFileWatch:
        return self

    async def __anext__(self) -> FileEvent:
        async with self._changed:
            await self._changed.wait_for(lambda: self._events or self._ended)
            if not self._events:
                raise self._error or StopAsyncIteration
            self._changed.notify_all()
            return self._events.popleft()

    async def _read_on(self) -> None:
        """Take events until the end; over a connection that broke as soon as there is one again."""
        try:
            waits = pauses()
            while True:
                try:
                    if await self._connection():
                        waits = pauses()
                    broken = NodeUnavailableError("the node ended the watch")
                except NodeUnavailableError as error:
                    broken = error
                if (pause := next(waits, None)) is None:
                    raise broken
                await asyncio.sleep(pause)
        except ShoalError as error:
            self._error = error
        finally:
            self._ended = True
            with contextlib.suppress(
                RuntimeError
            ):  # a condition cannot be entered while its loop is closing
                async with self._changed:
                    self._changed.notify_all()

    async def _connection(self) -> bool:
        """Take what comes over one connection, and return whether anything did."""
        query = {"path": self._path, "recursive": flag(self._recursive)}
        path = self._access.path("files/watch")
        heard = False
        async with self._access.client.open(
            "GET", path, query=query, token=self._access.token
        ) as response:
            while (line := await _line(response.content)).endswith(b"\n"):
                await self._take(line)
                heard = True
        return heard

    async def _take(self, line: bytes) -> None:
        try:
            told: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
            if "code" in told:
                raise from_problem(told)
            if told.get("type") != "ready":
                event = msgspec.convert(told, FileEvent)
            elif self._ready:
                event = FileEvent(kind="overflow", path=self._path)  # what happened in between
            else:
                event = None
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise InternalError(f"malformed event in a watch: {error}") from error
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._events) < _WAITING)
            self._ready = True
            if event is not None:
                self._events.append(event)
            self._changed.notify_all()


async def _line(content: aiohttp.StreamReader) -> bytes:
    """The next line with its end; without one the stream is over."""
    try:
        return await content.readline()
    except ValueError as error:
        raise InternalError(f"a line without end in a watch: {error}") from error
