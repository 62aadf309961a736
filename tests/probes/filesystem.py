"""FS: nothing of the host's file system is visible, writable or reachable."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import tempfile

from .lib import (
    DENIED,
    NOT_WRITABLE,
    Report,
    describe,
    in_child,
    mounts,
    pids,
    probe,
    read,
    syscall,
    try_open,
    walk,
)

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_SHARED = 1, 32, 4096, 16384, 1 << 20
NULL_DEVICE = os.makedev(1, 3)

DEVICES = {
    "null": os.makedev(1, 3),
    "zero": os.makedev(1, 5),
    "full": os.makedev(1, 7),
    "random": os.makedev(1, 8),
    "urandom": os.makedev(1, 9),
    "tty": os.makedev(5, 0),
    "console": None,
    "ptmx": os.makedev(5, 2),
}
DEV_DIRECTORIES = {"pts", "shm", "mqueue"}
DEV_LINKS = {"fd", "stdin", "stdout", "stderr", "ptmx"}

MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/slabinfo",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/selinux",
    "/sys/kernel/debug",
    "/sys/kernel/security",
    "/sys/kernel/tracing",
)
"""Source: OCI runtimes' default masked paths, and what tells of the kernel beyond them."""


def is_null_device(path: str) -> bool:
    """A path is the genuine null device, as a mask is."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == NULL_DEVICE


@probe("FS-01")
def only_standard_descriptors(report: Report) -> None:
    for number in report.facts["inherited"]:
        kind = os.fstat(number).st_mode
        where = os.readlink(f"/proc/self/fd/{number}")
        report.expect(number <= 2, f"descriptor {number} is inherited: {where}")
        report.expect(not stat.S_ISDIR(kind), f"descriptor {number} is a directory: {where}")
        report.expect(not stat.S_ISBLK(kind), f"descriptor {number} is a block device: {where}")


@probe("FS-02")
def everything_lies_in_the_root(report: Report) -> None:
    top = os.stat("/")
    above = os.stat("/..")
    report.expect((top.st_dev, top.st_ino) == (above.st_dev, above.st_ino), "/.. leads out of /")
    report.expect(os.getcwd().startswith("/"), f"cwd is {os.getcwd()}")
    for pid in pids():
        for link in ("root", "cwd"):
            path = f"/proc/{pid}/{link}"
            try:
                target = os.readlink(path)
                found = os.stat(path)
            except OSError as error:
                report.expect(
                    error.errno in {*DENIED, errno.ENOENT, errno.ESRCH}, f"{path}: {error}"
                )
                continue
            report.expect(target.startswith("/"), f"{path} is {target}")
            if link == "root":
                same = (found.st_dev, found.st_ino) == (top.st_dev, top.st_ino)
                report.expect(same, f"{path} is another root: {target}")
            else:
                inside = os.path.exists(target) and os.path.samestat(os.stat(target), found)
                report.expect(inside, f"{path} is not the {target} of this root")
    # Another root deeper down, with the working directory left outside it: up goes to the real root.
    result = in_child(lambda: _climb(top))
    report.expect(result in {1, -errno.EPERM}, f"climbing out of a nested root gave {result}")


def _climb(top: os.stat_result) -> int:
    os.chroot(tempfile.mkdtemp(dir="/tmp"))
    for _ in range(64):
        os.chdir("..")
    return int(os.path.samestat(os.stat("."), top))


@probe("FS-03")
def kernel_settings_cannot_be_written(report: Report) -> None:
    own = [mount for mount in mounts() if mount.point == "/proc"]
    report.expect(len(own) == 1, f"{len(own)} mounts at /proc")
    for mount in own:
        report.expect(mount.kind == "proc", f"/proc is a {mount.kind}")
        report.expect("ro" in mount.options, f"/proc is mounted {','.join(mount.options)}")
    single = ["/proc/sysrq-trigger", "/proc/mtrr", "/proc/kcore", "/proc/timer_list"]
    for path in single:
        if not is_null_device(path):  # a mask, which takes bytes and does nothing
            report.refused(f"open for write of {path}", try_open(path, os.O_WRONLY), NOT_WRITABLE)
    for top in ("/proc/sys", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/acpi", "/proc/driver"):
        for path, found in walk(top):
            if stat.S_ISREG(found.st_mode):
                result = try_open(path, os.O_WRONLY)
                report.refused(f"open for write of {path}", result, NOT_WRITABLE)


@probe("FS-04")
def masked_paths_give_no_byte(report: Report) -> None:
    for path in MASKED:
        try:
            found = os.lstat(path)
        except OSError:
            report.expect(True, "")
            continue
        report.expect(not stat.S_ISLNK(found.st_mode), f"{path} is a link")
        if stat.S_ISDIR(found.st_mode):
            try:
                entries = os.listdir(path)
            except OSError:
                entries = []
            report.expect(not entries, f"{path} shows {entries[:3]}")
            continue
        if stat.S_ISCHR(found.st_mode):
            report.expect(found.st_rdev == NULL_DEVICE, f"{path} is a device that is not null")
        data = read(path, 64)
        report.expect(not data, f"{path} gives {data!r}")


@probe("FS-05")
def helpers_of_the_kernel_cannot_be_named(report: Report) -> None:
    paths = [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/hotplug",
        "/proc/sys/kernel/poweroff_cmd",
        "/proc/sys/kernel/core_pipe_limit",
        "/proc/sys/fs/binfmt_misc/register",
        "/proc/sys/fs/binfmt_misc/status",
        "/sys/kernel/uevent_helper",
        "/sys/fs/cgroup/release_agent",
    ]
    paths += [path for path, _ in walk("/sys/fs/cgroup") if path.endswith("/release_agent")]
    paths += [path for path, _ in walk("/sys/devices") if path.endswith("/uevent")]
    for path in paths:
        report.refused(f"open for write of {path}", try_open(path, os.O_WRONLY), NOT_WRITABLE)


@probe("FS-06")
def sys_is_absent_or_read_only(report: Report) -> None:
    forbidden = {
        *("debugfs", "tracefs", "securityfs", "bpf", "configfs", "efivarfs", "devtmpfs", "pstore"),
    }
    for mount in mounts():
        # One harmless device bound over a file is how a /dev is made without mknod; FS-07 judges it.
        one_device = mount.kind == "devtmpfs" and not os.path.isdir(mount.point)
        report.expect(
            one_device or mount.kind not in forbidden, f"{mount.kind} is mounted at {mount.point}"
        )
        if mount.point == "/sys" or mount.point.startswith("/sys/"):
            report.expect(not mount.writable, f"{mount.point} is mounted read-write")
    for path, found in walk("/sys"):
        if stat.S_ISREG(found.st_mode) and found.st_mode & 0o222:
            result = try_open(path, os.O_WRONLY)
            report.refused(f"open for write of {path}", result, NOT_WRITABLE)


@probe("FS-07")
def dev_has_the_harmless_devices_only(report: Report) -> None:
    for name in os.listdir("/dev"):
        path = f"/dev/{name}"
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            report.expect(name in DEV_LINKS, f"{path} is a link to {os.readlink(path)}")
        elif stat.S_ISDIR(found.st_mode):
            report.expect(name in DEV_DIRECTORIES, f"{path} is there")
        elif name == "console":
            major = os.major(found.st_rdev)
            report.expect(major in {1, 5} or 136 <= major <= 143, f"{path} is device {major}")
        else:
            report.expect(DEVICES.get(name) == found.st_rdev, f"{path} is {oct(found.st_mode)}")
            report.expect(stat.S_ISCHR(found.st_mode), f"{path} is no character device")
    for name in ("null", "zero", "full", "random", "urandom"):
        report.expect(os.path.exists(f"/dev/{name}"), f"/dev/{name} is missing")
    for top in [f"/{name}" for name in os.listdir("/") if name not in {"proc", "sys", "dev"}]:
        for path, found in walk(top, 100_000):
            is_device = stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode)
            report.expect(not is_device, f"{path} is a device")
    for path, found in walk("/dev"):
        report.expect(not stat.S_ISBLK(found.st_mode), f"{path} is a block device")
    report.refused("open of /dev/kvm", try_open("/dev/kvm", os.O_RDWR), NOT_WRITABLE)


@probe("FS-08")
def devices_cannot_be_made(report: Report) -> None:
    wanted = [
        ("null", stat.S_IFCHR, os.makedev(1, 3)),
        ("mem", stat.S_IFCHR, os.makedev(1, 1)),
        ("kmsg", stat.S_IFCHR, os.makedev(1, 11)),
        ("fuse", stat.S_IFCHR, os.makedev(10, 229)),
        ("kvm", stat.S_IFCHR, os.makedev(10, 232)),
    ]
    wanted += [
        (f"disk{major}-{minor}", stat.S_IFBLK, os.makedev(major, minor))
        for major, minor in ((7, 0), (8, 0), (254, 0), (259, 0))
    ]
    for place in ("/tmp", "/dev/shm", "/dev", "/root", "/run", "/var/tmp"):
        for name, kind, device in wanted:
            path = f"{place}/probe-{name}-{os.getpid()}"
            try:
                os.mknod(path, kind | 0o666, device)
            except OSError as error:
                allowed = {*DENIED, errno.EROFS, errno.ENOENT}
                report.expect(error.errno in allowed, f"mknod {path}: {error}")
                continue
            opened = try_open(path, os.O_RDONLY)
            os.unlink(path)
            report.refused(f"open of the device made at {path}", opened)


@probe("FS-09")
def set_id_means_nothing(report: Report) -> None:
    for mount in mounts():
        if not mount.writable:
            continue
        report.expect("nosuid" in mount.options, f"{mount.point} is writable without nosuid")
        holds_devices = mount.kind == "devpts" or not os.path.isdir(mount.point)
        if not holds_devices:
            report.expect("nodev" in mount.options, f"{mount.point} is writable without nodev")
    program = report.facts.get("set_id_program")
    if program:
        command = [program, "-c", "import os; print(os.geteuid(), os.getegid())"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        same = done.stdout.split() == [str(os.getuid()), str(os.getgid())]
        report.expect(same, f"a set-id program became {done.stdout.strip()}")


@probe("FS-10")
def nothing_can_be_mounted(report: Report) -> None:
    allowed = frozenset({errno.EPERM, errno.ENOSYS})
    here = tempfile.mkdtemp(dir="/tmp").encode()

    def mount(source: bytes, target: bytes, kind: bytes | None, flags: int) -> int:
        result = syscall(165, source, target, kind, flags, None)
        if result >= 0 and not flags & MS_REMOUNT:
            syscall(166, target, 2)
        return result

    report.refused("mount of tmpfs", mount(b"none", here, b"tmpfs", 0), allowed)
    report.refused("mount of proc", mount(b"none", here, b"proc", 0), allowed)
    report.refused("mount of sysfs", mount(b"none", here, b"sysfs", 0), allowed)
    report.refused("mount of cgroup", mount(b"none", here, b"cgroup2", 0), allowed)
    report.refused("mount of overlay", mount(b"none", here, b"overlay", 0), allowed)
    report.refused("bind mount", mount(b"/", here, None, MS_BIND), allowed)
    report.refused("recursive bind mount", mount(b"/", here, None, MS_BIND | MS_REC), allowed)
    for target in (b"/proc", b"/proc/sys", b"/sys", b"/"):
        result = mount(b"none", target, None, MS_REMOUNT | MS_BIND)
        report.refused(f"remount,rw of {target.decode()}", result, allowed)
        result = mount(b"none", target, None, MS_REMOUNT)
        report.refused(f"superblock remount of {target.decode()}", result, allowed)
    report.refused("making / shared", syscall(165, None, b"/", None, MS_SHARED, None), allowed)
    # MNT_EXPIRE marks a mount at the first call and takes it away at the second: only one is made.
    for target in (b"/proc", b"/proc/sys", b"/sys", b"/dev/shm", b"/dev"):
        result = syscall(166, target, 4)
        missing = result in {-errno.ENOENT, -errno.EINVAL} and not os.path.ismount(target)
        report.expect(missing or -result in allowed, f"umount of {target!r}: {describe(result)}")
    for mount_ in mounts():
        shared = [tag for tag in mount_.propagation if tag.startswith("shared:")]
        report.expect(not shared, f"{mount_.point} has propagation {shared}")
    os.rmdir(here)


@probe("FS-11")
def no_foreign_socket_or_path_is_reachable(report: Report) -> None:
    names = [
        "/run/docker.sock",
        "/var/run/docker.sock",
        "/run/containerd/containerd.sock",
        "/run/crio/crio.sock",
        "/run/podman/podman.sock",
        "/run/dbus/system_bus_socket",
        "/run/systemd/private",
        "/run/systemd/journal/socket",
        "/run/shoal",
        "/var/lib/shoal",
        "/tmp/.X11-unix",
        "/run/user",
        *report.facts.get("host_paths", []),
    ]
    for name in names:
        report.expect(not os.path.lexists(name), f"{name} is there")
    for top in [f"/{name}" for name in os.listdir("/") if name not in {"proc", "sys"}]:
        for path, found in walk(top, 100_000):
            report.expect(not stat.S_ISSOCK(found.st_mode), f"{path} is a socket")
    for name in report.facts.get("abstract_sockets", []):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            result = -client.connect_ex("\0" + name)
        report.refused(f"connect to abstract {name}", result, frozenset({errno.ECONNREFUSED}))
    listed = (read("/proc/net/unix") or b"").decode("utf-8", "replace").splitlines()[1:]
    named = [line.split()[7] for line in listed if len(line.split()) > 7]
    report.expect(not named, f"/proc/net/unix names {named[:5]}")


@probe("FS-12")
def nothing_tells_of_the_host(report: Report) -> None:
    told = [str(word) for word in report.facts.get("host_words", [])]
    places = {
        "mountinfo": read("/proc/self/mountinfo"),
        "mounts": read("/proc/self/mounts"),
        "cgroup": read("/proc/self/cgroup"),
        "cmdline of 1": read("/proc/1/cmdline"),
        "hostname": os.uname().nodename.encode(),
        "environ": read("/proc/self/environ"),
        "cmdline": read("/proc/cmdline"),
    }
    for place, data in places.items():
        text = (data or b"").decode("utf-8", "replace")
        for word in told:
            report.expect(word not in text, f"{place} tells {word}")
    report.expect(os.uname().nodename != report.facts.get("hostname"), "the host's name is told")
    for line in (read("/proc/self/cgroup") or b"").decode().splitlines():
        parts = line.split(":", 2)[2].split("/")
        known = {"", "..", "work", "agent"}
        report.expect(set(parts) <= known, f"cgroup path is {'/'.join(parts)}")
