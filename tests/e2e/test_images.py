"""Images that other tools made: each form comes in, whole, once."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import images
from tests.support.node import PrivateNode


def _import(node: PrivateNode, path: Path | str, name: str, *more: str) -> str:
    done = node.cli("image", "import", *more, str(path), name, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def _names(node: PrivateNode) -> list[str]:
    rows = json.loads(node.cli("image", "ls", "--json").stdout)
    return [row["name"].removesuffix(":latest") for row in rows]


def _until(holds: Callable[[], object], *, within: float = 60.0) -> None:
    """Wait for something that announces itself by no event."""
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def _uploads(node: PrivateNode) -> list[Path]:
    """Archives that the node is receiving, or makes an image of."""
    return list((node.data_dir / "tmp").glob("upload-*"))


def test_an_oci_layout_in_every_wrapping_is_the_same_image(
    node: PrivateNode, tmp_path: Path
) -> None:
    import shoal

    zipped = tmp_path / "layout.tar.gz"
    with images.base_layout_tar().open("rb") as plain, gzip.open(zipped, "wb", 1) as packed:
        shutil.copyfileobj(plain, packed)
    digests = {
        _import(node, images.base_layout(), "umoci-dir:1"),
        _import(node, images.base_layout_tar(), "umoci-tar:1"),
        _import(node, zipped, "umoci-gz:1"),
        _import(node, images.base_docker_archive(), "skopeo:1"),
    }
    assert len(digests) == 1
    assert next(iter(digests)).startswith("sha256:")
    with shoal.Sandbox.create("umoci-dir:1") as sb:
        assert sb.run("echo $GREETING; pwd").stdout == "hello from the image\n/srv\n"
        assert sb.files.read("/etc/made-by") == b"umoci\n"
        assert not sb.files.exists("/etc/goes-away")
        assert "goes-away" not in sb.run("ls -a /etc").stdout
        assert sb.run(["python3", "-c", "print(6*7)"], check=True).stdout == "42\n"
    for name in ("umoci-dir:1", "umoci-tar:1", "umoci-gz:1", "skopeo:1"):
        done = node.cli("image", "rm", name)
        assert done.returncode == 0, done.stderr.decode()


def test_a_directory_a_tar_and_a_pipe_of_a_root_file_system(
    node: PrivateNode, tmp_path: Path
) -> None:
    import shoal

    tree = images.tiny_rootfs(tmp_path / "tree")
    packed = tmp_path / "tree.tar"
    with tarfile.open(packed, "w") as archive:
        archive.add(tree, arcname=".")
    _import(node, tree, "tiny-dir", "--format", "rootfs")
    _import(node, packed, "tiny-tar")
    piped = node.cli("image", "import", "-", "tiny-pipe", stdin=packed.read_bytes())
    assert piped.returncode == 0, piped.stderr.decode()
    for name in ("tiny-dir", "tiny-tar", "tiny-pipe"):
        with shoal.Sandbox.create(name) as sb:
            result = sb.run(["/bin/hello", "a"])
            assert (result.exit_code, result.stdout) == (1, "hello 2\n")
            # No shell in it: what needs one says so, and the sandbox goes on.
            result = sb.run("echo hi")
            assert (result.outcome, result.errno) == (shoal.Outcome.NOT_STARTED, 2)
            sb.files.write("/note", b"x")
            assert sb.files.read("/note") == b"x"
        assert node.cli("image", "rm", name).returncode == 0


def test_an_image_in_use_stays(node: PrivateNode, tmp_path: Path) -> None:
    import shoal

    _import(node, images.tiny_rootfs(tmp_path / "tree"), "used", "--format", "rootfs")
    with shoal.Sandbox.create("used") as sb:
        with pytest.raises(shoal.errors.ConflictError):
            shoal.Node().remove_image("used")
        node.request("POST", "/v1/images/gc")
        assert sb.run(["/bin/hello"]).ok
    assert node.cli("image", "rm", "used").returncode == 0


def test_a_symlinked_and_hostile_tree_changes_nothing_outside(
    node: PrivateNode, tmp_path: Path
) -> None:
    """IM-01, IM-07: the places where a runtime writes are links that lead to the host."""
    import shoal

    victim = tmp_path / "victim"
    victim.mkdir()
    tree = images.tiny_rootfs(tmp_path / "tree")
    for name in ("dev", "proc", "sys", "tmp", "etc", "run", "srv"):
        (tree / name).symlink_to(f"../../../../../..{victim}")
    with node.unchanged():
        done = node.cli("image", "import", "--format", "rootfs", str(tree), "hostile")
        if done.returncode == 0:
            with (
                contextlib.suppress(shoal.errors.StartFailedError, shoal.errors.PathError),
                shoal.Sandbox.create("hostile", workdir="/srv/deep") as sb,
            ):
                sb.run(["/bin/hello"])
                sb.files.write("/etc/note", b"x")
            assert node.cli("image", "rm", "hostile").returncode == 0
            node.request("POST", "/v1/images/gc")
    assert list(victim.iterdir()) == []


def test_two_imports_at_once_make_one_image(node: PrivateNode) -> None:
    import shoal

    failures: list[str] = []

    def run(number: int) -> None:
        try:
            _import(node, images.base_layout(), f"twin-{number}:1")
        except AssertionError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures
    with shoal.Sandbox.create("twin-1:1") as sb:
        assert sb.files.read("/etc/made-by") == b"umoci\n"
    layers = [entry for entry in node.pool_entries() if entry.startswith("layers/")]
    assert len(layers) == len(set(layers))
    for number in range(3):
        assert node.cli("image", "rm", f"twin-{number}:1").returncode == 0


@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_an_import_that_is_cut_off_leaves_nothing(part: float, node: PrivateNode) -> None:
    archive = images.base_docker_archive()
    size = archive.stat().st_size
    head = (
        "POST /v1/images?name=cut-off&format=auto HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/x-tar\r\nContent-Length: {size}\r\n\r\n"
    )
    node.request("POST", "/v1/images/gc")
    with node.unchanged(seconds=30):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(node.socket))
            client.sendall(head.encode())
            with archive.open("rb") as source:
                left = int(size * part)
                while left > 0:
                    data = source.read(min(left, 1 << 20))
                    client.sendall(data)
                    left -= len(data)
        assert "cut-off" not in _names(node)
        node.request("POST", "/v1/images/gc")


def test_an_import_whose_client_is_killed_is_whole_or_not_at_all(node: PrivateNode) -> None:
    node.request("POST", "/v1/images/gc")
    with node.unchanged(seconds=60):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "shoal", "image", "import"),
                *(str(images.base_docker_archive()), "killed"),
            ],
            env=node.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _until(lambda: _uploads(node))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        # All bytes may have been there already; then the node may finish what it was asked for.
        _until(lambda: not _uploads(node))
        if "killed" in _names(node):
            assert node.cli("run", "--image", "killed", "--", "true").returncode == 0
            assert node.cli("image", "rm", "killed").returncode == 0
        node.request("POST", "/v1/images/gc")


def test_removed_images_give_their_layers_back(node: PrivateNode, tmp_path: Path) -> None:
    node.request("POST", "/v1/images/gc")
    with node.unchanged():
        _import(node, images.tiny_rootfs(tmp_path / "tree"), "brief", "--format", "rootfs")
        assert node.cli("image", "rm", "brief").returncode == 0
        node.request("POST", "/v1/images/gc")


@pytest.mark.slow
def test_base_is_built_from_the_archive(node: PrivateNode, tmp_path: Path) -> None:
    import shoal

    cache = tmp_path / "cache"
    builder = PrivateNode(node.data_dir, node.run_dir, {"SHOAL_CACHE_DIR": str(cache)})

    def entry() -> tuple[str, int, int]:
        [kept] = cache.glob("base-*.tar")
        return kept.name, kept.stat().st_ino, kept.stat().st_mtime_ns

    done = builder.cli("image", "build", "--name", "built:1", timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    with shoal.Sandbox.create("built:1") as sb:
        assert sb.run(["python3", "-c", "print(6*7)"]).stdout == "42\n"
    built = entry()
    assert builder.cli("image", "build", "--name", "built:2", timeout=600).returncode == 0
    assert entry() == built
    for name in ("built:1", "built:2"):
        assert node.cli("image", "rm", name).returncode == 0
