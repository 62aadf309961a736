"""PR: processes see nobody else, hold nothing, and cannot touch the guest agent."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pty
import resource
import signal
import stat
import time

from .lib import (
    DENIED,
    Report,
    in_child,
    ordinary,
    pids,
    probe,
    read,
    status_of,
    syscall,
    tasks,
    try_open,
    walk,
)

CAPABILITIES = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "FSETID": 4,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "NET_BIND_SERVICE": 10,
    "SYS_CHROOT": 18,
    "SETFCAP": 31,
}
"""The eleven that root in a sandbox may hold. Source: linux/capability.h."""
ALLOWED_CAPABILITIES = sum(1 << number for number in CAPABILITIES.values())

PTRACE_ATTACH, PTRACE_DETACH, PTRACE_SEIZE = 16, 17, 0x4206


def _guest_agents() -> list[int]:
    """PID 1 and whatever else runs under a user that no user of the image has."""
    others = [
        pid for pid in pids() if status_of(f"/proc/{pid}").get("Uid", "0").split()[0] == "65536"
    ]
    return sorted({1, *others})


@probe("PR-01")
def only_own_processes_exist(report: Report) -> None:
    shown = pids()
    report.expect(1 in shown, "/proc has no process 1")
    report.expect(len(shown) <= 20, f"/proc shows {len(shown)} processes")
    for pid in shown:
        fields = status_of(f"/proc/{pid}")
        if not fields:
            continue
        report.expect(fields.get("Kthread", "0") == "0", f"{pid} is a kernel thread")
        report.expect("NSpid" not in fields or len(fields["NSpid"].split()) == 1, f"{pid}: NSpid")
        parent = int(fields["PPid"])
        report.expect(parent in shown or parent == 0, f"{pid} has parent {parent}")
        line = (read(f"/proc/{pid}/cmdline") or b"").decode("utf-8", "replace")
        for word in report.facts.get("foreign_words", []):
            report.expect(word not in line, f"{pid} is foreign: {line}")
    here = ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(here), 8)
    for pid in report.facts.get("foreign_pids", []):
        if pid in shown:
            continue
        for call, result in (
            ("kill", syscall(62, pid, 0)),
            ("tgkill", syscall(234, pid, pid, 0)),
            ("pidfd_open", syscall(434, pid, 0)),
            ("process_vm_readv", syscall(310, pid, local, 1, local, 1, 0)),
            ("sched_getaffinity", syscall(204, pid, 8, ctypes.create_string_buffer(1024))),
        ):
            allowed = frozenset({*DENIED, errno.ESRCH})
            report.refused(f"{call} of the foreign process {pid}", result, allowed)


def _attach(pid: int) -> int:
    result = syscall(101, PTRACE_ATTACH, pid, 0, 0)
    if result >= 0:
        os.waitpid(pid, 0x40000000)  # __WALL
        syscall(101, PTRACE_DETACH, pid, 0, 0)
    return result


@probe("PR-02")
def the_guest_agent_cannot_be_touched(report: Report) -> None:
    for pid in _guest_agents():
        seized = in_child(lambda pid=pid: syscall(101, PTRACE_SEIZE, pid, 0, 0))  # type: ignore[misc]
        report.refused(f"PTRACE_SEIZE of {pid}", seized)
        if report.facts.get("bold", True):
            report.refused(f"PTRACE_ATTACH of {pid}", in_child(lambda pid=pid: _attach(pid)))  # type: ignore[misc]
        here = ctypes.create_string_buffer(8)
        local = (ctypes.c_uint64 * 2)(ctypes.addressof(here), 8)
        remote = (ctypes.c_uint64 * 2)(8, 8)  # nothing is mapped there: allowed gives EFAULT
        for call, number in (("process_vm_readv", 310), ("process_vm_writev", 311)):
            result = syscall(number, pid, local, 1, remote, 1, 0)
            report.refused(f"{call} of {pid}", result)
        handle = syscall(434, pid, 0)
        if handle >= 0:
            report.refused(f"pidfd_getfd of {pid}", syscall(438, handle, 0, 0))
            result = syscall(440, handle, remote, 0, 21, 0)  # process_madvise
            report.refused(f"process_madvise of {pid}", result)
            os.close(handle)
        else:
            report.refused(f"pidfd_open of {pid}", handle)
        for name, flags in (
            ("mem", os.O_RDONLY),
            ("mem", os.O_RDWR),
            ("environ", os.O_RDONLY),
            ("maps", os.O_RDONLY),
            ("auxv", os.O_RDONLY),
            ("pagemap", os.O_RDONLY),
            ("clear_refs", os.O_WRONLY),
        ):
            result = try_open(f"/proc/{pid}/{name}", flags)
            refused = frozenset({*DENIED, errno.EROFS}) if flags != os.O_RDONLY else DENIED
            report.refused(f"open of /proc/{pid}/{name} ({flags})", result, refused)
        for name in ("syscall", "stack", "personality", "timerslack_ns"):
            told = read(f"/proc/{pid}/{name}", 256)  # here the kernel asks at the read
            report.expect(not told, f"/proc/{pid}/{name} tells {told!r}")
        for name in ("exe", "cwd", "root", "fd/0", "ns/mnt"):
            try:
                target = os.readlink(f"/proc/{pid}/{name}")
            except OSError as error:
                report.expect(error.errno in DENIED, f"readlink of /proc/{pid}/{name}: {error}")
            else:
                report.expect(False, f"/proc/{pid}/{name} is {target}")
        for name in ("fd", "fdinfo", "map_files", "cwd/", "root/"):
            try:
                entries = os.listdir(f"/proc/{pid}/{name}")
            except OSError as error:
                report.expect(error.errno in DENIED, f"/proc/{pid}/{name}: {error}")
            else:
                report.expect(False, f"/proc/{pid}/{name} shows {entries[:3]}")
        result = syscall(302, pid, resource.RLIMIT_NOFILE, (ctypes.c_uint64 * 2)(3, 3), None)
        report.refused(f"prlimit64 of {pid}", result)


@probe("PR-03")
def no_new_privileges_on_every_thread(report: Report) -> None:
    for path, fields in tasks():
        report.expect(fields.get("NoNewPrivs") == "1", f"{path} may gain privileges")


@probe("PR-04")
def capabilities_are_few(report: Report) -> None:
    for path, fields in tasks():
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            held = int(fields[kind], 16)
            extra = held & ~ALLOWED_CAPABILITIES
            report.expect(not extra, f"{path} has {kind} {extra:#x} too much")
            if fields["Uid"].split()[0] in {str(os.getuid()), "1000"} and ordinary():
                none = kind == "CapBnd" or held == 0
                report.expect(none, f"{path} is no root and has {kind} {held:#x}")
    for number in range(64):
        held = syscall(157, 23, number, 0, 0, 0)  # PR_CAPBSET_READ
        allowed = number in CAPABILITIES.values()
        report.expect(held != 1 or allowed, f"capability {number} is in the bounding set")


@probe("PR-05")
def no_id_maps_to_a_host_user(report: Report) -> None:
    for name in ("uid_map", "gid_map"):
        lines = (read(f"/proc/self/{name}") or b"").decode().splitlines()
        report.expect(bool(lines), f"{name} is empty")
        for line in lines:
            _, outside, length = (int(field) for field in line.split())
            report.expect(outside >= 1000, f"{name} maps to the host's {outside} (+{length})")
    setgroups = (read("/proc/self/setgroups") or b"").decode().strip()
    report.expect(setgroups in {"allow", "deny"}, f"setgroups is {setgroups}")


@probe("PR-06")
def seccomp_filters_every_thread(report: Report) -> None:
    for path, fields in tasks():
        report.expect(
            fields.get("Seccomp") == "2", f"{path} has seccomp mode {fields.get('Seccomp')}"
        )


@probe("PR-07")
def the_guest_agents_program_is_out_of_reach(report: Report) -> None:
    for pid in _guest_agents():
        path = f"/proc/{pid}/exe"
        allowed = frozenset({*DENIED, errno.ETXTBSY, errno.EROFS})
        report.refused(f"open for write of {path}", try_open(path, os.O_WRONLY), allowed)
        try:
            target = os.readlink(path)
        except OSError as error:
            report.expect(error.errno in DENIED, f"readlink of {path}: {error}")
            continue
        directory = os.path.dirname(target)
        writable = os.path.exists(target) and os.access(directory, os.W_OK)
        report.expect(not writable, f"the agent's program {target} can be replaced")
    for path, found in walk("/", 200_000):
        if stat.S_ISREG(found.st_mode) and os.path.basename(path).startswith(("shoal-", "noded")):
            report.expect(path.startswith("/proc"), f"{path} is in the root file system")


@probe("PR-08")
def no_keystroke_can_be_pushed_into_a_terminal(report: Report) -> None:
    if not report.facts.get("on_a_pty"):
        for number in range(3):
            report.expect(not os.isatty(number), f"descriptor {number} is a terminal")
        result = try_open("/dev/tty", os.O_RDWR)
        report.refused("open of /dev/tty", result, frozenset({*DENIED, errno.ENXIO, errno.ENOENT}))

    def push(command: int) -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # closing the master hangs up
        master, slave = pty.openpty()
        os.setsid()
        fcntl.ioctl(slave, 0x540E, 0)  # TIOCSCTTY
        letter = ctypes.create_string_buffer(b"x")
        result = syscall(16, slave, command, letter)
        os.close(master)
        return result

    def terminal() -> int:
        master, slave = pty.openpty()
        return int(os.isatty(slave)) and master

    report.expect(in_child(terminal) > 0, "no pseudo-terminal can be made to judge with")
    for name, command in (("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541C)):
        for high in (0, 1 << 32, 0xFFFFFFFF << 32):
            result = in_child(lambda value=command | high: push(value))  # type: ignore[misc]
            allowed = frozenset({*DENIED, errno.EIO, errno.ENOTTY})
            report.refused(f"{name} with high bits {high >> 32:#x}", result, allowed)


@probe("PR-09")
def no_secret_of_the_platform_is_here(report: Report) -> None:
    secrets = [str(word).encode() for word in report.facts.get("secrets", [])]
    secrets += [bytes.fromhex(word) for word in report.facts.get("secrets_hex", [])]
    for pid in pids():
        for name in ("environ", "cmdline"):
            data = read(f"/proc/{pid}/{name}") or b""
            report.expect(not any(word in data for word in secrets), f"/proc/{pid}/{name} tells")
            if name == "environ":
                ours = [part for part in data.split(b"\0") if part.startswith(b"SHOAL_")]
                report.expect(not ours, f"/proc/{pid}/environ has {ours}")
    environment = {key for key in os.environ if key.startswith(("SHOAL", "PIP_", "SSL_", "AWS"))}
    report.expect(not environment, f"the environment has {sorted(environment)}")
    for top in ("/etc", "/run", "/tmp", "/var", "/root", "/home", "/dev/shm", "/srv", "/opt"):
        for path, found in walk(top, 50_000):
            if stat.S_ISREG(found.st_mode) and found.st_size < 1 << 20:
                data = read(path) or b""
                report.expect(not any(word in data for word in secrets), f"{path} tells")
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    report.expect((soft, hard) == (0, 0), f"core dumps of {soft}/{hard} bytes are allowed")


@probe("PR-10")
def orphans_are_reaped(report: Report) -> None:
    def zombies() -> list[int]:
        return [pid for pid in pids() if status_of(f"/proc/{pid}").get("State", "").startswith("Z")]

    for _ in range(3):
        for _ in range(40):
            if os.fork() == 0:
                if os.fork() == 0:
                    time.sleep(0.02)
                os._exit(0)
        for _ in range(40):
            os.wait()
        deadline = time.monotonic() + 2.0
        while (left := zombies()) and time.monotonic() < deadline:
            time.sleep(0.05)
        report.expect(not left, f"{len(left)} zombies are left after 2 s")
    # Orphans that ignore everything and die by a signal.
    reader, writer = os.pipe()
    if os.fork() == 0:
        grandchild = os.fork()
        if grandchild == 0:
            os.setsid()
            signal.pause()
        os.write(writer, str(grandchild).encode())
        os._exit(0)
    os.wait()
    grandchild = int(os.read(reader, 20))
    os.kill(grandchild, signal.SIGKILL)
    deadline = time.monotonic() + 2.0
    while os.path.exists(f"/proc/{grandchild}") and time.monotonic() < deadline:
        time.sleep(0.02)
    report.expect(not os.path.exists(f"/proc/{grandchild}"), "a killed orphan stays")
