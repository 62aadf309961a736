"""Prepare what a node needs on disk, then become `shoal-noded`.

As root: the directories with their modes, the file of the disk pool. Nothing here touches a mount or a
namespace; that is the keeper's.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from shoal.errors import (
    ConflictError,
    HostUnsupportedError,
    InvalidArgumentError,
    NodeUnavailableError,
)
from shoal.local.node import locked, require_root, usable

MIN_POOL_MIB = 256
"""mkfs.btrfs takes no smaller file, with room for anything in it."""
_FREE_SHARE = 0.8
"""Of the disk's free space, what a pool may grow to."""
POOL_DEADLINE = 60.0
"""Seconds to wait for another program that makes the pool, and as many for mkfs.btrfs."""


def run(
    *,
    data_dir: Path,
    run_dir: Path,
    pool_mib: int,
    listen: str = "",
    ready_fd: int | None = None,
    idle_exit: float | None = None,
) -> NoReturn:
    """Prepare, and replace this process by the node.

    Args:
        data_dir: What survives a restart.
        run_dir: Where the sockets are.
        pool_mib: Size of a new disk pool at most.
        listen: As `Settings.listen`.
        ready_fd: Descriptor that gets a line of JSON once the node is ready, or once it has failed.
        idle_exit: Seconds of idleness after which it leaves; None or 0: it stays.

    Raises:
        HostUnsupportedError: Something is missing on this machine; the hint says what.
        ConflictError: Another node uses the data directory.
    """
    argv, environment = prepare(
        data_dir=data_dir,
        run_dir=run_dir,
        pool_mib=pool_mib,
        listen=listen,
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
    listen: str = "",
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
    with usable("data_dir", data_dir):
        for directory in (data_dir, *(data_dir / name for name in ("images", "tmp", "log"))):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)
        (data_dir / "pool.lock").touch()
    with usable("run_dir", run_dir):
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
    _refuse_a_second_node(data_dir)
    pool = data_dir / "pool.btrfs"
    make_pool(pool, pool_mib)
    argv = [str(noded), "serve", "--data-dir", str(data_dir), "--run-dir", str(run_dir)]
    argv += ["--agent", str(agent), "--python", sys.executable, "--pool", str(pool)]
    if listen:
        argv += ["--listen", listen]
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


def _refuse_a_second_node(data_dir: Path) -> None:
    """Look whether a server holds the state. Started all the same, the keeper would clear away what runs there."""
    import fcntl

    try:
        file = open(data_dir / "state.db.lock", "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"another node uses {data_dir}",
                hint="end that one, or choose another --data-dir (SHOAL_DATA_DIR)",
            ) from None


def make_pool(path: Path, pool_mib: int) -> None:
    """Make the disk pool, a sparse file with btrfs in it, unless there is one.

    It may grow to `pool_mib`, but to no more than most of what the disk has free now.

    Raises:
        HostUnsupportedError: mkfs.btrfs is missing, or the disk is full.
        NodeUnavailableError: `POOL_DEADLINE` passed; nothing half is left.
    """
    until = time.monotonic() + POOL_DEADLINE
    with locked(path.with_name("pool.lock"), until, "making the disk pool"):
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
                timeout=POOL_DEADLINE,
            )
            if made.returncode != 0:
                raise HostUnsupportedError(f"mkfs.btrfs failed: {made.stderr.strip()[-300:]}")
            os.replace(temporary, path)
        except subprocess.TimeoutExpired as error:
            raise NodeUnavailableError(
                f"mkfs.btrfs did not end within {POOL_DEADLINE:g} s",
                hint=f"does the disk of {path.parent} answer?",
            ) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
