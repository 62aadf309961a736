from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from shoal.node.keeper_client import Fault, KeeperError
from shoal.node.recovery import recover
from shoal.node.secret import NodeSecret
from shoal.node.tests.fakes import FakeKeeper, Steps, World
from shoal.state import StateStore
from shoal.types import Reason, SandboxSpec, Status


class _Images:
    def __init__(self) -> None:
        self.reconciled = 0

    async def reconcile(self) -> list[str]:
        self.reconciled += 1
        return []


async def test_nothing_is_falsely_running_after_a_crash(tmp_path: Path) -> None:
    crashed = World(tmp_path)
    async with crashed.engine:
        up = (await crashed.engine.create(SandboxSpec())).sandbox
        stopping = (await crashed.engine.create(SandboxSpec())).sandbox
        crashed.steps.hold("destroy")
        with anyio.move_on_after(0.02):
            await crashed.engine.terminate(stopping.id)
        crashed.steps.hold("attach")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crashed.engine.create, SandboxSpec())
            await crashed.steps.reached["attach"].wait()
            [creating] = {*crashed.keeper.held} - {up.id, stopping.id}
            before = {one.id: one.status for one in crashed.state.all()}
            # A copy, as a crash at this moment would leave it.
            copy = StateStore.open(tmp_path / "copy.db")
            for one in crashed.state.all():
                copy.save(one)
            tasks.cancel_scope.cancel()
        for gate in crashed.steps.gates.values():
            gate.set()
        await crashed.engine.shutdown()
    crashed.state.close()
    assert set(before.values()) == {Status.RUNNING, Status.STOPPING, Status.CREATING}

    keeper, images = FakeKeeper(Steps()), _Images()
    keeper.held[up.id] = {}
    await recover(keeper=keeper, state=copy, images=images)
    assert not keeper.held
    assert images.reconciled == 1
    ends = {one.id: (one.status, one.reason) for one in copy.all()}
    assert ends == {
        up.id: (Status.STOPPED, Reason.LOST),
        creating: (Status.STOPPED, Reason.LOST),
        stopping.id: (Status.STOPPED, Reason.TERMINATED),  # its owner's wish, decided before
    }
    assert all(one.ended_at for one in copy.all())
    await recover(keeper=keeper, state=copy, images=images)
    assert {one.id: (one.status, one.reason) for one in copy.all()} == ends
    copy.close()


async def test_a_leftover_that_cannot_be_removed_stops_the_start(tmp_path: Path) -> None:
    state = StateStore.open(tmp_path / "state.db")
    keeper = FakeKeeper(Steps())
    keeper.held["sb-left"] = {}
    keeper.steps.failing["destroy"] = KeeperError("destroy", Fault(code="syscall_failed"))
    with pytest.raises(KeeperError):
        await recover(keeper=keeper, state=state, images=_Images())
    state.close()


def test_the_secret_is_made_once_and_shows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    first = NodeSecret.load(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert NodeSecret.load(path).token("sb-a") == first.token("sb-a") != first.token("sb-b")
    assert repr(first) == "***"
    path.write_bytes(b"short")
    assert NodeSecret.load(path).token("sb-a") != first.token("sb-a")
    assert len(path.read_bytes()) == 32
    assert not list(tmp_path.glob("*.new"))
