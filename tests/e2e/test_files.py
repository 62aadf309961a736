"""Files both ways: bytes, modes, links, trees."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import shoal


def test_bytes_come_back_as_they_went(sandbox: shoal.Sandbox) -> None:
    for data in (b"", b"hi", bytes(range(256)), os.urandom(20 << 20)):
        info = sandbox.files.write("/app/deep/a.bin", data)
        assert (info.kind, info.size, info.path) == ("file", len(data), "/app/deep/a.bin")
        assert sandbox.files.read("/app/deep/a.bin") == data
    assert sandbox.files.read("/app/deep/a.bin", offset=100, length=50) == data[100:150]


def test_text_modes_and_owners(sandbox: shoal.Sandbox) -> None:
    sandbox.files.write("/a.sh", "#!/bin/sh\necho grüße\n", mode=0o755, user="1000")
    info = sandbox.files.stat("/a.sh")
    assert (info.mode, info.uid) == (0o755, 1000)
    assert sandbox.files.read_text("/a.sh").endswith("grüße\n")
    assert sandbox.run(["/a.sh"]).stdout == "grüße\n"


def test_the_verbs(sandbox: shoal.Sandbox) -> None:
    files = sandbox.files
    assert not files.exists("/w")
    assert files.make_dir("/w/x/y").kind == "directory"
    files.write("/w/x/one", "1")
    sandbox.run("ln -s one /w/x/link; mkfifo /w/x/fifo", check=True)
    listed = {info.name: info for info in files.list("/w/x")}
    assert {name: info.kind for name, info in listed.items()} == {
        "fifo": "other",
        "link": "symlink",
        "one": "file",
        "y": "directory",
    }
    assert listed["link"].target == "one"
    assert {info.path for info in files.list("/w", depth=2)} >= {"/w/x", "/w/x/one"}
    files.rename("/w/x/one", "/w/two")
    assert files.read("/w/two") == b"1"
    assert not files.exists("/w/x/one")
    files.remove("/w", recursive=True)
    assert not files.exists("/w")


def _tree(top: Path) -> dict[str, tuple[str, int, bytes | str]]:
    found: dict[str, tuple[str, int, bytes | str]] = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            found[name] = ("link", 0, os.readlink(path))
        elif path.is_dir():
            found[name] = ("directory", mode, "")
        else:
            found[name] = ("file", mode, path.read_bytes())
    return found


def _make_tree(top: Path) -> None:
    (top / "bin").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "bin" / "run").write_bytes(b"#!/bin/sh\necho ran\n")
    (top / "bin" / "run").chmod(0o750)
    (top / "data.bin").write_bytes(os.urandom(20 << 20))
    (top / "data.bin").chmod(0o600)
    (top / "ünï cödé \n x").write_text("odd")
    (top / "link").symlink_to("bin/run")
    (top / "dangling").symlink_to("nowhere")
    deep = top
    for number in range(20):
        deep = deep / f"level-{number:02}-{'x' * 30}"
    deep.mkdir(parents=True)
    (deep / "end").write_text("deep")
    for number in range(300):
        (top / "bin" / f"{number}.txt").write_text(str(number))


def test_a_tree_goes_in_and_comes_back(sandbox: shoal.Sandbox, tmp_path: Path) -> None:
    _make_tree(tmp_path / "here")
    sandbox.files.upload(tmp_path / "here", "/app/tree")
    assert sandbox.run(["/app/tree/link"]).stdout == "ran\n"
    assert sandbox.run("stat -c '%a %u %g' /app/tree/data.bin").stdout == "600 0 0\n"
    left_out = sandbox.files.download("/app/tree", tmp_path / "back")
    assert not left_out
    assert _tree(tmp_path / "back") == _tree(tmp_path / "here")


def test_the_whole_file_system_comes_without_what_is_mounted_in_it(
    sandbox: shoal.Sandbox, tmp_path: Path
) -> None:
    sandbox.files.write("/app/own", "mine")
    left_out = sandbox.files.download("/", tmp_path / "all")
    assert {"proc/", "dev/"} <= set(left_out)
    assert list((tmp_path / "all" / "proc").iterdir()) == []
    assert (tmp_path / "all" / "app" / "own").read_text() == "mine"
    assert "null" in sandbox.files.download("/dev", tmp_path / "dev")


def test_what_cannot_be_read_on_the_way_is_said(sandbox: shoal.Sandbox, tmp_path: Path) -> None:
    import shoal

    with pytest.raises(shoal.errors.PathError) as raised:
        sandbox.files.download("/proc/self", tmp_path / "self")
    assert "permission denied" in str(raised.value)
    assert raised.value.details["errno"] == 13


def test_one_file_goes_in_and_comes_back(sandbox: shoal.Sandbox, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0\1\2")
    (tmp_path / "a").chmod(0o640)
    sandbox.files.upload(tmp_path / "a", "/new/dir/b")
    assert sandbox.files.stat("/new/dir/b").mode == 0o640
    sandbox.files.download("/new/dir/b", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"\0\1\2"
    with pytest.raises(FileNotFoundError):
        sandbox.files.upload(tmp_path / "nothing", "/x")


def test_cp_01_the_file_api_never_leaves_the_sandbox(
    sandbox: shoal.Sandbox, tmp_path: Path
) -> None:
    import shoal

    canary = tmp_path / "canary"
    canary.write_text("host")
    sandbox.run(f"ln -s {tmp_path} /out; ln -s /proc/1/root /magic; ln -s / /top", check=True)
    for path in (f"/out/{canary.name}", f"/magic{canary}", f"/../../..{canary}", f"/top{canary}"):
        with pytest.raises(shoal.ShoalError):
            sandbox.files.read(path)
    for path in ("/../escaped", "/top/../escaped"):
        try:
            sandbox.files.write(path, b"x")
        except shoal.ShoalError:
            continue
        assert sandbox.run("cat /escaped").stdout == "x"
    assert not Path("/escaped").exists()
    assert canary.read_text() == "host"


def test_cp_02_a_download_writes_only_where_it_was_told(
    sandbox: shoal.Sandbox, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("host")
    target = tmp_path / "target"
    target.mkdir()
    (target / "dir").symlink_to(outside)
    sandbox.run(
        "mkdir -p /t/dir && echo evil > /t/dir/victim && ln -s /etc/passwd /t/absolute"
        f" && ln -s ../outside /t/up && ln -s {outside}/victim /t/there && mkfifo /t/fifo",
        check=True,
    )
    left_out = sandbox.files.download("/t", target)
    assert (outside / "victim").read_text() == "host"
    assert len(list(outside.iterdir())) == 1
    for path in target.rglob("*"):
        resolved = path.resolve()
        assert resolved.is_relative_to(target), path
    assert left_out
    assert (target / "dir" / "victim").read_text() == "evil\n"
