"""The life of a sandbox as plain functions: an event in, the next state and instructions out.

No clock, no I/O, no task. The engine carries the instructions out and reports what came of them as the next
event, so that everything that can happen to a sandbox stands in one table.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import msgspec

from shoal.errors import InternalError
from shoal.types import Reason, Status

_STORY_LENGTH = 16
_OUT_OF_MEMORY = "it ran out of memory and its guest agent was killed"


class IllegalTransitionError(InternalError):
    """An event came that cannot happen in this state; `details["story"]` tells what led there."""


class Event(msgspec.Struct, frozen=True, tag=True):
    """Something that happened to a sandbox."""


class Started(Event, frozen=True):
    """Its guest agent said READY, its main command runs, and it is as ready as its spec asks."""


class StartFailed(Event, frozen=True):
    """A step of bringing it up failed, its own command or probe did, or its creator went away."""

    message: str
    reason: Reason = Reason.FAILED_TO_START


class EndRequested(Event, frozen=True):
    """Somebody, or a clock, wants it gone."""

    reason: Reason
    message: str = ""


class Exited(Event, frozen=True):
    """Its PID 1 ended by itself."""

    oom_kills: int
    """OOM kills in the sandbox since it was made."""
    wait_status: int
    """As waitpid(2) gives it."""


class TornDown(Event, frozen=True):
    """Everything it held was given back."""


class FoundAfterRestart(Event, frozen=True):
    """A new server found its record; the keeper has nothing of it any more."""


class FoundAlive(Event, frozen=True):
    """A new server found its record; the keeper still has it."""


class Instruction(enum.StrEnum):
    """What the engine shall do, in the order given."""

    SAVE = "save"
    """Write the record down."""
    ARM_TIMER = "arm_timer"
    """End it when its timeout has passed."""
    CANCEL_TIMER = "cancel_timer"
    ABORT_START = "abort_start"
    """Stop bringing it up."""
    TEAR_DOWN = "tear_down"
    """Give everything back, in reverse order; then report `TornDown`."""
    RELEASE = "release"
    """Wake those who wait for its end and forget it; the record stays."""


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """Where a sandbox stands and how it came there."""

    id: str
    status: Status
    reason: Reason | None = None
    """Set as soon as its end is decided; the first reason stays."""
    message: str = ""
    story: tuple[str, ...] = ()
    """Its last events, oldest first."""


Effect = tuple[Status, Reason | None, str, tuple[Instruction, ...]]
Rule = Callable[[Life, Any], Effect]


def born(sandbox: str) -> tuple[Life, tuple[Instruction, ...]]:
    """The first state of a sandbox and what to do about it."""
    life = Life(id=sandbox, status=Status.CREATING, story=("born",))
    return life, (Instruction.SAVE, Instruction.ARM_TIMER)


def step(life: Life, event: Event) -> tuple[Life, tuple[Instruction, ...]]:
    """The state after an event, and what to do about it.

    Raises:
        IllegalTransitionError: The event cannot happen in this state. The state did not change.
    """
    rule = TABLE.get((life.status, type(event)))
    if rule is None:
        raise IllegalTransitionError(
            f"{type(event).__name__} cannot happen to {life.id}, which is {life.status.value}",
            sandbox=life.id,
            status=life.status.value,
            story=[*life.story, repr(event)],
        )
    status, reason, message, instructions = rule(life, event)
    story = (*life.story, f"{life.status.value} -> {status.value}: {event!r}")[-_STORY_LENGTH:]
    return Life(
        id=life.id, status=status, reason=reason, message=message, story=story
    ), instructions


def _stay(life: Life, _event: Event) -> Effect:
    return life.status, life.reason, life.message, ()


def _run(_life: Life, _event: Started) -> Effect:
    return Status.RUNNING, None, "", (Instruction.SAVE,)


def _fail(_life: Life, event: StartFailed) -> Effect:
    return _end(event.reason, event.message)


def _end(reason: Reason, message: str) -> Effect:
    return (
        Status.STOPPING,
        reason,
        message,
        (Instruction.CANCEL_TIMER, Instruction.SAVE, Instruction.TEAR_DOWN),
    )


def _end_running(_life: Life, event: EndRequested) -> Effect:
    return _end(event.reason, event.message)


def _abort(reason: Reason, message: str) -> Effect:
    # No TEAR_DOWN yet: the start still acquires things. When it has stopped it reports `StartFailed`.
    return (
        Status.STOPPING,
        reason,
        message,
        (Instruction.CANCEL_TIMER, Instruction.SAVE, Instruction.ABORT_START),
    )


def _end_creating(_life: Life, event: EndRequested) -> Effect:
    return _abort(event.reason, event.message)


def _exit_creating(_life: Life, event: Exited) -> Effect:
    if _ran_out(event):
        return _abort(Reason.OOM, _OUT_OF_MEMORY)
    return _abort(
        Reason.FAILED_TO_START,
        f"its guest agent ended while it started ({_describe(event.wait_status)})",
    )


def _aborted(life: Life, _event: StartFailed) -> Effect:
    return Status.STOPPING, life.reason, life.message, (Instruction.TEAR_DOWN,)


def _exit_running(_life: Life, event: Exited) -> Effect:
    if _ran_out(event):
        return _end(Reason.OOM, _OUT_OF_MEMORY)
    return _end(Reason.LOST, f"its guest agent ended by itself ({_describe(event.wait_status)})")


def _ran_out(event: Exited) -> bool:
    return event.oom_kills > 0 and event.wait_status & 0x7F == 9


def _stop(life: Life, _event: TornDown) -> Effect:
    return Status.STOPPED, life.reason, life.message, (Instruction.SAVE, Instruction.RELEASE)


def _lose(life: Life, _event: FoundAfterRestart) -> Effect:
    # An end that was decided before the crash keeps its reason: the owner's own terminate is not an infra failure.
    reason = life.reason or Reason.LOST
    return (
        Status.STOPPED,
        reason,
        life.message or "the node ended while it was alive",
        (Instruction.SAVE,),
    )


def _take_up(life: Life, _event: FoundAlive) -> Effect:
    return life.status, life.reason, life.message, (Instruction.ARM_TIMER,)


def _give_up(_life: Life, _event: FoundAlive) -> Effect:
    # Nobody waits for it any more: its creator's request ended with the server.
    return _end(Reason.FAILED_TO_START, "the node's server died while it started")


def _go_on_ending(life: Life, _event: FoundAlive) -> Effect:
    return Status.STOPPING, life.reason, life.message, (Instruction.TEAR_DOWN,)


TABLE: dict[tuple[Status, type[Event]], Rule] = {
    (Status.CREATING, Started): _run,
    (Status.CREATING, StartFailed): _fail,
    (Status.CREATING, EndRequested): _end_creating,
    (Status.CREATING, Exited): _exit_creating,
    (Status.CREATING, FoundAfterRestart): _lose,
    (Status.CREATING, FoundAlive): _give_up,
    (Status.RUNNING, EndRequested): _end_running,
    (Status.RUNNING, Exited): _exit_running,
    (Status.RUNNING, FoundAfterRestart): _lose,
    (Status.RUNNING, FoundAlive): _take_up,
    (Status.PAUSED, EndRequested): _end_running,
    (Status.PAUSED, Exited): _exit_running,
    (Status.PAUSED, FoundAfterRestart): _lose,
    (Status.PAUSED, FoundAlive): _take_up,
    # From here on the end is decided: whatever else wants it ended finds it done.
    (Status.STOPPING, StartFailed): _aborted,
    (Status.STOPPING, EndRequested): _stay,
    (Status.STOPPING, Exited): _stay,
    (Status.STOPPING, TornDown): _stop,
    (Status.STOPPING, FoundAfterRestart): _lose,
    (Status.STOPPING, FoundAlive): _go_on_ending,
    (Status.STOPPED, EndRequested): _stay,
    (Status.STOPPED, Exited): _stay,
}


def _describe(wait_status: int) -> str:
    signal = wait_status & 0x7F
    return f"signal {signal}" if signal else f"exit code {wait_status >> 8 & 0xFF}"
