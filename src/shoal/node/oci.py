"""A sandbox's spec in the keeper's words, which are those of the OCI runtime-spec.

Source: OCI runtime-spec, config.md and config-linux.md. What the spec has no word for (`disk`, `shm`) stands
beside it under a name of its own.
"""

from __future__ import annotations

import posixpath
from typing import Any

from shoal.errors import ImageError, InvalidArgumentError
from shoal.node.admission import check_user
from shoal.node.door_client import Process
from shoal.node.slots import IDS_PER_SLOT, first_host_id
from shoal.types import ImageInfo, SandboxSpec

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CPU_PERIOD_US = 100_000
_MIB = 1 << 20
_SMALLEST_QUOTA_US = 1000
_LEAST_SHARES, _MOST_SHARES = 2, 262_144
_OOM_SCORE_ADJ = 100
"""Above every daemon of the host: when memory ends, sandboxes go first."""


def runtime_spec(
    sandbox: str, spec: SandboxSpec, *, layers: list[str], slot: int
) -> dict[str, Any]:
    """What the keeper needs to build a sandbox.

    Args:
        sandbox: Its id; the host name is made of its first characters.
        spec: Checked already.
        layers: Hex diffIDs, top first.
        slot: Its range of host ids.
    """
    memory = spec.memory_mib * _MIB
    ids = [{"containerID": 0, "hostID": first_host_id(slot), "size": IDS_PER_SLOT}]
    return {
        "hostname": sandbox[:11],
        "process": {"rlimits": _rlimits(spec), "oomScoreAdj": _OOM_SCORE_ADJ},
        "root": {"layers": layers},
        "linux": {
            "uidMappings": ids,
            "gidMappings": ids,
            "resources": {
                "memory": {"limit": memory},
                "pids": {"limit": spec.pids},
                "cpu": {
                    "quota": max(_SMALLEST_QUOTA_US, round(spec.cpu * CPU_PERIOD_US)),
                    "period": CPU_PERIOD_US,
                    "shares": min(_MOST_SHARES, max(_LEAST_SHARES, round(spec.cpu * 1024))),
                },
            },
            "seccomp": "standard",
        },
        "disk": {"limit": spec.disk_mib * _MIB},
        # Charged to the memory limit too; a quarter leaves the rest to the processes.
        "shm": {"limit": memory // 4},
    }


def _rlimits(spec: SandboxSpec) -> list[dict[str, Any]]:
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 65_536,
        "RLIMIT_MEMLOCK": 8 * _MIB,
        "RLIMIT_MSGQUEUE": 819_200,
        "RLIMIT_SIGPENDING": max(128, 2 * spec.pids),
        "RLIMIT_RTPRIO": 0,
        "RLIMIT_NICE": 0,
    }
    return [{"type": name, "soft": value, "hard": value} for name, value in limits.items()]


def exec_defaults(spec: SandboxSpec, image: ImageInfo) -> Process:
    """Environment, working directory and user of every exec: the image's, with the spec's on top.

    Raises:
        ImageError: The image's user or working directory cannot be one, and the spec names no other.
    """
    env = {"PATH": DEFAULT_PATH}
    for entry in image.env:
        name, equals, value = entry.partition("=")
        if name and equals and "\0" not in entry:  # other entries mean nothing to execve(2)
            env[name] = value
    env |= spec.env
    user = spec.user
    if user is None:
        user = image.user
        if user:
            try:
                check_user(user)
            except InvalidArgumentError as error:
                raise ImageError(
                    f"image {spec.image} names a user that cannot be one: {user[:200]!r}",
                    hint="name another with `user`",
                ) from error
    workdir = spec.workdir
    if workdir is None:
        workdir = posixpath.join("/", image.workdir)
        if "\0" in workdir:
            raise ImageError(
                f"image {spec.image} has a working directory with a NUL character",
                hint="name another with `workdir`",
            )
    return Process(env=[f"{name}={value}" for name, value in env.items()], cwd=workdir, user=user)
