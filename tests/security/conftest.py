"""Canaries on the host that no sandbox may see, and the sandbox that looks for them."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.node import CANARY, PrivateNode

if TYPE_CHECKING:
    import shoal

PROBES = Path(__file__).parents[1] / "probes"
Judge = Callable[..., None]


class Canaries:
    """Things on the host that an attacker would love to find."""

    def __init__(self, directory: Path) -> None:
        self.word = f"canary-{uuid.uuid4().hex}"
        self.file = directory / self.word
        self.file.write_text(self.word)
        self.file.chmod(0o666)
        self.shared = Path("/dev/shm") / self.word
        self.shared.write_text(self.word)
        self.abstract = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.abstract.bind("\0" + self.word)
        self.abstract.listen(8)
        self.path = directory / "s"
        self.unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.unix.bind(str(self.path))
        self.unix.listen(8)
        self.tcp = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self.tcp.setblocking(False)
        self.port = int(self.tcp.getsockname()[1])
        self.process = subprocess.Popen(
            ["sh", "-c", "read line", self.word], stdin=subprocess.PIPE, start_new_session=True
        )
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.key = 0x5EA0_0000 | os.getpid() & 0xFFFF
        self.segment = self.libc.shmget(self.key, 4096, 0o1666)
        assert self.segment >= 0

    def close(self) -> None:
        """Remove all of them."""
        self.process.kill()
        self.process.communicate()
        for listener in (self.abstract, self.unix, self.tcp):
            listener.close()
        self.shared.unlink()
        self.libc.shmctl(self.segment, 0, None)

    def calls(self) -> int:
        """How many connections reached the listener so far."""
        count = 0
        while True:
            try:
                connection, _ = self.tcp.accept()
            except BlockingIOError:
                return count
            connection.close()
            count += 1

    @staticmethod
    def addresses() -> list[str]:
        """Addresses of the host's own interfaces, and its gateway."""
        found: list[str] = []
        table = Path("/proc/net/fib_trie").read_text().splitlines()
        for line, following in itertools.pairwise(table):
            if "host LOCAL" in following:
                found.append(line.split()[-1])
        for line in Path("/proc/net/route").read_text().splitlines()[1:]:
            gateway = bytes.fromhex(line.split()[2])[::-1]
            found.append(socket.inet_ntoa(gateway))
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        packed = [bytes.fromhex(line.split()[0]) for line in lines]
        found += [socket.inet_ntop(socket.AF_INET6, address) for address in packed]
        return sorted({address for address in found if address not in {"0.0.0.0", "::1"}})

    def facts(self, node: PrivateNode) -> dict[str, Any]:
        """What the probes are told about the host."""
        remote = [word for word in self.addresses() if not word.startswith("127.")]
        return {
            "host_paths": [str(self.file), str(self.path), str(node.data_dir), str(node.run_dir)],
            "abstract_sockets": [self.word],
            "host_words": [str(node.data_dir), str(node.run_dir), self.word],
            "hostname": socket.gethostname(),
            "foreign_words": [self.word, "noded", "shoal.node"],
            "foreign_pids": [self.process.pid, *node.daemons()],
            "shm_keys": [self.key],
            "shared_files": [str(self.shared)],
            "host_addresses": remote,
            "host_ports": [self.port],
        }


@pytest.fixture(scope="session")
def canaries(as_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Canaries]:
    """The canaries, for as long as tests run."""
    made = Canaries(tmp_path_factory.mktemp("canary"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def walled(node: PrivateNode) -> Iterator[shoal.Sandbox]:
    """A sandbox that has the probes."""
    import shoal

    with shoal.Sandbox.create(timeout=3600) as made:
        made.files.upload(PROBES, "/opt/probes")
        yield made


@pytest.fixture(params=["0", "1000"], ids=["root", "user"])
def judge(
    request: pytest.FixtureRequest, walled: shoal.Sandbox, node: PrivateNode, canaries: Canaries
) -> Judge:
    """Run a probe in the sandbox, as its root and as an ordinary user, and believe its report."""

    def run(name: str, **more: Any) -> None:
        facts = {**canaries.facts(node), **more}
        result = walled.run(
            ["python3", "-B", "-m", "probes", name],
            cwd="/opt",
            user=str(request.param),
            stdin=json.dumps(facts),
            timeout=90,
        )
        assert result.ok, f"{result.outcome} {result.exit_code}: {result.stderr[-2000:]}"
        answer = json.loads(result.stdout)
        assert answer["seen"] > 0, "the probe could look at nothing"
        assert answer["violations"] == []

    return run


@pytest.fixture
def on_the_host(as_root: None, tmp_path: Path) -> Callable[[str], list[str]]:
    """Run a probe as root of the host, away from its mounts: what it reports."""

    def run(name: str) -> list[str]:
        shutil.copytree(PROBES, tmp_path / "probes", dirs_exist_ok=True)
        own = {"PR-10": ["--pid", "--fork", "--mount-proc"], "NET-06": ["--net"]}.get(name, [])
        directory = os.open("/", os.O_RDONLY)
        done = subprocess.run(
            [
                *("unshare", "--mount", "--propagation", "private", *own),
                *("python3", "-B", "-m", "probes", name),
            ],
            cwd=tmp_path,
            input=json.dumps({"bold": False}),
            env={"PATH": os.environ["PATH"], "HOST_CANARY": CANARY},
            pass_fds=[directory],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        os.close(directory)
        assert done.returncode == 0, done.stderr
        return [str(violation) for violation in json.loads(done.stdout)["violations"]]

    return run
