"""RS: limits are set, finite, and out of the workload's reach."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import stat

from .lib import DENIED, NOT_WRITABLE, Report, mounts, probe, syscall, tasks, try_open, walk


@probe("RS-05")
def rlimits_are_finite(report: Report) -> None:
    unlimited = resource.RLIM_INFINITY
    for name, most in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_RTPRIO", 0),
        ("RLIMIT_NOFILE", 1 << 20),
        ("RLIMIT_MEMLOCK", 1 << 30),
        ("RLIMIT_MSGQUEUE", 1 << 24),
        ("RLIMIT_SIGPENDING", 1 << 20),
    ):
        which = int(getattr(resource, name, 11))  # Python has no name for RLIMIT_SIGPENDING
        for word, value in zip(("soft", "hard"), resource.getrlimit(which), strict=True):
            fine = value != unlimited and value <= most
            report.expect(fine, f"{name} has a {word} limit of {value}")


@probe("RS-06")
def every_tmpfs_has_a_size(report: Report) -> None:
    total = 0
    counted: set[int] = set()
    for mount in mounts():
        if mount.kind not in {"tmpfs", "ramfs"} or not mount.writable:
            continue
        if not os.path.isdir(mount.point):
            continue
        found = os.statvfs(mount.point)
        size = found.f_blocks * found.f_frsize
        report.expect(size > 0, f"{mount.point} has no size limit")
        report.expect(found.f_files > 0, f"{mount.point} has no limit on its files")
        device = os.stat(mount.point).st_dev
        if device not in counted:
            counted.add(device)
            total += size
    most = report.facts.get("memory_bytes", 1 << 62)
    report.expect(total <= most, f"tmpfs may hold {total} of {most} bytes")


@probe("RS-07")
def the_own_cgroup_is_not_writable(report: Report) -> None:
    report.expect(True, "")
    for path, found in walk("/sys/fs/cgroup"):
        if stat.S_ISDIR(found.st_mode):
            try:
                os.mkdir(f"{path}/probe")
            except OSError as error:
                report.expect(error.errno in NOT_WRITABLE, f"mkdir in {path}: {error}")
            else:
                os.rmdir(f"{path}/probe")
                report.expect(False, f"a group can be made in {path}")
        elif found.st_mode & 0o222:
            report.refused(f"open for write of {path}", try_open(path, os.O_WRONLY), NOT_WRITABLE)
    for mount in mounts():
        if mount.kind in {"cgroup", "cgroup2"}:
            report.expect(not mount.writable, f"{mount.point} is writable")


@probe("RS-08")
def priorities_cannot_be_raised(report: Report) -> None:
    with open("/proc/self/oom_score_adj", encoding="ascii") as handle:
        now = int(handle.read())
    for lower in (now - 1, -1000):
        try:
            with open("/proc/self/oom_score_adj", "w", encoding="ascii") as handle:
                handle.write(str(lower))
        except OSError as error:
            report.expect(error.errno in {*DENIED, errno.EROFS}, f"oom_score_adj: {error}")
        else:
            report.expect(False, f"oom_score_adj can be lowered to {lower}")
    report.expect(now >= 0, f"oom_score_adj is {now}")
    for path, fields in tasks():
        report.expect(bool(fields), f"{path} cannot be read")
    result = syscall(141, 0, 0, -5)  # setpriority
    report.refused("setpriority to -5", result)
    parameter = ctypes.c_int(1)
    for name, policy in (("FIFO", 1), ("RR", 2)):
        buffer = (ctypes.c_int * 1)(parameter.value)
        report.refused(f"SCHED_{name}", syscall(144, 0, policy, buffer))
    # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
    attributes = (ctypes.c_uint64 * 6)(48 | 6 << 32, 0, 0, 10_000_000, 30_000_000, 30_000_000)
    result = syscall(314, 0, attributes, 0)
    report.refused("SCHED_DEADLINE", result, frozenset({*DENIED, errno.EBUSY}))
    report.refused("ioprio of the real-time class", syscall(251, 1, 0, 1 << 13 | 4))
