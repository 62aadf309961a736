"""FI: the file system from outside: bytes, attributes, trees, and changes as they happen."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio

from shoal import types
from shoal.conformance._expect import Unmet, holds, refused, same
from shoal.conformance._help import EVERY_BYTE, python, read_until, until
from shoal.conformance._suite import Trial, check
from shoal.errors import PathError, PathNotFoundError, ShoalError

MIB = 1 << 20

# ---- one file


@check("FI-01")
async def round_trip(t: Trial) -> None:
    """Bytes come back as they went: every value, none at all, many; text as UTF-8."""
    files = (await t.sandbox()).files
    for data in (b"", b"\n", EVERY_BYTE, EVERY_BYTE * 65536):
        info = await files.write("/app/data", data)
        same("size", info.size, len(data))
        same("bytes", await files.read("/app/data"), data)
    await files.write("/app/text", "ü€🐟\r\n")
    same("text", await files.read_text("/app/text"), "ü€🐟\r\n")


@check("FI-02")
async def one_file_system(t: Trial) -> None:
    """Files and commands see the same files, at once."""
    sandbox = await t.sandbox()
    await sandbox.files.write("/app/in", b"in")
    same("a command reads", (await sandbox.run(["cat", "/app/in"])).stdout, "in")
    await sandbox.run("printf out >/app/out", check=True)
    same("files read", await sandbox.files.read("/app/out"), b"out")


@check("FI-03", deadline=60)
async def streams(t: Trial) -> None:
    """A file is written from a stream and read as one: iterables, async ones, open files."""
    files = (await t.sandbox()).files
    pieces = [bytes([n]) * 100_000 for n in range(100)]
    whole = b"".join(pieces)

    async def coming() -> AsyncIterator[bytes]:
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece

    def ready() -> Iterator[bytes]:
        yield from pieces

    for name, source in (("async", coming()), ("sync", ready()), ("file", io.BytesIO(whole))):
        info = await files.write(f"/app/{name}", source)
        same(f"size from {name}", info.size, len(whole))
        seen, parts = b"", 0
        async for part in files.read_stream(f"/app/{name}"):
            seen += part
            parts += 1
        same(f"bytes from {name}", seen, whole)
        holds(parts > 1, "several parts", parts)


@check("FI-04")
async def ranges(t: Trial) -> None:
    """A range of a file is exactly that; past the end there is nothing."""
    files = (await t.sandbox()).files
    data = EVERY_BYTE * 1000
    await files.write("/app/data", data)
    for offset, length in (
        (0, 1),
        (255, 2),
        (1000, 70_000),
        (255_990, 100),
        (256_000, 5),
        (9**9, 5),
    ):
        got = await files.read("/app/data", offset=offset, length=length)
        same(f"bytes at {offset}", got, data[offset : offset + length])
        streamed = files.read_stream("/app/data", offset=offset, length=length)
        same(f"stream at {offset}", b"".join([part async for part in streamed]), got)
    same("to the end", await files.read("/app/data", offset=200_000), data[200_000:])
    same("nothing", await files.read("/app/data", length=0), b"")


@check("FI-05", deadline=60)
async def atomic(t: Trial) -> None:
    """A reader never sees half of a write, only the old file or the new one."""
    sandbox = await t.sandbox()
    await sandbox.files.write("/app/data", b"A" * MIB)
    program = """
import os
print("ready", flush=True)
kinds = set()
while not os.path.exists("/app/stop"):
    with open("/app/data", "rb") as file:
        data = file.read()
    kinds.add((len(data), len(set(data))))
print(sorted(kinds))
"""
    reader = await sandbox.exec(python(program))
    await read_until(reader, b"ready\n")
    for n in range(60):
        await sandbox.files.write("/app/data", b"AB"[n % 2 : n % 2 + 1] * MIB)
    await sandbox.files.write("/app/stop", b"")
    same("sizes and kinds of bytes", await reader.stdout.read_text(), f"{[(MIB, 1)]}\n")


@check("FI-06")
async def broken_write(t: Trial) -> None:
    """A write that breaks off in the middle leaves the old file, and nothing beside it."""
    files = (await t.sandbox()).files
    await files.write("/app/data", b"old")

    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * MIB
        raise _BrokenError

    try:
        await files.write("/app/data", broken())
    except (_BrokenError, ShoalError):
        pass
    else:
        raise Unmet("expected the source's own error\ngot a write that ended well")

    async def settled() -> bool:
        return [one.path for one in await files.list("/app")] == ["/app/data"]

    await until("only the old file in its directory", settled)
    same("content", await files.read("/app/data"), b"old")


class _BrokenError(Exception):
    pass


@check("FI-07")
async def written_as(t: Trial) -> None:
    """A new file is 0644 and root's unless told; one that is replaced keeps its mode and owner."""
    files = (await t.sandbox()).files
    one = await files.write("/app/one", b"1")
    same("new", (one.mode, one.uid, one.gid), (0o644, 0, 0))
    two = await files.write("/app/two", b"2", mode=0o750, user="1234:567")
    same("as told", (two.mode, two.uid, two.gid), (0o750, 1234, 567))
    two = await files.write("/app/two", b"3")
    same("replaced", (two.mode, two.uid, two.gid), (0o750, 1234, 567))
    with refused("write without parents", PathNotFoundError):
        await files.write("/app/none/three", b"", parents=False)


@check("FI-08")
async def change_mode_and_owner(t: Trial) -> None:
    """chmod and chown do what they say, follow links, and tell of a path that is not there."""
    sandbox = await t.sandbox()
    files = sandbox.files
    await files.write("/app/file", b"")
    await sandbox.run("ln -s file /app/link", check=True)
    for mode in (0o600, 0o755, 0o4755, 0o000):
        await files.chmod("/app/file", mode)
        same("mode", (await files.stat("/app/file")).mode, mode)
    await files.chmod("/app/link", 0o640)
    await files.chown("/app/link", "65534:77")
    info = await files.stat("/app/file")
    same("through a link", (info.mode, info.uid, info.gid), (0o640, 65534, 77))
    await files.chown("/app/file", "root")
    same("by name", (await files.stat("/app/file")).uid, 0)
    for call in (files.chmod("/app/none", 0o600), files.chown("/app/none", "0")):
        with refused("a path that is not there", PathNotFoundError):
            await call


# ---- names and directories


@check("FI-09")
async def stat_tells(t: Trial) -> None:
    """`stat` tells kind, size, mode, owner, time and a link's target, and follows no link at the end."""
    sandbox = await t.sandbox()
    await sandbox.run(
        "mkdir -p /app/dir; cd /app; printf 12345 >file; chmod 640 file; chown 11:22 file;"
        "touch -d @1000000000.5 file; ln -s /no/where link; mkfifo fifo",
        user="0",
        check=True,
    )
    file = await sandbox.files.stat("/app/file")
    got = (file.path, file.name, file.kind, file.size, file.mode, file.uid, file.gid, file.mtime)
    same("file", got, ("/app/file", "file", "file", 5, 0o640, 11, 22, 1_000_000_000.5))
    link = await sandbox.files.stat("/app/link")
    same("link", (link.kind, link.target), ("symlink", "/no/where"))
    kinds = [(await sandbox.files.stat(f"/app/{name}")).kind for name in ("dir", "fifo")]
    same("others", kinds, ["directory", "other"])


@check("FI-10")
async def listing(t: Trial) -> None:
    """A list is sorted, complete, and as deep as asked; links in it are not followed."""
    sandbox = await t.sandbox()
    files = sandbox.files
    await sandbox.run("mkdir -p /app/a/b/c; touch /app/z /app/a/y /app/a/b/x; ln -s / /app/l")
    await sandbox.run("cd /app/a/b/c; seq -f n%05g 3000 | xargs touch", check=True)

    async def paths(path: str, depth: int) -> list[str]:
        return [one.path for one in await files.list(path, depth=depth)]

    same("depth 1", await paths("/app", 1), ["/app/a", "/app/l", "/app/z"])
    two = ["/app/a", "/app/a/b", "/app/a/y", "/app/l", "/app/z"]
    same("depth 2", await paths("/app", 2), two)
    same("depth 3", await paths("/app", 3), sorted([*two, "/app/a/b/c", "/app/a/b/x"]))
    many = [f"/app/a/b/c/n{n:05}" for n in range(1, 3001)]
    same("3000 entries", await paths("/app/a/b/c", 1), many)
    same("an empty directory", (await files.make_dir("/app/e")).kind, "directory")
    same("its list", await paths("/app/e", 1), [])


@check("FI-11")
async def names(t: Trial) -> None:
    """Names may have blanks, quotes, newlines, percent signs, letters beyond ASCII, and 255 bytes."""
    sandbox = await t.sandbox()
    words = ["a b", "'\"", "new\nline", "%2e%2e", "a+b&c=d?e#f", "ü🐟", "-rf", "x" * 255, "..."]
    for word in words:
        await sandbox.files.write(f"/app/{word}", word)
        same("content", await sandbox.files.read_text(f"/app/{word}"), word)
    seen = await sandbox.run(python("import os; print(ascii(sorted(os.listdir('/app'))))"))
    same("names inside", seen.stdout, ascii(sorted(words)) + "\n")
    listed = {one.name for one in await sandbox.files.list("/app")}
    same("names listed", listed, set(words))


@check("FI-12")
async def make_and_exists(t: Trial) -> None:
    """`make_dir` makes parents if asked; `exists` is true of directories and of links that lead nowhere."""
    sandbox = await t.sandbox()
    files = sandbox.files
    made = await files.make_dir("/app/a/b", user="1234")
    same("made", (made.kind, made.uid), ("directory", 1234))
    await files.make_dir("/app/a/b")
    with refused("a directory without its parent", PathNotFoundError):
        await files.make_dir("/app/x/y", parents=False)
    await files.write("/app/file", b"")
    with refused("a directory where a file is", PathError):
        await files.make_dir("/app/file")
    await sandbox.run("ln -s /no/where /app/link", check=True)
    asked = ["/app/a/b", "/app/file", "/app/link", "/app/none", "/app/file/x"]
    got = [await files.exists(path) for path in asked]
    same("exists", got, [True, True, True, False, False])


@check("FI-13")
async def rename(t: Trial) -> None:
    """`rename` moves files and directories, replaces a file, and tells of a source that is not there."""
    files = (await t.sandbox()).files
    await files.write("/app/one", b"1")
    await files.write("/app/two", b"2")
    await files.rename("/app/one", "/app/two")
    same("replaced", await files.read("/app/two"), b"1")
    same("source", await files.exists("/app/one"), False)
    await files.write("/app/dir/file", b"3")
    await files.rename("/app/dir", "/app/moved")
    same("in a moved directory", await files.read("/app/moved/file"), b"3")
    with refused("a source that is not there", PathNotFoundError):
        await files.rename("/app/none", "/app/x")


@check("FI-14")
async def remove(t: Trial) -> None:
    """`remove` takes a file, a link (never what it leads to) or an empty directory; a full one only if told."""
    sandbox = await t.sandbox()
    files = sandbox.files
    await files.write("/app/kept/file", b"")
    await files.write("/app/tree/deep/file", b"")
    await sandbox.run("ln -s /app/kept /app/tree/link; ln -s /app/kept /app/link", check=True)
    with refused("a directory that is not empty", PathError):
        await files.remove("/app/tree")
    await files.remove("/app/link")
    await files.remove("/app/tree", recursive=True)
    same("left", [one.path for one in await files.list("/app", depth=3)], _KEPT)
    with refused("a path that is not there", PathNotFoundError):
        await files.remove("/app/none")


_KEPT = ["/app/kept", "/app/kept/file"]


# ---- changes as they happen


@check("FI-15")
async def watch(t: Trial) -> None:
    """A watch tells create, write, chmod, rename and remove below a directory, new directories included."""
    sandbox = await t.sandbox()
    await sandbox.files.make_dir("/app/w")
    async with sandbox.files.watch("/app/w") as events:
        await sandbox.run("echo x >/app/w/a", check=True)
        await _told(events, ("create", "/app/w/a"), ("write", "/app/w/a"))
        await sandbox.run("chmod 600 /app/w/a", check=True)
        await _told(events, ("chmod", "/app/w/a"))
        await sandbox.run("mv /app/w/a /app/w/b", check=True)
        renamed = await _told(events, ("rename", "/app/w/a"))
        same("target", renamed.target, "/app/w/b")
        await sandbox.run("rm /app/w/b", check=True)
        await _told(events, ("remove", "/app/w/b"))
        await sandbox.run("mkdir -p /app/w/new", check=True)
        made = await _told(events, ("create", "/app/w/new"))
        same("directory", made.directory, True)
        await sandbox.run("echo y >/app/w/new/c", check=True)
        await _told(events, ("create", "/app/w/new/c"))
        await sandbox.files.write("/app/w/new/d", b"by the file API")
        await _told(events, ("/app/w/new/d",))


@check("FI-16")
async def watch_borders(t: Trial) -> None:
    """What moves out of a watched tree is removed, what moves in is created."""
    sandbox = await t.sandbox()
    await sandbox.run("mkdir -p /app/w; touch /app/w/out /app/in", check=True)
    async with sandbox.files.watch("/app/w") as events:
        await sandbox.run("mv /app/w/out /app/out", check=True)
        await _told(events, ("remove", "/app/w/out"))
        await sandbox.run("mv /app/in /app/w/in", check=True)
        await _told(events, ("create", "/app/w/in"))


@check("FI-17")
async def watch_one_level(t: Trial) -> None:
    """A watch that is not recursive tells nothing from below; one of nothing is not found."""
    sandbox = await t.sandbox()
    await sandbox.files.make_dir("/app/w/below")
    async with sandbox.files.watch("/app/w", recursive=False) as events:
        await sandbox.run("touch /app/w/below/x; touch /app/w/y", check=True)
        async for event in events:
            holds("below/" not in event.path, "nothing from below", event)
            if event.path == "/app/w/y":
                break
    with refused("watch of nothing", PathNotFoundError):
        async with sandbox.files.watch("/app/none"):
            pass


async def _told(
    events: AsyncIterator[types.FileEvent], *wanted: tuple[str, ...]
) -> types.FileEvent:
    """The last of `wanted` once all have come, as (kind, path) or as (path,) of any kind."""
    left, seen = list(wanted), []
    with anyio.move_on_after(10):
        async for event in events:
            seen.append(event)
            left = [one for one in left if one not in ((event.kind, event.path), (event.path,))]
            if not left:
                return event
    raise Unmet(f"expected the events {left}\ngot {[(one.kind, one.path) for one in seen]}")


# ---- trees in and out


@check("FI-18", deadline=60)
async def trees(t: Trial) -> None:
    """A tree goes in and comes back the same: bytes, modes, links, times, empty directories, odd names."""
    sandbox = await t.sandbox()
    top = t.directory()
    _grow(top / "tree")
    sent: list[int] = []
    received: list[int] = []
    await sandbox.files.upload(top / "tree", "/app/tree", progress=sent.append)
    inside = await sandbox.run(
        "cd /app/tree; ./run; readlink link; stat -c %a.%Y run; id -u", user="0"
    )
    same("inside", inside.stdout.split(), ["ran", "run", "750.1000000000", "0"])
    left_out = await sandbox.files.download("/app/tree", top / "back", progress=received.append)
    same("left out", left_out, [])
    same("tree", _census(top / "back"), _census(top / "tree"))
    for name, told in (("upload", sent), ("download", received)):
        holds(bool(told) and told == sorted(told), f"progress of the {name} that grows", told)
        holds(told[-1] >= 3 * MIB, f"progress of the {name} up to the last byte", told[-1])


@check("FI-19")
async def one_file(t: Trial) -> None:
    """One file goes to the name given, or keeps its own below a path that ends in `/`; so does the way back."""
    sandbox = await t.sandbox()
    top = t.directory()
    await anyio.to_thread.run_sync((top / "a.txt").write_bytes, EVERY_BYTE)
    await sandbox.files.upload(top / "a.txt", "/app/b.txt")
    await sandbox.files.upload(top / "a.txt", "/app/dir/", user="1234")
    same("named", await sandbox.files.read("/app/b.txt"), EVERY_BYTE)
    same("owner", (await sandbox.files.stat("/app/dir/a.txt")).uid, 1234)
    await sandbox.files.download("/app/b.txt", top / "c.txt")
    await sandbox.files.download("/app/b.txt", f"{top}/out/")
    same("back", sorted(_census(top)), ["a.txt", "c.txt", "out", "out/b.txt"])
    with refused("download of nothing", PathNotFoundError):
        await sandbox.files.download("/app/none", top / "none")


@check("FI-20")
async def nothing_outside(t: Trial) -> None:
    """A download writes nothing outside the directory it was given, whatever links are in the sandbox or here."""
    sandbox = await t.sandbox()
    top = t.directory()
    _trap(top)
    await sandbox.run(
        "mkdir -p /app/tree/real /app/tree/here; cd /app/tree; ln -s ../outside up; ln -s /etc abs;"
        "ln -s real inside; echo stolen >here/file; ln -s ../../outside/file real/deep; mkfifo fifo",
        check=True,
    )
    left_out = await sandbox.files.download("/app/tree", top / "target")
    same("outside", (top / "outside" / "file").read_bytes(), b"mine")
    same("entries outside", os.listdir(top / "outside"), ["file"])
    same("where a link of mine was", (top / "target" / "here" / "file").read_bytes(), b"stolen\n")
    same("links that stayed", _links(top / "target"), {"inside": "real"})
    same("left out", {one.rstrip("/").rpartition("/")[2] for one in left_out}, _LEFT_OUT)


_LEFT_OUT = {"up", "abs", "deep", "fifo"}


@check("FI-21")
async def links_stay_inside(t: Trial) -> None:
    """Paths and links are the sandbox's own: none leads to this machine's files."""
    sandbox = await t.sandbox()
    await sandbox.run("echo own >/etc/own-name; ln -s /etc/own-name /link", user="0", check=True)
    await sandbox.run("ln -s ../../../../../../etc/own-name /up", user="0", check=True)
    for path in ("/link", "/up", "/../../../etc/own-name", "/proc/self/root/etc/own-name"):
        try:
            same(path, await sandbox.files.read(path), b"own\n")
        except PathError:
            holds(path.startswith("/proc"), f"{path} to be read", "PathError")
    await sandbox.files.write("/link", b"changed\n")
    same("inside", (await sandbox.run(["cat", "/etc/own-name"])).stdout in _EITHER, True)


_EITHER = ("own\n", "changed\n")
"""Whether a write goes through a link or replaces it is not promised; that it stays inside is."""


@check("FI-22", deadline=90)
async def large(t: Trial) -> None:
    """A file of 256 MiB goes in from a stream and comes back as one."""
    sandbox = await t.sandbox(memory_mib=256, timeout=150)
    piece = hashlib.sha256(b"").digest() * 32768

    async def coming() -> AsyncIterator[bytes]:
        for _ in range(256):
            yield piece

    await sandbox.files.write("/app/large", coming())
    digest = hashlib.sha256()
    async for part in sandbox.files.read_stream("/app/large"):
        digest.update(part)
    wanted = hashlib.sha256()
    for _ in range(256):
        wanted.update(piece)
    same("digest", digest.hexdigest(), wanted.hexdigest())


def _grow(top: Path) -> None:
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "empty").mkdir(mode=0o700)
    (top / "run").write_bytes(b"#!/bin/sh\necho ran\n")
    (top / "run").chmod(0o750)
    (top / "sub" / "big").write_bytes(EVERY_BYTE * 12288)
    (top / "sub" / "secret").write_bytes(b"s")
    (top / "sub" / "secret").chmod(0o600)
    (top / "sub" / "ü b\n🐟").write_bytes(b"odd")
    (top / "link").symlink_to("run")
    (top / "sub" / "up").symlink_to("../sub/secret")
    (top / "sub" / "nowhere").symlink_to("missing")
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, (1_000_000_000, 1_000_000_000), follow_symlinks=False)
    os.utime(top, (1_000_000_000, 1_000_000_000))


def _census(top: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            fact: tuple[object, ...] = ("link", os.readlink(path))
        elif stat.S_ISDIR(info.st_mode):
            fact = ("directory", oct(info.st_mode), int(info.st_mtime))
        else:
            fact = ("file", oct(info.st_mode), int(info.st_mtime), hash(path.read_bytes()))
        found[str(path.relative_to(top))] = fact
    return found


def _trap(top: Path) -> None:
    (top / "outside").mkdir()
    (top / "outside" / "file").write_bytes(b"mine")
    (top / "target").mkdir()
    (top / "target" / "here").symlink_to("../outside")


def _links(top: Path) -> dict[str, str]:
    found = (path for path in sorted(top.rglob("*")) if path.is_symlink())
    return {str(path.relative_to(top)): os.readlink(path) for path in found}
