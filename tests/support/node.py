"""A private node: its own directories, its own processes, and what it holds on the host."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if sys.version_info >= (3, 12):
    from typing import override
else:
    from typing_extensions import override

CANARY = "canary-of-the-hosts-environment"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = str(path)

    @override
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(frozen=True)
class Answer:
    """A response of the node."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Census:
    """What a node holds on the host, in a form that can be compared."""

    processes: dict[str, int]
    """Processes of the node by name, the sandboxes' among them."""
    mounts: dict[str, int]
    """Mounts in the mount namespaces of the node's processes and in ours, by kind."""
    cgroups: list[str]
    netns: int
    loops: list[str]
    files: list[str]
    descriptors: dict[str, int]
    """Open descriptors of the daemons, by process and target; connections are counted apart."""
    connections: int
    """Connected unix sockets of the daemons. Clients keep some for their next request."""

    def differs_from(self, other: Census) -> dict[str, tuple[Any, Any]]:
        """What changed between `other` and this, by field."""
        changed: dict[str, tuple[Any, Any]] = {}
        for name in self.__dataclass_fields__:
            before, after = getattr(other, name), getattr(self, name)
            if name == "connections":
                if after > before:
                    changed[name] = (before, after)
            elif before != after:
                if isinstance(before, list):
                    changed[name] = (
                        [item for item in before if item not in after],
                        [item for item in after if item not in before],
                    )
                elif isinstance(before, dict):
                    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
                    changed[name] = (
                        {key: before.get(key, 0) for key in keys},
                        {key: after.get(key, 0) for key in keys},
                    )
                else:
                    changed[name] = (before, after)
        return changed


def _parents() -> dict[int, int]:
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                text = (entry / "stat").read_text()
                found[int(entry.name)] = int(text.rpartition(")")[2].split()[1])
    return found


def descendants(top: int) -> list[int]:
    """A process and all below it."""
    parents = _parents()
    found = [top] if top in parents else []
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return sorted(found)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


Part = Literal["front door", "server"]
DOOR_ID = 0x7FFD_0000
"""The host's user that front doors run as."""


@dataclass
class PrivateNode:
    """A node of the tests' own, with short paths so that unix sockets fit."""

    data_dir: Path
    run_dir: Path
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def make(cls, **settings: str) -> PrivateNode:
        """Directories for a node; nothing runs yet."""
        top = Path(tempfile.mkdtemp(prefix="shoal-t-", dir="/tmp"))
        return cls(data_dir=top / "data", run_dir=top / "run", settings=dict(settings))

    @property
    def env(self) -> dict[str, str]:
        """The environment with which SDK and command line find this node, or start it."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
        return {
            **kept,
            "SHOAL_DATA_DIR": str(self.data_dir),
            "SHOAL_RUN_DIR": str(self.run_dir),
            "SHOAL_POOL_MIB": "32768",
            "HOST_CANARY": CANARY,
            "PYTHONDONTWRITEBYTECODE": "1",
            "NO_COLOR": "1",
            **self.settings,
        }

    @property
    def socket(self) -> Path:
        """The front door."""
        return self.run_dir / "shoal.sock"

    @property
    def log(self) -> str:
        """What the node said, or the end of it."""
        return _text(str(self.data_dir.parent / "serve.log"))[-6000:]

    def start(self, deadline: float = 90.0) -> None:
        """Start `shoal serve` and wait until it answers."""
        log = (self.data_dir.parent / "serve.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "shoal", "serve"),
                    *("--data-dir", str(self.data_dir), "--run-dir", str(self.run_dir)),
                ],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + deadline
        while not self.answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"the node ended with {self.process.returncode}:\n{self.log}")
            if time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"the node is silent for {deadline} s:\n{self.log}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """A node is behind the socket and says who it is."""
        try:
            return self.request("GET", "/v1/node", timeout=2).status == 200
        except OSError:
            return False

    def stop(self, deadline: float = 40.0) -> None:
        """End it as a service manager does, and by force when that does not help."""
        if self.process is None:
            return
        family = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(10)
            raise RuntimeError(f"SIGTERM did not end the node:\n{self.log}") from None

    def remove(self) -> None:
        """Delete the directories."""
        shutil.rmtree(self.data_dir.parent, ignore_errors=True)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        token: str | None = None,
        timeout: float = 30,
    ) -> Answer:
        """One HTTP request to the front door."""
        connection = _UnixConnection(self.socket, timeout)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return Answer(response.status, response.read())

    def token(self, sandbox: str) -> str:
        """The access token of a sandbox."""
        answer = self.request("POST", f"/v1/sandboxes/{sandbox}/connect")
        return str(answer.json()["access_token"])

    def cli(
        self, *arguments: str, stdin: bytes | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the `shoal` command against this node."""
        return subprocess.run(
            [sys.executable, "-m", "shoal", *arguments],
            env=self.env,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    # ---- what it holds on the host

    def pids(self) -> list[int]:
        """Its processes: the daemons, and everything in sandboxes."""
        if self.process is not None:
            return descendants(self.process.pid)
        return self.owners()

    def owners(self) -> list[int]:
        """Processes that were given this node's directories, however they were started."""
        mark = str(self.data_dir)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                seen = _text(f"{entry}/cmdline") + _text(f"{entry}/environ")
                if mark in seen:
                    found.append(int(entry.name))
        return sorted(found)

    def part(self, name: Part) -> int | None:
        """The process of the keeper's that is its front door, or its server; None while there is none."""
        assert self.process is not None
        for pid, parent in _parents().items():
            if parent != self.process.pid:
                continue
            status = _text(f"/proc/{pid}/status")
            is_door = f"Uid:\t{DOOR_ID}\t" in status and "State:\tZ" not in status
            is_server = "\0shoal.node\0" in _text(f"/proc/{pid}/cmdline")
            if is_door if name == "front door" else is_server:
                return pid
        return None

    def kill(self, *parts: Part, deadline: float = 60.0) -> None:
        """End parts of the node as a crash does, and wait until there are new ones. Six deaths in a minute end it."""
        before = {part: self.part(part) for part in parts}
        for pid in before.values():
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + deadline
        while any(self.part(part) in (None, before[part]) for part in parts):
            assert self.process is not None
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    def daemons(self) -> list[int]:
        """Its processes outside sandboxes."""
        return [pid for pid in self.pids() if not _in_sandbox(pid)]

    def cgroups(self) -> list[Path]:
        """Its groups in every hierarchy: below the directories that hold its processes' sandboxes."""
        names = self.cgroup_names()
        return [path for top in _hierarchies() for path in _below(top) if path.name in names]

    def cgroup_names(self) -> set[str]:
        """Names of the directories that its sandboxes are in, as far as they were seen."""
        for pid in self.pids():
            for line in _text(f"/proc/{pid}/cgroup").splitlines():
                parts = line.split(":", 2)[2].split("/")
                self._names.update(part for part in parts if part.startswith("shoal-"))
        return self._names

    _names: set[str] = field(default_factory=set)

    def sandbox_cgroups(self, sandbox: str) -> list[Path]:
        """The group of one sandbox in every hierarchy."""
        return [path for top in _hierarchies() for path in _below(top) if path.name == sandbox]

    def sandbox_pids(self, sandbox: str) -> list[int]:
        """Host ids of the processes in a sandbox."""
        found: set[int] = set()
        for group in self.sandbox_cgroups(sandbox):
            for directory in (group, *_below(group)):
                found.update(int(word) for word in _text(f"{directory}/cgroup.procs").split())
        return sorted(found)

    def pool_entries(self) -> list[str]:
        """What the disk pool holds of sandboxes and layers, seen through the keeper's namespace."""
        for pid in self.daemons():
            for line in _text(f"/proc/{pid}/mountinfo").splitlines():
                point, kind = line.split()[4], line.partition(" - ")[2].split()[0]
                if kind == "btrfs" and "/dev/loop" in line.partition(" - ")[2]:
                    top = Path(f"/proc/{pid}/root{point}")
                    return sorted(
                        f"{sub.name}/{entry.name}"
                        for sub in _listed(top)
                        if sub.is_dir()
                        for entry in _listed(sub)
                    )
        return []

    def census(self) -> Census:
        """Everything it holds now."""
        pids = self.pids()
        names = Counter(_text(f"/proc/{pid}/comm").strip() for pid in pids)
        kinds: Counter[str] = Counter()
        seen: set[str] = set()
        networks: set[str] = set()
        for pid in [os.getpid(), *pids]:
            with contextlib.suppress(OSError):
                networks.add(os.readlink(f"/proc/{pid}/ns/net"))
                space = os.readlink(f"/proc/{pid}/ns/mnt")
                if space not in seen:
                    seen.add(space)
                    lines = _text(f"/proc/{pid}/mountinfo").splitlines()
                    kinds.update(line.partition(" - ")[2].split()[0] for line in lines)
        groups = [str(path) for top in self.cgroups() for path in (top, *_below(top))]
        loops = [
            path.read_text().strip()
            for path in Path("/sys/block").glob("loop*/loop/backing_file")
            if str(self.data_dir) in _text(str(path))
        ]
        volatile = ("-wal", "-shm", ".log")
        files = [
            str(path)
            for top in (self.data_dir, self.run_dir)
            for path in _below(top, files=True)
            if not path.name.endswith(volatile)
        ]
        held: Counter[str] = Counter()
        connections = 0
        connected = _connected([os.getpid(), *self.daemons()])
        for pid in self.daemons():
            name = _text(f"/proc/{pid}/comm").strip()
            for entry in _listed(Path(f"/proc/{pid}/fd")):
                with contextlib.suppress(OSError):
                    target = os.readlink(entry)
                    if target in connected:
                        connections += 1
                    elif "/state.db" in target:
                        held[f"{name}: state"] = 1  # SQLite keeps one aside now and then
                    else:
                        held[f"{name}: {re.sub(r'[0-9]+', 'N', target)}"] += 1
        return Census(
            processes=dict(names),
            mounts=dict(kinds),
            cgroups=sorted(groups),
            netns=len(networks),
            loops=sorted(loops),
            files=sorted([*files, *self.pool_entries()]),
            descriptors=dict(held),
            connections=connections,
        )

    @contextlib.contextmanager
    def unchanged(self, seconds: float = 20.0, *, connections: bool = False) -> Iterator[None]:
        """Nothing that the block did is left on the host.

        Args:
            seconds: How long it may take until that is so.
            connections: Count those too: no client is left that would keep one.
        """
        before = self.census()
        yield
        end = time.monotonic() + seconds
        while changed := self.census().differs_from(before):
            if not connections:
                changed.pop("connections", None)
            if not changed or time.monotonic() > end:
                break
            time.sleep(0.25)
        assert not changed, f"left behind: {changed}"


def _in_sandbox(pid: int) -> bool:
    lines = _text(f"/proc/{pid}/uid_map").splitlines()
    return not lines or int(lines[0].split()[1]) >= 1 << 20


def _connected(pids: list[int]) -> set[str]:
    """The connected unix stream sockets in these processes' network namespaces, by their inodes."""
    texts = {_text(f"/proc/{pid}/net/unix") for pid in pids}
    lines = [line.split() for text in texts for line in text.splitlines()[1:]]
    return {f"socket:[{words[6]}]" for words in lines if words[4:6] == ["0001", "03"]}


def _hierarchies() -> list[Path]:
    lines = _text("/proc/self/mountinfo").splitlines()
    return [
        Path(line.split()[4])
        for line in lines
        if line.partition(" - ")[2].startswith(("cgroup ", "cgroup2 "))
    ]


def _below(top: Path, *, files: bool = False) -> Iterator[Path]:
    """Directories (and files) below `top`; what vanishes meanwhile is left out."""
    for directory, inner, names in os.walk(top):
        for name in (*inner, *names) if files else inner:
            yield Path(directory) / name


def _listed(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError:
        return []
