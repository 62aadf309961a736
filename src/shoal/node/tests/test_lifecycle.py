from __future__ import annotations

import itertools

import pytest

from shoal.node import lifecycle
from shoal.node.lifecycle import (
    EndRequested,
    Event,
    Exited,
    FoundAfterRestart,
    FoundAlive,
    IllegalTransitionError,
    Instruction,
    Life,
    Started,
    StartFailed,
    TornDown,
    step,
)
from shoal.types import Reason, Status

EVENTS: tuple[Event, ...] = (
    Started(),
    StartFailed("broken"),
    EndRequested(Reason.TERMINATED),
    Exited(oom_kills=0, wait_status=9),
    TornDown(),
    FoundAfterRestart(),
    FoundAlive(),
)
ILLEGAL = [
    (status, event)
    for status, event in itertools.product(Status, EVENTS)
    if (status, type(event)) not in lifecycle.TABLE
]


def life(status: Status, reason: Reason | None = None) -> Life:
    return Life(id="sb-x", status=status, reason=reason)


@pytest.mark.parametrize(("status", "event"), ILLEGAL)
def test_an_illegal_transition_raises_with_the_story(status: Status, event: Event) -> None:
    before = Life(id="sb-x", status=status, story=("born", "something"))
    with pytest.raises(IllegalTransitionError) as caught:
        step(before, event)
    assert caught.value.details["story"][:2] == ["born", "something"]
    assert caught.value.details["status"] == status.value
    assert "sb-x" in caught.value.message
    assert caught.value.code == "internal"


def test_every_event_is_either_in_the_table_or_illegal_somewhere() -> None:
    assert len(lifecycle.TABLE) + len(ILLEGAL) == len(Status) * len(EVENTS)
    assert (Status.STOPPED, Started()) in ILLEGAL
    assert (Status.RUNNING, Started()) in ILLEGAL
    assert (Status.CREATING, TornDown()) in ILLEGAL


def test_the_usual_life() -> None:
    one, todo = lifecycle.born("sb-x")
    assert (one.status, todo) == (Status.CREATING, (Instruction.SAVE, Instruction.ARM_TIMER))
    one, todo = step(one, Started())
    assert (one.status, todo) == (Status.RUNNING, (Instruction.SAVE,))
    one, todo = step(one, EndRequested(Reason.TIMEOUT, "late"))
    assert (one.status, one.reason, one.message) == (Status.STOPPING, Reason.TIMEOUT, "late")
    assert todo == (Instruction.CANCEL_TIMER, Instruction.SAVE, Instruction.TEAR_DOWN)
    one, todo = step(one, TornDown())
    assert (one.status, one.reason) == (Status.STOPPED, Reason.TIMEOUT)
    assert todo == (Instruction.SAVE, Instruction.RELEASE)
    assert len(one.story) == 4


def test_the_first_reason_stays() -> None:
    one = life(Status.STOPPING, Reason.TIMEOUT)
    for event in (EndRequested(Reason.TERMINATED), Exited(oom_kills=1, wait_status=9)):
        one, todo = step(one, event)
        assert (one.status, one.reason, todo) == (Status.STOPPING, Reason.TIMEOUT, ())
    one, _ = step(one, FoundAfterRestart())
    assert (one.status, one.reason) == (Status.STOPPED, Reason.TIMEOUT)


def test_an_end_while_it_starts_aborts_the_start_and_tears_down_only_afterwards() -> None:
    one, todo = step(life(Status.CREATING), EndRequested(Reason.TERMINATED))
    assert one.status is Status.STOPPING
    assert Instruction.ABORT_START in todo
    assert Instruction.TEAR_DOWN not in todo
    one, todo = step(one, StartFailed("cancelled"))
    assert (one.reason, todo) == (Reason.TERMINATED, (Instruction.TEAR_DOWN,))


@pytest.mark.parametrize(
    ("oom_kills", "wait_status", "reason"),
    [
        (1, 9, Reason.OOM),
        (0, 9, Reason.LOST),
        (3, 11, Reason.LOST),  # the workload was OOM-killed earlier; the guest agent crashed
        (0, 1 << 8, Reason.LOST),
    ],
)
def test_a_guest_agent_that_ends_by_itself(
    oom_kills: int, wait_status: int, reason: Reason
) -> None:
    one, todo = step(life(Status.RUNNING), Exited(oom_kills=oom_kills, wait_status=wait_status))
    assert (one.status, one.reason) == (Status.STOPPING, reason)
    assert Instruction.TEAR_DOWN in todo


@pytest.mark.parametrize(
    "status", [Status.CREATING, Status.RUNNING, Status.PAUSED, Status.STOPPING]
)
def test_what_was_alive_before_a_restart_is_lost(status: Status) -> None:
    one, todo = step(life(status), FoundAfterRestart())
    assert (one.status, one.reason, todo) == (Status.STOPPED, Reason.LOST, (Instruction.SAVE,))


@pytest.mark.parametrize("status", [Status.RUNNING, Status.PAUSED])
def test_what_is_found_alive_goes_on_as_it_was_with_a_timer_of_its_own(status: Status) -> None:
    one, todo = step(life(status), FoundAlive())
    assert (one.status, one.reason, todo) == (status, None, (Instruction.ARM_TIMER,))


def test_what_is_found_alive_in_the_middle_of_its_start_is_given_up() -> None:
    one, todo = step(life(Status.CREATING), FoundAlive())
    assert (one.status, one.reason) == (Status.STOPPING, Reason.FAILED_TO_START)
    assert one.reason is not None
    assert one.reason.is_infra
    # Unlike an aborted start's: no task is under way that would report its end.
    assert todo[-1] is Instruction.TEAR_DOWN


def test_what_is_found_alive_in_the_middle_of_its_end_ends_for_the_reason_it_had() -> None:
    one, todo = step(life(Status.STOPPING, Reason.TIMEOUT), FoundAlive())
    assert (one.status, one.reason) == (Status.STOPPING, Reason.TIMEOUT)
    assert todo == (Instruction.TEAR_DOWN,)


def test_the_story_is_bounded() -> None:
    one = life(Status.STOPPING, Reason.TERMINATED)
    for _ in range(100):
        one, _ = step(one, EndRequested(Reason.TERMINATED))
    assert len(one.story) == 16
