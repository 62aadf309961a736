"""What probes share: raw system calls, children that may die, and the report."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

DENIED = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
"""What a wall answers: the kernel did not get as far as looking at the arguments."""
NOT_WRITABLE = frozenset({errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOENT})


class Report:
    """Counts what a probe looked at and keeps what was wrong."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.seen = 0
        self.violations: list[str] = []

    def expect(self, holds: bool, what: str) -> None:
        """Count one look; `what` says what is wrong when it does not hold."""
        self.seen += 1
        if not holds and len(self.violations) < 40:
            self.violations.append(what)

    def refused(self, what: str, result: int, allowed: frozenset[int] = DENIED) -> None:
        """Count one call that must have failed with one of these errnos."""
        self.expect(result < 0 and -result in allowed, f"{what} gave {describe(result)}")

    def to_json(self, name: str) -> str:
        """The answer, one line."""
        return json.dumps({"id": name, "seen": self.seen, "violations": self.violations})


Probe = Callable[[Report], None]
PROBES: dict[str, Probe] = {}


def probe(name: str) -> Callable[[Probe], Probe]:
    """Register a probe for the property `name`."""

    def register(function: Probe) -> Probe:
        PROBES[name] = function
        return function

    return register


def describe(result: int) -> str:
    """A raw result in words."""
    if result >= 0:
        return f"success ({result})"
    return errno.errorcode.get(-result, str(result))


def syscall(number: int, *arguments: int | bytes | ctypes.Array[Any] | None) -> int:
    """The raw system call: its result, or minus errno."""
    ctypes.set_errno(0)
    raw: list[Any] = []
    for argument in arguments:
        if isinstance(argument, int):
            raw.append(ctypes.c_ulong(argument & 0xFFFFFFFFFFFFFFFF))
        else:
            raw.append(argument)
    result = int(libc.syscall(ctypes.c_long(number), *raw))
    return result if result != -1 else -ctypes.get_errno()


def in_child(action: Callable[[], int]) -> int:
    """The result of `action` run in a forked child, or minus 1000 minus the signal that ended it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            result = action()
        except OSError as error:
            result = -(error.errno or errno.EIO)
        os.write(writer, str(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return -1000 - os.WTERMSIG(status)
    return int(answer)


def killed_by(result: int) -> signal.Signals | None:
    """The signal that ended the child of `in_child`, if one did."""
    return signal.Signals(-result - 1000) if result <= -1001 else None


def machine_code(code: bytes, *arguments: int) -> int:
    """Run machine code as a C function in this process; call it in a child."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    kinds = [ctypes.c_long] * len(arguments)
    function = ctypes.CFUNCTYPE(ctypes.c_long, *kinds)(address)
    return int(function(*arguments))


def try_open(path: str, flags: int) -> int:
    """Open and close: 0, or minus errno."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        return -(error.errno or errno.EIO)
    os.close(descriptor)
    return 0


def walk(top: str, limit: int = 20_000) -> Iterator[tuple[str, os.stat_result]]:
    """Every path below `top` with its lstat; links are not followed."""
    waiting = [top]
    count = 0
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as entries:
                children = list(entries)
        except OSError:
            continue
        for entry in children:
            try:
                found = os.lstat(entry.path)
            except OSError:
                continue
            count += 1
            if count > limit:
                return
            yield entry.path, found
            if stat.S_ISDIR(found.st_mode):
                waiting.append(entry.path)


def read(path: str, size: int = 1 << 20) -> bytes | None:
    """The first bytes of a file, or None when they cannot be had."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(descriptor, size)
    except OSError:
        return None
    finally:
        os.close(descriptor)


class Mount:
    """One line of mountinfo. Source: proc_pid_mountinfo(5)."""

    def __init__(self, line: str) -> None:
        left, _, right = line.partition(" - ")
        fields = left.split()
        self.root = fields[3]
        self.point = fields[4].encode().decode("unicode_escape")
        self.options = fields[5].split(",")
        self.propagation = fields[6:]
        self.kind, self.source, *rest = right.split(" ")
        self.super_options = rest[0] if rest else ""

    @property
    def writable(self) -> bool:
        """Neither the mount nor its file system is read-only."""
        return "rw" in self.options and "ro" not in self.super_options.split(",")


def mounts() -> list[Mount]:
    """The mounts of this process."""
    with open("/proc/self/mountinfo", encoding="utf-8") as handle:
        return [Mount(line.rstrip("\n")) for line in handle]


def status_of(task: str) -> dict[str, str]:
    """The fields of a /proc/…/status file."""
    text = read(f"{task}/status") or b""
    pairs = (line.partition(":") for line in text.decode("utf-8", "replace").splitlines())
    return {key: value.strip() for key, _, value in pairs}


def tasks() -> Iterator[tuple[str, dict[str, str]]]:
    """Every thread that /proc shows, with its status."""
    for pid in pids():
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        for thread in threads:
            path = f"/proc/{pid}/task/{thread}"
            fields = status_of(path)
            if fields:
                yield path, fields


def pids() -> list[int]:
    """Every process that /proc shows."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def ordinary() -> bool:
    """This process is not root."""
    return os.getuid() != 0


def main() -> int:
    """Run one probe; the facts come as JSON on stdin."""
    name = sys.argv[1]
    # Before anything else opens a file: a probe asks which descriptors were inherited.
    inherited = [number for number in range(4096) if _is_open(number)]
    text = sys.stdin.read()
    facts: dict[str, Any] = json.loads(text) if text.strip() else {}
    facts["inherited"] = inherited
    report = Report(facts)
    PROBES[name](report)
    sys.stdout.write(report.to_json(name) + "\n")
    return 0


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
