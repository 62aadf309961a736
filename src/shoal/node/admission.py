"""What may start: limits that make sense, and room for them.

Two questions with two answers. Does the spec make sense on this host at all? If not, it never will:
`InvalidArgumentError`. Is there room now? If not, there may be later: `ResourceExhaustedError`. The reservation
is a plain call between two awaits, so that of two creates which race for the last room one gets it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from shoal.errors import InvalidArgumentError, ResourceExhaustedError
from shoal.types import Ready, SandboxSpec

MIN_CPU = 0.01
"""The kernel's smallest quota is 1 ms of each 100 ms."""
MIN_MEMORY_MIB = 16
_MAX_ENV_BYTES = 128 * 1024
_MAX_LABELS = 64
_MAX_LABEL_KEY = 128
_MAX_LABEL_VALUE = 1024
_MAX_WORD = 4096
_MAX_ARGV_BYTES = 128 * 1024
_MAX_PUBLIC_PORTS = 256
_MIN_INTERVAL = 0.01
_LAST_PORT = 65_535
_HTTP_PATH = re.compile(r"/[!-~]{0,4095}")
_LAST_GUEST_ID = 65_535
_USER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}\$?")
_FLOORS_FOR = 0.25
"""Seconds for which a look at the host counts: a burst does not look a thousand times."""


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """Amounts of what sandboxes share."""

    cpu: float
    memory_mib: int
    disk_mib: int
    pids: int

    @classmethod
    def of(cls, spec: SandboxSpec) -> Resources:
        """What a spec asks for."""
        return cls(cpu=spec.cpu, memory_mib=spec.memory_mib, disk_mib=spec.disk_mib, pids=spec.pids)


class Overcommit(msgspec.Struct, frozen=True, kw_only=True):
    """How much is promised for each unit that is there."""

    cpu: float = 1.0
    memory: float = 1.0
    disk: float = 1.0
    pids: float = 1.0


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """What the host keeps of something, whatever is promised: promises are not the same as use."""

    resource: str
    keep_mib: int
    available_mib: Callable[[], int]
    """Asked for the MiB that are really there now."""


class Admission:
    """The host's room and what of it is promised.

    Args:
        host: What is there. A sandbox's own limit cannot be higher.
        overcommit: Factors on it, for the sum of all sandboxes.
        max_sandboxes: Sandboxes alive at once.
        max_timeout: Longest lifetime in seconds.
        floors: Nothing is admitted while less than any of these is there.
    """

    def __init__(
        self,
        host: Resources,
        *,
        overcommit: Overcommit,
        max_sandboxes: int,
        max_timeout: float,
        floors: Sequence[Floor] = (),
    ) -> None:
        self.host = host
        self._max_sandboxes = max_sandboxes
        self._max_timeout = max_timeout
        self._floors = floors
        self._floors_seen = -math.inf
        self._below: Floor | None = None
        self._total = (
            host.cpu * overcommit.cpu,
            host.memory_mib * overcommit.memory,
            host.disk_mib * overcommit.disk,
            host.pids * overcommit.pids,
        )
        # CPUs are counted in thousandths: sums of floats would drift over millions of sandboxes.
        self._milli_cpu = 0
        self._memory_mib = 0
        self._disk_mib = 0
        self._pids = 0
        self._sandboxes = 0

    @property
    def reserved(self) -> Resources:
        """What is promised at the moment."""
        return Resources(
            cpu=self._milli_cpu / 1000,
            memory_mib=self._memory_mib,
            disk_mib=self._disk_mib,
            pids=self._pids,
        )

    def check(self, spec: SandboxSpec) -> None:
        """Say no to a spec that makes no sense on this host. Reserves nothing.

        Raises:
            InvalidArgumentError: Names the field, its value and, where the host sets the bound, the host's number.
        """
        host = self.host
        _bounded("cpu", spec.cpu, MIN_CPU, host.cpu, "CPUs")
        _bounded("memory_mib", spec.memory_mib, MIN_MEMORY_MIB, host.memory_mib, "MiB of memory")
        _bounded("disk_mib", spec.disk_mib, 1, host.disk_mib, "MiB of disk")
        _bounded("pids", spec.pids, 1, host.pids, "processes")
        if not math.isfinite(spec.timeout) or spec.timeout <= 0:
            raise InvalidArgumentError(
                f"timeout must be a number of seconds above 0, not {_number(spec.timeout)}",
                field="timeout",
            )
        if spec.timeout > self._max_timeout:
            raise InvalidArgumentError(
                f"timeout of {_number(spec.timeout)} s is more than the node's maximum of {_number(self._max_timeout)} s",
                hint="ask for less, or raise max_timeout on the node",
                field="timeout",
            )
        _check_words(spec)
        if spec.command is not None:
            _check_argv("command", spec.command)
        if spec.ready is not None:
            self._check_ready(spec.ready)
        check_ports(spec.public_ports)

    def _check_ready(self, ready: Ready) -> None:
        if (ready.port is None) == (ready.command is None):
            raise InvalidArgumentError(
                "ready needs a port or a command" + (", not both" if ready.command else ""),
                hint="a port, a port and a path, or a command",
                field="ready",
            )
        if ready.command is not None:
            _check_argv("ready.command", ready.command)
            if ready.path is not None:
                raise InvalidArgumentError(
                    "ready.path goes with a port, not with a command", field="ready.path"
                )
        if ready.port is not None:
            check_port("ready.port", ready.port)
        if ready.path is not None and not _HTTP_PATH.fullmatch(ready.path):
            raise InvalidArgumentError(
                f"ready.path cannot be {ready.path[:200]!r}",
                hint="it begins with a slash; what is no printable ASCII, and spaces, are written as %XX",
                field="ready.path",
            )
        if not math.isfinite(ready.interval) or ready.interval < _MIN_INTERVAL:
            raise InvalidArgumentError(
                f"ready.interval must be {_MIN_INTERVAL:g} s or more, not {_number(ready.interval)}",
                field="ready.interval",
            )
        if not math.isfinite(ready.timeout) or ready.timeout <= 0:
            raise InvalidArgumentError(
                f"ready.timeout must be a number of seconds above 0, not {_number(ready.timeout)}",
                field="ready.timeout",
            )
        if ready.timeout > self._max_timeout:
            raise InvalidArgumentError(
                f"ready.timeout of {_number(ready.timeout)} s is more than the node's maximum of {_number(self._max_timeout)} s",
                hint="ask for less, or raise max_timeout on the node",
                field="ready.timeout",
            )

    @contextlib.contextmanager
    def reserve(self, spec: SandboxSpec) -> Iterator[None]:
        """Hold room for a checked spec until the block ends.

        Raises:
            ResourceExhaustedError: There is no room now. Nothing was reserved.
        """
        cpu_total, memory_total, disk_total, pids_total = self._total
        if self._sandboxes >= self._max_sandboxes:
            raise ResourceExhaustedError(
                f"the node has {self._sandboxes} sandboxes, its maximum",
                hint="end sandboxes that are idle, or raise max_sandboxes on the node",
                resource="sandboxes",
                total=self._max_sandboxes,
            )
        _fits("cpu", spec.cpu, self._milli_cpu / 1000, cpu_total)
        _fits("memory_mib", spec.memory_mib, self._memory_mib, memory_total)
        _fits("disk_mib", spec.disk_mib, self._disk_mib, disk_total)
        _fits("pids", spec.pids, self._pids, pids_total)
        self._check_floors()
        with self.hold(spec):
            yield

    @contextlib.contextmanager
    def hold(self, spec: SandboxSpec) -> Iterator[None]:
        """Count what a sandbox has that is there already, whether or not there is room."""
        milli_cpu = round(spec.cpu * 1000)
        self._milli_cpu += milli_cpu
        self._memory_mib += spec.memory_mib
        self._disk_mib += spec.disk_mib
        self._pids += spec.pids
        self._sandboxes += 1
        try:
            yield
        finally:
            self._milli_cpu -= milli_cpu
            self._memory_mib -= spec.memory_mib
            self._disk_mib -= spec.disk_mib
            self._pids -= spec.pids
            self._sandboxes -= 1

    def _check_floors(self) -> None:
        now = time.monotonic()
        if now - self._floors_seen > _FLOORS_FOR:
            self._floors_seen = now
            self._below = next(
                (floor for floor in self._floors if floor.available_mib() < floor.keep_mib), None
            )
        if self._below is not None:
            resource, keep = self._below.resource, self._below.keep_mib
            raise ResourceExhaustedError(
                f"the host has less than the {keep} MiB of {resource} left that it keeps",
                hint=f"end sandboxes, or free {resource} on the host",
                resource=resource,
            )


def _number(value: float) -> str:
    """A number as a person writes it: `16`, `0.5`, never `1e+06`."""
    return str(int(value)) if float(value).is_integer() else f"{value:.10g}"


def _bounded(field: str, value: float, least: float, host: float, unit: str) -> None:
    if not math.isfinite(value) or value <= 0:
        raise InvalidArgumentError(f"{field} must be above 0, not {_number(value)}", field=field)
    if value < least:
        raise InvalidArgumentError(
            f"{field} of {_number(value)} is less than the minimum of {_number(least)}", field=field
        )
    if value > host:
        raise InvalidArgumentError(
            f"{field} of {_number(value)} is more than this host has: {_number(host)} {unit}",
            hint=f"ask for {_number(host)} or less",
            field=field,
            host=host,
        )


def _fits(resource: str, asked: float, reserved: float, total: float) -> None:
    if reserved + asked > total:
        raise ResourceExhaustedError(
            f"no room for {resource} of {_number(asked)}: {_number(reserved)} of {_number(total)} are promised",
            hint=f"end sandboxes that are idle, ask for less {resource}, or raise the overcommit factor on the node",
            resource=resource,
            asked=asked,
            reserved=reserved,
            total=total,
        )


def _check_words(spec: SandboxSpec) -> None:
    if not spec.image or len(spec.image) > _MAX_WORD or not spec.image.isprintable():
        raise InvalidArgumentError(
            "image must be a name or a digest", hint="`base` is always there", field="image"
        )
    size = 0
    for name, value in spec.env.items():
        size += (
            len(name.encode("utf-8", "surrogatepass"))
            + len(value.encode("utf-8", "surrogatepass"))
            + 2
        )
        if not name or "=" in name or "\0" in name:
            raise InvalidArgumentError(f"env has a name that cannot be one: {name!r}", field="env")
        if "\0" in value:
            raise InvalidArgumentError(f"env {name} has a NUL character in its value", field="env")
    if size > _MAX_ENV_BYTES:
        raise InvalidArgumentError(
            f"env has {size} bytes, the maximum is {_MAX_ENV_BYTES}",
            hint="upload a file instead",
            field="env",
        )
    if len(spec.labels) > _MAX_LABELS:
        raise InvalidArgumentError(
            f"{len(spec.labels)} labels, the maximum is {_MAX_LABELS}", field="labels"
        )
    for name, value in spec.labels.items():
        if not name or len(name) > _MAX_LABEL_KEY or "=" in name or not name.isprintable():
            raise InvalidArgumentError(
                f"label {name[:_MAX_LABEL_KEY]!r} cannot be a label's name",
                hint=f"1 to {_MAX_LABEL_KEY} printable characters without `=`",
                field="labels",
            )
        if len(value) > _MAX_LABEL_VALUE or not value.isprintable():
            raise InvalidArgumentError(
                f"label {name} has a value that is too long or not printable",
                hint=f"at most {_MAX_LABEL_VALUE} printable characters",
                field="labels",
            )
    if spec.workdir is not None and (
        not spec.workdir.startswith("/") or "\0" in spec.workdir or len(spec.workdir) > _MAX_WORD
    ):
        raise InvalidArgumentError(
            f"workdir must be an absolute path, not {spec.workdir[:200]!r}", field="workdir"
        )
    if spec.user is not None:
        check_user(spec.user)


def _check_argv(field: str, argv: Sequence[str]) -> None:
    if not argv or not argv[0]:
        raise InvalidArgumentError(
            f"{field} names no program", hint="a list: program, arguments", field=field
        )
    if any("\0" in word for word in argv):
        raise InvalidArgumentError(f"{field} has a NUL character in a word", field=field)
    size = sum(len(word.encode("utf-8", "surrogatepass")) + 1 for word in argv)
    if size > _MAX_ARGV_BYTES:
        raise InvalidArgumentError(
            f"{field} has {size} bytes, the maximum is {_MAX_ARGV_BYTES}",
            hint="upload a script instead",
            field=field,
        )


def check_port(field: str, port: int) -> None:
    """Say no to what cannot be a TCP port.

    Raises:
        InvalidArgumentError: It is not one of 1 to 65535.
    """
    if not 1 <= port <= _LAST_PORT:
        raise InvalidArgumentError(f"{field} must be 1 to {_LAST_PORT}, not {port}", field=field)


def check_ports(public_ports: Sequence[int]) -> None:
    """Say no to what cannot be a sandbox's public ports.

    Raises:
        InvalidArgumentError: One is no port, one is there twice, or there are too many.
    """
    if len(public_ports) > _MAX_PUBLIC_PORTS:
        raise InvalidArgumentError(
            f"{len(public_ports)} public_ports, the maximum is {_MAX_PUBLIC_PORTS}",
            field="public_ports",
        )
    for index, port in enumerate(public_ports):
        check_port("public_ports", port)
        if port in public_ports[:index]:
            raise InvalidArgumentError(f"public_ports has {port} twice", field="public_ports")


def check_user(user: str) -> None:
    """Say no to what cannot be `name`, `uid`, `name:group` or `uid:gid`.

    Raises:
        InvalidArgumentError: It is none of these, or an id is not one of 0 to 65535 in plain decimal.
    """
    parts = user.split(":")
    if len(parts) > 2 or not all(_is_name_or_id(part) for part in parts):
        raise InvalidArgumentError(
            f"user cannot be {user[:200]!r}",
            hint=f"a name or an id of 0 to {_LAST_GUEST_ID}, and a group after a colon if you like",
            field="user",
        )


def _is_name_or_id(word: str) -> bool:
    if word.isascii() and word.isdigit():
        # One spelling a number: `00`, `0x0` or 4294967296 must never end up as root.
        return len(word) <= 5 and str(int(word)) == word and int(word) <= _LAST_GUEST_ID
    return _USER_NAME.fullmatch(word) is not None


def host_resources(
    *, disk_mib: int, reserve_memory_mib: int, proc: Path = Path("/proc")
) -> Resources:
    """What this machine has for sandboxes.

    Args:
        disk_mib: Size of the disk pool, as the keeper tells it.
        reserve_memory_mib: Memory that is not for sandboxes.
        proc: Where procfs is.
    """
    memory_mib = _meminfo(proc, "MemTotal") - reserve_memory_mib
    pids = min(int((proc / "sys/kernel" / name).read_text()) for name in ("pid_max", "threads-max"))
    return Resources(
        cpu=float(len(os.sched_getaffinity(0))),
        memory_mib=max(memory_mib, 0),
        disk_mib=disk_mib,
        pids=pids,
    )


def available_memory_mib(proc: Path = Path("/proc")) -> int:
    """Memory that could be used now without swapping. Source: proc_meminfo(5), MemAvailable."""
    return _meminfo(proc, "MemAvailable")


def available_disk_mib(path: Path) -> int:
    """What is free on the file system of a path. The disk pool is a sparse file: it is full when this is."""
    return shutil.disk_usage(path).free >> 20


def _meminfo(proc: Path, key: str) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) // 1024
    raise RuntimeError(f"no {key} in {proc}/meminfo")
