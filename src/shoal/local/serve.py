"""Prepare what a node needs on disk, then become `shoal-noded`.

As root: the directories with their modes, the node's secret, the file of the disk pool. Nothing here touches a
mount or a namespace; that is the keeper's.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from shoal.errors import HostUnsupportedError, InvalidArgumentError
from shoal.local.node import require_root

MIN_POOL_MIB = 256
"""mkfs.btrfs takes no smaller file, with room for anything in it."""
_FREE_SHARE = 0.8
"""Of the disk's free space, what a pool may grow to."""


def run(
    *,
    data_dir: Path,
    run_dir: Path,
    pool_mib: int,
    ready_fd: int | None = None,
    idle_exit: float | None = None,
) -> NoReturn:
    """Prepare, and replace this process by the node.

    Args:
        data_dir: What survives a restart.
        run_dir: Where the sockets are.
        pool_mib: Size of a new disk pool at most.
        ready_fd: Descriptor that gets a line of JSON once the node is ready, or once it has failed.
        idle_exit: Seconds of idleness after which it leaves; None or 0: it stays.

    Raises:
        HostUnsupportedError: Something is missing on this machine; the hint says what.
    """
    argv, environment = prepare(
        data_dir=data_dir,
        run_dir=run_dir,
        pool_mib=pool_mib,
        ready_fd=ready_fd,
        idle_exit=idle_exit,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    if ready_fd is not None:
        os.set_inheritable(ready_fd, True)
    os.execve(argv[0], argv, environment)  # noqa: S606 - no shell is what we want


def prepare(
    *,
    data_dir: Path,
    run_dir: Path,
    pool_mib: int,
    ready_fd: int | None = None,
    idle_exit: float | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Everything before the exec: the command line and the environment of the node."""
    if sys.platform != "linux":
        raise HostUnsupportedError("a node needs Linux", hint=f"this is {platform.system()}")
    require_root()
    noded, agent = binaries()
    data_dir, run_dir = data_dir.absolute(), run_dir.absolute()
    if len(os.fsencode(run_dir)) > 60:
        # The longest socket below it must fit into sockaddr_un's 108 bytes.
        raise InvalidArgumentError(
            f"the run directory's path is too long: {run_dir}", hint="use a shorter --run-dir"
        )
    for directory in (data_dir, *(data_dir / name for name in ("images", "tmp", "log"))):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
    secret(data_dir / "secret")
    pool = data_dir / "pool.btrfs"
    make_pool(pool, pool_mib)
    argv = [str(noded), "serve", "--data-dir", str(data_dir), "--run-dir", str(run_dir)]
    argv += ["--agent", str(agent), "--python", sys.executable, "--pool", str(pool)]
    if ready_fd is not None:
        argv += ["--ready-fd", str(ready_fd)]
    if idle_exit:
        argv += ["--idle-exit", f"{idle_exit:g}"]
    environment = dict(os.environ)
    environment |= {
        "SHOAL_DATA_DIR": str(data_dir),
        "SHOAL_RUN_DIR": str(run_dir),
        "PYTHONSAFEPATH": "1",
    }
    return argv, environment


def binaries() -> tuple[Path, Path]:
    """The static binaries: those of the wheel, or where `SHOAL_NODED` points while developing.

    Raises:
        HostUnsupportedError: There are none for this machine.
    """
    if given := os.environ.get("SHOAL_NODED"):
        noded = Path(given).absolute()
        agent = Path(os.environ.get("SHOAL_AGENT") or noded.with_name("shoal-agent")).absolute()
    else:
        with importlib.resources.as_file(importlib.resources.files("shoal") / "_bin") as directory:
            noded, agent = directory / "shoal-noded", directory / "shoal-agent"
    for path in (noded, agent):
        if not os.access(path, os.X_OK):
            raise HostUnsupportedError(
                f"this installation has no {path.name} for {platform.system()} {platform.machine()}",
                hint="install the wheel for this platform, or build from source with cargo and set SHOAL_NODED",
                path=str(path),
            )
    return noded, agent


def secret(path: Path) -> None:
    """Make the node's secret, 32 random bytes, unless there is one."""
    if path.exists() and path.stat().st_size == 32:
        path.chmod(0o600)
        return
    temporary = path.with_name(f".secret.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(fd)
    os.replace(temporary, path)


def make_pool(path: Path, pool_mib: int) -> None:
    """Make the disk pool, a sparse file with btrfs in it, unless there is one.

    It may grow to `pool_mib`, but to no more than most of what the disk has free now.

    Raises:
        HostUnsupportedError: mkfs.btrfs is missing, or the disk is full.
    """
    with _locked(path.with_name("pool.lock")):
        if path.exists():
            return
        mkfs = shutil.which("mkfs.btrfs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if mkfs is None:
            raise HostUnsupportedError("mkfs.btrfs is missing", hint="apt-get install btrfs-progs")
        free_mib = shutil.disk_usage(path.parent).free >> 20
        size_mib = min(pool_mib, int(free_mib * _FREE_SHARE))
        if size_mib < MIN_POOL_MIB:
            raise HostUnsupportedError(
                f"{path.parent} has {free_mib} MiB free, too little for a disk pool",
                hint="free some space, or choose another --data-dir",
                free_mib=free_mib,
            )
        temporary = path.with_name(".pool.new")
        try:
            with open(temporary, "wb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.truncate(size_mib << 20)
            # Single metadata: a second copy in the same file protects from nothing.
            made = subprocess.run(
                [mkfs, "-q", "-f", "-m", "single", str(temporary)],
                capture_output=True,
                text=True,
                check=False,
            )
            if made.returncode != 0:
                raise HostUnsupportedError(f"mkfs.btrfs failed: {made.stderr.strip()[-300:]}")
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
