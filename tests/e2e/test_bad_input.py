"""Bad input: a typed error, one clear line and a hint, and nothing left behind."""

from __future__ import annotations

import gzip
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import images
from tests.support.node import PrivateNode

GONE = "sb-" + "a" * 26
NO_DIGEST = "sha256:" + "0" * 64


def assert_clear(done: subprocess.CompletedProcess[bytes], *words: str, hint: bool = True) -> None:
    """Exit code not 0, no traceback, one line that names what was wrong, and a hint."""
    said = done.stderr.decode()
    assert done.returncode != 0, (done.stdout, said)
    assert "Traceback" not in said + done.stdout.decode()
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "shoal:"))]
    assert len(errors) == 1, said
    for word in words:
        assert word in said, said
    if hint:
        assert "hint" in said.lower() or "Try" in said, said
    assert len(lines) <= 4, said


def test_an_unknown_image(node: PrivateNode) -> None:
    import shoal

    with node.unchanged():
        with pytest.raises(shoal.errors.ImageNotFoundError) as caught:
            shoal.Sandbox.create("no-such-image")
        assert "no-such-image" in str(caught.value)
        assert caught.value.hint
        assert_clear(node.cli("run", "--image", "no-such-image", "--", "true"), "no-such-image")


@pytest.mark.parametrize(
    "options",
    [
        {"cpu": 0},
        {"cpu": -1},
        {"cpu": float("nan")},
        {"cpu": 100_000},
        {"memory_mib": 0},
        {"memory_mib": -5},
        {"memory_mib": 1 << 40},
        {"disk_mib": 0},
        {"disk_mib": 1 << 40},
        {"pids": 0},
        {"pids": 1 << 30},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("inf")},
        {"timeout": 1e12},
        {"network": "everything"},
        {"runtime": "magic"},
        {"env": {"A=B": "c"}},
        {"env": {"": "c"}},
        {"env": {"A": "x\0y"}},
        {"workdir": "relative"},
        {"workdir": "/a\0b"},
        {"labels": {"": "x"}},
        {"image": ""},
        {"image": "../../etc"},
        {"image": "a\nb"},
    ],
    ids=str,
)
def test_a_limit_or_option_that_makes_no_sense(
    options: dict[str, object], node: PrivateNode
) -> None:
    import shoal

    with node.unchanged(), pytest.raises(shoal.ShoalError) as caught:
        shoal.Sandbox.create(**options)  # type: ignore[arg-type]
    expected = (
        shoal.errors.InvalidArgumentError,
        shoal.errors.ResourceExhaustedError,
        shoal.errors.ImageNotFoundError,
    )
    assert isinstance(caught.value, expected), repr(caught.value)
    assert not caught.value.is_infra
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--memory", "0", "--", "true"),
        ("run", "--memory", "900t", "--", "true"),
        ("run", "--cpu", "0", "--", "true"),
        ("run", "--cpu", "100000", "--", "true"),
        ("run", "--disk", "0", "--", "true"),
        ("run", "--timeout", "-3", "--", "true"),
        ("run", "--no-such-option", "--", "true"),
        ("run", "--env", "=x", "--", "true"),
        ("run",),
        ("no-such-verb",),
        ("exec", "not-an-id", "--", "true"),
        ("exec", GONE, "--", "true"),
        ("inspect", GONE),
        ("shell", GONE),
        ("cp", "/etc/hostname", f"{GONE}:/x"),
        ("cp", "/etc/hostname", "/tmp/nowhere/x"),
        ("image", "import", "/no/such/file"),
        ("image", "rm", "no-such-image"),
    ],
    ids=" ".join,
)
def test_the_command_line_says_it_in_one_line(
    arguments: tuple[str, ...], node: PrivateNode
) -> None:
    with node.unchanged():
        assert_clear(node.cli(*arguments), hint=False)


def test_a_command_that_is_not_there(node: PrivateNode) -> None:
    import shoal

    with shoal.Sandbox.create() as sb:
        result = sb.run(["no-such-command", "x"])
        assert result.outcome is shoal.Outcome.NOT_STARTED
        assert (result.errno, result.stage, result.exit_code) == (2, "exec", None)
        result = sb.run(["/etc/passwd"])
        assert (result.outcome, result.errno) == (shoal.Outcome.NOT_STARTED, 13)
        result = sb.run(["true"], cwd="/etc/passwd")
        assert (result.outcome, result.stage) == (shoal.Outcome.NOT_STARTED, "cwd")
        result = sb.run(["true"], user="nobody-by-this-name")
        assert (result.outcome, result.stage) == (shoal.Outcome.NOT_STARTED, "user")
        with pytest.raises(shoal.errors.ExecFailedError) as caught:
            sb.run(["no-such-command"], check=True)
        assert caught.value.result.errno == 2
        assert sb.run("true").ok
    done = node.cli("run", "--", "no-such-command")
    assert done.returncode == 127
    assert_clear(done, "no-such-command", hint=False)
    assert node.cli("run", "--", "/etc/passwd").returncode == 126


def test_a_sandbox_that_never_was(node: PrivateNode) -> None:
    import shoal

    for wrong in (GONE, "x", "sb-../../etc", ""):
        with pytest.raises((shoal.errors.NotFoundError, shoal.errors.InvalidArgumentError)):
            shoal.Sandbox.connect(wrong)


def test_a_sandbox_that_is_gone_tells_its_reason(node: PrivateNode) -> None:
    import shoal

    sb = shoal.Sandbox.create()
    sb.terminate()
    for action in (
        lambda: shoal.Sandbox.connect(sb.id),
        lambda: sb.run("true"),
        lambda: sb.files.read("/etc/passwd"),
    ):
        with pytest.raises(shoal.errors.SandboxGoneError) as caught:
            action()
        assert caught.value.details["reason"] == "terminated"
    assert_clear(node.cli("exec", sb.id, "--", "true"), "terminated", hint=False)


def test_files_that_are_not_there_or_something_else(sandbox: object, node: PrivateNode) -> None:
    import shoal

    assert isinstance(sandbox, shoal.Sandbox)
    with pytest.raises(shoal.errors.PathNotFoundError):
        sandbox.files.read("/no/such/file")
    with pytest.raises(shoal.errors.PathError):
        sandbox.files.read("/etc")
    with pytest.raises(shoal.errors.PathError):
        sandbox.files.write("/etc", b"x")
    with pytest.raises(shoal.errors.PathError):
        sandbox.files.remove("/etc")
    with pytest.raises(shoal.errors.InvalidArgumentError):
        sandbox.files.read("relative")
    with pytest.raises(shoal.errors.InvalidArgumentError):
        sandbox.files.read("/a\0b")


Spoil = Callable[[Path, Path], Path]


def _truncated(good: Path, where: Path) -> Path:
    bad = where / "bad.tar"
    with good.open("rb") as source:
        bad.write_bytes(source.read(good.stat().st_size // 2))
    return bad


def _noise(good: Path, where: Path) -> Path:
    bad = where / "noise.tar"
    bad.write_bytes(os.urandom(1 << 20))
    return bad


def _empty(good: Path, where: Path) -> Path:
    bad = where / "empty.tar"
    bad.write_bytes(b"")
    return bad


def _half_gzip(good: Path, where: Path) -> Path:
    bad = where / "half.tar.gz"
    packed = gzip.compress(os.urandom(1 << 20))
    bad.write_bytes(packed[: len(packed) // 2])
    return bad


def _flipped_blob(good: Path, where: Path) -> Path:
    layout = where / "layout"
    shutil.copytree(images.base_layout(), layout)
    blobs = sorted((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    with blobs[-1].open("r+b") as handle:
        handle.seek(blobs[-1].stat().st_size // 2)
        byte = handle.read(1)
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte[0] ^ 0xFF]))
    return layout


def _missing_blob(good: Path, where: Path) -> Path:
    layout = where / "layout"
    shutil.copytree(images.base_layout(), layout)
    blobs = sorted((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blobs[-1].unlink()
    return layout


def _wrong_config(good: Path, where: Path) -> Path:
    layout = where / "layout"
    shutil.copytree(images.base_layout(), layout)
    (layout / "index.json").write_text('{"schemaVersion": 2, "manifests": "what?"}')
    return layout


SPOILERS: dict[str, Spoil] = {
    "truncated": _truncated,
    "noise": _noise,
    "empty": _empty,
    "half a gzip": _half_gzip,
    "a flipped byte in a layer": _flipped_blob,
    "a missing layer": _missing_blob,
    "an index of nonsense": _wrong_config,
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_im_04_im_06_a_bad_archive_is_refused_and_leaves_nothing(
    spoiler: str, node: PrivateNode, tmp_path: Path
) -> None:
    good = images.base_docker_archive()
    bad = SPOILERS[spoiler](good, tmp_path)
    with node.unchanged():
        done = node.cli("image", "import", str(bad), "spoiled")
        assert_clear(done, hint=False)
        assert "spoiled" not in node.cli("image", "ls").stdout.decode()


def test_a_digest_that_is_not_the_images(node: PrivateNode) -> None:
    import shoal

    with node.unchanged(), pytest.raises(shoal.errors.DigestMismatchError):
        shoal.Node().import_image(images.base_layout(), "other", expected_digest=NO_DIGEST)
    done = node.cli("image", "import", "--digest", NO_DIGEST, str(images.base_layout()), "o")
    assert_clear(done, "sha256", hint=False)


@pytest.mark.parametrize("arguments", [("run", "--", "true"), ("serve",), ("create",)])
def test_without_root_no_node_starts(arguments: tuple[str, ...], as_root: None) -> None:
    private = PrivateNode.make()
    done = subprocess.run(
        # A user namespace without a mapping: nobody, and no capability on this host.
        ["unshare", "--user", sys.executable, "-B", "-m", "shoal", *arguments],
        env=private.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert_clear(done, "root")
    assert not private.owners()
    private.remove()


WITHOUT_NAMESPACES = """
import ctypes, os, sys
# Root with all its ids, in a namespace below which no other may be made: a host with user namespaces switched off.
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    assert ctypes.CDLL(None).unshare(0x10000000) == 0
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    os.execv(sys.executable, [sys.executable, "-B", "-m", "shoal", *sys.argv[1:]])
os.read(ready[0], 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{child}/{name}", "w") as file:
        file.write("0 0 4294967295")
os.write(go[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("arguments", [("run", "--", "true"), ("create",)])
def test_without_user_namespaces_no_node_starts(arguments: tuple[str, ...], as_root: None) -> None:
    private = PrivateNode.make()
    done = subprocess.run(
        [sys.executable, "-B", "-c", WITHOUT_NAMESPACES, *arguments],
        env=private.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert_clear(done, "no user namespace")
    assert not private.owners()
    private.remove()


def test_cp_06_another_user_cannot_reach_the_node(node: PrivateNode) -> None:
    nobody = pwd.getpwnam("nobody")
    for path in [node.socket, *(path for path in node.run_dir.rglob("*") if path.is_socket())]:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setgroups([])
                os.setgid(nobody.pw_gid)
                os.setuid(nobody.pw_uid)
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(str(path))
            except PermissionError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, path


def test_without_mmdebstrap_base_cannot_be_built(node: PrivateNode, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python3", "mount", "umount", "losetup", "mkfs.btrfs", "btrfs", "tar"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    other = PrivateNode(
        node.data_dir,
        node.run_dir,
        {"PATH": str(tools), "SHOAL_CACHE_DIR": str(tmp_path / "cache")},
    )
    with node.unchanged():
        done = other.cli("image", "build", "--name", "other-base")
        assert_clear(done, "mmdebstrap")


def test_doctor_says_what_this_host_can_do(node: PrivateNode) -> None:
    done = node.cli("doctor")
    assert b"Traceback" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stdout.decode()
    for word in (b"cgroup", b"namespace"):
        assert word in (done.stdout + done.stderr).lower()
