"""Find this machine's embedded node, or start it.

Any number of programs may call `ensure` at once: one starts the node, under a lock in the run directory, the
others wait for it. The node is nobody's child: it leaves by itself when it has been idle.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import (
    HostUnsupportedError,
    InvalidArgumentError,
    NodeUnavailableError,
    from_problem,
)

if TYPE_CHECKING:
    from shoal.settings import Settings

START_DEADLINE = 30.0
"""Seconds for the node to be ready, waiting for another starter included."""
DEFAULT_RUN_DIR = "/run/shoal"
"""The default of `settings.Settings.run_dir`."""
IDLE_EXIT = 60
"""Seconds without a sandbox and without a request after which an embedded node leaves."""


def settings() -> Settings:
    """The settings that the environment gives.

    Raises:
        InvalidArgumentError: One of its variables makes no sense.
    """
    from pydantic import ValidationError

    from shoal.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        wrong = error.errors()[0]
        name = "_".join(("SHOAL", *(str(part) for part in wrong["loc"]))).upper()
        raise InvalidArgumentError(f"{name}: {wrong['msg']}") from error


def socket_path() -> Path:
    """Where the embedded node listens, when it runs.

    Read without `settings`, whose import takes longer than a whole command: a test compares the two.
    """
    return Path(os.environ.get("SHOAL_RUN_DIR") or DEFAULT_RUN_DIR).absolute() / "shoal.sock"


def answers(path: Path) -> bool:
    """Whether somebody accepts connections at the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def ensure(*, deadline: float = START_DEADLINE) -> Path:
    """Return the socket of a node that is ready; start one if there is none.

    Args:
        deadline: Seconds for all of it.

    Raises:
        HostUnsupportedError: This machine or this user cannot run a node; the hint says why.
        NodeUnavailableError: It did not become ready; its log has more.
    """
    if sys.platform != "linux":
        raise HostUnsupportedError(
            "a node needs Linux", hint="set SHOAL_URL to the address of a node on a Linux machine"
        )
    path = socket_path()
    until = time.monotonic() + deadline
    if answers(path):
        return path
    require_root()
    run_dir, data_dir = path.parent, settings().data_dir.absolute()
    with usable("run_dir", run_dir):
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        (run_dir / "start.lock").touch()
    with locked(run_dir / "start.lock", until, "starting the node"):
        if not answers(path):
            _start(data_dir, run_dir, until)
    return path


def require_root() -> None:
    """Refuse early, and with advice, what only root can do.

    Raises:
        HostUnsupportedError: We are not root.
    """
    if os.geteuid() != 0:
        raise HostUnsupportedError(
            "a node needs root to set up namespaces, mounts and limits",
            hint="run this with sudo, or set SHOAL_URL to the address of a running node",
        )


@contextlib.contextmanager
def usable(setting: str, directory: Path) -> Iterator[None]:
    """A block that makes or opens things in a directory which a setting names.

    Raises:
        HostUnsupportedError: The block met an OSError; the hint says how to name another directory.
    """
    try:
        yield
    except OSError as error:
        raise HostUnsupportedError(
            f"{directory} cannot be used: {error.strerror or error}",
            hint=f"name another directory: SHOAL_{setting.upper()}, or --{setting.replace('_', '-')} of `shoal serve`",
        ) from error


@contextlib.contextmanager
def locked(path: Path, until: float, work: str) -> Iterator[None]:
    """A block that one program at a time is in.

    Args:
        path: A file to lock; it stays.
        until: Up to when to wait, on `time.monotonic`'s clock.
        work: What the block does, for the message.

    Raises:
        NodeUnavailableError: Another program was in it for too long.
    """
    import fcntl

    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise NodeUnavailableError(
                        f"another program is still {work}", hint=f"see who holds {path}"
                    ) from None
                time.sleep(0.05)  # flock(2) has no timeout
            else:
                break
        yield


def _start(data_dir: Path, run_dir: Path, until: float) -> None:
    """Start a node that outlives us, and wait until it is ready."""
    log_path = data_dir / "log" / "node.log"
    with usable("data_dir", data_dir):
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        log_path.parent.mkdir(exist_ok=True, mode=0o700)
        log = open(log_path, "ab")  # noqa: SIM115 - closed below
    ready, told = os.pipe()
    try:
        with log:
            try:
                _spawn(data_dir, run_dir, told, log.fileno())
            finally:
                os.close(told)
        line = _read_line(ready, until)
    finally:
        os.close(ready)
    try:
        answer: Any = json.loads(line)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and "ok" in answer:
        return
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        raise from_problem(answer["error"])
    state = (
        "did not get ready in time"
        if not line and time.monotonic() >= until
        else "ended before it was ready"
    )
    raise NodeUnavailableError(
        f"the node {state}{_last_words(log_path)}", hint=f"see {log_path}, or run `shoal doctor`"
    )


def _spawn(data_dir: Path, run_dir: Path, told: int, log: int) -> None:
    """Start `shoal serve` as a session of its own whose parent is init."""
    node = [
        sys.executable,
        "-P",
        "-m",
        "shoal",
        "serve",
        "--idle-exit",
        f"{settings().idle_exit or IDLE_EXIT:g}",
        "--ready-fd",
        str(told),
    ]
    node += ["--data-dir", str(data_dir), "--run-dir", str(run_dir)]
    environment = dict(os.environ)
    if "PYTHONPATH" in environment:  # we leave the directory that it may be relative to
        parts = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in parts if part)
    # The shell goes away at once, so we neither keep a child nor have to reap one.
    subprocess.run(
        ["/bin/sh", "-c", '"$@" &', "sh", *node],
        check=True,
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=(told,),
        start_new_session=True,
    )


def _read_line(fd: int, until: float) -> bytes:
    """A line from a pipe; what there is of it at the deadline, or when the other end closes."""
    line = b""
    while b"\n" not in line:
        left = until - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            break
        chunk = os.read(fd, 65536)
        if not chunk:
            break
        line += chunk
    return line


def _last_words(log: Path) -> str:
    """The last line of the log, as part of a message."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return f": {lines[-1][:300]}" if lines else ""
