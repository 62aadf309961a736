"""What a node does first: bring the records in line with what is really there.

The keeper ends with its server, and a new one removes what a dead node left before it starts a server. Should it hold
sandboxes all the same, nobody has a connection to them, and they are ended here.
"""

from __future__ import annotations

import time
from typing import Protocol

import anyio
import msgspec
import structlog

from shoal.errors import ShoalError
from shoal.node import lifecycle
from shoal.node.keeper_client import Keeper
from shoal.node.lifecycle import FoundAfterRestart, Life
from shoal.state import Record, StateStore

log = structlog.get_logger(__name__)

_DESTROY_DEADLINE = 30.0


class Reconciled(Protocol):
    """A store that can set itself right after a start."""

    async def reconcile(self) -> list[str]:
        """Remove what a crash left; returns what went."""
        ...


async def recover(*, keeper: Keeper, state: StateStore, images: Reconciled) -> None:
    """Leave no sandbox that is falsely running, on record or in the keeper, and no half-made image.

    Raises:
        ShoalError: A leftover could not be removed: a node must not start over it.
    """
    left = await keeper.sandboxes()
    kept: list[ShoalError] = []
    async with anyio.create_task_group() as tasks:
        for sandbox in left:
            log.warning("leftover_found", sandbox=sandbox)
            tasks.start_soon(_destroy, keeper, sandbox, kept)
    if kept:
        raise kept[0]
    for record in state.unfinished():
        state.save(_lost(record))
        log.warning("sandbox_lost", sandbox=record.id, was=record.status)
    removed = await images.reconcile()
    if removed:
        log.info("images_reconciled", removed=removed)


async def _destroy(keeper: Keeper, sandbox: str, kept: list[ShoalError]) -> None:
    try:
        await keeper.destroy(sandbox, deadline=_DESTROY_DEADLINE)
    except ShoalError as error:
        log.error("leftover_kept", sandbox=sandbox, error=error.message)
        kept.append(error)


def _lost(record: Record) -> Record:
    life = Life(
        id=record.id,
        status=record.status,
        reason=record.reason,
        message=record.message,
        story=("recorded",),
    )
    life, _ = lifecycle.step(life, FoundAfterRestart())
    return msgspec.structs.replace(
        record, status=life.status, reason=life.reason, message=life.message, ended_at=time.time()
    )
