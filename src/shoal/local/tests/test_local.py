from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from shoal.errors import (
    ConflictError,
    HostUnsupportedError,
    ImageError,
    InvalidArgumentError,
    NodeUnavailableError,
)
from shoal.local import base_image, doctor, node, progress, serve

Test = TypeVar("Test", bound=Callable[..., None])


def needs_root(test: Test) -> Test:
    """Marks a test that root alone can pass."""
    skip = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    marked: Test = pytest.mark.root(skip(test))
    return marked


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Not tmp_path: a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="shoal-") as directory:
        for name in ("data", "run", "cache"):
            monkeypatch.setenv(f"SHOAL_{name.upper()}_DIR", f"{directory}/{name}")
        monkeypatch.delenv("SHOAL_URL", raising=False)
        yield Path(directory)


def _stub(home: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """A stand-in for the node's binary: it is started with the real command line and environment."""
    noded = home / "shoal-noded"
    noded.write_text(f"#!{sys.executable}\n{program}")
    noded.chmod(0o755)
    (home / "shoal-agent").write_text("#!/bin/sh\n")
    (home / "shoal-agent").chmod(0o755)
    monkeypatch.setenv("SHOAL_NODED", str(noded))
    monkeypatch.setenv("SHOAL_POOL_MIB", "300")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


LISTENS = """
import json, os, socket, sys, time
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
s = socket.socket(socket.AF_UNIX)
s.bind(given["--run-dir"] + "/shoal.sock")
s.listen()
with open(given["--data-dir"] + "/started", "a") as f:
    f.write(json.dumps([os.getpid(), os.getsid(0), os.getppid(), sys.argv, sorted(os.listdir("/proc/self/fd"))]) + "\\n")
os.write(int(given["--ready-fd"]), b'{"ok": {}}\\n')
s.settimeout(20)
for _ in range(int(os.environ.get("STUB_ACCEPTS", "50"))):
    s.accept()[0].close()
    if os.path.exists(given["--data-dir"] + "/stop"):
        break
"""


@needs_root
def test_many_who_ask_at_once_start_one_node(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stub(home, monkeypatch, LISTENS)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(node.ensure())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [home / "run" / "shoal.sock"] * 5
    started = (home / "data" / "started").read_text().splitlines()
    assert len(started) == 1
    pid, session, _, argv, _ = json.loads(started[0])
    assert session not in (os.getsid(0), 0)
    assert pid != os.getpid()
    assert argv[1] == "serve"
    assert argv[argv.index("--pool") + 1] == str(home / "data" / "pool.btrfs")
    (home / "data" / "stop").touch()
    assert node.answers(home / "run" / "shoal.sock")
    assert (home / "data").stat().st_mode & 0o777 == 0o700
    pool = (home / "data" / "pool.btrfs").stat()
    assert pool.st_size == 300 << 20
    assert pool.st_blocks * 512 < 50 << 20


@needs_root
def test_a_node_that_fails_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = {
        "code": "host_unsupported",
        "detail": "no user namespaces",
        "hint": "do this",
        "status": 501,
    }
    told = json.dumps({"error": problem})
    _stub(
        home,
        monkeypatch,
        f"import os, sys\nos.write(int(sys.argv[sys.argv.index('--ready-fd') + 1]), {told.encode()!r})\n",
    )
    with pytest.raises(HostUnsupportedError, match="no user namespaces") as caught:
        node.ensure()
    assert caught.value.hint == "do this"


@needs_root
def test_a_node_that_dies_or_hangs_is_an_error_with_its_last_words(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub(home, monkeypatch, "import sys\nsys.exit('last words')\n")
    with pytest.raises(NodeUnavailableError, match="ended before it was ready: last words"):
        node.ensure()
    _stub(home, monkeypatch, "import time\ntime.sleep(2)\n")
    with pytest.raises(NodeUnavailableError, match="did not get ready in time"):
        node.ensure(deadline=1.5)


@needs_root
def test_serve_itself_tells_the_starter_what_is_missing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub(home, monkeypatch, "")
    (home / "shoal-agent").unlink()
    with pytest.raises(HostUnsupportedError, match="no shoal-agent"):
        node.ensure()


def test_the_short_way_to_the_socket_agrees_with_the_settings(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert node.socket_path() == node.settings().socket
    monkeypatch.delenv("SHOAL_RUN_DIR")
    assert node.socket_path() == node.settings().socket == Path(node.DEFAULT_RUN_DIR) / "shoal.sock"


def test_without_root_it_says_so_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostUnsupportedError, match="needs root") as caught:
        node.ensure()
    assert "sudo" in caught.value.hint
    assert not (home / "run").exists()
    with pytest.raises(HostUnsupportedError, match="needs root"):
        base_image.build(lambda fraction, text: None)


def test_without_root_a_node_that_runs_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "run" / "shoal.sock"))
        listener.listen()
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert node.ensure() == home / "run" / "shoal.sock"


def test_where_there_is_no_linux_it_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(HostUnsupportedError, match="needs Linux") as caught:
        node.ensure()
    assert "SHOAL_URL" in caught.value.hint
    assert [check.verdict for check in doctor.examine()] == ["fail"]


@needs_root
def test_a_pool_is_made_once_and_never_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = tmp_path / "pool.btrfs"
    with pytest.raises(HostUnsupportedError, match="too little"):
        serve.make_pool(pool, 10)
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(HostUnsupportedError) as caught:
        serve.make_pool(pool, 300)
    assert "btrfs-progs" in caught.value.hint
    monkeypatch.setattr("shutil.which", lambda name, path=None: "/bin/false")
    with pytest.raises(HostUnsupportedError, match=r"mkfs\.btrfs failed"):
        serve.make_pool(pool, 300)
    assert [path.name for path in tmp_path.iterdir()] == ["pool.lock"]
    monkeypatch.undo()
    serve.make_pool(pool, 300)
    made = pool.stat()
    serve.make_pool(pool, 600)
    assert (pool.stat().st_ino, pool.stat().st_size) == (made.st_ino, made.st_size)


@needs_root
def test_a_pool_that_is_not_made_in_time_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "POOL_DEADLINE", 0.3)
    with (
        node.locked(tmp_path / "pool.lock", time.monotonic(), "trying"),
        pytest.raises(NodeUnavailableError, match="another program is still making the disk pool"),
    ):
        serve.make_pool(tmp_path / "pool.btrfs", 300)
    slow = tmp_path / "mkfs"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name, path=None: str(slow))
    with pytest.raises(NodeUnavailableError, match=r"mkfs\.btrfs did not end within 0\.3 s"):
        serve.make_pool(tmp_path / "pool.btrfs", 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mkfs", "pool.lock"]


@needs_root
def test_a_directory_that_cannot_be_used_names_its_setting(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub(home, monkeypatch, LISTENS)
    (home / "file").touch()
    for name in ("data", "run"):
        data, run = (home / ("file/below" if each == name else each) for each in ("data", "run"))
        with pytest.raises(HostUnsupportedError, match="below cannot be used: Not a dir") as caught:
            serve.prepare(data_dir=data, run_dir=run, pool_mib=300)
        assert f"SHOAL_{name.upper()}_DIR, or --{name}-dir" in caught.value.hint
        with monkeypatch.context() as patch:
            patch.setenv(f"SHOAL_{name.upper()}_DIR", str(home / "file" / "below"))
            with pytest.raises(HostUnsupportedError, match="below cannot be used") as caught:
                node.ensure()
        assert f"SHOAL_{name.upper()}_DIR" in caught.value.hint


@needs_root
def test_a_data_directory_that_a_node_uses_is_refused_before_anything_starts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub(home, monkeypatch, LISTENS)

    def prepare() -> None:
        serve.prepare(data_dir=home / "data", run_dir=home / "run", pool_mib=300)

    prepare()
    with node.locked(home / "data" / "state.db.lock", time.monotonic(), "serving"):
        with pytest.raises(ConflictError, match="another node uses") as caught:
            prepare()
        assert "--data-dir" in caught.value.hint
        with pytest.raises(ConflictError, match="another node uses"):
            node.ensure()
    prepare()


@needs_root
def test_the_node_is_told_where_to_listen_if_anywhere(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub(home, monkeypatch, "")
    for listen, told in (("", []), ("127.0.0.1:0", ["--listen", "127.0.0.1:0"])):
        argv, _ = serve.prepare(
            data_dir=home / "data", run_dir=home / "run", pool_mib=300, listen=listen
        )
        assert [word for word in argv if word in ("--listen", "127.0.0.1:0")] == told


@pytest.mark.parametrize(
    ("given", "listen"),
    [
        ("", "127.0.0.1:0"),
        ("none", ""),
        ("127.8.0.1:65535", "127.8.0.1:65535"),
        ("[::1]:8080", "[::1]:8080"),
    ],
)
def test_where_to_listen_is_a_loopback_address_or_nowhere(
    monkeypatch: pytest.MonkeyPatch, given: str, listen: str
) -> None:
    monkeypatch.setenv("SHOAL_LISTEN", given)
    assert node.settings().listen == listen


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("0.0.0.0:80", "loopback"),
        ("[::]:80", "loopback"),
        ("8.8.8.8:80", "loopback"),
        ("localhost:80", "IP address"),
        ("127.0.0.1", "IP address"),
        ("::1:80", "IP address"),
        ("[127.0.0.1]:80", "IP address"),
        ("[::1%lo]:80", "IP address"),
        ("127.0.0.1:", "IP address"),
        ("127.0.0.1:65536", "IP address"),
        ("127.0.0.1:-1", "IP address"),
        ("127.0.0.1: 80", "IP address"),
        ("127.0.0.1:٣", "IP address"),
        (":80", "IP address"),
    ],
)
def test_where_nobody_can_or_may_listen_is_refused(
    monkeypatch: pytest.MonkeyPatch, given: str, word: str
) -> None:
    monkeypatch.setenv("SHOAL_LISTEN", given)
    with pytest.raises(InvalidArgumentError, match=f"SHOAL_LISTEN.*{word}"):
        node.settings()


@needs_root
def test_a_path_too_long_for_sockets_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub(home, monkeypatch, "")
    with pytest.raises(InvalidArgumentError, match="too long"):
        serve.prepare(data_dir=home / "data", run_dir=home / ("r" * 60), pool_mib=300)


def _fake_mmdebstrap(home: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    tools = home / "tools"
    tools.mkdir()
    (tools / "mmdebstrap").write_text(f"#!/bin/sh\n{program}")
    (tools / "mmdebstrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(base_image, "KEYRING", tools / "mmdebstrap")


@needs_root
def test_the_base_image_is_built_once_for_all_who_ask(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_mmdebstrap(home, monkeypatch, f"echo built >> {home}/log; sleep 0.3; echo tar")
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(base_image.build(lambda fraction, text: None)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(made) == {base_image.cached()}
    assert made[0].read_text() == "tar\n"
    assert (home / "log").read_text() == "built\n"
    base_image.build(lambda fraction, text: None, refresh=True)
    assert (home / "log").read_text() == "built\nbuilt\n"
    monkeypatch.setenv("SHOAL_DEBIAN_MIRROR", "http://mirror.example/")
    assert base_image.cached() not in made


def test_a_debian_mirror_may_be_named_with_and_without_its_debian(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for given in (
        "http://mirror.example",
        "http://mirror.example/debian",
        "http://mirror.example/debian/",
    ):
        monkeypatch.setenv("SHOAL_DEBIAN_MIRROR", given)
        sources = [line.split("] ")[1] for line in base_image.recipe()[-3:]]
        assert sources == [
            "http://mirror.example/debian bookworm main",
            "http://mirror.example/debian bookworm-updates main",
            "http://mirror.example/debian-security bookworm-security main",
        ]
    monkeypatch.setenv("SHOAL_DEBIAN_MIRROR", "")
    assert base_image.mirror() == "http://deb.debian.org"


@needs_root
def test_a_build_that_fails_leaves_nothing_and_says_why(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_mmdebstrap(
        home, monkeypatch, "echo half; echo 'I: fine' >&2; echo 'E: no network' >&2; exit 1"
    )
    with pytest.raises(ImageError, match="E: no network") as caught:
        base_image.build(lambda fraction, text: None)
    assert "SHOAL_DEBIAN_MIRROR" in caught.value.hint
    assert [path.suffix for path in (home / "cache").iterdir()] == [".lock"]


@needs_root
def test_a_build_that_is_given_up_leaves_no_process_mount_or_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = home / "canary"
    canary.mkdir()
    (canary / "precious").touch()
    program = f"""
        mkdir "$TMPDIR/tree"
        mount --bind {canary} "$TMPDIR/tree" || exit 1
        (trap "" TERM HUP INT; exec sleep 4242.17) &
        echo mounted >&2
        sleep 60
    """
    _fake_mmdebstrap(home, monkeypatch, program)
    before = Path("/proc/self/mountinfo").read_text().count(str(home))

    def give_up(fraction: float | None, text: str) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        base_image.build(give_up)
    assert (canary / "precious").exists()
    assert [path.suffix for path in (home / "cache").iterdir()] == [".lock"]
    assert Path("/proc/self/mountinfo").read_text().count(str(home)) == before
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert b"4242.17" not in process.read_bytes()


@needs_root
def test_what_a_killed_build_left_goes_with_the_next_but_never_what_is_mounted_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = home / "canary"
    canary.mkdir()
    (canary / "precious").touch()
    left = home / "cache" / ".base-left"
    (left / "mounted").mkdir(parents=True)
    (left / "file").touch()
    _fake_mmdebstrap(home, monkeypatch, "echo tar")
    subprocess.run(["mount", "-t", "tmpfs", "none", left / "mounted"], check=True)
    try:
        (left / "mounted" / "precious").touch()
        base_image.build(lambda fraction, text: None)
        assert (left / "mounted" / "precious").exists()
        assert not (left / "file").exists()
    finally:
        subprocess.run(["umount", left / "mounted"], check=True)
    base_image.build(lambda fraction, text: None, refresh=True)
    assert not left.exists()


@needs_root
def test_missing_tools_are_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostUnsupportedError) as caught:
        base_image.build(lambda fraction, text: None)
    assert caught.value.hint == "apt-get install mmdebstrap"


def test_the_meter_never_goes_back() -> None:
    lines = (
        "I: running apt-get update...\nI: downloading packages with apt...\n"
        "0 upgraded, 2 newly installed, 0 to remove\n"
        "Get:1 http://x bookworm/main amd64 bash amd64 5 [1 kB]\n"
        "Get:2 http://x bookworm/main amd64 dash amd64 5 [1 kB]\n"
        "I: extracting archives...\nI: installing essential packages...\n"
        "Unpacking bash (5) ...\nSetting up bash (5) ...\nUnpacking dash (5) ...\nSetting up dash (5) ...\n"
        "I: installing remaining packages inside the chroot...\n"
        "0 upgraded, 1 newly installed, 0 to remove\nSetting up python3 (3) ...\n"
        "I: cleaning package lists and apt cache...\nI: creating tarball...\n"
    )
    meter = base_image.Meter()
    told = [meter.line(line) for line in lines.splitlines()]
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert 0.9 < fractions[-1] <= 1.0
    assert told[3][1] == "downloading bash"


def test_no_bar_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("x") as tell:
        tell(0.5, "y")
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_the_doctor_looks_at_everything_and_advises() -> None:
    checks = {check.name: check for check in doctor.examine()}
    wanted = "kernel root user-namespaces idmapped-mounts overlayfs btrfs mkfs.btrfs cgroups seccomp mmdebstrap memory"
    assert {name.replace("-", " ") for name in wanted.split()} <= set(checks)
    assert all(check.hint for check in checks.values() if check.verdict != "ok")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_the_doctor_says_which_node_is_meant(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> tuple[str, str]:
        check = next(check for check in doctor.examine() if check.name == "node")
        return check.verdict, check.found

    own = f"this machine's own, at {home}/run/shoal.sock"
    assert told() == ("ok", f"{own}; starts when it is needed")
    (home / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "run" / "shoal.sock"))
        listener.listen()
        assert told() == ("ok", f"{own}; it runs")
        url = f"unix://{home}/run/shoal.sock"
        monkeypatch.setenv("SHOAL_URL", url)
        assert told() == ("ok", f"{url}, named by SHOAL_URL; somebody answers")
    for url in (
        "unix:///nonexistent/shoal.sock",
        "http://127.0.0.1:1",
        "http://x:port",
        "nonsense",
    ):
        monkeypatch.setenv("SHOAL_URL", url)
        assert told() == ("warn", f"{url}, named by SHOAL_URL; nobody answers")
