"""Build `base`, a small Debian with Python, from the Debian archive.

The result is a tar of a root file system, kept under the hash of its recipe, so it is built once a machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from shoal.errors import HostUnsupportedError, ImageError
from shoal.local.node import require_root, settings
from shoal.local.progress import Tell

SUITE = "bookworm"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = ("python3", "ca-certificates")
_DROPPED = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
)
_SCRATCH = ".base-"
_APART = [
    "/usr/bin/unshare",
    "--mount",
    "--propagation",
    "private",
    "--pid",
    "--fork",
    "--mount-proc",
    "--kill-child=KILL",
    "--",
]
"""mmdebstrap mounts the host's /dev/shm and more into what it builds. In a mount namespace of its own these
mounts end with it, however it ends; in a pid namespace of its own nothing of it outlives it."""
_EPOCH = "1735689600"
"""Newest file time in the image, so that a second build differs only where packages do."""

_HOOK = r"""set -e
cd "$1"
for name in doc man info locale lintian bug; do rm -rf "usr/share/$name"; mkdir -p "usr/share/$name"; done
rm -rf var/cache/debconf/*-old var/cache/ldconfig/* var/log/*
rm -f etc/resolv.conf etc/hostname etc/machine-id var/lib/dbus/machine-id
printf '127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n' > etc/hosts
: > etc/resolv.conf
: > etc/machine-id
chmod 0644 etc/hosts etc/resolv.conf etc/machine-id
ln -sf python3 usr/bin/python
"""


def mirror() -> str:
    """The Debian mirror, less the `/debian` that its address may end in."""
    return settings().debian_mirror.rstrip("/").removesuffix("/debian").rstrip("/")


def recipe() -> list[str]:
    """The arguments of mmdebstrap that make the image, less the target."""
    base = mirror()
    signed = f"[signed-by={KEYRING}]"
    words = [
        "--mode=root",
        "--variant=essential",
        "--format=tar",
        "--verbose",
        f"--include={','.join(PACKAGES)}",
    ]
    words += [f"--dpkgopt=path-exclude=/{path}/*" for path in _DROPPED]
    words += [
        '--aptopt=Acquire::Retries "3"',
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=APT::Install-Recommends "false"',
        f"--customize-hook={_HOOK}",
        SUITE,
        "-",
        f"deb {signed} {base}/debian {SUITE} main",
        f"deb {signed} {base}/debian {SUITE}-updates main",
        f"deb {signed} {base}/debian-security {SUITE}-security main",
    ]
    return words


def cached() -> Path:
    """Where this recipe's result is, or will be."""
    digest = hashlib.sha256("\0".join([*recipe(), _EPOCH]).encode()).hexdigest()[:16]
    return settings().cache_dir.absolute() / f"base-{SUITE}-{digest}.tar"


def build(tell: Tell, *, refresh: bool = False) -> Path:
    """Return the tar of `base`; build it unless that was done before on this machine.

    When several programs call this at once, one builds and the others wait for it.

    Args:
        tell: Is told of the progress.
        refresh: Build anew even if there is one.

    Raises:
        HostUnsupportedError: mmdebstrap or Debian's keyring is missing, or we are not root.
        ImageError: The build failed; nothing of it is left.
    """
    target = cached()
    if target.exists() and not refresh:
        return target
    require_root()
    tool = shutil.which("mmdebstrap")
    if tool is None:
        raise HostUnsupportedError("mmdebstrap is missing", hint="apt-get install mmdebstrap")
    if not KEYRING.exists():
        raise HostUnsupportedError(
            f"{KEYRING} is missing", hint="apt-get install debian-archive-keyring"
        )
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    before = _stamp(target)
    with _locked(target.with_suffix(".lock"), tell):
        if target.exists() and (not refresh or _stamp(target) != before):
            return target  # somebody else built it while we waited
        _build(tool, target, tell)
    return target


def _build(tool: str, target: Path, tell: Tell) -> None:
    for left in target.parent.glob(f"{_SCRATCH}*"):
        _remove(left)  # of a build that was killed; we hold the lock, so nobody works there
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=target.parent))
    try:
        made = scratch / "base.tar"
        scratch.chmod(0o755)  # apt's own user must be able to enter
        environment = {
            name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")
        }
        environment |= {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "TMPDIR": str(scratch),
            "SOURCE_DATE_EPOCH": _EPOCH,
            "DEBIAN_FRONTEND": "noninteractive",
        }
        code, last = _run([*_APART, tool, *recipe()], made, environment, tell)
        if code != 0:
            errors = [line for line in last if line.startswith("E:")] or last[-3:]
            raise ImageError(
                f"mmdebstrap failed: {'; '.join(errors)[:600]}",
                hint=f"can this machine reach {mirror()}? SHOAL_DEBIAN_MIRROR names another mirror",
            )
        os.replace(made, target)
    finally:
        _remove(scratch)


def _run(
    argv: list[str], output: Path, environment: dict[str, str], tell: Tell
) -> tuple[int, list[str]]:
    """Run the build; its exit code and the last lines it said. What ends us ends all of it."""
    last: deque[str] = deque(maxlen=12)
    meter = Meter()
    with (
        open(output, "wb") as tar,
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=tar,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
        ) as process,
    ):
        assert process.stderr is not None  # noqa: S101 - it is a pipe
        try:
            for raw in process.stderr:
                line = raw.decode("utf-8", "replace").rstrip()
                last.append(line)
                tell(*meter.line(line))
        except BaseException:
            process.kill()
            process.stderr.read()  # up to its end: then the last of its processes is gone
            raise
    return process.returncode, list(last)


def _remove(directory: Path) -> None:
    """Remove a tree, but nothing that is mounted in it."""
    subprocess.run(
        ["/bin/rm", "-rf", "--one-file-system", "--", str(directory)],
        check=False,
        capture_output=True,
    )


class Meter:
    """How far mmdebstrap is, read from what it and apt print."""

    _STAGES = (
        ("running apt-get update", 0.02, "reading package lists"),
        ("downloading packages", 0.06, "downloading"),
        ("extracting archives", 0.25, "extracting"),
        ("installing essential", 0.30, "installing"),
        ("installing remaining", 0.70, "installing Python"),
        ("cleaning package lists", 0.95, "cleaning"),
        ("creating tarball", 0.97, "packing"),
    )
    _COUNT = re.compile(r"(\d+) newly installed")
    _GET = re.compile(r"Get:\d+ \S+ \S+ \S+ (\S+)")
    _STEP = re.compile(r"(?:Unpacking|Setting up) (\S+)")

    def __init__(self) -> None:
        self._start, self._end, self._text = 0.0, 0.02, ""
        self._total, self._steps = 0, 0

    def line(self, line: str) -> tuple[float, str]:
        """Take a line; return the fraction done and what is going on."""
        for index, (words, fraction, text) in enumerate(self._STAGES):
            if line.startswith("I: ") and words in line:
                after = self._STAGES[index + 1][1] if index + 1 < len(self._STAGES) else 1.0
                self._start, self._end, self._text, self._steps = fraction, after, text, 0
        if found := self._COUNT.search(line):
            self._total, self._steps = int(found[1]), 0
        detail = ""
        if found := self._GET.match(line) or self._STEP.match(line):
            self._steps += 1
            detail = found[1].partition(":")[0]
        # Each package is downloaded once, or unpacked and set up.
        whole = max(
            1,
            self._total
            * (1 if self._text == "downloading" else 3 if "Python" in self._text else 2),
        )
        share = min(1.0, self._steps / whole)
        return self._start + (self._end - self._start) * share, f"{self._text} {detail}".strip()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def _locked(path: Path, tell: Tell) -> Iterator[None]:
    import fcntl

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(None, "another program builds it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
