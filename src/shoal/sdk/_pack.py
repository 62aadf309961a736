"""A local file or tree as a tar stream, made on the fly: nothing is spooled and nothing is followed."""

from __future__ import annotations

import asyncio
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

CHUNK = 1 << 20
"""Bytes handed over at once, about."""

T = TypeVar("T")
Progress = Callable[[int], None]
"""Called with the bytes of file content moved so far, which add up to what `measure` says."""
Pieces = Iterator[tuple[bytes, int]]
"""Bytes to send, each time with how many of them are content of files."""


def pack(source: str, name: str = "", *, whole: bool = False) -> Pieces:
    """Tar `source`, a chunk at a time.

    Links are packed as links. Sockets, devices and FIFOs are left out.

    Args:
        source: A file or directory on this machine.
        name: Member name of `source`; empty for a directory whose entries are the top level.
        whole: Keep owners, hard links and extended attributes, as a root file system needs them; otherwise
            everything belongs to root and a second name of a file is a second file.

    Raises:
        OSError: A file cannot be read, or shrank while it was.
    """
    buffer, fresh = bytearray(), 0
    seen: dict[tuple[int, int], str] = {}
    for path, member, status in _walk(source, name):
        info, content = _member(path, member, status, whole, seen)
        buffer += info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        if content and info.size:
            left = info.size
            with open(path, "rb") as file:
                while left:
                    block = file.read(min(left, CHUNK))
                    if not block:
                        raise OSError(f"{path} became shorter while it was read")
                    left -= len(block)
                    buffer += block
                    fresh += len(block)
                    if len(buffer) >= CHUNK:
                        yield bytes(buffer), fresh
                        buffer.clear()
                        fresh = 0
            buffer += bytes(-info.size % 512)
        if len(buffer) >= CHUNK:
            yield bytes(buffer), fresh
            buffer.clear()
            fresh = 0
    yield bytes(buffer + bytes(1024)), fresh


def measure(source: str, name: str = "") -> int:
    """Bytes of file content that `pack` will send, for a progress bar."""
    return sum(
        status.st_size for _, _, status in _walk(source, name) if stat.S_ISREG(status.st_mode)
    )


def _walk(source: str, name: str) -> Iterator[tuple[str, str, os.stat_result]]:
    """Path, member name and status of everything to pack, parents first, in the order of names."""
    top = os.lstat(source)
    if name or not stat.S_ISDIR(top.st_mode):
        if _kept(top):
            yield source, name or os.path.basename(source), top
        if not stat.S_ISDIR(top.st_mode):
            return
    stack = [(source, f"{name}/" if name else "")]
    while stack:
        directory, prefix = stack.pop()
        below: list[tuple[str, str]] = []
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            status = entry.stat(follow_symlinks=False)
            if not _kept(status):
                continue
            yield entry.path, prefix + entry.name, status
            if stat.S_ISDIR(status.st_mode):
                below.append((entry.path, f"{prefix}{entry.name}/"))
        stack.extend(reversed(below))


def _kept(status: os.stat_result) -> bool:
    mode = status.st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)


def _member(
    path: str, name: str, status: os.stat_result, whole: bool, seen: dict[tuple[int, int], str]
) -> tuple[tarfile.TarInfo, bool]:
    """A member's header, and whether the file's content follows it."""
    info = tarfile.TarInfo(name)
    info.mode = stat.S_IMODE(status.st_mode)
    info.mtime = int(status.st_mtime)
    if whole:
        info.uid, info.gid = status.st_uid, status.st_gid
        if xattrs := _xattrs(path):
            info.pax_headers = xattrs
    if stat.S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
        return info, False
    if stat.S_ISLNK(status.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        return info, False
    if whole and status.st_nlink > 1:
        key = (status.st_dev, status.st_ino)
        if (first := seen.setdefault(key, name)) != name:
            info.type, info.linkname = tarfile.LNKTYPE, first
            return info, False
    info.size = status.st_size
    return info, True


def _xattrs(path: str) -> dict[str, str]:
    if not hasattr(os, "listxattr"):
        return {}
    try:
        names = os.listxattr(path, follow_symlinks=False)
        return {
            f"SCHILY.xattr.{name}": os.getxattr(path, name, follow_symlinks=False).decode(
                "utf-8", "surrogateescape"
            )
            for name in names
        }
    except OSError:
        return {}  # a file system without them


async def in_thread(pieces: Pieces, progress: Progress | None = None) -> AsyncIterator[bytes]:
    """`pieces`, each made in a worker thread, so that a slow disk stops nobody else."""
    done = 0
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece[0]
        done += piece[1]
        if progress is not None:
            progress(done)
