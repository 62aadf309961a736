from __future__ import annotations

import time
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

from shoal.node.keeper_client import Fault, KeeperError
from shoal.node.lifecycle import Exited
from shoal.node.recovery import recover
from shoal.node.secret import NodeSecret
from shoal.node.tests.fakes import FakeImages, FakeKeeper, Steps, World, until
from shoal.state import Record, StateStore
from shoal.types import Reason, SandboxSpec, Status


class _Images(FakeImages):
    def __init__(self) -> None:
        super().__init__(Steps())
        self.pins_at_reconcile = -1

    async def reconcile(self) -> list[str]:
        self.pins_at_reconcile = self.pins
        return []


async def _killed(directory: Path) -> tuple[StateStore, FakeKeeper, dict[Status, Record]]:
    """What a server leaves that dies with a sandbox in each state: records, a keeper, and whose record is which."""
    crashed = World(directory)
    async with crashed.engine:
        await crashed.engine.create(SandboxSpec(timeout=200.0, cpu=2.0, public_ports=[80]))
        stopping = (await crashed.engine.create(SandboxSpec())).sandbox
        crashed.steps.hold("destroy")
        with anyio.move_on_after(0.02):
            await crashed.engine.terminate(stopping.id)
        crashed.steps.hold("attach")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crashed.engine.create, SandboxSpec())
            await crashed.steps.reached["attach"].wait()
            copy = StateStore.open(directory / "copy.db")
            for one in crashed.state.all():
                copy.save(one)
            keeper = FakeKeeper(Steps())
            keeper.held |= crashed.keeper.held
            keeper.claimed = crashed.keeper.claimed
            tasks.cancel_scope.cancel()
        for gate in crashed.steps.gates.values():
            gate.set()
        await crashed.engine.shutdown()
    crashed.state.close()
    records = {one.status: one for one in copy.all()}
    assert records.keys() == {Status.RUNNING, Status.STOPPING, Status.CREATING}
    return copy, keeper, records


def _world_of(copy: StateStore, keeper: FakeKeeper, directory: Path) -> World:
    """The next server's engine, over what was left."""
    (directory / "next").mkdir()
    made = World(directory / "next")
    for one in copy.all():
        made.state.save(one)
    copy.close()
    keeper.steps = made.steps
    made.keeper.held = keeper.held
    made.keeper.exited = keeper.exited
    made.keeper.claimed = keeper.claimed
    made.slots.add(0, 1000)
    return made


async def test_nothing_is_falsely_running_after_a_whole_node_died(tmp_path: Path) -> None:
    state, _, was = await _killed(tmp_path)
    keeper, images = FakeKeeper(Steps()), _Images()
    assert await recover(keeper=keeper, state=state, images=images) == []
    ends = {one.id: (one.status, one.reason) for one in state.all()}
    assert ends == {
        was[Status.RUNNING].id: (Status.STOPPED, Reason.LOST),
        was[Status.CREATING].id: (Status.STOPPED, Reason.LOST),
        was[Status.STOPPING].id: (Status.STOPPED, Reason.TERMINATED),  # its owner's wish
    }
    assert all(one.ended_at for one in state.all())
    assert await recover(keeper=keeper, state=state, images=images) == []
    assert {one.id: (one.status, one.reason) for one in state.all()} == ends
    state.close()


async def test_what_the_keeper_still_has_lives_on_and_holds_what_it_held(tmp_path: Path) -> None:
    state, keeper, was = await _killed(tmp_path)
    keeper.held["sb-nobodys"] = {}
    images = _Images()
    survivors = await recover(keeper=keeper, state=state, images=images)
    assert images.pins_at_reconcile == 1  # all three are of one image
    assert "sb-nobodys" not in keeper.held
    assert {one.record.id for one in survivors} == {one.id for one in was.values()}

    one = _world_of(state, keeper, tmp_path)
    up, stopping, creating = (
        was[status] for status in (Status.RUNNING, Status.STOPPING, Status.CREATING)
    )
    async with one.engine:
        await one.engine.adopt(survivors)
        await until(lambda: one.engine.alive == 1)
        for ended, reason in ((stopping, Reason.TERMINATED), (creating, Reason.FAILED_TO_START)):
            info = one.engine.get(ended.id)
            assert (info.status, info.reason) == (Status.STOPPED, reason)
        assert one.keeper.held.keys() == {up.id}
        assert one.engine.get(up.id) == up.to_info()
        assert one.admission.reserved.cpu == 2.0
        assert (one.slots.taken, one.images.pins) == (1, 1)

        one.door.on_connect()
        await until(lambda: up.id in one.door.attached)
        token, process = one.door.attached[up.id]
        assert one.engine.access(up.id).access_token == token
        assert one.door.public[up.id] == [80]
        assert process.user == "app"

        # Its host ids are not given on: the fake keeper would refuse them.
        fresh = [await one.engine.create(SandboxSpec()) for _ in range(3)]
        for each in fresh:
            await one.engine.terminate(each.sandbox.id)
        info = await one.engine.terminate(up.id)
        assert (info.status, info.reason) == (Status.STOPPED, Reason.TERMINATED)
        assert one.door.reasons[up.id] is Reason.TERMINATED
        one.assert_nothing_held()
    one.state.close()


async def test_a_survivor_has_the_time_that_is_left_whatever_the_wall_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, keeper, was = await _killed(tmp_path)
    up = was[Status.RUNNING]
    left = up.deadline - time.monotonic()
    assert 150 < left < 200
    soon = replace(up, deadline=time.monotonic() + 0.1)
    state.save(soon)
    survivors = await recover(keeper=keeper, state=state, images=_Images())
    one = _world_of(state, keeper, tmp_path)
    monkeypatch.setattr(time, "time", lambda: 10.0)  # long before it was made
    async with one.engine:
        await one.engine.adopt(survivors)
        assert one.engine.get(up.id).status is Status.RUNNING
        await until(lambda: one.engine.get(up.id).status is Status.STOPPED)
        assert one.engine.get(up.id).reason is Reason.TIMEOUT
        await until(lambda: one.engine.alive == 0)
        one.assert_nothing_held()
    one.state.close()


@pytest.mark.parametrize(
    ("exited", "reason"),
    [
        (Exited(oom_kills=1, wait_status=9), Reason.OOM),
        (Exited(oom_kills=0, wait_status=9), Reason.LOST),
        (None, Reason.LOST),
    ],
)
async def test_what_ended_while_no_server_listened_tells_what_it_died_of(
    tmp_path: Path, exited: Exited | None, reason: Reason
) -> None:
    state, keeper, was = await _killed(tmp_path)
    up = was[Status.RUNNING]
    del keeper.held[up.id]
    if exited is not None:
        keeper.exited[up.id] = exited
    survivors = await recover(keeper=keeper, state=state, images=_Images())
    assert up.id not in {one.record.id for one in survivors}
    # The keeper may still be removing it; nothing of it is given on before it is done.
    assert "destroy" in keeper.steps.done
    record = state.get(up.id)
    assert record is not None
    assert (record.status, record.reason) == (Status.STOPPED, reason)
    state.close()


async def test_what_ends_before_the_new_server_listens_is_not_missed(tmp_path: Path) -> None:
    state, keeper, was = await _killed(tmp_path)
    up = was[Status.RUNNING]
    survivors = await recover(keeper=keeper, state=state, images=_Images())
    del keeper.held[up.id]
    keeper.exited[up.id] = Exited(oom_kills=1, wait_status=9)
    one = _world_of(state, keeper, tmp_path)
    async with one.engine:
        await one.engine.adopt(survivors)
        await until(lambda: one.engine.alive == 0)
        assert one.engine.get(up.id).reason is Reason.OOM
        one.assert_nothing_held()
    one.state.close()


async def test_a_survivor_whose_image_is_gone_is_lost_and_leaves_nothing(tmp_path: Path) -> None:
    state, keeper, was = await _killed(tmp_path)
    up = was[Status.RUNNING]
    state.save(replace(up, image_digest="sha256:other"))
    survivors = await recover(keeper=keeper, state=state, images=_Images())
    one = _world_of(state, keeper, tmp_path)
    async with one.engine:
        await one.engine.adopt(survivors)
        await until(lambda: one.engine.alive == 0)
        info = one.engine.get(up.id)
        assert (info.status, info.reason) == (Status.STOPPED, Reason.LOST)
        assert "sha256:other" in info.message
        one.assert_nothing_held()
    one.state.close()


async def test_what_the_keeper_cannot_remove_yet_keeps_its_host_ids_until_it_can(
    tmp_path: Path,
) -> None:
    state, keeper, was = await _killed(tmp_path)
    up = was[Status.RUNNING]
    spec = keeper.held.pop(up.id)
    keeper.steps.failing["destroy"] = KeeperError("destroy", Fault(code="syscall_failed"))
    survivors = await recover(keeper=keeper, state=state, images=_Images())
    assert up.id in {one.record.id for one in survivors}
    one = _world_of(state, keeper, tmp_path)
    gate = one.steps.hold("destroy")
    async with one.engine:
        await one.engine.adopt(survivors)
        assert one.engine.get(up.id).status is Status.STOPPING
        made = await one.engine.create(SandboxSpec())
        assert one.keeper.held[made.sandbox.id]["linux"] != spec["linux"]
        gate.set()
        await until(lambda: one.engine.get(up.id).status is Status.STOPPED)
        assert one.engine.get(up.id).reason is Reason.LOST
        await one.engine.shutdown()
        one.assert_nothing_held()
    one.state.close()


async def test_a_leftover_without_a_record_that_cannot_be_removed_stops_the_start(
    tmp_path: Path,
) -> None:
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
