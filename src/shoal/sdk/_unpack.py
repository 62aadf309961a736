"""A tar stream that a sandbox made, unpacked below one directory of this machine.

The sandbox is not trusted, so neither is the stream. Names with `..` or a leading `/` end it; a link in the
way is replaced, never followed; a link that would point outside is left out, as are devices, FIFOs and
sockets; set-id bits and owners are dropped. Every step is taken relative to an open directory (openat(2)
with O_NOFOLLOW), so a link that appears in the middle is not followed either.

Source: pax(1), POSIX.1-2017, ustar and pax interchange formats; GNU tar's L and K members.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import PathError

_BLOCK = 512
_MAX_HEADER = 1 << 20
"""Bytes of one extended header; a longer one is an attack."""
_MAX_DEPTH = 256
_LEFT_OUT = {
    "1": "a hard link to what did not come with it",
    "2": "a link that points outside",
    "3": "a device",
    "4": "a device",
    "6": "a FIFO",
}
"""Why a member of this kind is left out."""
"""Directories above a member."""
_DIR_FD = os.open in os.supports_dir_fd and hasattr(os, "O_DIRECTORY")
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class UnsafeArchiveError(PathError):
    """The stream asks for something outside the chosen directory, or is malformed."""

    code = "unsafe_archive"


@dataclass
class Member:
    """One header, extended headers applied."""

    name: bytes
    kind: str
    size: int
    mode: int
    mtime: float
    link: bytes


def _number(raw: bytes) -> int:
    if raw[:1] in (b"\x80", b"\xff"):  # base 256, GNU
        value = (
            int.from_bytes(raw, "big", signed=True)
            if raw[0] == 0xFF
            else int.from_bytes(raw[1:], "big")
        )
        if value < 0:
            raise UnsafeArchiveError("negative number in a tar header")
        return value
    text = raw.strip(b" \0")
    if not text:
        return 0
    if any(byte not in b"01234567" for byte in text):
        raise UnsafeArchiveError("malformed number in a tar header")
    return int(text, 8)


def _pax(raw: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    while raw:
        digits, space, rest = raw.partition(b" ")
        if not space or not digits.isdigit() or len(digits) > 9:
            raise UnsafeArchiveError("malformed pax header")
        length = int(digits) - len(digits) - 1
        record, raw = rest[:length], rest[length:]
        key, equals, value = record.partition(b"=")
        if length < 1 or len(record) < length or not equals or not value.endswith(b"\n"):
            raise UnsafeArchiveError("malformed pax header")
        found[key.decode("utf-8", "replace")] = value[:-1]
    return found


def _parse(block: bytes) -> Member:
    stored = _number(block[148:156])
    if sum(block[:148]) + 8 * 0x20 + sum(block[156:]) != stored:
        raise UnsafeArchiveError("wrong checksum in a tar header")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return Member(
        name=name,
        kind=chr(block[156]) if block[156] else "0",
        size=_number(block[124:136]),
        mode=_number(block[100:108]),
        mtime=float(_number(block[136:148])),
        link=block[157:257].split(b"\0", 1)[0],
    )


@dataclass
class Unpacker:
    """Takes a tar stream in pieces and writes what it holds below `root`.

    `feed` blocks on the disk: call it from a worker thread. `close` must be called in the end, also after an
    error; it reports a stream that ended early.

    With `rename` the stream must hold exactly one member that is no directory, and that is written under this
    name: how one file is fetched.
    """

    root: str
    rename: str | None = None
    max_bytes: int | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """What was left out here or by the packer, each with the reason: links that point outside, devices, …"""
    written: int = 0
    """Bytes of file content so far."""
    members: int = 0

    def __post_init__(self) -> None:
        self._disk = _Disk(self.root)
        self._buffer = bytearray()
        self._machine = self._run()
        self._need = next(self._machine)
        self._ended = False
        self._directories: list[tuple[tuple[str, ...], int, float]] = []
        self._files: set[tuple[str, ...]] = set()

    def feed(self, data: bytes) -> None:
        """Take the next piece of the stream.

        Raises:
            UnsafeArchiveError: It is malformed or asks for something outside; what came before stays.
            OSError: The disk refused.
        """
        if self._ended:
            if data.strip(b"\0"):
                raise UnsafeArchiveError("data after the end of the archive")
            return
        self._buffer += data
        at = 0
        view = memoryview(self._buffer)
        try:
            while len(view) - at >= self._need[0] or (self._need[1] and len(view) > at):
                take = min(self._need[0], len(view) - at)
                piece = bytes(view[at : at + take])
                at += take
                try:
                    self._need = self._machine.send(piece)
                except StopIteration:
                    self._ended = True
                    if bytes(view[at:]).strip(b"\0"):
                        raise UnsafeArchiveError("data after the end of the archive") from None
                    at = len(view)
                    break
        finally:
            view.release()
        del self._buffer[:at]

    def finish(self) -> None:
        """Give directories their modes and times; nothing may follow.

        Raises:
            UnsafeArchiveError: The stream ended in the middle.
        """
        if not self._ended:
            raise UnsafeArchiveError("the archive ended early")
        if self.rename is not None and self.members != 1:
            raise UnsafeArchiveError(f"one file was asked for, {self.members} came")
        for parts, mode, mtime in reversed(self._directories):
            with self._disk.parent((*parts, "."), make=False) as parent:
                if parent is not None:
                    self._disk.stamp_directory(parent, mode, mtime)

    def close(self) -> None:
        """Let go of the directory."""
        self._machine.close()
        self._disk.close()

    def _run(self) -> Generator[tuple[int, bool], bytes, None]:
        """Yields how many bytes it wants next, and whether fewer will do; is sent them."""
        pax: dict[str, bytes] = {}
        long_name: bytes | None = None
        long_link: bytes | None = None
        while True:
            block = yield _BLOCK, False
            if not any(block):
                return
            member = _parse(block)
            if member.kind in "xgLK":
                if member.size > _MAX_HEADER:
                    raise UnsafeArchiveError("extended tar header too long")
                raw = (yield from self._exactly(member.size + -member.size % _BLOCK))[: member.size]
                if member.kind == "g":
                    self._comment(_pax(raw).get("comment", b""))
                elif member.kind == "x":
                    pax = _pax(raw)
                elif member.kind == "L":
                    long_name = raw.rstrip(b"\0")
                elif member.kind == "K":
                    long_link = raw.rstrip(b"\0")
                continue
            member.name = pax.get("path", long_name if long_name is not None else member.name)
            member.link = pax.get("linkpath", long_link if long_link is not None else member.link)
            try:
                member.size = int(pax.get("size", member.size))
                member.mtime = float(pax.get("mtime", member.mtime))
            except ValueError as error:
                raise UnsafeArchiveError("malformed pax header") from error
            if any(key.startswith("GNU.sparse") for key in pax) or member.size < 0:
                raise UnsafeArchiveError(
                    "a kind of tar member that is not taken", member=_show(member.name)
                )
            if not -1e11 < member.mtime < 1e11:
                member.mtime = 0.0
            pax, long_name, long_link = {}, None, None
            yield from self._take(member)

    def _comment(self, text: bytes) -> None:
        """Take note of what the sandbox's packer left out: `left out, WHY: PATH`."""
        why, colon, path = text.removeprefix(b"left out, ").partition(b": ")
        if colon and text.startswith(b"left out, "):
            self.skipped.append((_show(path), _show(why)))

    def _exactly(self, count: int) -> Generator[tuple[int, bool], bytes, bytes]:
        return (yield count, False) if count else b""

    def _skip(self, count: int) -> Generator[tuple[int, bool], bytes, None]:
        while count:
            count -= len((yield count, True))

    def _take(self, member: Member) -> Generator[tuple[int, bool], bytes, None]:
        parts = _parts(member.name)
        self.members += 1
        padding = -member.size % _BLOCK
        if self.rename is not None:
            if member.kind == "5" or self.members > 1:
                raise UnsafeArchiveError("one file was asked for, something else came")
            parts = (self.rename,)
        if member.kind in "07":
            yield from self._file(member, parts)
            yield from self._skip(padding)
            return
        if member.kind == "5":
            yield from self._skip(member.size + padding)
            if parts:  # the top is the caller's own, and keeps its mode
                with self._disk.parent((*parts, "."), make=True):
                    pass
                self._directories.append((parts, member.mode & 0o777, member.mtime))
            return
        if member.kind not in "12346":
            raise UnsafeArchiveError(
                "a kind of tar member that is not taken", member=_show(member.name)
            )
        yield from self._skip(member.size + padding)
        if not parts:
            raise UnsafeArchiveError("the archive's top is no directory")
        if member.kind == "2" and _stays_inside(member.link, parts):
            with self._disk.parent(parts, make=True) as parent:
                self._disk.symlink(parent, parts[-1], os.fsdecode(member.link), member.mtime)
            self._files.discard(parts)
        elif member.kind == "1" and (source := _parts(member.link)) in self._files:
            if source != parts:
                with (
                    self._disk.parent(source, make=False) as old,
                    self._disk.parent(parts, make=True) as new,
                ):
                    self._disk.link(old, source[-1], new, parts[-1])
                self._files.add(parts)
        else:
            self.skipped.append((_show(member.name), _LEFT_OUT[member.kind]))

    def _file(
        self, member: Member, parts: tuple[str, ...]
    ) -> Generator[tuple[int, bool], bytes, None]:
        if not parts or member.name.endswith(b"/"):
            raise UnsafeArchiveError("a file without a name", member=_show(member.name))
        if self.max_bytes is not None and self.written + member.size > self.max_bytes:
            raise UnsafeArchiveError(f"more than {self.max_bytes} bytes", member=_show(member.name))
        with self._disk.parent(parts, make=True) as parent:
            fd = self._disk.create(parent, parts[-1])
        try:
            left = member.size
            while left:
                piece = yield left, True
                left -= len(piece)
                self.written += len(piece)
                rest = memoryview(piece)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            self._disk.stamp_file(fd, member.mode & 0o777, member.mtime)
        finally:
            os.close(fd)
        self._files.add(parts)


def _show(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _parts(name: bytes) -> tuple[str, ...]:
    """The components of a member's name.

    Raises:
        UnsafeArchiveError: It is absolute, climbs, or cannot be a name here.
    """
    if name.startswith(b"/") or b"\0" in name or not name:
        raise UnsafeArchiveError("a member's name leaves the directory", member=_show(name))
    parts = [part for part in os.fsdecode(name).split("/") if part not in ("", ".")]
    for part in parts:
        if (
            part == ".."
            or os.sep in part
            or (os.altsep and os.altsep in part)
            or (os.name == "nt" and ":" in part)
        ):
            raise UnsafeArchiveError("a member's name leaves the directory", member=_show(name))
    if len(parts) > _MAX_DEPTH:
        raise UnsafeArchiveError("a member lies too deep")
    return tuple(parts)


def _stays_inside(target: bytes, at: tuple[str, ...]) -> bool:
    """Whether a link at `at` with this target points below the root, whatever links lie on its way.

    `..` counts only at the target's start, where what it climbs are real directories; after a name it could
    climb out of wherever that name leads.
    """
    text = os.fsdecode(target)
    if (
        not target
        or text.startswith("/")
        or "\0" in text
        or (os.name == "nt" and (":" in text or "\\" in text))
    ):
        return False
    parts = [part for part in text.split("/") if part not in ("", ".")]
    climbs = 0
    while climbs < len(parts) and parts[climbs] == "..":
        climbs += 1
    return ".." not in parts[climbs:] and climbs < len(at)


class _Disk:
    """What is done below the root, each step relative to an open directory."""

    def __init__(self, root: str) -> None:
        os.makedirs(root, exist_ok=True)
        self._root = root
        self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC) if _DIR_FD else -1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextlib.contextmanager
    def parent(self, parts: tuple[str, ...], *, make: bool) -> Iterator[Any]:
        """The directory that holds the last of `parts`: a descriptor, or a path where there is no openat(2).

        With `make`, what is missing or is no directory on the way is replaced by one; without, the answer is
        None then.
        """
        if not _DIR_FD:
            yield self._walk_paths(parts, make)
            return
        fd = os.dup(self._fd)
        try:
            for part in parts[:-1]:
                try:
                    below = self._enter(fd, part, make)
                except OSError:
                    if make:
                        raise
                    break
                os.close(fd)
                fd = below
            else:
                yield fd
                return
            yield None
        finally:
            os.close(fd)

    def _enter(self, fd: int, part: str, make: bool) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | _NOFOLLOW | _CLOEXEC
        try:
            return os.open(part, flags, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except PermissionError:
            raise
        except OSError:  # ELOOP: a link
            pass
        if not make:
            raise FileNotFoundError(part)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=fd)
        os.mkdir(part, 0o700, dir_fd=fd)
        return os.open(part, flags, dir_fd=fd)

    def _walk_paths(self, parts: tuple[str, ...], make: bool) -> str | None:
        path = self._root
        for part in parts[:-1]:
            path = os.path.join(path, part)
            is_directory = os.path.isdir(path) and not os.path.islink(path)
            if not is_directory:
                if not make:
                    return None
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                os.mkdir(path)
        return path

    def _at(self, parent: Any, name: str) -> tuple[str, dict[str, Any]]:
        return (name, {"dir_fd": parent}) if _DIR_FD else (os.path.join(parent, name), {})

    def _clear(self, parent: Any, name: str) -> None:
        """Take away what stands where something else shall stand."""
        path, at = self._at(parent, name)
        try:
            os.unlink(path, **at)
        except FileNotFoundError:
            pass
        except OSError:
            # An empty directory may make room; one with things in it stays, and the caller is told.
            os.rmdir(path, **at)

    def create(self, parent: Any, name: str) -> int:
        self._clear(parent, name)
        path, at = self._at(parent, name)
        return os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC, 0o600, **at
        )

    def symlink(self, parent: Any, name: str, target: str, mtime: float) -> None:
        self._clear(parent, name)
        path, at = self._at(parent, name)
        os.symlink(target, path, **at)
        if os.utime in os.supports_follow_symlinks:
            with contextlib.suppress(OSError):
                os.utime(path, (mtime, mtime), follow_symlinks=False, **at)

    def link(self, old_parent: Any, old: str, parent: Any, name: str) -> None:
        if old_parent is None:
            raise UnsafeArchiveError("a hard link to nothing")
        self._clear(parent, name)
        if _DIR_FD:
            status = os.stat(old, dir_fd=old_parent, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise UnsafeArchiveError("a hard link to something that is no file")
            os.link(old, name, src_dir_fd=old_parent, dst_dir_fd=parent, follow_symlinks=False)
        else:
            os.link(os.path.join(old_parent, old), os.path.join(parent, name))

    @staticmethod
    def stamp_file(fd: int, mode: int, mtime: float) -> None:
        if hasattr(os, "fchmod"):
            os.fchmod(fd, mode)
        if os.utime in os.supports_fd:
            os.utime(fd, (mtime, mtime))

    @staticmethod
    def stamp_directory(parent: Any, mode: int, mtime: float) -> None:
        if isinstance(parent, int):
            os.fchmod(parent, mode)
            os.utime(parent, (mtime, mtime))
