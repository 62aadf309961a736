"""From READY to ready: the main command, the probe, and the ports that need no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from msgspec.structs import replace

from shoal.errors import (
    ConflictError,
    InvalidArgumentError,
    NodeUnavailableError,
    ResourceExhaustedError,
    SandboxGoneError,
    SandboxNotFoundError,
    ShoalError,
    StartFailedError,
    StartTimeoutError,
)
from shoal.node.door_client import Ended, Probed
from shoal.node.lifecycle import Exited
from shoal.node.tests.fakes import CONFIG, World, until, world
from shoal.types import Outcome, Ready, Reason, SandboxSpec, Status

READY = Ready.on_http(8000, "/health", interval=0.01, timeout=30)
SERVER = SandboxSpec(command=["python3", "-m", "http.server"], ready=READY)
YES, NO = Probed(ready=True), Probed(ready=False, detail="connection refused")


def ended(outcome: Outcome, **more: Any) -> Probed:
    return Probed(ready=False, detail="refused", ended=Ended(outcome=outcome, **more))


async def creating(one: World, spec: SandboxSpec, caught: list[ShoalError]) -> None:
    """Create, and keep the error."""
    try:
        await one.engine.create(spec)
    except ShoalError as error:
        caught.append(error)


async def test_a_create_answers_when_the_probe_comes_true_and_not_before(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        gate = one.steps.hold("probe")
        one.door.answers = [NO, NO, YES]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.engine.create, SERVER)
            await one.steps.reached["probe"].wait()
            [info] = one.engine.list()
            assert info.status is Status.CREATING
            with pytest.raises(ConflictError, match="starting"):
                one.engine.access(info.id)
            gate.set()
        assert one.engine.get(info.id).status is Status.RUNNING
        assert one.steps.done == ["pin", "create", "attach", "exec", "probe", "probe", "probe"]
        assert one.door.started == [(info.id, "main", SERVER.command)]
        assert one.door.probes == [(READY, "main")] * 3


async def test_a_main_command_alone_is_started_and_not_waited_for(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        await one.engine.create(SandboxSpec(command=["sleep", "9"]))
        assert one.steps.done == ["pin", "create", "attach", "exec"]


async def test_a_probe_without_a_main_command_asks_for_nobodys_end(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        one.door.answers = [YES]
        await one.engine.create(SandboxSpec(ready=READY))
        assert one.steps.done == ["pin", "create", "attach", "probe"]
        assert one.door.probes == [(READY, None)]


async def test_a_sandbox_that_is_ready_is_so_whatever_became_of_its_main_command(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as one:
        one.door.answers = [replace(YES, ended=Ended(outcome=Outcome.EXITED, exit_code=0))]
        assert (await one.engine.create(SERVER)).sandbox.status is Status.RUNNING


async def test_what_is_never_ready_is_a_start_timeout_with_the_last_reason(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        one.door.answers = [NO, Probed(ready=False, detail="status 503")]
        spec = SandboxSpec(ready=replace(READY, timeout=0.08))
        with pytest.raises(
            StartTimeoutError, match=r"not ready within 0\.08 s: status 503"
        ) as caught:
            await one.engine.create(spec)
        assert caught.value.details == {"stage": "ready"}
        assert not caught.value.is_infra
        assert caught.value.hint
        assert len(one.door.probes) > 1
        assert one.steps.done[-3:] == ["detach", "destroy", "unpin"]
        one.assert_nothing_held()
        [record] = one.state.all()
        assert (record.status, record.reason) == (Status.STOPPED, Reason.NOT_READY)
        assert "status 503" in record.message


@pytest.mark.parametrize(
    ("answer", "words", "details", "infra"),
    [
        (
            ended(Outcome.EXITED, exit_code=3),
            "exited with code 3",
            {"stage": "main", "outcome": "exited", "exit_code": 3},
            False,
        ),
        (
            ended(Outcome.OOM_KILLED, signal=9),
            r"signal 9 \(oom_killed\)",
            {"stage": "main", "outcome": "oom_killed", "signal": 9},
            False,
        ),
        (ended(Outcome.LOST), "lost", {"stage": "main", "outcome": "lost"}, True),
        (
            ended(Outcome.EXITED, exit_code=0, stdout_tail="bye\n"),
            "exited with code 0",
            {"stage": "main", "outcome": "exited", "exit_code": 0, "stdout_tail": "bye\n"},
            False,
        ),
    ],
)
async def test_a_main_command_that_ends_before_it_is_ready_says_how(
    tmp_path: Path, answer: Probed, words: str, details: dict[str, Any], infra: bool
) -> None:
    async with world(tmp_path) as one:
        one.door.answers = [NO, answer]
        with pytest.raises(StartFailedError, match=words) as caught:
            await one.engine.create(SERVER)
        assert not isinstance(caught.value, StartTimeoutError)
        assert (caught.value.details, caught.value.is_infra) == (details, infra)
        assert len(one.door.probes) == 2
        assert one.steps.done[-3:] == ["detach", "destroy", "unpin"]
        one.assert_nothing_held()
        msgspec.json.encode(caught.value.to_problem())
        [record] = one.state.all()
        assert record.reason is (Reason.FAILED_TO_START if infra else Reason.NOT_READY)


@pytest.mark.parametrize(
    ("stdout", "stderr", "words"),
    [
        ("on the way\n", "Traceback:\n  …\nNo module named 'x'\n\n", "stderr: No module named 'x'"),
        ("listening\nno room left", " \n", "stdout: no room left"),
        ("", "\x1b[2Jred\x07\n", "stderr: \ufffd[2Jred\ufffd"),
        ("", "x" * 2048, "stderr: …" + "x" * 200),
    ],
)
async def test_a_main_command_that_ends_before_it_is_ready_has_the_last_word(
    tmp_path: Path, stdout: str, stderr: str, words: str
) -> None:
    async with world(tmp_path) as one:
        tails = {"stdout_tail": stdout, "stderr_tail": stderr}
        one.door.answers = [ended(Outcome.EXITED, exit_code=1, **tails)]
        with pytest.raises(StartFailedError) as caught:
            await one.engine.create(SERVER)
        assert caught.value.hint == f"it last said on {words}"
        assert caught.value.details["stderr_tail"] == stderr
        [record] = one.state.all()
        assert (
            "last said" not in record.message
        )  # what a sandbox prints is for its owner, not for the node's log


async def test_a_main_command_that_does_not_start_is_not_the_nodes_fault(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        failed = StartFailedError("its main command: no such file", stage="main", errno=2)
        failed.is_infra = False
        one.steps.failing["exec"] = failed
        with pytest.raises(StartFailedError):
            await one.engine.create(SERVER)
        [record] = one.state.all()
        assert record.reason is Reason.NOT_READY
        with pytest.raises(SandboxGoneError) as caught:
            one.engine.access(record.id)
        assert (caught.value.details["is_infra"], caught.value.details["reason"]) == (
            False,
            "not_ready",
        )


@pytest.mark.parametrize(
    ("step", "error", "kind"),
    [
        ("exec", StartFailedError("no such file", stage="main", errno=2), StartFailedError),
        ("exec", StartTimeoutError("silent", stage="main"), StartTimeoutError),
        ("exec", NodeUnavailableError("the front door is gone"), NodeUnavailableError),
        ("probe", NodeUnavailableError("the front door is gone"), NodeUnavailableError),
        ("probe", StartFailedError("unknown sandbox", stage="ready"), StartFailedError),
    ],
)
async def test_an_error_after_ready_undoes_the_start_like_one_before(
    tmp_path: Path, step: str, error: ShoalError, kind: type[ShoalError]
) -> None:
    async with world(tmp_path) as one:
        one.door.answers = [YES]
        one.steps.failing[step] = error
        with pytest.raises(kind) as caught:
            await one.engine.create(SERVER)
        assert caught.value is error
        assert one.steps.done[one.steps.done.index(step) + 1 :] == ["detach", "destroy", "unpin"]
        one.assert_nothing_held()
        await one.engine.create(SERVER)  # a retry succeeds


@pytest.mark.parametrize("step", ["exec", "probe"])
async def test_a_creator_that_goes_away_after_ready_gives_the_sandbox_up(
    tmp_path: Path, step: str
) -> None:
    async with world(tmp_path) as one:
        one.door.answers = [NO]
        one.steps.hold(step)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.engine.create, SERVER)
            await one.steps.reached[step].wait()
            tasks.cancel_scope.cancel()
        await until(lambda: one.engine.alive == 0)
        one.assert_nothing_held()
        [record] = one.state.all()
        assert record.message == "its creator went away"


async def test_a_creator_that_goes_away_between_two_probes_gives_the_sandbox_up(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as one:
        one.door.answers = [NO]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.engine.create, SandboxSpec(ready=replace(READY, interval=20)))
            await until(lambda: one.door.probes)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        await until(lambda: one.engine.alive == 0)
        one.assert_nothing_held()


@pytest.mark.parametrize("step", ["exec", "probe"])
async def test_an_end_that_comes_after_ready(tmp_path: Path, step: str) -> None:
    async with world(tmp_path) as one:
        one.door.answers = [YES]
        one.steps.hold(step)
        caught: list[ShoalError] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(creating, one, SERVER, caught)
            await one.steps.reached[step].wait()
            [listed] = one.engine.list()
            info = await one.engine.terminate(listed.id)
        assert info.reason is Reason.TERMINATED
        [error] = caught
        assert isinstance(error, SandboxGoneError)
        assert error.details["reason"] == "terminated"
        one.assert_nothing_held()


async def test_the_sandboxes_own_timeout_goes_before_that_of_the_probe(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        one.door.answers = [NO]
        with pytest.raises(SandboxGoneError) as caught:
            await one.engine.create(SandboxSpec(ready=READY, timeout=0.05))
        assert caught.value.details["reason"] == "timeout"


async def test_a_guest_agent_that_runs_out_of_memory_before_it_is_ready(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        one.steps.hold("probe")
        caught: list[ShoalError] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(creating, one, SERVER, caught)
            await one.steps.reached["probe"].wait()
            [listed] = one.engine.list()
            one.keeper.on_exit(listed.id, Exited(oom_kills=1, wait_status=9))
        assert isinstance(caught[0], SandboxGoneError)
        assert caught[0].details["reason"] == "oom"
        one.assert_nothing_held()


async def test_the_guest_agents_deadline_is_not_that_of_the_probe(tmp_path: Path) -> None:
    async with world(tmp_path, config=replace(CONFIG, start_timeout=0.05)) as one:
        gate = one.steps.hold("probe")
        one.door.answers = [YES]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.engine.create, SERVER)
            await one.steps.reached["probe"].wait()
            await anyio.sleep(0.1)
            gate.set()
        assert one.engine.list()[0].status is Status.RUNNING


async def test_whoever_waits_to_be_ready_keeps_nobody_from_being_built(tmp_path: Path) -> None:
    async with world(tmp_path, config=replace(CONFIG, create_concurrency=1)) as one:
        gate = one.steps.hold("probe")
        one.door.answers = [YES]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.engine.create, SERVER)
            await one.steps.reached["probe"].wait()
            with anyio.fail_after(5):
                await one.engine.create(SandboxSpec())
            gate.set()


# Ports that need no token


async def test_public_ports_are_told_to_every_front_door(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        made = (await one.engine.create(SandboxSpec(public_ports=[8000]))).sandbox
        assert made.public_ports == [8000]
        assert one.door.public[made.id] == [8000]
        info = await one.engine.publish(made.id, 80)
        assert info.public_ports == [80, 8000]
        assert one.door.public[made.id] == [80, 8000]
        assert await one.engine.unpublish(made.id, 8000) == one.engine.get(made.id)
        kept = one.state.get(made.id)
        assert kept is not None
        assert kept.spec.public_ports == [80]

        one.door.public.clear()
        one.door.on_connect()
        await until(lambda: one.door.public == {made.id: [80]})
        info = await one.engine.terminate(made.id)
        assert info.public_ports == [80]


async def test_a_port_that_is_public_or_not_already_is_told_again(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        made = (await one.engine.create(SandboxSpec(public_ports=[80]))).sandbox
        await one.engine.publish(made.id, 80)
        await one.engine.unpublish(made.id, 81)
        assert one.steps.done.count("publish") == 2
        assert one.door.public[made.id] == [80]


async def test_who_may_have_no_public_port(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        made = (await one.engine.create(SandboxSpec(public_ports=[*range(1, 257)]))).sandbox
        for port in (0, -1, 65_536):
            with pytest.raises(InvalidArgumentError, match="port must be 1 to 65535"):
                await one.engine.publish(made.id, port)
        with pytest.raises(InvalidArgumentError, match="maximum is 256"):
            await one.engine.publish(made.id, 257)
        with pytest.raises(SandboxNotFoundError):
            await one.engine.publish("sb-nope", 80)
        assert "publish" not in one.steps.done
        await one.engine.terminate(made.id)
        with pytest.raises(SandboxGoneError):
            await one.engine.unpublish(made.id, 80)

        gate = one.steps.hold("attach")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.engine.create, SandboxSpec())
            await one.steps.reached["attach"].wait()
            with pytest.raises(ConflictError):
                await one.engine.publish(one.engine.list()[0].id, 80)
            gate.set()


async def test_what_cannot_be_written_down_is_not_published(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        made = (await one.engine.create(SandboxSpec())).sandbox
        save = one.state.save

        def full(*_: object) -> None:
            raise ResourceExhaustedError("no space")

        one.state.save = full  # type: ignore[method-assign,assignment]  # a disk that is full for a while
        with pytest.raises(ResourceExhaustedError):
            await one.engine.publish(made.id, 80)
        one.state.save = save  # type: ignore[method-assign]  # it has room again
        assert one.engine.get(made.id).public_ports == []
        assert one.door.public[made.id] == []


async def test_a_front_door_that_did_not_take_it_is_told_when_it_is_asked_again(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as one:
        made = (await one.engine.create(SandboxSpec(public_ports=[80]))).sandbox
        one.steps.failing["publish"] = NodeUnavailableError("silent")
        with pytest.raises(NodeUnavailableError):
            await one.engine.unpublish(made.id, 80)
        assert one.door.public[made.id] == [80]
        assert (await one.engine.unpublish(made.id, 80)).public_ports == []
        assert one.door.public[made.id] == []


async def test_a_sandbox_that_ends_while_it_is_published_says_so(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        made = (await one.engine.create(SandboxSpec())).sandbox
        gate = one.steps.hold("publish")
        one.steps.failing["publish"] = NodeUnavailableError("unknown sandbox")
        async with anyio.create_task_group() as tasks:

            async def publish() -> None:
                with pytest.raises(SandboxGoneError):
                    await one.engine.publish(made.id, 80)

            tasks.start_soon(publish)
            await one.steps.reached["publish"].wait()
            info = await one.engine.terminate(made.id)
            gate.set()
        assert info.reason is Reason.TERMINATED
        kept = one.state.get(made.id)
        assert kept is not None
        assert kept.status is Status.STOPPED


async def test_ports_published_at_once_are_all_public(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        made = (await one.engine.create(SandboxSpec())).sandbox
        gate = one.steps.hold("publish")
        async with anyio.create_task_group() as tasks:
            for port in range(1, 21):
                tasks.start_soon(one.engine.publish, made.id, port)
            await one.steps.reached["publish"].wait()
            await anyio.wait_all_tasks_blocked()
            gate.set()
        assert one.door.public[made.id] == [*range(1, 21)]
        assert one.engine.get(made.id).public_ports == [*range(1, 21)]


async def test_a_port_published_while_a_front_door_comes_anew_is_public_there(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as one:
        made = (await one.engine.create(SandboxSpec())).sandbox
        gate = one.steps.hold("attach")
        async with anyio.create_task_group() as tasks:
            one.door.on_connect()
            await one.steps.reached["attach"].wait()  # it has been told of no port
            tasks.start_soon(one.engine.publish, made.id, 80)
            await anyio.wait_all_tasks_blocked()
            gate.set()
        assert one.door.public[made.id] == [80]


async def test_the_access_tells_where_ports_are(tmp_path: Path) -> None:
    async with world(tmp_path) as one:
        assert (await one.engine.create(SandboxSpec())).url_template is None
        one.engine._url_template = "http://{port}-{id}.localhost:1"
        made = await one.engine.create(SandboxSpec())
        assert made.url_template == "http://{port}-{id}.localhost:1"
        assert one.engine.access(made.sandbox.id) == made
