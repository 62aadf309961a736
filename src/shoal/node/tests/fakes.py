"""The engine's neighbours without a kernel: each step can be made to fail, or to wait, by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from shoal.errors import ImageNotFoundError
from shoal.node.admission import Admission, Overcommit, Resources
from shoal.node.door_client import Attached, Probed, Process
from shoal.node.engine import Engine, EngineConfig
from shoal.node.keeper_client import Alive, Created, Held, IdBlock
from shoal.node.lifecycle import Exited
from shoal.node.secret import NodeSecret
from shoal.node.slots import Slots
from shoal.state import StateStore
from shoal.types import ImageInfo, Ready, Reason

IMAGE = ImageInfo(
    name="base",
    digest="sha256:" + "d" * 64,
    layers=["a" * 64, "b" * 64],
    size_bytes=1,
    created_at=0.0,
    env=["LANG=C.UTF-8", "nonsense"],
    workdir="/srv",
    user="app",
)


async def until(holds: Callable[[], object], *, within: float = 5.0) -> None:
    """Wait for something that announces itself by no event."""
    with anyio.fail_after(within):
        while not holds():  # noqa: ASYNC110 - the outcome of other tasks, which set no event
            await anyio.sleep(0.002)


class Steps:
    """What was done, in order, by all fakes of one test; a step named in `failing` raises once it is reached."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failing: dict[str, BaseException] = {}
        self.gates: dict[str, anyio.Event] = {}
        self.reached: dict[str, anyio.Event] = {}

    def hold(self, step: str) -> anyio.Event:
        """Make a step wait until the returned event is set; `reached[step]` is set when it is there."""
        self.reached[step] = anyio.Event()
        self.gates[step] = anyio.Event()
        return self.gates[step]

    async def take(self, step: str) -> None:
        self.done.append(step)
        if step in self.gates:
            self.reached[step].set()
            await self.gates[step].wait()
        if step in self.failing:
            raise self.failing.pop(step)


class FakeKeeper:
    """A `Keeper` that holds ids only."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.held: dict[str, dict[str, Any]] = {}
        self.exited: dict[str, Exited] = {}
        self.most_at_once = 0
        self.claimed = 0
        self._at_once = 0
        self.on_exit: Callable[[str, Exited], None] = lambda _sandbox, _event: None

    async def create(
        self, sandbox: str, *, generation: int, spec: dict[str, Any], deadline: float
    ) -> Created:
        assert generation == 1
        assert deadline > 0
        host_ids = {one["linux"]["uidMappings"][0]["hostID"] for one in self.held.values()}
        assert spec["linux"]["uidMappings"][0]["hostID"] not in host_ids, (
            "host ids given on too early"
        )
        self.held[sandbox] = spec
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await anyio.lowlevel.checkpoint()
            await self.steps.take("create")
        finally:
            self._at_once -= 1
        return Created(pid=1, socket=f"/agents/{sandbox}.sock")

    async def destroy(self, sandbox: str, *, deadline: float) -> None:
        assert deadline > 0
        await self.steps.take("destroy")
        self.held.pop(sandbox, None)

    async def claim_ids(self) -> IdBlock:
        self.claimed += 1
        return IdBlock(first=(self.claimed - 1) * 1000, count=1000)

    async def sandboxes(self) -> Held:
        alive = {one: Alive(sandbox=one, socket=f"/agents/{one}.sock") for one in self.held}
        return Held(alive=alive, exited=dict(self.exited))


class FakeDoor:
    """A `Door` that remembers who is attached."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.attached: dict[str, tuple[str, Process]] = {}
        self.reasons: dict[str, Reason | None] = {}
        """What a detach said, by sandbox."""
        self.public: dict[str, list[int]] = {}
        """Ports that need no token, by sandbox."""
        self.started: list[tuple[str, str, list[str]]] = []
        """Main commands: sandbox, exec id, words."""
        self.probes: list[tuple[Ready, str | None]] = []
        """What was asked, and whose end was to be told."""
        self.answers: list[Probed] = []
        """What the next probes see; the last one stays."""
        self.generation = 1
        self.on_connect: Callable[[], None] = lambda: None
        self.on_lost: Callable[[str, str], None] = lambda _sandbox, _message: None

    async def attach(
        self,
        sandbox: str,
        *,
        socket: str,
        token: str,
        process: Process,
        public_ports: Sequence[int],
        deadline: float,
    ) -> Attached:
        assert socket.endswith(f"{sandbox}.sock")
        assert deadline > 0
        self.attached[sandbox] = (token, process)
        public = list(public_ports)
        await self.steps.take("attach")
        self.public[sandbox] = public
        return Attached(generation=self.generation)

    async def detach(self, sandbox: str, *, reason: Reason | None = None) -> None:
        self.attached.pop(sandbox, None)
        self.public.pop(sandbox, None)
        self.reasons[sandbox] = reason
        await self.steps.take("detach")

    async def publish(self, sandbox: str, public_ports: Sequence[int]) -> None:
        public = list(public_ports)
        await self.steps.take("publish")
        self.public[sandbox] = public

    async def exec(
        self, sandbox: str, exec_id: str, argv: Sequence[str], *, deadline: float
    ) -> None:
        assert sandbox in self.attached
        assert deadline > 0
        await self.steps.take("exec")
        self.started.append((sandbox, exec_id, list(argv)))

    async def probe(
        self, sandbox: str, ready: Ready, *, main: str | None, deadline: float
    ) -> Probed:
        assert sandbox in self.attached
        assert 0 < deadline <= ready.timeout
        self.probes.append((ready, main))
        await self.steps.take("probe")
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class FakeImages:
    """An `Images` with one image, `base`."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.pins = 0
        self.image = IMAGE

    @asynccontextmanager
    async def pin(self, reference: str) -> AsyncIterator[ImageInfo]:
        if reference not in ("base", IMAGE.digest):
            raise ImageNotFoundError(f"no image {reference!r}", hint="the node has: base")
        await self.steps.take("pin")
        self.pins += 1
        try:
            yield self.image
        finally:
            self.pins -= 1
            await self.steps.take("unpin")

    def layers_of(self, image: ImageInfo) -> list[str]:
        return image.layers[::-1]


HOST = Resources(cpu=4.0, memory_mib=8192, disk_mib=16384, pids=10_000)


def admission(**changes: Any) -> Admission:
    """Admission on a host of four CPUs."""
    values: dict[str, Any] = {
        "overcommit": Overcommit(cpu=100, memory=100, disk=100, pids=100),
        "max_sandboxes": 1000,
        "max_timeout": 3600.0,
    } | changes
    return Admission(values.pop("host", HOST), **values)


CONFIG = EngineConfig(
    start_timeout=10.0, stop_timeout=5.0, create_concurrency=4, keep_ended=86_400.0, max_ended=1000
)


class World:
    """An engine among fakes, and the fakes."""

    def __init__(
        self,
        directory: Path,
        *,
        config: EngineConfig | None = None,
        admission_: Admission | None = None,
    ) -> None:
        self.steps = Steps()
        self.keeper = FakeKeeper(self.steps)
        self.door = FakeDoor(self.steps)
        self.images = FakeImages(self.steps)
        self.state = StateStore.open(directory / "state.db")
        self.admission = admission_ or admission()
        self.slots = Slots()
        self.engine = Engine(
            keeper=self.keeper,
            door=self.door,
            images=self.images,
            state=self.state,
            admission=self.admission,
            secret=NodeSecret(b"k" * 32),
            config=config or CONFIG,
            slots=self.slots,
        )

    def assert_nothing_held(self) -> None:
        """Every resource is back where it came from."""
        assert self.engine.alive == 0
        assert not self.keeper.held
        assert not self.door.attached
        assert self.images.pins == 0
        assert self.slots.taken == 0
        reserved = self.admission.reserved
        assert (reserved.cpu, reserved.memory_mib, reserved.disk_mib, reserved.pids) == (0, 0, 0, 0)


@asynccontextmanager
async def world(directory: Path, **changes: Any) -> AsyncIterator[World]:
    """A running engine among fakes; shut down and checked for leaks at the end."""
    made = World(directory, **changes)
    try:
        async with made.engine:
            yield made
            await made.engine.shutdown()
            made.assert_nothing_held()
    finally:
        made.state.close()
