"""Telling a node what has been consumed of an exec's output, at next to no cost beside the output itself."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec

from shoal.errors import NodeUnavailableError, ShoalError
from shoal.sdk._client import quote
from shoal.sdk._tunnel import Line

if TYPE_CHECKING:
    from shoal.sdk._exec import Access

STEP = 512 << 10
"""Bytes that a node is told of at once: half a window, so that the other half is under way meanwhile."""
PAUSE = 0.002
"""Seconds between two words about less: a sandbox short of memory may keep little more, and wait for each."""
LITTLE = 8 << 10
"""Bytes, below which it is not that."""
LITTLE_PAUSE = 0.02
"""Seconds between two words about so little."""
DEADLINE = 10.0
"""Seconds for a node to take note, and to be tried when nobody is there to notice that it is gone."""
KEPT_LINES = 8
"""Connections kept for the next receipt."""
FLUSH_DEADLINE = 2.0
"""Seconds for which one who takes a stream over waits for what its reader had to say."""


class Receipts:
    """What a node has been told of one exec's output, and the task that tells it more.

    One request at a time, each about everything so far.
    """

    def __init__(self, access: Access, exec_id: str, consumed: list[int]) -> None:
        self.access = access
        self.exec_id = exec_id
        self._consumed = consumed
        """Offsets of stdout and of stderr; the owner of this moves them on."""
        self._told = sum(consumed)
        self._task: asyncio.Task[None] | None = None
        self._much = asyncio.Event()
        self._told_at = 0.0
        self._hurry = False

    @property
    def new(self) -> int:
        """Bytes that the node has not been told of."""
        return sum(self._consumed) - self._told

    def due(self) -> None:
        """Tell what is new: at once if it is much, or the first in a while."""
        if self._task is None:
            if self.new > 0 and not self.access.client.closed:
                self._task = self.access.client.own(self._tell())
        elif self.new >= STEP:
            self._much.set()

    async def flush(self) -> None:
        """Wait until the node has been told of everything so far."""
        if (task := self._task) is not None:
            self._hurry = True
            self._much.set()
            await asyncio.wait({task}, timeout=FLUSH_DEADLINE)

    async def _tell(self) -> None:
        clock = asyncio.get_running_loop().time
        given_up = clock() + DEADLINE
        retry = 0.0
        try:
            while self.new > 0:
                if self.new < STEP and not self._hurry:
                    pause = PAUSE if self.new >= LITTLE else LITTLE_PAUSE
                    await self._wait_for_much(self._told_at + pause - clock())
                self._told_at = clock()
                self._much.clear()
                told = list(self._consumed)
                try:
                    await self._request(told)
                except NodeUnavailableError:
                    if clock() > given_up:
                        return
                    await asyncio.sleep(retry)
                    retry = min(retry * 2 + 0.02, 1.0)
                else:
                    self._told = sum(told)
                    given_up, retry = clock() + DEADLINE, 0.0
        except ShoalError:
            pass  # the exec or the sandbox is gone; the stream says why
        finally:
            self._task, self._hurry = None, False

    async def _wait_for_much(self, pause: float) -> None:
        if pause > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._much.wait()

    async def _request(self, offsets: list[int]) -> None:
        access = self.access
        path = access.path(f"execs/{quote(self.exec_id)}/consumed")
        body = msgspec.json.encode({"stdout": offsets[0], "stderr": offsets[1]})
        lines = access.client.lines
        line = lines.pop() if lines else await Line.open(access.address)
        try:
            async with asyncio.timeout(DEADLINE):
                await line.post(path, access.token, body)
            if line.usable and len(lines) < KEPT_LINES and not access.client.closed:
                lines.append(line)
                return
        except TimeoutError:
            raise NodeUnavailableError(f"no answer within {DEADLINE:g} s: POST {path}") from None
        finally:
            if line not in lines:
                line.close()
