"""What this host can and cannot do, as data: each check ok, warn or fail, with advice."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

Verdict = Literal["ok", "warn", "fail"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked at."""

    name: str
    verdict: Verdict
    found: str
    """What is there."""
    hint: str = ""
    """What to do about it, unless it is ok."""


def ok(name: str, found: str) -> Check:
    """It is as it should be."""
    return Check(name=name, verdict="ok", found=found)


def warn(name: str, found: str, hint: str) -> Check:
    """Shoal works, with less."""
    return Check(name=name, verdict="warn", found=found, hint=hint)


def fail(name: str, found: str, hint: str) -> Check:
    """Shoal does not work here."""
    return Check(name=name, verdict="fail", found=found, hint=hint)


def examine() -> list[Check]:
    """Look at everything; changes nothing that outlives the call."""
    if sys.platform != "linux":
        hint = "run a node on a Linux machine and set SHOAL_URL to its address"
        named = [_guarded(_node)] if os.environ.get("SHOAL_URL", "").strip() else []
        return [fail("system", platform.system(), hint), *named]
    return [_guarded(check) for check in CHECKS]


def _guarded(check: Callable[[], Check]) -> Check:
    name = check.__name__.strip("_").replace("_", " ")
    try:
        return check()
    except OSError as error:
        return fail(name, str(error), "this could not be looked at")


def _system() -> Check:
    machine = platform.machine()
    if machine not in ("x86_64", "aarch64"):
        return fail("system", f"Linux on {machine}", "x86_64 and aarch64 are supported")
    return ok("system", f"Linux on {machine}, Python {platform.python_version()}")


def _kernel() -> Check:
    found = platform.release()
    numbers = re.match(r"(\d+)\.(\d+)", found)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version < (6, 7):
        hint = "6.7 or newer is needed: idmapped overlay layers and btrfs simple quotas"
        return fail("kernel", found, hint)
    return ok("kernel", found)


def _root() -> Check:
    if os.geteuid() != 0:
        return fail(
            "root",
            f"uid {os.geteuid()}",
            "run the node with sudo; others may use it through SHOAL_URL",
        )
    return ok("root", "uid 0")


def _capabilities() -> Check:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    held = int(found[1], 16) if found else 0
    needed = {
        "CHOWN": 0,
        "SETUID": 7,
        "SETGID": 6,
        "SYS_CHROOT": 18,
        "NET_ADMIN": 12,
        "SYS_ADMIN": 21,
        "MKNOD": 27,
    }
    missing = [name for name, bit in needed.items() if not held >> bit & 1]
    if missing:
        return fail(
            "capabilities",
            f"without {', '.join(missing)}",
            "in a container, start it with --privileged",
        )
    return ok("capabilities", "all that is needed")


def _user_namespaces() -> Check:
    limit = int(Path("/proc/sys/user/max_user_namespaces").read_text())
    if limit < 1:
        return fail("user namespaces", "switched off", "sysctl -w user.max_user_namespaces=100000")
    if (error := _in_child(0x10000000)) is not None:  # CLONE_NEWUSER
        return fail(
            "user namespaces",
            f"refused: {error}",
            "a security module or an outer container forbids them",
        )
    if limit < 10000:
        return warn(
            "user namespaces", f"at most {limit}", "sysctl -w user.max_user_namespaces=100000"
        )
    return ok("user namespaces", f"at most {limit}")


def _namespaces() -> Check:
    missing = [
        kind
        for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup")
        if not Path(f"/proc/self/ns/{kind}").exists()
    ]
    if missing:
        return fail(
            "namespaces", f"without {', '.join(missing)}", "the kernel was built without them"
        )
    if (error := _in_child(0x40000000)) is not None:  # CLONE_NEWNET
        return fail("namespaces", f"refused: {error}", "in a container, start it with --privileged")
    return ok("namespaces", "mnt pid net ipc uts cgroup")


def _in_child(flags: int) -> str | None:
    """Whether unshare(2) with these flags works, tried in a child."""
    code = f"import ctypes,sys;l=ctypes.CDLL(None,use_errno=True);sys.exit(l.unshare({flags}) and ctypes.get_errno())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], check=False, capture_output=True, timeout=20
    )
    return os.strerror(done.returncode) if done.returncode else None


def _filesystems() -> set[str]:
    lines = Path("/proc/filesystems").read_text().splitlines()
    return {line.split()[-1] for line in lines if line.strip()}


def _has_filesystem(name: str) -> bool:
    if name in _filesystems():
        return True
    modules = Path("/lib/modules") / platform.release()
    try:
        known = (modules / "modules.dep").read_text() + (modules / "modules.builtin").read_text()
    except OSError:
        return False
    return f"/{'overlay' if name == 'overlay' else name}.ko" in known


def _overlayfs() -> Check:
    if not _has_filesystem("overlay"):
        return fail(
            "overlayfs", "not in this kernel", "modprobe overlay, or use a kernel that has it"
        )
    return ok("overlayfs", "there")


def _idmapped_mounts() -> Check:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(
        442, -1, b"", 0, 0, 0
    )  # mount_setattr(2) with nothing to do; ENOSYS where it is missing
    if ctypes.get_errno() == 38:
        return fail("idmapped mounts", "mount_setattr(2) is missing", "use kernel 6.7 or newer")
    return ok("idmapped mounts", "there")


def _btrfs() -> Check:
    if not _has_filesystem("btrfs"):
        return fail(
            "btrfs",
            "not in this kernel",
            "modprobe btrfs, or use a kernel that has it; disk limits need it",
        )
    return ok("btrfs", "there; simple quotas come with kernel 6.7")


def _mkfs_btrfs() -> Check:
    found = shutil.which("mkfs.btrfs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        return fail("mkfs.btrfs", "missing", "apt-get install btrfs-progs")
    return ok("mkfs.btrfs", found)


def _loop_devices() -> Check:
    if not Path("/dev/loop-control").exists():
        return fail(
            "loop devices",
            "no /dev/loop-control",
            "modprobe loop; in a container, start it with --privileged",
        )
    try:
        os.close(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return fail(
            "loop devices", "not allowed", "run as root; in a container, start it with --privileged"
        )
    return ok("loop devices", "/dev/loop-control")


def _cgroups() -> Check:
    need = ("memory", "pids", "cpu")
    unified = Path("/sys/fs/cgroup/cgroup.controllers")
    if unified.exists():
        there = unified.read_text().split()
        missing = [name for name in need if name not in there]
        if missing:
            return fail(
                "cgroups",
                f"v2 without {', '.join(missing)}",
                "delegate these controllers to this cgroup",
            )
        if not os.access("/sys/fs/cgroup", os.W_OK):
            return fail(
                "cgroups", "v2, read-only", "run as root; in a container, mount cgroups read-write"
            )
        return ok("cgroups", "v2")
    mounted: dict[str, str] = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup":
            mounted |= {word: point for word in options.split(",") if word in need}
    missing = [name for name in need if name not in mounted]
    if missing:
        return fail(
            "cgroups",
            f"v1 without {', '.join(missing)}",
            "mount these controllers, or boot with cgroups v2",
        )
    locked = [name for name in need if not os.access(mounted[name], os.W_OK)]
    if locked:
        return fail(
            "cgroups", f"v1, {', '.join(locked)} read-only", "run as root; mount cgroups read-write"
        )
    return ok("cgroups", "v1: memory, pids, cpu")


def _seccomp() -> Check:
    if "Seccomp:" not in Path("/proc/self/status").read_text():
        return fail("seccomp", "not in this kernel", "use a kernel with CONFIG_SECCOMP_FILTER")
    return ok("seccomp", "there")


def _binaries() -> Check:
    from shoal.errors import ShoalError
    from shoal.local import serve

    try:
        noded, _ = serve.binaries()
    except ShoalError as error:
        return fail("binaries", error.message, error.hint)
    return ok("binaries", str(noded.parent))


def _mmdebstrap() -> Check:
    found = shutil.which("mmdebstrap")
    if found is None:
        return warn(
            "mmdebstrap",
            "missing",
            "apt-get install mmdebstrap, to build `base`; or import an image",
        )
    if not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists():
        return warn(
            "mmdebstrap", "without Debian's keyring", "apt-get install debian-archive-keyring"
        )
    return ok("mmdebstrap", found)


def _memory() -> Check:
    text = Path("/proc/meminfo").read_text()
    found = {
        key: int(value) >> 10
        for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)
    }
    total, available = found.get("MemTotal", 0), found.get("MemAvailable", 0)
    said = f"{available} of {total} MiB available"
    if available < 512:
        return warn(
            "memory", said, "a sandbox asks for 512 MiB by default; free some, or use --memory"
        )
    return ok("memory", said)


def _disk() -> Check:
    from shoal.local.node import settings

    place = settings().data_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free >> 20
    if free < 1024:
        return warn("disk", f"{free} MiB free at {place}", "free some space, or set SHOAL_DATA_DIR")
    return ok("disk", f"{free} MiB free at {place}")


def _pid_max() -> Check:
    limit = int(Path("/proc/sys/kernel/pid_max").read_text())
    if limit < 100_000:
        return warn(
            "pid max", str(limit), "sysctl -w kernel.pid_max=4194304, for thousands of sandboxes"
        )
    return ok("pid max", str(limit))


def _open_files() -> Check:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 65_536:
        return warn(
            "open files",
            f"at most {hard}",
            "raise the hard limit (ulimit -Hn 1048576), for thousands of sandboxes",
        )
    return ok("open files", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}")


def _temporary_directory() -> Check:
    with tempfile.TemporaryFile():
        return ok("temporary directory", tempfile.gettempdir())


def _node() -> Check:
    """Which node the SDK and the other verbs talk to; everything else here is about this machine."""
    from shoal.local import node

    url = os.environ.get("SHOAL_URL", "").strip()
    if not url:
        path = node.socket_path()
        state = "it runs" if node.answers(path) else "starts when it is needed"
        return ok("node", f"this machine's own, at {path}; {state}")
    if _accepts(url):
        return ok("node", f"{url}, named by SHOAL_URL; somebody answers")
    hint = "is `shoal serve` running there? without SHOAL_URL this machine's own node is used"
    return warn("node", f"{url}, named by SHOAL_URL; nobody answers", hint)


def _accepts(url: str) -> bool:
    from shoal.local import node

    if url.startswith("unix://"):
        return node.answers(Path(url.removeprefix("unix://")))
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=5.0).close()
    except (OSError, ValueError):  # a port that is none
        return False
    return bool(parts.hostname)


CHECKS: tuple[Callable[[], Check], ...] = (
    _system,
    _kernel,
    _root,
    _capabilities,
    _user_namespaces,
    _namespaces,
    _idmapped_mounts,
    _overlayfs,
    _btrfs,
    _mkfs_btrfs,
    _loop_devices,
    _cgroups,
    _seccomp,
    _binaries,
    _mmdebstrap,
    _memory,
    _disk,
    _pid_max,
    _open_files,
    _temporary_directory,
    _node,
)
