"""Nothing of an exec's output is lost or repeated, however often the connections of its client break.

`SHOAL_SOAK=1` runs a hundred execs of 50 MB each, which takes minutes; otherwise a few of 10 MB run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.support.node import PrivateNode

if TYPE_CHECKING:
    import shoal

SOAK = bool(os.environ.get("SHOAL_SOAK"))
EXECS, SIZE = (100, 50_000_000) if SOAK else (16, 10_000_000)
AT_ONCE = 6
ERRORS = 1_000_000
"""Bytes on stderr."""
DEADLINE = 1500.0 if SOAK else 180.0

PROGRAM = """
import os, random, sys
seed, size, errors = map(int, sys.argv[1:])
with open("/runs", "a") as runs:
    runs.write(f"{seed}\\n")
source = random.Random(seed)
for stream, left in ((1, size // 2), (2, errors), (1, size - size // 2)):
    while left:
        piece = source.randbytes(min(left, 1 << 16))
        left -= len(piece)
        while piece:
            piece = piece[os.write(stream, piece):]
"""


def _expected(seed: int) -> tuple[str, str]:
    source = random.Random(seed)
    hashes = {1: hashlib.sha256(), 2: hashlib.sha256()}
    for stream, left in ((1, SIZE // 2), (2, ERRORS), (1, SIZE - SIZE // 2)):
        while left:
            piece = source.randbytes(min(left, 1 << 16))
            left -= len(piece)
            hashes[stream].update(piece)
    return hashes[1].hexdigest(), hashes[2].hexdigest()


@dataclass
class Relay:
    """A TCP port in front of a unix socket, which takes all it is given, delivers late, and breaks connections."""

    target: str
    chance: random.Random
    port: int = 0
    broken: int = 0
    lost: int = 0
    """Bytes that the node had sent and no client got."""
    _live: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        breaking = asyncio.create_task(self._break())
        try:
            yield
        finally:
            breaking.cancel()
            server.close()
            for task in self._live:
                task.cancel()
            await asyncio.gather(*self._live, breaking, return_exceptions=True)

    async def _break(self) -> None:
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 0.05))
            if self._live:
                chosen = self.chance.choice(sorted(self._live, key=lambda task: task.get_name()))
                self.broken += 1
                chosen.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._live.add(task)
        waiting: deque[bytes] = deque()
        inner: asyncio.StreamWriter | None = None
        try:
            answers, inner = await asyncio.open_unix_connection(self.target)
            async with asyncio.TaskGroup() as both:
                both.create_task(_forward(reader, inner))
                both.create_task(_take(answers, waiting))
                both.create_task(_deliver(waiting, writer))
        except* (asyncio.CancelledError, OSError, EOFError):
            pass
        finally:
            self._live.discard(task)
            self.lost += sum(map(len, waiting)) + writer.transport.get_write_buffer_size()
            writer.transport.abort()
            if inner is not None:
                inner.transport.abort()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    raise EOFError


async def _take(reader: asyncio.StreamReader, into: deque[bytes]) -> None:
    while data := await reader.read(1 << 18):
        into.append(data)
    raise EOFError


async def _deliver(waiting: deque[bytes], writer: asyncio.StreamWriter) -> None:
    """What has come is delivered a moment later, as over a long line."""
    while True:
        ripe = len(waiting)
        await asyncio.sleep(0.01)
        for _ in range(ripe):
            writer.write(waiting.popleft())
            await writer.drain()


async def _digest(reader: shoal.AsyncStreamReader) -> str:
    found = hashlib.sha256()
    while data := await reader.read(1 << 18):
        found.update(data)
    return found.hexdigest()


async def _one(sandbox: shoal.AsyncSandbox, seed: int, turns: asyncio.Semaphore) -> tuple[str, str]:
    async with turns:
        argv = ["python3", "-c", PROGRAM, str(seed), str(SIZE), str(ERRORS)]
        process = await sandbox.exec(argv, exec_id=f"run-{seed}")
        out, err = await asyncio.gather(_digest(process.stdout), _digest(process.stderr))
        assert await process.wait(timeout=60) == 0
        return out, err


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_output_survives_connections_that_break_at_random(node: PrivateNode) -> None:
    import shoal
    from shoal.sdk._client import Address
    from shoal.types import SandboxAccess

    seeds = range(EXECS)
    relay = Relay(str(node.socket), random.Random(20))
    async with asyncio.timeout(DEADLINE), await shoal.AsyncSandbox.create(timeout=DEADLINE) as own:
        async with relay.serve():
            address = Address(f"http://127.0.0.1:{relay.port}")
            access = SandboxAccess(sandbox=await own.info(), access_token=node.token(own.id))
            relayed = shoal.AsyncSandbox(address, access)
            turns = asyncio.Semaphore(AT_ONCE)
            digests = await asyncio.gather(*(_one(relayed, seed, turns) for seed in seeds))
        runs = (await own.files.read("/runs")).decode().split()
    wrong = [seed for seed, digest in zip(seeds, digests, strict=True) if digest != _expected(seed)]
    assert not wrong
    assert Counter(runs) == {str(seed): 1 for seed in seeds}
    # Otherwise it would show nothing.
    assert relay.broken >= 10
    assert relay.lost > 1 << 20
