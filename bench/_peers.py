"""Containers of other makers, each running idle on its own copy of one root file system.

They get neither cgroup limits nor a network, which favours them. `crun run` refuses hosts on which cgroup v1 and v2
are both mounted, so containers of crun are started where the second is not visible; `exec` does not look.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

DEADLINE = 600.0
"""Seconds for any one call of a peer."""
_IDLE = ["/bin/sleep", "7200"]
_CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL"]
"""What tar in there needs to be root."""
_V1_ONLY = [
    *("unshare", "--mount", "sh", "-c"),
    'if [ -d "$0" ]; then umount "$0"; fi; exec "$@"',
    "/sys/fs/cgroup/unified",
]


@dataclass(frozen=True)
class Peer:
    """A running container."""

    name: str
    prefix: list[str]
    """What stands before a command, to run it in there."""
    prefix_stdin: list[str]
    """The same for a command that reads."""


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be measured here."""

    name: str
    why: str


def peers(undo: ExitStack, rootfs: Path, scratch: Path) -> Iterator[Peer | Missing]:
    """Each peer, running until `undo` is closed, or why it is not."""
    for name, program, start in _STARTS:
        if shutil.which(program) is None:
            yield Missing(name, "missing: bench/peers.sh installs it")
            continue
        here = scratch / program
        here.mkdir()
        with ExitStack() as own:
            try:
                peer = start(own, rootfs, here)
                _call([*peer.prefix, "/bin/true"])
            except (OSError, subprocess.SubprocessError) as error:
                detail = getattr(error, "stderr", None) or str(error)
                yield Missing(name, f"does not start here: {str(detail).strip()[-300:]}")
                continue
            undo.push(own.pop_all())
        yield peer


def _call(argv: list[str]) -> str:
    done = subprocess.run(
        argv,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    return done.stdout


def _daemonized(argv: list[str], log: Path) -> None:
    """Start a container whose first process keeps the descriptors it was started with."""
    with log.open("w") as out:
        done = subprocess.run(
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            timeout=DEADLINE,
        )
    if done.returncode != 0:
        raise OSError(log.read_text())


def _later(undo: ExitStack, argv: list[str]) -> None:
    undo.callback(
        subprocess.run,
        argv,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=DEADLINE,
    )


def _copy(rootfs: Path, target: Path) -> Path:
    _call(["cp", "-a", "--reflink=auto", str(rootfs), str(target)])
    return target


def _bundle(rootfs: Path, where: Path) -> Path:
    """An OCI bundle that runs an idle process as root."""
    namespaces = ("pid", "network", "ipc", "uts", "mount")
    config = {
        "ociVersion": "1.0.2",
        "root": {"path": str(_copy(rootfs, where / "rootfs")), "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": _IDLE,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in namespaces]},
    }
    (where / "config.json").write_text(json.dumps(config))
    return where


def _crun(undo: ExitStack, rootfs: Path, scratch: Path) -> Peer:
    crun = ["crun", "--root", str(scratch / "state"), "--cgroup-manager=disabled"]
    name = "shoal-bench"
    bundle = _bundle(rootfs, scratch)
    _later(undo, [*crun, "delete", "--force", name])
    _daemonized([*_V1_ONLY, *crun, "run", "-d", "-b", str(bundle), name], scratch / "log")
    prefix = [*crun, "exec", name]
    return Peer("crun exec", prefix, prefix)


def _runsc(undo: ExitStack, rootfs: Path, scratch: Path) -> Peer:
    state = scratch / "state"
    runsc = ["runsc", "--root", str(state), "--ignore-cgroups", "--network=none"]
    name = "shoal-bench"
    bundle = _bundle(rootfs, scratch)
    _later(undo, ["umount", str(state / "null-netns")])
    _later(undo, [*runsc, "delete", "-force", name])
    _daemonized([*runsc, "run", "-detach", "-bundle", str(bundle), name], scratch / "log")
    prefix = [*runsc, "exec", name]
    return Peer("runsc exec", prefix, prefix)


def _podman(undo: ExitStack, rootfs: Path, scratch: Path) -> Peer:
    podman = [
        *("podman", "--root", str(scratch / "root"), "--runroot", str(scratch / "run")),
        *("--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none"),
        *(("--runtime", "crun") if shutil.which("crun") else ()),
    ]
    name = "shoal-bench"
    limits = [f"--ulimit={limit}=1024:1024" for limit in ("nofile", "nproc")]
    _later(undo, [*podman, "rm", "--force", "--time", "0", name])
    _call(
        [
            *(*_V1_ONLY, *podman, "run", "--detach", "--name", name, "--network", "none"),
            *("--cgroups=disabled", *limits, "--rootfs", str(_copy(rootfs, scratch / "rootfs"))),
            *_IDLE,
        ]
    )
    return Peer("podman exec", [*podman, "exec", name], [*podman, "exec", "--interactive", name])


def _docker(undo: ExitStack, rootfs: Path, scratch: Path) -> Peer:
    socket = f"unix://{scratch}/sock"
    docker = ["docker", "--host", socket]
    name = "shoal-bench"
    cgroup = f"shoal-bench-{os.getpid()}"
    undo.callback(_remove_cgroups, cgroup)
    log = undo.enter_context((scratch / "log").open("w"))
    daemon = subprocess.Popen(
        [
            *("dockerd", "--host", socket, "--pidfile", str(scratch / "pid")),
            *("--data-root", str(scratch / "data"), "--exec-root", str(scratch / "exec")),
            *("--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs"),
            *("--cgroup-parent", cgroup),
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    undo.callback(_end, daemon)
    deadline = time.monotonic() + 30
    while not (scratch / "sock").exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise OSError((scratch / "log").read_text()[-300:])
        time.sleep(0.05)
    with subprocess.Popen(["tar", "-C", str(rootfs), "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            [*docker, "import", "-", name],
            check=True,
            stdin=tar.stdout,
            capture_output=True,
            timeout=DEADLINE,
        )
    _later(undo, [*docker, "rm", "--force", name])
    _call([*docker, "run", "--detach", "--name", name, "--network", "none", name, *_IDLE])
    return Peer("docker exec", [*docker, "exec", name], [*docker, "exec", "--interactive", name])


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _remove_cgroups(name: str) -> None:
    for found in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        for directory, _, _ in os.walk(found, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


Start = Callable[[ExitStack, Path, Path], Peer]
_STARTS: list[tuple[str, str, Start]] = [
    ("docker exec", "dockerd", _docker),
    ("podman exec", "podman", _podman),
    ("crun exec", "crun", _crun),
    ("runsc exec", "runsc", _runsc),
]
