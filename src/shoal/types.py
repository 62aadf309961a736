"""The nouns: what a caller hands in and gets back.

Frozen, validated on decode, and the same on both sides of every wire that Python speaks.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Literal, Self

import msgspec


class Status(enum.StrEnum):
    """Where a sandbox stands in its life."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Reason(enum.StrEnum):
    """Why a sandbox ended."""

    TERMINATED = "terminated"
    TIMEOUT = "timeout"
    IDLE_TIMEOUT = "idle_timeout"
    LEASE_EXPIRED = "lease_expired"
    OOM = "oom"
    FAILED_TO_START = "failed_to_start"
    NOT_READY = "not_ready"
    """Its own command did not start or ended too soon, or what its `ready` asks for did not come true in time."""
    EVICTED = "evicted"
    LOST = "lost"
    HOST_SHUTDOWN = "host_shutdown"

    @property
    def is_infra(self) -> bool:
        """The infrastructure ended it, not its owner, its clock or its own code."""
        return self in {Reason.FAILED_TO_START, Reason.EVICTED, Reason.LOST, Reason.HOST_SHUTDOWN}


class Outcome(enum.StrEnum):
    """How an exec ended. `RUNNING` is the one that is not an end."""

    RUNNING = "running"
    EXITED = "exited"
    SIGNALED = "signaled"
    TIMED_OUT = "timed_out"
    OOM_KILLED = "oom_killed"
    KILLED = "killed"
    NOT_STARTED = "not_started"
    LOST = "lost"

    @property
    def is_infra(self) -> bool:
        """The infrastructure lost it; the command itself is not to blame."""
        return self is Outcome.LOST


Network = Literal["none"]
Runtime = Literal["native"]


class _Noun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Unknown fields are ignored: a newer node may say more."""


class Ready(_Noun, frozen=True, kw_only=True):
    """When a new sandbox is of use: the create answers no sooner.

    Either a port, which must accept a connection; a port and a path, which must answer with a status of 200 to 399;
    or a command, which must exit with 0. Whatever is asked, is asked inside the sandbox.
    """

    port: int | None = None
    """TCP port on the sandbox's loopback."""
    path: str | None = None
    """Path and query that is asked for on `port` over HTTP."""
    command: list[str] | None = None
    """Program and arguments, started as an exec of the sandbox would be."""
    interval: float = 0.1
    """Seconds between a failed attempt and the next."""
    timeout: float = 60.0
    """Seconds, from the start of the main command on, after which the create fails."""

    @classmethod
    def on_port(cls, port: int, *, interval: float = 0.1, timeout: float = 60.0) -> Self:
        """Something listens on a TCP port."""
        return cls(port=port, interval=interval, timeout=timeout)

    @classmethod
    def on_http(
        cls, port: int, path: str = "/", *, interval: float = 0.1, timeout: float = 60.0
    ) -> Self:
        """A request for a path is answered with a status of 200 to 399."""
        return cls(port=port, path=path, interval=interval, timeout=timeout)

    @classmethod
    def on_command(
        cls, argv: Sequence[str], *, interval: float = 0.1, timeout: float = 60.0
    ) -> Self:
        """A command exits with 0."""
        return cls(command=list(argv), interval=interval, timeout=timeout)


class SandboxSpec(_Noun, frozen=True, kw_only=True):
    """What a sandbox shall be. Checked by `node.admission` against the host that it lands on."""

    image: str = "base"
    """Name, `name:tag` or `sha256:` digest of an image that the node has."""
    cpu: float = 1.0
    """CPUs it may use at most; fractions allowed."""
    memory_mib: int = 512
    """Memory limit in MiB, page cache, tmpfs and kernel memory included; never swapped."""
    disk_mib: int = 1024
    """Hard limit in MiB on what it writes to its root file system."""
    pids: int = 512
    """Processes and threads at most."""
    timeout: float = 300.0
    """Seconds until it is ended, counted from its creation."""
    network: Network = "none"
    """Egress policy: `none` is a loopback interface and nothing else."""
    runtime: Runtime = "native"
    """The wall."""
    env: dict[str, str] = {}
    """Environment of every exec, on top of the image's."""
    labels: dict[str, str] = {}
    """Words of yours, to list and select by."""
    user: str | None = None
    """Default user of execs, by name or id; None: the image's, else root."""
    workdir: str | None = None
    """Default working directory of execs; None: the image's, else `/`."""
    command: list[str] | None = None
    """Main command: program and arguments of an exec with the id `main`, started when the sandbox is up."""
    ready: Ready | None = None
    """What the create waits for, once the main command has started; None: nothing."""
    public_ports: list[int] = []
    """TCP ports that whoever reaches the front door may use without a token."""


class SandboxInfo(_Answer, frozen=True, kw_only=True):
    """A sandbox as the node knows it, alive or ended."""

    id: str
    status: Status
    image: str
    image_digest: str
    runtime: str
    network: str
    cpu: float
    memory_mib: int
    disk_mib: int
    pids: int
    labels: dict[str, str]
    created_at: float
    """Seconds since 1970."""
    expires_at: float
    """Seconds since 1970 at which its timeout ends it."""
    ended_at: float | None = None
    reason: Reason | None = None
    message: str = ""
    """More about the reason, for a person."""
    public_ports: list[int] = []
    """TCP ports that need no token."""


class SandboxAccess(_Answer, frozen=True, kw_only=True):
    """A running sandbox together with what its data plane asks for."""

    sandbox: SandboxInfo
    access_token: str
    url_template: str | None = None
    """Address of its ports, with `{port}` and `{id}` to be filled in; None: the node listens on no TCP port."""


class SandboxPage(_Answer, frozen=True, kw_only=True):
    """Sandboxes, newest first."""

    sandboxes: list[SandboxInfo]


class PtySize(_Noun, frozen=True, kw_only=True):
    """A terminal's size in characters."""

    rows: int = 24
    cols: int = 80


class ExecRequest(_Noun, frozen=True, kw_only=True):
    """A command to start; the body of `POST /v1/sandboxes/{id}/execs`."""

    argv: list[str]
    """Program and arguments; the program is searched in PATH."""
    exec_id: str | None = None
    """Chosen by the client, so that a retry is the same exec: 1 to 128 of the characters A-Z a-z 0-9 _ . -, and neither
    `.` nor `..`. None: the node chooses."""
    env: dict[str, str] = {}
    """On top of the sandbox's own."""
    cwd: str | None = None
    user: str | None = None
    stdin: bool = False
    """True: a pipe that `…/stdin` fills. False: /dev/null."""
    pty: PtySize | None = None
    timeout: float | None = None
    """Seconds until the command is killed; None: it lives as long as the sandbox."""
    detached: bool = False
    """True: the answer is an `ExecStarted` without a stream, and output that nobody reads is dropped, oldest first,
    rather than kept for a reader while the command waits."""


class ExecStarted(_Answer, frozen=True, kw_only=True):
    """First frame of an exec's stream."""

    exec_id: str
    pid: int
    existing: bool
    stdout_offset: int
    stderr_offset: int
    detached: bool = False


class Usage(_Answer, frozen=True, kw_only=True):
    """What an exec used."""

    wall_s: float = 0.0
    user_s: float = 0.0
    system_s: float = 0.0
    max_rss_bytes: int = 0
    """Largest resident set of any one of its processes."""
    read_bytes: int = 0
    written_bytes: int = 0

    @property
    def cpu_s(self) -> float:
        """User and system CPU seconds together."""
        return self.user_s + self.system_s


class ExecExit(_Answer, frozen=True, kw_only=True):
    """Last frame of an exec's stream."""

    outcome: Outcome
    exit_code: int | None = None
    """The command's own, when it exited."""
    signal: int | None = None
    """What ended it, when a signal did."""
    errno: int | None = None
    """Why it did not start."""
    stage: str | None = None
    """Where starting failed: request, user, cwd, stdio, fork, cgroup, privileges or exec."""
    usage: Usage = Usage()


class ExecState(_Answer, frozen=True, kw_only=True):
    """Where an exec stands."""

    exec_id: str
    pid: int
    exit: ExecExit | None = None
    """None while it runs."""


class ExecStatus(_Answer, frozen=True, kw_only=True):
    """An exec that the sandbox knows."""

    exec_id: str
    pid: int
    argv: list[str]
    outcome: Outcome
    exit_code: int | None = None
    pty: bool = False


class ExecPage(_Answer, frozen=True, kw_only=True):
    """The execs that a sandbox knows, oldest first."""

    execs: list[ExecStatus]


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished command with all its output."""

    outcome: Outcome
    exit_code: int | None
    stdout_bytes: bytes
    stderr_bytes: bytes
    signal: int | None = None
    errno: int | None = None
    stage: str | None = None
    usage: Usage = Usage()
    truncated: bool = False
    """Output went over the cap: head and tail were kept, the middle was dropped."""

    @property
    def ok(self) -> bool:
        """It exited with code 0."""
        return self.outcome is Outcome.EXITED and self.exit_code == 0

    @property
    def stdout(self) -> str:
        """Standard output as text; what is not UTF-8 shows as U+FFFD."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Standard error as text; what is not UTF-8 shows as U+FFFD."""
        return self.stderr_bytes.decode("utf-8", "replace")


FileKind = Literal["file", "directory", "symlink", "other"]


class FileInfo(_Answer, frozen=True, kw_only=True):
    """A path in a sandbox; links are not followed."""

    path: str
    kind: FileKind
    size: int
    mode: int
    """Permission bits."""
    uid: int
    gid: int
    mtime: float
    """Seconds since 1970."""
    target: str | None = None
    """Where a symbolic link points."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]


class FilePage(_Answer, frozen=True, kw_only=True):
    """A directory's entries, sorted by path."""

    entries: list[FileInfo]


EventKind = Literal["create", "write", "remove", "rename", "chmod", "overflow"]


class FileEvent(_Answer, frozen=True, kw_only=True, rename={"kind": "type"}):
    """Something that happened to a watched path."""

    kind: EventKind
    """`overflow`: more happened than could be told, so look for yourself."""
    path: str
    """Absolute; what is not UTF-8 shows as U+FFFD. Of an `overflow` the watched path."""
    target: str | None = None
    """Of a `rename`: the new path."""
    directory: bool = False


class ImageInfo(_Answer, frozen=True, kw_only=True):
    """An image on the node."""

    name: str
    digest: str
    """`sha256:` digest of its config, which is its identity."""
    layers: list[str]
    """diffIDs, lowest first."""
    size_bytes: int
    """Bytes of its layers, unpacked, as far as the unpacker counted them."""
    created_at: float
    """Seconds since 1970 at which the node got it."""
    architecture: str = ""
    env: list[str] = []
    workdir: str = ""
    user: str = ""
    entrypoint: list[str] = []
    cmd: list[str] = []
    labels: dict[str, str] = {}


class ImagePage(_Answer, frozen=True, kw_only=True):
    """The node's images, by name."""

    images: list[ImageInfo]


class NodeInfo(_Answer, frozen=True, kw_only=True):
    """A node and what is left of it."""

    version: str
    started_at: float
    sandboxes: int
    cpu_total: float
    cpu_reserved: float
    memory_total_mib: int
    memory_reserved_mib: int
    disk_total_mib: int
    disk_reserved_mib: int
    walls: dict[str, Any] = {}
    """The walls in force, as the keeper reports them: kernel, cgroup version, seccomp rules, …"""
