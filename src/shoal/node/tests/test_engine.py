from __future__ import annotations

import time
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

from shoal.errors import (
    ConflictError,
    DeadlineExceededError,
    ImageNotFoundError,
    InternalError,
    InvalidArgumentError,
    NodeUnavailableError,
    ResourceExhaustedError,
    SandboxGoneError,
    SandboxNotFoundError,
    ShoalError,
    StartFailedError,
    StartTimeoutError,
)
from shoal.node.admission import Overcommit
from shoal.node.engine import new_id
from shoal.node.keeper_client import Fault, KeeperError
from shoal.node.lifecycle import Exited
from shoal.node.tests.fakes import CONFIG, World, admission, until, world
from shoal.types import Reason, SandboxInfo, SandboxSpec, Status


async def ended(one: World, sandbox: str) -> SandboxInfo:
    """Wait for a sandbox to be stopped."""
    await until(lambda: one.engine.get(sandbox).status is Status.STOPPED)
    return one.engine.get(sandbox)


async def test_a_create_takes_the_steps_in_order_and_a_terminate_undoes_them(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as one:
        access = await one.engine.create(SandboxSpec(labels={"a": "b"}))
        info = access.sandbox
        assert info.status is Status.RUNNING
        assert info.id.startswith("sb-")
        assert info.expires_at - info.created_at == 300.0
        assert one.steps.done == ["pin", "create", "attach"]
        token, process = one.door.attached[info.id]
        assert token == access.access_token
        assert len(token) == 64
        assert process.user == "app"
        assert one.keeper.held[info.id]["root"]["layers"] == ["b" * 64, "a" * 64]
        kept = one.state.get(info.id)
        assert kept is not None
        assert (kept.status, kept.slot) == (Status.RUNNING, 0)
        assert one.engine.access(info.id) == access

        info = await one.engine.terminate(info.id)
        assert (info.status, info.reason) == (Status.STOPPED, Reason.TERMINATED)
        assert info.ended_at is not None
        assert one.steps.done[3:] == ["detach", "destroy", "unpin"]
        assert one.door.reasons == {info.id: Reason.TERMINATED}
        one.assert_nothing_held()
        assert await one.engine.terminate(info.id) == info
        with pytest.raises(SandboxGoneError) as caught:
            one.engine.access(info.id)
        assert caught.value.details["reason"] == "terminated"
        assert caught.value.hint


FAULT = KeeperError(
    "create", Fault(code="syscall_failed", stage="overlay", call="fsmount", errno=28)
)
BROKEN = KeeperError("create", Fault(code="syscall_failed", stage="userns", call="clone", errno=1))


@pytest.mark.parametrize(
    ("step", "error", "kind", "undone"),
    [
        ("create", BROKEN, StartFailedError, ["destroy", "unpin"]),
        ("create", FAULT, ResourceExhaustedError, ["destroy", "unpin"]),
        ("create", DeadlineExceededError("slow"), StartTimeoutError, ["destroy", "unpin"]),
        ("create", ValueError("a bug"), InternalError, ["destroy", "unpin"]),
        ("attach", StartTimeoutError("silent"), StartTimeoutError, ["detach", "destroy", "unpin"]),
        ("attach", StartFailedError("died"), StartFailedError, ["detach", "destroy", "unpin"]),
        (
            "attach",
            NodeUnavailableError("no door"),
            NodeUnavailableError,
            ["detach", "destroy", "unpin"],
        ),
    ],
)
async def test_an_error_at_a_step_undoes_the_earlier_ones_in_reverse_and_is_recorded(
    tmp_path: Path, step: str, error: Exception, kind: type[ShoalError], undone: list[str]
) -> None:
    async with world(tmp_path) as one:
        one.steps.failing[step] = error
        with pytest.raises(kind):
            await one.engine.create(SandboxSpec())
        assert one.steps.done[one.steps.done.index(step) + 1 :] == undone
        one.assert_nothing_held()
        [record] = one.state.all()
        assert (record.status, record.reason) == (Status.STOPPED, Reason.FAILED_TO_START)
        assert record.message
        assert record.ended_at is not None
        await one.engine.create(SandboxSpec())  # a retry succeeds


async def test_a_failing_undo_step_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        one.steps.failing |= {
            "attach": StartFailedError("died"),
            "detach": NodeUnavailableError("no door"),
            "unpin": RuntimeError("a bug"),
        }
        with pytest.raises(StartFailedError):
            await one.engine.create(SandboxSpec())
        one.assert_nothing_held()


async def test_what_fails_before_the_keeper_acts_leaves_no_record(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        with pytest.raises(ImageNotFoundError):
            await one.engine.create(SandboxSpec(image="nope"))
        with pytest.raises(InvalidArgumentError):
            await one.engine.create(SandboxSpec(cpu=0))
        one.steps.failing["pin"] = OSError("disk")
        with pytest.raises(OSError, match="disk"):
            await one.engine.create(SandboxSpec())
        one.assert_nothing_held()
        assert one.state.all() == []


async def test_a_full_disk_stops_a_create_before_the_keeper_acts(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        one.state._db.execute("PRAGMA max_page_count = 1")
        with pytest.raises(ResourceExhaustedError, match=r"state\.db"):
            await one.engine.create(SandboxSpec(env={"A": "x" * 40_000}))
        assert one.steps.done[-2:] == ["pin", "unpin"]
        one.state._db.execute("PRAGMA max_page_count = 100000")


async def test_a_record_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        info = (await one.engine.create(SandboxSpec())).sandbox
        save = one.state.save

        def full(*_: object) -> None:
            raise ResourceExhaustedError("no space")

        one.state.save = full  # type: ignore[method-assign,assignment]  # a disk that is full for a while
        info = await one.engine.terminate(info.id)
        assert info.status is Status.STOPPED
        assert one.engine.get(info.id) == info
        assert [each.id for each in one.engine.list(ended=10)] == [info.id]
        one.state.save = save  # type: ignore[method-assign]  # it has room again
        await one.engine.shutdown()
        kept = one.state.get(info.id)
        assert kept is not None
        assert kept.status is Status.STOPPED


async def test_a_stale_guest_agent_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        one.door.generation = 2
        with pytest.raises(StartFailedError, match="generation 2"):
            await one.engine.create(SandboxSpec())
        one.assert_nothing_held()


@pytest.mark.parametrize("step", ["create", "attach"])
async def test_a_creator_that_goes_away_gives_the_sandbox_up(tmp_path: Path, step: str) -> None:
    async with world(tmp_path) as one:
        one.steps.hold(step)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.engine.create, SandboxSpec())
            await one.steps.reached[step].wait()
            tasks.cancel_scope.cancel()
        [record] = one.state.all()
        info = await ended(one, record.id)
        assert info.reason is Reason.FAILED_TO_START
        assert info.message == "its creator went away"
        one.assert_nothing_held()


@pytest.mark.parametrize("step", ["create", "attach"])
async def test_an_end_that_comes_while_it_starts(tmp_path: Path, step: str) -> None:
    async with world(tmp_path) as one:
        one.steps.hold(step)
        caught: list[ShoalError] = []

        async def create() -> None:
            try:
                await one.engine.create(SandboxSpec())
            except ShoalError as error:
                caught.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(create)
            await one.steps.reached[step].wait()
            [listed] = one.engine.list()
            assert listed.status is Status.CREATING
            with pytest.raises(ConflictError):
                one.engine.access(listed.id)
            info = await one.engine.terminate(listed.id)
        assert info.reason is Reason.TERMINATED
        [error] = caught
        assert isinstance(error, SandboxGoneError)
        assert error.details["reason"] == "terminated"
        one.assert_nothing_held()


async def test_a_guest_agent_that_dies_before_ready(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        one.steps.hold("attach")

        async def die() -> None:
            await one.steps.reached["attach"].wait()
            [listed] = one.engine.list()
            one.keeper.on_exit(listed.id, Exited(oom_kills=0, wait_status=11))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(die)
            with pytest.raises(StartFailedError, match="signal 11"):
                await one.engine.create(SandboxSpec())
        one.assert_nothing_held()


async def test_an_end_that_races_with_ready_is_not_passed_by(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        gate = one.steps.hold("attach")

        async def end() -> None:
            await one.steps.reached["attach"].wait()
            [listed] = one.engine.list()
            gate.set()  # READY and the end in the same turn of the loop
            await one.engine.terminate(listed.id)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end)
            with pytest.raises(SandboxGoneError):
                await one.engine.create(SandboxSpec())
        one.assert_nothing_held()


async def test_a_timeout_ends_a_sandbox(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        long = (await one.engine.create(SandboxSpec(timeout=100.0))).sandbox
        began = time.monotonic()
        short = (await one.engine.create(SandboxSpec(timeout=0.05))).sandbox
        info = await ended(one, short.id)
        assert time.monotonic() - began >= 0.05
        assert info.reason is Reason.TIMEOUT
        assert "0.05 s" in info.message
        assert [each.id for each in one.engine.list()] == [long.id]


async def test_a_step_of_the_wall_clock_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as one:
        info = (await one.engine.create(SandboxSpec(timeout=50.0))).sandbox
        real = time.time
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + 86_400)
            await anyio.sleep(0.02)
            assert one.engine.get(info.id).status is Status.RUNNING


async def test_a_sandbox_that_ends_by_itself(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        for oom_kills, reason in ((1, Reason.OOM), (0, Reason.LOST)):
            info = (await one.engine.create(SandboxSpec())).sandbox
            one.keeper.on_exit(info.id, Exited(oom_kills=oom_kills, wait_status=9))
            one.keeper.on_exit(info.id, Exited(oom_kills=oom_kills, wait_status=9))
            assert (await ended(one, info.id)).reason is reason
        one.keeper.on_exit("sb-unknown", Exited(oom_kills=0, wait_status=0))
        one.assert_nothing_held()


async def test_a_sandbox_that_the_front_door_lost_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.engine._LAST_WORDS", 0.02)
    async with world(tmp_path) as one:
        lost = (await one.engine.create(SandboxSpec())).sandbox.id
        other = (await one.engine.create(SandboxSpec())).sandbox.id
        for sandbox in (lost, lost, "sb-unknown"):
            one.door.on_lost(sandbox, "it sent 9 bytes of noise")
        info = await ended(one, lost)
        assert info.reason is Reason.LOST
        assert "9 bytes of noise" in info.message
        assert one.door.reasons == {lost: Reason.LOST}
        assert one.engine.get(other).status is Status.RUNNING


async def test_a_loss_while_it_starts_gives_the_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.engine._LAST_WORDS", 0.0)
    async with world(tmp_path) as one:
        one.steps.hold("attach")
        async with anyio.create_task_group() as tasks:

            async def create() -> None:
                with pytest.raises(SandboxGoneError, match="noise"):
                    await one.engine.create(SandboxSpec())

            tasks.start_soon(create)
            await one.steps.reached["attach"].wait()
            [record] = one.state.all()
            one.door.on_lost(record.id, "noise")
        one.assert_nothing_held()


async def test_what_the_keeper_says_of_an_exit_goes_before_what_the_front_door_says(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as one:
        info = (await one.engine.create(SandboxSpec())).sandbox
        one.door.on_lost(info.id, "its connection ended")
        await anyio.wait_all_tasks_blocked()
        one.keeper.on_exit(info.id, Exited(oom_kills=1, wait_status=9))
        assert (await ended(one, info.id)).reason is Reason.OOM


async def test_nothing_is_given_on_before_the_keeper_has_removed_it(tmp_path: Path) -> None:
    async with world(tmp_path, config=replace(CONFIG, stop_timeout=0.02)) as one:
        info = (await one.engine.create(SandboxSpec())).sandbox
        gate = one.steps.hold("destroy")
        assert (await one.engine.terminate(info.id)).status is Status.STOPPING
        assert one.slots.taken == 1
        assert one.admission.reserved.memory_mib == 512
        other = (await one.engine.create(SandboxSpec())).sandbox
        second = one.state.get(other.id)
        assert second is not None
        assert second.slot == 1
        one.steps.failing["destroy"] = KeeperError(
            "destroy", Fault(code="syscall_failed", errno=16)
        )
        gate.set()
        assert (await ended(one, info.id)).reason is Reason.TERMINATED
        assert one.steps.done.count("destroy") == 2


async def test_terminates_at_the_same_time_are_one(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        info = (await one.engine.create(SandboxSpec())).sandbox
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(one.engine.terminate, info.id)
        assert one.steps.done.count("destroy") == 1


async def test_a_hundred_creates_at_once_are_few_at_a_time_for_the_keeper(tmp_path: Path) -> None:
    async with world(tmp_path, config=replace(CONFIG, create_concurrency=4)) as one:
        made: list[str] = []

        async def create() -> None:
            made.append((await one.engine.create(SandboxSpec())).sandbox.id)

        async with anyio.create_task_group() as tasks:
            for _ in range(150):
                tasks.start_soon(create)
        assert len(set(made)) == 150
        assert one.keeper.most_at_once <= 4
        assert one.slots.taken == 150


async def test_creates_at_once_never_oversell(tmp_path: Path) -> None:
    small = admission(overcommit=Overcommit(cpu=10, memory=1, disk=10, pids=10))
    async with world(tmp_path, admission_=small) as one:
        refused: list[ShoalError] = []

        async def create() -> None:
            try:
                await one.engine.create(SandboxSpec(memory_mib=1000))
            except ResourceExhaustedError as error:
                refused.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(create)
        assert one.engine.alive == 8
        assert len(refused) == 12


async def test_a_shutdown_ends_all_and_refuses_what_comes(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        up = (await one.engine.create(SandboxSpec())).sandbox
        gate = one.steps.hold("attach")
        errors: list[ShoalError] = []

        async def create() -> None:
            try:
                await one.engine.create(SandboxSpec())
            except ShoalError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(create)
            await one.steps.reached["attach"].wait()
            await one.engine.shutdown()
        gate.set()
        assert one.engine.alive == 0
        assert {each.reason for each in one.state.all()} == {Reason.HOST_SHUTDOWN}
        assert isinstance(errors[0], SandboxGoneError)
        assert one.engine.get(up.id).reason is Reason.HOST_SHUTDOWN
        with pytest.raises(NodeUnavailableError):
            await one.engine.create(SandboxSpec())


async def test_a_create_that_waits_for_its_image_when_the_node_stops_is_refused(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as one:
        gate = one.steps.hold("pin")
        async with anyio.create_task_group() as tasks:

            async def create() -> None:
                with pytest.raises(NodeUnavailableError):
                    await one.engine.create(SandboxSpec())

            tasks.start_soon(create)
            await one.steps.reached["pin"].wait()
            await one.engine.shutdown()
            gate.set()
        assert one.state.all() == []


async def test_a_keeper_that_is_gone_keeps_nobody_waiting(tmp_path: Path) -> None:
    one = World(tmp_path)
    async with one.engine:
        info = (await one.engine.create(SandboxSpec())).sandbox
        one.steps.failing["destroy"] = NodeUnavailableError("the keeper is gone")
        with anyio.fail_after(1):
            assert (await one.engine.terminate(info.id)).status is Status.STOPPING
            await one.engine.shutdown()
    kept = one.state.get(info.id)
    assert kept is not None
    assert kept.status is Status.STOPPING  # for the next start to see
    one.state.close()


async def test_a_new_front_door_is_shown_every_running_sandbox(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        ids = {(await one.engine.create(SandboxSpec())).sandbox.id for _ in range(3)}
        one.door.attached.clear()
        one.steps.failing["attach"] = StartTimeoutError("silent")
        one.door.on_connect()
        await anyio.wait_all_tasks_blocked()
        lost = [each for each in one.state.all() if each.reason is Reason.LOST]
        assert len(lost) == 1
        assert set(one.door.attached) == ids - {lost[0].id}


async def test_lists_select_by_label_and_by_life(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        first = (await one.engine.create(SandboxSpec(labels={"job": "1", "x": "y"}))).sandbox
        second = (await one.engine.create(SandboxSpec(labels={"job": "2"}))).sandbox
        await one.engine.terminate(first.id)
        assert [each.id for each in one.engine.list()] == [second.id]
        assert [each.id for each in one.engine.list(ended=10)] == [second.id, first.id]
        assert one.engine.list(labels={"job": "1"}) == []
        found = one.engine.list(labels={"job": "1", "x": "y"}, ended=10)
        assert [each.id for each in found] == [first.id]
        with pytest.raises(SandboxNotFoundError):
            one.engine.get("sb-nope")
        with pytest.raises(SandboxNotFoundError):
            await one.engine.terminate("../x")


async def test_ended_sandboxes_are_forgotten_in_time(tmp_path: Path) -> None:
    async with world(tmp_path, config=replace(CONFIG, keep_ended=0.0)) as one:
        info = (await one.engine.create(SandboxSpec())).sandbox
        await one.engine.terminate(info.id)
        await until(lambda: one.state.get(info.id) is None)


async def test_two_thousand_lives_leave_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as one:

        async def live() -> None:
            for _ in range(100):
                info = (await one.engine.create(SandboxSpec())).sandbox
                await one.engine.terminate(info.id)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(live)
        one.assert_nothing_held()
        assert len(one.state.all()) == 2000


def test_ids_have_130_random_bits() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    for one in ids:
        assert len(one) == 29
        assert set(one[3:]) <= set("abcdefghijklmnopqrstuvwxyz234567")
