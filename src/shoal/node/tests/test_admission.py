from __future__ import annotations

import math
import random
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from shoal.errors import InternalError, InvalidArgumentError, ResourceExhaustedError
from shoal.node.admission import Floor, Overcommit, Resources, check_user, host_resources
from shoal.node.slots import FIRST_ID, IDS_PER_SLOT, Slots, first_host_id
from shoal.node.tests.fakes import HOST, admission
from shoal.types import Ready, SandboxSpec


@pytest.mark.parametrize("field", ["cpu", "memory_mib", "disk_mib", "pids", "timeout"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf])
def test_a_limit_that_is_no_amount_is_refused(field: str, value: float) -> None:
    spec = SandboxSpec(**{field: value})  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InvalidArgumentError, match=field):
        admission().check(spec)


@pytest.mark.parametrize(
    ("field", "value", "host"),
    [
        ("cpu", 4.01, "4"),
        ("memory_mib", 8193, "8192"),
        ("disk_mib", 16385, "16384"),
        ("pids", 10_001, "10000"),
    ],
)
def test_more_than_the_host_has_names_the_hosts_number(field: str, value: float, host: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        admission().check(SandboxSpec(**{field: value}))  # type: ignore[arg-type]  # by name
    assert field in caught.value.message
    assert host in caught.value.message
    assert host in caught.value.hint
    assert caught.value.details["field"] == field


def test_large_numbers_are_written_out() -> None:
    with pytest.raises(InvalidArgumentError, match="disk_mib of 10000000 is more"):
        admission().check(SandboxSpec(disk_mib=10_000_000))
    with pytest.raises(
        InvalidArgumentError, match=r"cpu of 4\.25 is more than this host has: 4 CPUs"
    ):
        admission().check(SandboxSpec(cpu=4.25))


def test_a_spec_as_large_as_the_host_is_fine() -> None:
    admission().check(
        SandboxSpec(cpu=4.0, memory_mib=8192, disk_mib=16384, pids=10_000, timeout=3600.0)
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"cpu": 0.001}, "minimum"),
        ({"memory_mib": 4}, "minimum"),
        ({"timeout": 3601.0}, "3600"),
        ({"image": ""}, "image"),
        ({"image": "a\0b"}, "image"),
        ({"env": {"": "x"}}, "env"),
        ({"env": {"A=B": "x"}}, "env"),
        ({"env": {"A": "x\0"}}, "NUL"),
        ({"env": {"A": "x" * 200_000}}, "env"),
        ({"labels": {"": "x"}}, "label"),
        ({"labels": {"a=b": "x"}}, "label"),
        ({"labels": {"a": "x\n"}}, "label"),
        ({"labels": {str(n): "" for n in range(65)}}, "labels"),
        ({"workdir": "relative"}, "workdir"),
        ({"workdir": "/a\0"}, "workdir"),
        ({"user": ""}, "user"),
    ],
)
def test_words_that_cannot_be(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidArgumentError, match=word):
        admission().check(SandboxSpec(**changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"command": []}, "command"),
        ({"command": ["", "x"]}, "command"),
        ({"command": ["a\0b"]}, "command"),
        ({"command": ["echo", "\0"]}, "command"),
        ({"command": ["echo", "x" * 200_000]}, "command"),
        ({"ready": Ready()}, "ready"),
        ({"ready": Ready(path="/")}, "ready"),
        ({"ready": Ready(port=80, command=["true"])}, "ready"),
        ({"ready": Ready(port=80, path="/", command=["true"])}, "ready"),
        ({"ready": Ready(command=["true"], path="/")}, "ready.path"),
        ({"ready": Ready(command=[])}, "ready.command"),
        ({"ready": Ready(command=["a\0"])}, "ready.command"),
        ({"ready": Ready(port=0)}, "ready.port"),
        ({"ready": Ready(port=-1)}, "ready.port"),
        ({"ready": Ready(port=65_536)}, "ready.port"),
        ({"ready": Ready(port=80, path="")}, "ready.path"),
        ({"ready": Ready(port=80, path="health")}, "ready.path"),
        ({"ready": Ready(port=80, path="http://10.0.0.1/")}, "ready.path"),
        ({"ready": Ready(port=80, path="/a b")}, "ready.path"),
        ({"ready": Ready(port=80, path="/\r\nX: y")}, "ready.path"),
        ({"ready": Ready(port=80, path="/\n")}, "ready.path"),
        ({"ready": Ready(port=80, path="/é")}, "ready.path"),
        ({"ready": Ready(port=80, path="/" + "x" * 4096)}, "ready.path"),
        ({"ready": Ready(port=80, interval=0.001)}, "ready.interval"),
        ({"ready": Ready(port=80, interval=-1)}, "ready.interval"),
        ({"ready": Ready(port=80, interval=math.nan)}, "ready.interval"),
        ({"ready": Ready(port=80, timeout=0)}, "ready.timeout"),
        ({"ready": Ready(port=80, timeout=-1)}, "ready.timeout"),
        ({"ready": Ready(port=80, timeout=math.inf)}, "ready.timeout"),
        ({"ready": Ready(port=80, timeout=3601)}, "ready.timeout"),
        ({"public_ports": [0]}, "public_ports"),
        ({"public_ports": [65_536]}, "public_ports"),
        ({"public_ports": [80, 81, 80]}, "public_ports"),
        ({"public_ports": list(range(1, 258))}, "public_ports"),
    ],
    ids=str,
)
def test_a_main_command_a_probe_or_ports_that_cannot_be(
    changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=field.replace(".", r"\.")) as caught:
        admission().check(SandboxSpec(**changes))
    assert caught.value.details["field"] == field


@pytest.mark.parametrize(
    "changes",
    [
        {"command": ["true"]},
        {"command": ["sh", "-c", "", "é"]},
        {"ready": Ready.on_port(1)},
        {"ready": Ready.on_port(65_535, interval=0.01, timeout=3600)},
        {"ready": Ready.on_http(8000)},
        {"ready": Ready.on_http(8000, "/a/b?c=d%20e")},
        {"ready": Ready.on_command(("pg_isready", "-q"))},
        {"public_ports": [1, 65_535]},
        {"public_ports": list(range(1, 257))},
    ],
    ids=str,
)
def test_a_main_command_a_probe_or_ports_that_can_be(changes: dict[str, Any]) -> None:
    admission().check(SandboxSpec(**changes))


@pytest.mark.parametrize(
    "user", ["root", "0", "65535", "1000:1000", "app:staff", "_apt", "a-b.c", "win$"]
)
def test_a_user_that_can_be_one(user: str) -> None:
    check_user(user)


@pytest.mark.parametrize(
    "user",
    [
        "",
        ":",
        "a:",
        ":a",
        "a:b:c",
        "-1",
        "00",
        "01",
        "0x0",
        "+0",
        " 0",
        "0 ",
        "65536",
        "4294967296",
        "4294967295",
        "9" * 400,
        "a b",
        "a\n",
        "root\0",
        "../x",
        "٣",
    ],
)
def test_a_user_that_can_not(user: str) -> None:
    with pytest.raises(InvalidArgumentError, match="user"):
        check_user(user)


@pytest.mark.parametrize(
    ("spec", "resource"),
    [
        (SandboxSpec(cpu=3.0), "cpu"),
        (SandboxSpec(cpu=0.5, memory_mib=5000), "memory_mib"),
        (SandboxSpec(cpu=0.5, disk_mib=9000), "disk_mib"),
        (SandboxSpec(cpu=0.5, pids=6000), "pids"),
    ],
)
def test_no_room_now_is_another_error_and_reserves_nothing(
    spec: SandboxSpec, resource: str
) -> None:
    one = admission(overcommit=Overcommit())
    with one.reserve(spec):
        held = one.reserved
        with pytest.raises(ResourceExhaustedError) as caught, one.reserve(spec):
            pass
        assert caught.value.details["resource"] == resource
        assert caught.value.hint
        assert one.reserved == held
    with one.reserve(spec):
        pass
    assert one.reserved == Resources(cpu=0, memory_mib=0, disk_mib=0, pids=0)


def test_the_number_of_sandboxes_is_bounded() -> None:
    one = admission(max_sandboxes=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(one.reserve(SandboxSpec()))
        with pytest.raises(ResourceExhaustedError, match="2 sandboxes"):
            stack.enter_context(one.reserve(SandboxSpec()))


async def test_concurrent_reservations_never_oversell() -> None:
    host = Resources(cpu=10.0, memory_mib=10_000, disk_mib=10_000, pids=10_000)
    one = admission(host=host, overcommit=Overcommit(cpu=1.5, memory=1.5, disk=1.5, pids=1.5))
    dice = random.Random(3)
    refused = most = 0

    async def hold(spec: SandboxSpec, turns: int) -> None:
        nonlocal refused, most
        try:
            with one.reserve(spec):
                reserved = one.reserved
                assert reserved.cpu <= 15.0
                assert max(reserved.memory_mib, reserved.disk_mib, reserved.pids) <= 15_000
                most = max(most, reserved.memory_mib)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
        except ResourceExhaustedError:
            refused += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(2000):
            amount = dice.randint(16, 3000)
            spec = SandboxSpec(cpu=amount / 1000, memory_mib=amount, disk_mib=amount, pids=amount)
            tasks.start_soon(hold, spec, dice.randint(0, 20))
            if dice.random() < 0.3:
                await anyio.lowlevel.checkpoint()
    assert refused
    assert most > 13_000
    assert one.reserved == Resources(cpu=0, memory_mib=0, disk_mib=0, pids=0)


@pytest.mark.parametrize("short", ["memory", "disk"])
def test_a_host_that_runs_short_takes_nobody(short: str) -> None:
    left = {"memory": 1000, "disk": 1000, short: 100}
    floors = [
        Floor(resource=name, keep_mib=256, available_mib=partial(left.__getitem__, name))
        for name in ("memory", "disk")
    ]
    one = admission(floors=floors)
    with (
        pytest.raises(ResourceExhaustedError, match=f"256 MiB of {short}"),
        one.reserve(SandboxSpec()),
    ):
        pass
    assert one.reserved.memory_mib == 0
    left[short] = 256
    with admission(floors=floors).reserve(SandboxSpec()):
        pass


def test_the_host_is_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/pid_max").write_text("5000\n")
    (tmp_path / "sys/kernel/threads-max").write_text("4000\n")
    (tmp_path / "meminfo").write_text("MemTotal:        2097152 kB\nMemFree: 1 kB\n")
    host = host_resources(disk_mib=7, reserve_memory_mib=48, proc=tmp_path)
    assert (host.memory_mib, host.disk_mib, host.pids) == (2000, 7, 4000)
    assert host.cpu >= 1
    assert host_resources(disk_mib=1, reserve_memory_mib=0).memory_mib > 0
    assert HOST.cpu == 4.0


def test_a_slot_of_an_earlier_life_is_nobody_elses_until_it_is_given_back() -> None:
    slots = Slots()
    slots.add(0, 4)
    with slots.held(1):
        assert [slots.take() for _ in range(3)] == [0, 2, 3]
        assert slots.take() is None
        with pytest.raises(InternalError), slots.held(1):
            pass
    assert slots.taken == 3
    assert (slots.take(), slots.take()) == (1, None)
    with slots.held(7):
        pass
    assert (slots.take(), slots.take()) == (7, None)


def test_what_is_there_already_counts_whether_or_not_there_is_room() -> None:
    full = admission(max_sandboxes=1)
    spec = SandboxSpec(cpu=4.0)
    with full.hold(spec), full.hold(spec):
        assert full.reserved.cpu == 8.0
        with pytest.raises(ResourceExhaustedError), full.reserve(SandboxSpec()):
            pass
    assert full.reserved.cpu == 0.0


def test_slots_are_the_smallest_free_and_never_overlap() -> None:
    slots = Slots()
    assert slots.take() is None  # the keeper has given no block yet
    slots.add(0, 4)
    assert [slots.take() for _ in range(3)] == [0, 1, 2]
    slots.give_back(1)
    slots.give_back(0)
    assert [slots.take() for _ in range(3)] == [0, 1, 3]
    assert slots.take() is None
    slots.add(512, 2)
    assert slots.take() == 512
    assert first_host_id(1) - first_host_id(0) == IDS_PER_SLOT
    assert first_host_id(0) == FIRST_ID
