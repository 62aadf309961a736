"""Carries out what the lifecycle decides: brings sandboxes up, watches their clocks, takes them down.

A sandbox's undo stack is filled as things are acquired and unwound in one place, `_tear_down`, whether its start
failed, its time was over or its owner ended it. That runs in a task of the engine's own, so no client that goes
away can leave half of a sandbox behind.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Protocol, Self

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import msgspec
import structlog

from shoal.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    NodeUnavailableError,
    ResourceExhaustedError,
    SandboxGoneError,
    SandboxNotFoundError,
    ShoalError,
    StartFailedError,
    StartTimeoutError,
)
from shoal.node import lifecycle, oci
from shoal.node.admission import Admission, check_port, check_ports
from shoal.node.door_client import Door, Ended, Process
from shoal.node.keeper_client import Fault, Keeper, KeeperError
from shoal.node.lifecycle import (
    EndRequested,
    Event,
    Exited,
    FoundAlive,
    Instruction,
    Life,
    Started,
    StartFailed,
    TornDown,
)
from shoal.node.secret import NodeSecret
from shoal.node.slots import Slots
from shoal.state import Record, StateStore
from shoal.types import (
    ImageInfo,
    Outcome,
    Ready,
    Reason,
    SandboxAccess,
    SandboxInfo,
    SandboxSpec,
    Status,
)

log = structlog.get_logger(__name__)

_DESTROY_DEADLINE = 30.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 15.0
_HOUSEKEEPING = 5.0
_FIRST_GENERATION = 1
MAIN = "main"
"""Exec id of the main command."""
_ATTEMPT = 10.0
"""Seconds for one attempt to see whether a sandbox is ready: who does not answer now may answer another."""
_UNKNOWN_END = Exited(oom_kills=0, wait_status=9)
"""What is assumed of an end that the keeper says nothing of: it ended everything of that sandbox by force."""
_LONGEST_LINE = 200
"""Characters of a command's output in a hint."""
_LAST_WORDS = 1.0
"""Seconds for which the keeper's account of an exit is waited for once the front door has lost a guest agent."""


class Images(Protocol):
    """What the engine asks of the image store."""

    def pin(self, reference: str) -> AbstractAsyncContextManager[ImageInfo]:
        """The image, which keeps its layers until the context is left."""
        ...

    def layers_of(self, image: ImageInfo) -> list[str]:
        """Hex diffIDs of an image, top first."""
        ...


class Survivor(msgspec.Struct, frozen=True):
    """A sandbox that outlived the server which made it."""

    record: Record
    socket: str
    """Where its guest agent listens, as the front door sees it."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How patient the engine is, in seconds, and how much it does at once; `Settings` has the defaults."""

    start_timeout: float
    stop_timeout: float
    create_concurrency: int
    keep_ended: float
    max_ended: int


class _Live:
    """A sandbox that is not stopped yet, with what the engine holds for it."""

    __slots__ = (
        "gone",
        "life",
        "ports_lock",
        "process",
        "record",
        "socket",
        "start_scope",
        "timer",
        "undo",
    )

    def __init__(self, record: Record, life: Life, process: Process) -> None:
        self.record = record
        self.life = life
        self.process = process
        self.socket = ""
        self.undo = AsyncExitStack()
        self.start_scope: anyio.CancelScope | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.gone = anyio.Event()
        # The front door takes requests in any order, so that which tells it last what is public must be the last.
        self.ports_lock = anyio.Lock()


class Engine:
    """The node's sandboxes. As a context manager it works; call `shutdown` before leaving it.

    Args:
        keeper: Builds and removes sandboxes.
        door: Serves their data plane.
        images: Gives layers.
        state: Where records go. The caller closes it after the engine.
        admission: Decides what may start.
        secret: Access tokens are made of it.
        config: Deadlines and bounds.
        slots: Ranges of host ids.
        url_template: As `types.SandboxAccess.url_template`.
    """

    def __init__(
        self,
        *,
        keeper: Keeper,
        door: Door,
        images: Images,
        state: StateStore,
        admission: Admission,
        secret: NodeSecret,
        config: EngineConfig,
        slots: Slots | None = None,
        url_template: str | None = None,
    ) -> None:
        self._keeper = keeper
        self._door = door
        self._images = images
        self._state = state
        self._admission = admission
        self._secret = secret
        self._config = config
        self._slots = slots or Slots()
        self._url_template = url_template
        self._live: dict[str, _Live] = {}
        self._unsaved: dict[str, Record] = {}
        self._written = 0
        self._folded = 0
        self._closing = False
        self._do: dict[Instruction, Callable[[_Live], None]] = {
            Instruction.SAVE: self._save,
            Instruction.ARM_TIMER: self._arm_timer,
            Instruction.CANCEL_TIMER: self._cancel_timer,
            Instruction.ABORT_START: self._abort_start,
            Instruction.TEAR_DOWN: self._begin_tear_down,
            Instruction.RELEASE: self._release,
        }
        self.quiet_since = time.monotonic()
        """When the last sandbox was released, on the monotonic clock."""

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        # First come, first served: anyio's semaphore wakes its waiters in order.
        self._turns = anyio.Semaphore(self._config.create_concurrency, fast_acquire=True)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._keeper.on_exit = self._on_exit
        self._door.on_connect = self._on_door
        self._door.on_lost = self._on_lost
        self._tasks.start_soon(self._keep_house)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        for live in self._live.values():
            self._cancel_timer(live)
        self._tasks.cancel_scope.cancel()
        return await self._tasks.__aexit__(kind, error, trace)

    @property
    def alive(self) -> int:
        """Sandboxes that hold anything, those that come and go included."""
        return len(self._live)

    @property
    def admission(self) -> Admission:
        """What there is and what of it is promised."""
        return self._admission

    async def create(self, spec: SandboxSpec) -> SandboxAccess:
        """Bring a sandbox to running, or leave nothing behind but its record.

        A caller that is cancelled meanwhile gives the sandbox up.

        Raises:
            InvalidArgumentError: The spec makes no sense on this host.
            ImageNotFoundError: The node has no such image.
            ResourceExhaustedError: There is no room now. Nothing was reserved.
            StartTimeoutError: The guest agent was silent for too long, or it was not ready in time.
            StartFailedError: A step failed, or its main command did; `details` says which.
            SandboxGoneError: It was ended while it started.
            NodeUnavailableError: The node is stopping.
        """
        began = time.monotonic()
        self._admission.check(spec)
        self._refuse_when_closing()
        async with AsyncExitStack() as undo:
            undo.enter_context(self._admission.reserve(spec))
            image = await undo.enter_async_context(self._images.pin(spec.image))
            slot = await undo.enter_async_context(self._slot())
            self._refuse_when_closing()  # again: `shutdown` ends only what it can see
            # Before the keeper acts: a crash must leave a trace.
            live = self._begin(spec, image, slot)
            live.undo = undo.pop_all()
        await self._start(live, image)
        log.info(
            "sandbox_running",
            sandbox=live.record.id,
            image=spec.image,
            ms=round((time.monotonic() - began) * 1000, 1),
        )
        return self._access(live)

    async def adopt(self, survivors: Sequence[Survivor]) -> None:
        """Take up sandboxes that another server left: each holds what it would hold had `create` made it here.

        The next `on_connect` of the front door shows them to it; one that serves them already goes on with it.
        """
        lives = [await self._take_up(one) for one in survivors]
        # What ended before it was taken up was told to nobody.
        there = await self._keeper.sandboxes()
        for live in lives:
            if live.record.id not in there.alive:
                self._apply(live, there.exited.get(live.record.id, _UNKNOWN_END))

    async def _take_up(self, survivor: Survivor) -> _Live:
        record = survivor.record
        life = Life(
            id=record.id,
            status=record.status,
            reason=record.reason,
            message=record.message,
            story=("recorded",),
        )
        live = _Live(record, life, Process(env=[], cwd="", user=""))
        live.socket = survivor.socket
        flaw = ""
        async with AsyncExitStack() as undo:
            undo.enter_context(self._admission.hold(record.spec))
            try:
                image = await undo.enter_async_context(self._images.pin(record.image_digest))
                live.process = oci.exec_defaults(record.spec, image)
                undo.enter_context(self._slots.held(record.slot))
            except ShoalError as error:
                flaw = error.message
            undo.push_async_callback(self._destroy, record.id)
            undo.push_async_callback(self._detach, live)
            live.undo = undo.pop_all()
        self._live[record.id] = live
        self._apply(live, FoundAlive())
        if flaw:
            self._apply(live, EndRequested(Reason.LOST, f"it cannot be taken up again: {flaw}"))
        log.info("sandbox_found", sandbox=record.id, was=record.status, now=live.life.status)
        return live

    async def terminate(self, sandbox: str) -> SandboxInfo:
        """End a sandbox and wait until nothing of it is left; one that has ended already stays as it is.

        Returns what is known of it; `stopping` when even `stop_timeout` seconds were not enough.

        Raises:
            SandboxNotFoundError: The node knows no such sandbox.
        """
        live = self._live.get(sandbox)
        if live is not None:
            self._apply(live, EndRequested(Reason.TERMINATED))
            with anyio.move_on_after(self._config.stop_timeout):
                await live.gone.wait()
            return live.record.to_info()
        return self.get(sandbox)

    def get(self, sandbox: str) -> SandboxInfo:
        """What is known of a sandbox, alive or ended.

        Raises:
            SandboxNotFoundError: The node knows no such sandbox.
        """
        live = self._live.get(sandbox)
        record = (
            live.record
            if live is not None
            else self._unsaved.get(sandbox) or self._state.get(sandbox)
        )
        if record is None:
            raise SandboxNotFoundError(
                f"no sandbox {sandbox[:200]!r}",
                hint=f"ended ones are forgotten after {self._config.keep_ended:g} s",
            )
        return record.to_info()

    def access(self, sandbox: str) -> SandboxAccess:
        """A running sandbox and the token of its data plane.

        Raises:
            SandboxNotFoundError: The node knows no such sandbox.
            SandboxGoneError: It has ended, or is about to; the reason is attached.
            ConflictError: It is not up yet.
        """
        return self._access(self._running(sandbox))

    async def publish(self, sandbox: str, port: int) -> SandboxInfo:
        """Let a port of a running sandbox be used without a token. One that is public stays so.

        Raises:
            InvalidArgumentError: It is no port, or too many are public already.
            SandboxNotFoundError: The node knows no such sandbox.
            SandboxGoneError: It has ended, or is about to.
            ConflictError: It is not up yet.
            ResourceExhaustedError: It cannot be written down. Nothing changed.
            NodeUnavailableError: The front door did not take it. It is written down; call this again.
        """
        return await self._set_public(sandbox, port, public=True)

    async def unpublish(self, sandbox: str, port: int) -> SandboxInfo:
        """Ask for a token again on a port. One that is not public stays so.

        Raises:
            InvalidArgumentError: It is no port.
            SandboxNotFoundError: The node knows no such sandbox.
            SandboxGoneError: It has ended, or is about to.
            ConflictError: It is not up yet.
            ResourceExhaustedError: It cannot be written down. Nothing changed.
            NodeUnavailableError: The front door did not take it. It is written down; call this again.
        """
        return await self._set_public(sandbox, port, public=False)

    async def _set_public(self, sandbox: str, port: int, *, public: bool) -> SandboxInfo:
        check_port("port", port)
        live = self._running(sandbox)
        async with live.ports_lock:
            self._running(sandbox)
            spec = live.record.spec
            ports = {*spec.public_ports, port} if public else {*spec.public_ports} - {port}
            spec = msgspec.structs.replace(spec, public_ports=sorted(ports))
            check_ports(spec.public_ports)
            # First, and whether or not it changes anything: the record is what every later front door is told, and
            # who calls again after an error wants the front door told.
            record = msgspec.structs.replace(live.record, spec=spec)
            self._store(record)
            live.record = record
            try:
                await self._door.publish(sandbox, spec.public_ports)
            except NodeUnavailableError:
                self._running(sandbox)  # that it ended meanwhile says more
                raise
        return live.record.to_info()

    def _running(self, sandbox: str) -> _Live:
        live = self._live.get(sandbox)
        if live is not None and live.life.status in (Status.RUNNING, Status.PAUSED):
            return live
        info = self.get(sandbox)
        if info.status is Status.CREATING:
            raise ConflictError(
                f"sandbox {sandbox} is still starting", hint="wait for the call that creates it"
            )
        raise gone(info)

    def list(self, *, labels: Mapping[str, str] | None = None, ended: int = 0) -> list[SandboxInfo]:
        """Sandboxes that carry all the labels, newest first: all alive, and the last `ended` that are not."""
        labels = labels or {}
        records: dict[str, Record] = {}
        if ended:
            records = {one.id: one for one in self._state.ended(labels=labels, limit=ended)}
            records |= self._unsaved
        records |= {one.record.id: one.record for one in self._live.values()}
        wanted = labels.items()
        found = [
            record.to_info() for record in records.values() if wanted <= record.spec.labels.items()
        ]
        found.sort(key=lambda info: info.created_at, reverse=True)
        return found

    async def shutdown(self) -> None:
        """Take no more sandboxes and end those there are, with reason `host_shutdown`.

        Returns when all are gone, at the latest after `stop_timeout` seconds.
        """
        self._closing = True
        leaving = list(self._live.values())
        for live in leaving:
            self._apply(live, EndRequested(Reason.HOST_SHUTDOWN, "the node was stopped"))
        with anyio.move_on_after(self._config.stop_timeout) as patience:
            for live in leaving:
                await live.gone.wait()
        if patience.cancelled_caught:
            log.error("sandboxes_left", sandboxes=sorted(self._live))
        self._save_unsaved()

    def close_admission(self) -> None:
        """From now on every create is refused: the node is about to leave."""
        self._closing = True

    # Starting

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise NodeUnavailableError("the node is stopping", hint="start it again, then retry")

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[int]:
        while (slot := self._slots.take()) is None:
            try:
                block = await self._keeper.claim_ids()
            except KeeperError as error:
                raise ResourceExhaustedError(
                    "all ranges of host ids are taken", hint="end sandboxes that are idle"
                ) from error
            self._slots.add(block.first, block.count)
        try:
            yield slot
        finally:
            self._slots.give_back(slot)

    def _begin(self, spec: SandboxSpec, image: ImageInfo, slot: int) -> _Live:
        sandbox, now = new_id(), time.time()
        process = oci.exec_defaults(spec, image)
        life, instructions = lifecycle.born(sandbox)
        record = Record(
            id=sandbox,
            spec=spec,
            image_digest=image.digest,
            slot=slot,
            generation=_FIRST_GENERATION,
            status=life.status,
            created_at=now,
            expires_at=now + spec.timeout,
            deadline=time.monotonic() + spec.timeout,
        )
        # Raises, unlike the later ones: nobody may act on a sandbox without a trace.
        self._state.save(record)
        live = _Live(record, life, process)
        self._live[sandbox] = live
        for instruction in instructions:
            if instruction is not Instruction.SAVE:
                self._do[instruction](live)
        return live

    async def _start(self, live: _Live, image: ImageInfo) -> None:
        failure: ShoalError | None = None
        try:
            with anyio.CancelScope() as live.start_scope:
                await self._bring_up(live, image)
        except Exception as error:  # noqa: BLE001 - every failure ends the same way, and none is lost
            failure = _start_failure(error)
        except BaseException:  # our caller was cancelled; what was acquired goes back without it
            self._apply(live, StartFailed("its creator went away"))
            raise
        if live.life.status is Status.RUNNING:
            return
        if failure is None:
            self._apply(live, StartFailed(""))
        elif isinstance(failure, StartFailedError) and not failure.is_infra:
            self._apply(live, StartFailed(failure.message, Reason.NOT_READY))
        else:
            self._apply(live, StartFailed(failure.message))
        log.warning(
            "sandbox_start_failed",
            sandbox=live.record.id,
            reason=live.life.reason,
            error=live.life.message,
        )
        with anyio.move_on_after(self._config.stop_timeout):
            await live.gone.wait()
        if live.life.reason not in (Reason.FAILED_TO_START, Reason.NOT_READY):
            raise gone(live.record.to_info())
        raise failure or StartFailedError(live.life.message, stage="ready")

    async def _bring_up(self, live: _Live, image: ImageInfo) -> None:
        record = live.record
        spec = oci.runtime_spec(
            record.id, record.spec, layers=self._images.layers_of(image), slot=record.slot
        )
        async with self._turns:
            deadline = time.monotonic() + self._config.start_timeout
            # Pushed before the call: one that failed or was given up may have built a part.
            live.undo.push_async_callback(self._destroy, record.id)
            created = await self._keeper.create(
                record.id,
                generation=record.generation,
                spec=spec,
                deadline=self._config.start_timeout,
            )
        live.socket = created.socket
        live.undo.push_async_callback(self._detach, live)
        await self._attach(live, max(0.001, deadline - time.monotonic()))
        await self._begin_main(live)
        await self._wait_ready(live)
        # An end that was asked for in the meantime may not have reached us yet; it must not be passed by.
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._apply(live, Started())

    async def _begin_main(self, live: _Live) -> None:
        command = live.record.spec.command
        if command is not None:
            # Its own deadline, as long as the guest agent's was.
            await self._door.exec(
                live.record.id, MAIN, command, deadline=self._config.start_timeout
            )

    async def _wait_ready(self, live: _Live) -> None:
        spec = live.record.spec
        if spec.ready is None:
            return
        end, detail = time.monotonic() + spec.ready.timeout, ""
        while (left := end - time.monotonic()) > 0:
            seen = await self._door.probe(
                live.record.id,
                spec.ready,
                main=MAIN if spec.command is not None else None,
                deadline=min(_ATTEMPT, left),
            )
            if seen.ready:
                return
            if seen.ended is not None:
                raise _main_ended(seen.ended)
            detail = seen.detail
            await anyio.sleep(min(spec.ready.interval, max(0.0, end - time.monotonic())))
        raise _never_ready(spec.ready, detail)

    async def _attach(self, live: _Live, deadline: float) -> None:
        record = live.record
        async with live.ports_lock:
            ready = await self._door.attach(
                record.id,
                socket=live.socket,
                token=self._secret.token(record.id),
                process=live.process,
                public_ports=live.record.spec.public_ports,
                deadline=deadline,
            )
        if ready.generation != record.generation:
            raise StartFailedError(
                f"its guest agent is of generation {ready.generation}, not {record.generation}",
                stage="ready",
            )

    def _access(self, live: _Live) -> SandboxAccess:
        return SandboxAccess(
            sandbox=live.record.to_info(),
            access_token=self._secret.token(live.record.id),
            url_template=self._url_template,
        )

    # What the lifecycle says

    def _apply(self, live: _Live, event: Event) -> None:
        life, instructions = lifecycle.step(live.life, event)
        if life.status is not live.life.status or life.reason is not live.life.reason:
            stopped = life.status is Status.STOPPED
            live.record = msgspec.structs.replace(
                live.record,
                status=life.status,
                reason=life.reason,
                message=life.message,
                ended_at=time.time() if stopped else None,
            )
        live.life = life
        for instruction in instructions:
            self._do[instruction](live)

    def _save(self, live: _Live) -> None:
        self._write(live.record)

    def _store(self, record: Record) -> None:
        self._state.save(record)
        self._written += 1
        self._unsaved.pop(record.id, None)

    def _write(self, record: Record) -> None:
        try:
            self._store(record)
        except ShoalError as error:
            # The sandbox's life goes on; housekeeping writes it down when there is room again.
            self._unsaved[record.id] = record
            log.warning(
                "record_unsaved", sandbox=record.id, status=record.status, error=error.message
            )

    def _arm_timer(self, live: _Live) -> None:
        # The loop's clock is monotonic: setting the host's clock ends nothing and keeps nothing alive.
        remaining = max(0.0, live.record.deadline - time.monotonic())
        live.timer = self._loop.call_later(remaining, self._on_timeout, live)

    def _cancel_timer(self, live: _Live) -> None:
        if live.timer is not None:
            live.timer.cancel()
            live.timer = None

    def _abort_start(self, live: _Live) -> None:
        if live.start_scope is not None:
            live.start_scope.cancel()

    def _begin_tear_down(self, live: _Live) -> None:
        self._tasks.start_soon(self._tear_down, live)

    def _release(self, live: _Live) -> None:
        del self._live[live.record.id]
        self.quiet_since = time.monotonic()
        live.gone.set()
        log.info(
            "sandbox_stopped",
            sandbox=live.record.id,
            reason=live.record.reason,
            message=live.record.message,
        )

    async def _tear_down(self, live: _Live) -> None:
        try:
            await live.undo.aclose()
        except NodeUnavailableError as error:
            # The keeper is gone and the node with it. The record stays unfinished for the next start.
            log.error("sandbox_left", sandbox=live.record.id, error=error.message)
            live.gone.set()  # nobody shall wait for what nobody can do
            return
        except Exception:  # everything else on the stack was still unwound
            log.exception("teardown_incomplete", sandbox=live.record.id)
        self._apply(live, TornDown())

    async def _detach(self, live: _Live) -> None:
        try:
            await self._door.detach(live.record.id, reason=live.life.reason)
        except (ShoalError, TimeoutError) as error:
            # Its streams end anyway when the sandbox does.
            log.warning("detach_failed", sandbox=live.record.id, error=str(error))

    async def _destroy(self, sandbox: str) -> None:
        """Have the keeper remove a sandbox; tries until it is gone, for nothing it holds may be given on before."""
        pause = _FIRST_PAUSE
        while True:
            try:
                await self._keeper.destroy(sandbox, deadline=_DESTROY_DEADLINE)
                return
            except (KeeperError, DeadlineExceededError) as error:
                log.warning(
                    "destroy_failed",
                    sandbox=sandbox,
                    error=error.message,
                    retry_s=pause,
                    **error.details,
                )
            await anyio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    # What happens from outside

    def _on_timeout(self, live: _Live) -> None:
        live.timer = None
        message = f"its timeout of {live.record.spec.timeout:g} s has passed"
        self._apply(live, EndRequested(Reason.TIMEOUT, message))

    def _on_exit(self, sandbox: str, event: Exited) -> None:
        live = self._live.get(sandbox)
        if live is None:
            log.debug("exit_of_unknown", sandbox=sandbox)
            return
        self._apply(live, event)

    def _on_lost(self, sandbox: str, message: str) -> None:
        live = self._live.get(sandbox)
        if live is None:
            log.debug("loss_of_unknown", sandbox=sandbox)
            return
        self._tasks.start_soon(self._end_lost, live, f"its guest agent was lost: {message}")

    async def _end_lost(self, live: _Live, message: str) -> None:
        # A guest agent that died is lost to the front door too, often a moment before the keeper says
        # what it died of; that account is the better one, and it alone tells an OOM kill.
        with anyio.move_on_after(_LAST_WORDS):
            await live.gone.wait()
        self._apply(live, EndRequested(Reason.LOST, message))

    def _on_door(self) -> None:
        for live in list(self._live.values()):
            if live.life.status in (Status.RUNNING, Status.PAUSED):
                self._tasks.start_soon(self._attach_again, live)

    async def _attach_again(self, live: _Live) -> None:
        try:
            await self._attach(live, self._config.start_timeout)
        except NodeUnavailableError as error:
            log.debug("attach_again_later", sandbox=live.record.id, error=error.message)
        except ShoalError as error:
            message = f"a new front door cannot reach its guest agent: {error.message}"
            self._apply(live, EndRequested(Reason.LOST, message))
        else:
            if live.life.status not in (Status.RUNNING, Status.PAUSED):
                # It ended meanwhile, and its own detach was before.
                await self._detach(live)

    async def _keep_house(self) -> None:
        pruned = -_LONGEST_PAUSE
        interval = min(60.0, max(1.0, self._config.keep_ended / 4))
        while True:
            self._save_unsaved()
            await self._fold_records()
            if time.monotonic() - pruned >= interval:
                pruned = time.monotonic()
                try:
                    self._state.prune(
                        ended_before=time.time() - self._config.keep_ended,
                        keep=self._config.max_ended,
                    )
                except ShoalError as error:
                    log.warning("prune_failed", error=error.message)
            await anyio.sleep(min(_HOUSEKEEPING, interval))

    async def _fold_records(self) -> None:
        if self._written == self._folded:
            return
        self._folded = self._written
        try:
            await anyio.to_thread.run_sync(self._state.checkpoint)
        except ShoalError as error:
            log.warning("checkpoint_failed", error=error.message)

    def _save_unsaved(self) -> None:
        for record in list(self._unsaved.values()):
            self._write(record)


def new_id() -> str:
    """A sandbox id: `sb-` and 130 random bits as 26 characters."""
    return "sb-" + base64.b32encode(os.urandom(17)).decode().lower()[:26]


def gone(info: SandboxInfo) -> SandboxGoneError:
    """The error that tells how a sandbox ended."""
    reason = info.reason.value if info.reason is not None else "unknown"
    verb = "ended" if info.status is Status.STOPPED else "is ending"
    why = f": {info.message}" if info.message else ""
    return SandboxGoneError(
        f"sandbox {info.id} {verb} ({reason}){why}",
        hint=_ADVICE.get(info.reason, "") if info.reason is not None else "",
        reason=reason,
        is_infra=info.reason.is_infra if info.reason is not None else True,
        ended_at=info.ended_at,
    )


_ADVICE = {
    Reason.TERMINATED: "create a new one",
    Reason.TIMEOUT: "create one with a larger timeout",
    Reason.OOM: "create one with more memory_mib",
    Reason.LOST: "not its own fault; create a new one",
    Reason.HOST_SHUTDOWN: "not its own fault; create a new one",
    Reason.NOT_READY: "create one with another command, or another `ready`",
    Reason.FAILED_TO_START: "create a new one; see the node's log if nothing of its own is named here",
}


def _main_ended(ended: Ended) -> StartFailedError:
    match ended:
        case Ended(outcome=Outcome.EXITED, exit_code=int() as code):
            how = f"exited with code {code}"
        case Ended(signal=int() as number):
            how = f"ended by signal {number} ({ended.outcome.value})"
        case _:
            how = f"ended ({ended.outcome.value})"
    error = StartFailedError(
        f"its main command {how} before the sandbox was ready",
        hint=_last_line(ended),
        stage="main",
        **{
            name: value
            for name, value in msgspec.structs.asdict(ended).items()
            if value not in (None, "")
        },
    )
    error.is_infra = ended.outcome.is_infra
    return error


def _last_line(ended: Ended) -> str:
    """What a command last said: where somebody looks who cannot look into the sandbox any more."""
    for stream, tail in (("stderr", ended.stderr_tail), ("stdout", ended.stdout_tail)):
        if text := tail.strip():
            line = text.splitlines()[-1].strip()
            cut = "…" if len(line) > _LONGEST_LINE else ""
            # It is shown on a terminal, and a stranger's program wrote it.
            line = "".join(one if one.isprintable() else "\ufffd" for one in line[-_LONGEST_LINE:])
            return f"it last said on {stream}: {cut}{line}"
    return "it printed nothing; try it with exec in a sandbox without `command`"


def _never_ready(ready: Ready, detail: str) -> StartTimeoutError:
    error = StartTimeoutError(
        f"not ready within {ready.timeout:g} s" + (f": {detail}" if detail else ""),
        hint="give `ready` a longer timeout, or see with exec, in a sandbox without `ready`, what keeps it",
        stage="ready",
    )
    error.is_infra = False
    return error


def _start_failure(error: Exception) -> ShoalError:
    """The error that a failed start ends in, for the one who asked for it."""
    match error:
        case KeeperError(is_full=True):
            return ResourceExhaustedError(
                error.message,
                hint="the disk pool is full: remove images or end sandboxes",
                **error.details,
            )
        case KeeperError(fault=Fault(code="stopping")):
            return NodeUnavailableError("the node is stopping", hint="start it again, then retry")
        case KeeperError():
            return StartFailedError(error.message, hint="see the node's log", **error.details)
        case DeadlineExceededError():
            return StartTimeoutError(
                error.message, hint="the host may be overloaded; retry", **error.details
            )
        case StartFailedError() | NodeUnavailableError():
            return error
        case ShoalError():
            return StartFailedError(error.message, hint=error.hint, **error.details)
        case _:
            log.error("start_failed_unexpectedly", exc_info=error)
            return InternalError("a bug in the node broke the start", hint="see the node's log")
