"""CP-02: copy-out writes only under the chosen directory, replaces links, and makes none that points outside."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from shoal import AsyncSandbox
from shoal.errors import PathError
from shoal.sdk._pack import pack
from shoal.sdk._unpack import Unpacker, UnsafeArchiveError, _stays_inside
from shoal.sdk.tests.fake_node import FakeNode


def _member(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "", mode: int = 0o644
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode, info.mtime = (
        kind,
        len(data),
        link,
        mode,
        1_000_000_000,
    )
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(1024)


def _unpack(
    root: Path, stream: bytes, *, step: int = 1 << 20, rename: str | None = None
) -> list[str]:
    unpacker = Unpacker(str(root), rename)
    try:
        for at in range(0, len(stream), step):
            unpacker.feed(stream[at : at + step])
        unpacker.finish()
    finally:
        unpacker.close()
    return [name for name, _ in unpacker.skipped]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "outside.d").mkdir()
    return tmp_path / "root"


def _untouched(root: Path) -> bool:
    outside = root.parent
    names = sorted(path.name for path in outside.iterdir() if path != root)
    return (
        names == ["outside", "outside.d"]
        and (outside / "outside").read_text() == "precious"
        and not list((outside / "outside.d").iterdir())
    )


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "..", "a/..", "/", "./../x", "a//../x"]
)
@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
)
def test_cp_02_a_name_that_climbs_or_is_absolute_ends_it(
    root: Path, name: str, kind: bytes
) -> None:
    with pytest.raises(UnsafeArchiveError):
        _unpack(root, _member(name, kind, link="y") + END)
    assert _untouched(root)


def test_cp_02_the_same_through_pax_and_gnu_long_names(root: Path) -> None:
    for header in (
        _member("x", b"x", b"16 path=../evil\n"),
        _member("././@LongLink", b"L", b"../evil\0"),
    ):
        with pytest.raises(UnsafeArchiveError):
            _unpack(root, header + _member("fine", data=b"x") + END)
    assert _untouched(root)


@pytest.mark.parametrize(
    "target",
    [
        "/etc",
        "..",
        "../outside",
        "a/../../outside",
        "../root/../outside",
        "./../..",
        "",
        "up/../x",
        "//etc",
    ],
)
def test_cp_02_a_link_that_points_outside_is_left_out(root: Path, target: str) -> None:
    assert _unpack(root, _member("evil", tarfile.SYMTYPE, link=target) + END) == ["evil"]
    assert not (root / "evil").is_symlink()


def test_cp_02_two_links_that_are_harmless_alone_do_not_climb_together(root: Path) -> None:
    stream = (
        _member("s/deep/up", tarfile.SYMTYPE, link="../..")
        + _member("s/deep/x", tarfile.SYMTYPE, link="up/../outside")
        + END
    )
    assert _unpack(root, stream) == ["s/deep/x"]
    assert os.path.realpath(root / "s/deep/up") == os.path.realpath(root)


def test_cp_02_nothing_is_written_through_a_link(root: Path) -> None:
    root.mkdir()
    (root / "old").symlink_to(root.parent / "outside")
    (root / "dir").symlink_to(root.parent / "outside.d")
    stream = (
        _member("old", data=b"new")
        + _member("dir/x", data=b"new")
        + _member("in", tarfile.SYMTYPE, link="dir")
        + _member("in/y", data=b"new")
        + _member("in2", tarfile.SYMTYPE, link="dir")
        + _member("in2", tarfile.DIRTYPE)
        + END
    )
    assert _unpack(root, stream) == []
    assert _untouched(root)
    assert (root / "old").read_bytes() == b"new"
    assert not (root / "old").is_symlink()
    assert not (root / "dir").is_symlink()
    assert not (root / "in").is_symlink()
    assert (root / "in" / "y").read_bytes() == b"new"
    assert not (root / "dir" / "y").exists()


def test_cp_02_a_hard_link_only_names_what_came_with_it(root: Path) -> None:
    root.mkdir()
    (root / "mine").symlink_to(root.parent / "outside")
    stream = (
        _member("a", data=b"one")
        + _member("b", tarfile.LNKTYPE, link="a")
        + _member("c", tarfile.LNKTYPE, link="mine")
        + _member("d", tarfile.LNKTYPE, link="nothing")
        + END
    )
    assert _unpack(root, stream) == ["c", "d"]
    assert (root / "a").stat().st_ino == (root / "b").stat().st_ino
    assert _untouched(root)
    with pytest.raises(UnsafeArchiveError):
        _unpack(root, _member("e", tarfile.LNKTYPE, link="../outside") + END)


def test_cp_02_devices_and_set_id_bits_do_not_arrive(root: Path) -> None:
    stream = (
        _member("tty", tarfile.CHRTYPE)
        + _member("disk", tarfile.BLKTYPE)
        + _member("pipe", tarfile.FIFOTYPE)
        + _member("su", data=b"x", mode=0o6755)
        + _member("d", tarfile.DIRTYPE, mode=0o7777)
        + END
    )
    assert _unpack(root, stream) == ["tty", "disk", "pipe"]
    assert sorted(path.name for path in root.iterdir()) == ["d", "su"]
    assert (root / "su").stat().st_mode & 0o7777 == 0o755
    assert (root / "d").stat().st_mode & 0o7777 == 0o777


def test_cp_02_one_file_is_one_file_under_the_name_asked_for(root: Path) -> None:
    root.mkdir()
    assert _unpack(root, _member("whatever/name", data=b"x") + END, rename="mine") == []
    assert [path.name for path in root.iterdir()] == ["mine"]
    for stream in (
        _member("a", data=b"x") + _member("b", data=b"x") + END,
        _member("a", tarfile.DIRTYPE) + END,
        END,
    ):
        with pytest.raises(UnsafeArchiveError):
            _unpack(root, stream, rename="other")


def test_cp_02_malformed_streams_end_with_a_typed_error(root: Path) -> None:
    whole = _member("a", data=b"x" * 1000) + END
    broken = [
        whole[:100],
        whole[:700],
        whole[:-1024],
        b"\xff" * 512,
        bytearray(whole[:148] + b"0000000\0" + whole[156:]),
        whole + b"trailing",
        _member("x", b"x", b"9999999 path=a\n") + whole,
        _member("x", b"x", b"nonsense") + whole,
        _member("x", b"x", b"12 size=-5\n\n") + whole,
        _member("x", b"x", b"22 GNU.sparse.major=1\n") + whole,
        _member("a", b"S", b"") + END,
        _member("/".join("d" * 300), tarfile.DIRTYPE) + END,
    ]
    for stream in broken:
        with pytest.raises(PathError):
            _unpack(root, bytes(stream))
    assert _untouched(root)


def test_cp_02_a_giant_extended_header_is_not_read_into_memory(root: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = b"x", 8 << 30
    with pytest.raises(UnsafeArchiveError, match="too long"):
        _unpack(root, info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_cp_02_a_byte_limit_holds(root: Path) -> None:
    unpacker = Unpacker(str(root), None, 10)
    with pytest.raises(UnsafeArchiveError, match="more than 10"):
        unpacker.feed(_member("a", data=b"x" * 6) + _member("b", data=b"x" * 6) + END)
    unpacker.close()


@pytest.mark.parametrize("step", [1, 511, 512, 513, 100_000])
def test_how_the_stream_is_cut_does_not_matter(root: Path, step: int) -> None:
    stream = b"".join(
        [_member(f"d/{number}", data=os.urandom(number * 37)) for number in range(20)]
        + [_member("d/" + "n" * 150, data=b"long"), _member("l", tarfile.SYMTYPE, link="d/5"), END]
    )
    assert _unpack(root, stream, step=step) == []
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        for member in tar:
            if member.isreg():
                file = tar.extractfile(member)
                assert file is not None
                assert (root / member.name).read_bytes() == file.read()
    assert (root / "l").read_bytes() == (root / "d/5").read_bytes()


def test_what_pack_packs_tarfile_and_unpack_read_alike(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "a").write_bytes(b"a" * 5000)
    os.link(tree / "sub" / "a", tree / "b")
    (tree / "loop").symlink_to("loop")
    os.mkfifo(tree / "fifo")
    (tree / os.fsdecode(b"raw-\xff")).write_text("x")
    for whole in (False, True):
        stream = b"".join(piece for piece, _ in pack(str(tree), whole=whole))
        with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
            kinds = {member.name: member.type for member in tar}
        assert kinds.pop("sub/a") == (tarfile.LNKTYPE if whole else tarfile.REGTYPE)
        assert set(kinds) == {"b", "loop", os.fsdecode(b"raw-\xff"), "sub"}
        assert _unpack(tmp_path / f"out-{whole}", stream) == []
        assert (tmp_path / f"out-{whole}" / "sub" / "a").read_bytes() == b"a" * 5000


def test_a_target_stays_inside_or_not() -> None:
    inside = [
        (b"x", ("a",)),
        (b"../x", ("a", "b")),
        (b"../..", ("a", "b", "c")),
        (b"./x/y", ("a",)),
    ]
    outside = [
        (b"../x", ("a",)),
        (b"x/../y", ("a", "b")),
        (b"/x", ("a",)),
        (b"", ("a",)),
        (b"a\0b", ("a",)),
    ]
    assert all(_stays_inside(target, at) for target, at in inside)
    assert not any(_stays_inside(target, at) for target, at in outside)


async def test_cp_02_a_hostile_sandbox_cannot_write_outside_a_download(
    node: FakeNode, root: Path
) -> None:
    async with await AsyncSandbox.create() as sb:
        await sb.files.make_dir("/d")
        await sb.files.write("/f", b"")
        node.archive = _member("../../outside", data=b"owned") + END
        with pytest.raises(PathError):
            await sb.files.download("/d", root)
        node.archive = (
            _member("l", tarfile.SYMTYPE, link="/etc") + _member("l/passwd", data=b"x") + END
        )
        assert await sb.files.download("/d", root) == ["l"]
        node.archive = _member("f", tarfile.SYMTYPE, link="/etc/passwd") + END
        assert await sb.files.download("/f", root / "f") == ["f"]
    assert _untouched(root)
    assert (root / "l" / "passwd").read_bytes() == b"x"
