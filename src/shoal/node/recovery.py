"""What a server does first: bring the records in line with what is really there.

Sandboxes outlive the server. What is on record and in the keeper lives on; what is only on record has ended; what is
only in the keeper belongs to nobody and is removed. After a whole node has died the new keeper holds nothing, so
everything on record has ended.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol

import anyio
import msgspec
import structlog

from shoal.errors import ShoalError
from shoal.node import lifecycle
from shoal.node.engine import Survivor
from shoal.node.keeper_client import Keeper
from shoal.node.lifecycle import Exited, FoundAfterRestart, Life
from shoal.state import Record, StateStore
from shoal.types import Status

log = structlog.get_logger(__name__)

_DESTROY_DEADLINE = 30.0


class Images(Protocol):
    """A store that can set itself right after a start."""

    def pin(self, reference: str) -> AbstractAsyncContextManager[object]:
        """Keep an image and its layers until the context is left."""
        ...

    async def reconcile(self) -> list[str]:
        """Remove what a crash left; returns what went."""
        ...


async def recover(*, keeper: Keeper, state: StateStore, images: Images) -> list[Survivor]:
    """Leave no sandbox that is falsely running, on record or in the keeper, and no half-made image.

    Returns those that live on, and those that the keeper is not yet done with: `Engine.adopt` takes them.

    Raises:
        ShoalError: A sandbox without a record could not be removed: a server must not start over it.
    """
    there = await keeper.sandboxes()
    records = {record.id: record for record in state.unfinished()}
    kept: dict[str, ShoalError] = {}
    async with anyio.create_task_group() as tasks:
        # Also what has ended, which the keeper may still be removing: its host ids are not free before.
        for sandbox in there.alive.keys() ^ records.keys():
            tasks.start_soon(_destroy, keeper, sandbox, kept)
    for sandbox in kept.keys() - records.keys():
        raise kept[sandbox]
    survivors = []
    for sandbox, record in records.items():
        if sandbox in there.alive or sandbox in kept:
            socket = there.alive[sandbox].socket if sandbox in there.alive else ""
            survivors.append(Survivor(record, socket))
        else:
            ended = _ended(record, there.exited.get(sandbox))
            state.save(ended)
            log.warning("sandbox_gone", sandbox=sandbox, was=record.status, reason=ended.reason)
    async with AsyncExitStack() as pins:
        # An image in use may have no name any more, and would be taken for rubbish.
        for digest in {survivor.record.image_digest for survivor in survivors}:
            with contextlib.suppress(ShoalError):
                await pins.enter_async_context(images.pin(digest))
        removed = await images.reconcile()
    if removed:
        log.info("images_reconciled", removed=removed)
    return survivors


async def _destroy(keeper: Keeper, sandbox: str, kept: dict[str, ShoalError]) -> None:
    try:
        await keeper.destroy(sandbox, deadline=_DESTROY_DEADLINE)
    except ShoalError as error:
        log.error("leftover_kept", sandbox=sandbox, error=error.message)
        kept[sandbox] = error


def _ended(record: Record, exited: Exited | None) -> Record:
    life = Life(
        id=record.id,
        status=record.status,
        reason=record.reason,
        message=record.message,
        story=("recorded",),
    )
    if exited is not None and record.status in (Status.RUNNING, Status.PAUSED):
        life, _ = lifecycle.step(life, exited)
    life, _ = lifecycle.step(life, FoundAfterRestart())
    return msgspec.structs.replace(
        record, status=life.status, reason=life.reason, message=life.message, ended_at=time.time()
    )
