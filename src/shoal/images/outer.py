"""The outer archive: which members a tar file has, and where.

An image arrives as a tar of blobs. This reads its table, nothing else: strictly, with bounds, and
without ever unpacking a member. What the table says twice, or what two parsers could read
differently, is refused; layers inside are read by the unpacker, which is somebody else.

Source: `pax(1)` of POSIX.1-2017, "ustar Interchange Format"; the GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

import msgspec

from shoal.errors import DigestMismatchError, ImageError

_BLOCK = 512
_MAX_META = 1 << 20
_MAX_NAME = 4096
_MAX_MEMBERS = 65_536
_CHUNK = 1 << 20
_MAX_PADDING = 1 << 20
_OCTAL = re.compile(rb"[ ]*([0-7]*)[\0 ]*")
_BEYOND_OCTAL = 1 << 33

MemberKind = Literal["file", "directory", "link", "other"]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A member of the outer archive."""

    name: str
    """Normalised: relative, without `.` and `..`; empty for the root itself."""
    kind: MemberKind
    offset: int
    """Where its content begins."""
    size: int
    target: str = ""
    """For a link: the member that it means, normalised; empty when that lies outside."""


def _refuse(what: str, name: str | bytes = b"") -> ImageError:
    if isinstance(name, bytes):
        name = name.decode("utf-8", "replace")
    about = f": {name[:200]!r}" if name else ""
    return ImageError(f"malformed archive: {what}{about}")


def normalised(name: str) -> str:
    """A member's name without `./` and doubled slashes; refused when it leaves the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise _refuse("name leaves the archive", name)
    return "/".join(parts)


def _link_target(name: str, target: str, *, symbolic: bool) -> str:
    path = posixpath.normpath(
        posixpath.join(posixpath.dirname(name), target) if symbolic else target
    )
    return "" if path.startswith(("/", "..")) or path == "." else path


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _OCTAL.fullmatch(field)
    if digits is None:
        raise _refuse("malformed number in a header")
    return int(digits[1] or b"0", 8)


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _pax(records: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    while records:
        digits, space, _ = records[:9].partition(b" ")
        if not space or not digits.isdigit() or digits.startswith(b"0"):
            raise _refuse("malformed pax record")
        length = int(digits)
        record, records = records[len(digits) + 1 : length], records[length:]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or not key or not record.endswith(b"\n"):
            raise _refuse("malformed pax record")
        if len(digits) + 1 + len(record) != length:
            raise _refuse("malformed pax record")
        if key in found:
            raise _refuse("pax record given twice", key)
        if key.startswith(b"GNU.sparse.") or key == b"SCHILY.realsize":
            raise _refuse("sparse member", key)
        found[key] = value
    return found


class _Meta:
    """What extended headers said about the next member."""

    def __init__(self) -> None:
        self.pax: dict[bytes, bytes] | None = None
        self.path: bytes | None = None
        self.link: bytes | None = None

    def take(self, flag: bytes, content: bytes) -> None:
        if flag == b"g":
            if set(_pax(content)) - {b"comment"}:
                raise _refuse("global header that changes members")
        elif flag == b"x":
            if self.pax is not None:
                raise _refuse("two extended headers for one member")
            self.pax = _pax(content)
        else:
            name = content.removesuffix(b"\0")
            if (self.path if flag == b"L" else self.link) is not None or b"\0" in name or not name:
                raise _refuse("malformed GNU long name")
            if flag == b"L":
                self.path = name
            else:
                self.link = name

    def is_empty(self) -> bool:
        return self.pax is None and self.path is None and self.link is None


def _size(header: bytes, pax: dict[bytes, bytes], name: bytes) -> int:
    size = _number(header[124:136])
    if b"size" not in pax:
        return size
    told = pax[b"size"]
    if not told.isdigit() or len(told) > 18:
        raise _refuse("malformed number in a pax record", name)
    large = int(told)
    if large != size and (large < _BEYOND_OCTAL or size not in (0, _BEYOND_OCTAL - 1)):
        raise _refuse("two sizes for one member", name)
    return large


def _member(header: bytes, meta: _Meta, offset: int) -> Member:
    flag = header[156:157]
    path = _text(header[:100])
    if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
        path = prefix + b"/" + path
    link = _text(header[157:257])
    pax = meta.pax or {}
    for key, own, other in ((b"path", path, meta.path), (b"linkpath", link, meta.link)):
        if other is not None and key in pax:
            raise _refuse("both pax and GNU tell a name", own)
    path = pax.get(b"path", path) if meta.path is None else meta.path
    link = pax.get(b"linkpath", link) if meta.link is None else meta.link
    if not path or b"\0" in path or len(path) > _MAX_NAME or len(link) > _MAX_NAME:
        raise _refuse("name is empty, too long or has a NUL", path)
    size = _size(header, pax, path)
    try:
        name, target = path.decode(), link.decode()
    except UnicodeDecodeError:
        raise _refuse("name is not UTF-8", path) from None
    kind: MemberKind = "other"
    if flag in (b"0", b"\0", b"7"):
        kind = "directory" if flag == b"\0" and name.endswith("/") else "file"
        if kind == "file" and name.endswith("/"):
            raise _refuse("slash at the end of what is no directory", name)
    elif flag == b"5":
        kind = "directory"
    elif flag in (b"1", b"2"):
        kind = "link"
    elif flag not in (b"3", b"4", b"6"):
        raise _refuse("unknown type of member", name)
    if kind != "file" and size:
        raise _refuse("content in what is no file", name)
    name = normalised(name)
    target = _link_target(name, target, symbolic=flag == b"2") if kind == "link" else ""
    return Member(name=name, kind=kind, offset=offset, size=size, target=target)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise ImageError("archive ends early")
    return content


def _check_sum(header: bytes) -> None:
    own = sum(header) - sum(header[148:156]) + 8 * 0x20
    try:
        right = _number(header[148:156]) == own
    except ImageError:
        right = False
    if not right:
        raise _refuse("wrong checksum: this is no tar file, or a damaged one")
    if header[257:265] not in (b"ustar\x0000", b"ustar  \0", bytes(8)):
        raise _refuse("unknown kind of tar")


def members(stream: IO[bytes]) -> Iterator[Member]:
    """The members of a tar, in order.

    Args:
        stream: At the first byte. Seekable; a decompressing stream will do.

    Raises:
        ImageError: It is no tar, damaged, cut, or holds more members than an image archive may.
    """
    meta = _Meta()
    offset = count = zeros = 0
    while zeros < 2:
        header = _exactly(stream, _BLOCK)
        offset += _BLOCK
        if not any(header):
            if not meta.is_empty():
                raise _refuse("extended header without a member")
            zeros += 1
            continue
        if zeros:
            raise _refuse("header after an end block")
        _check_sum(header)
        count += 1
        if count > _MAX_MEMBERS:
            raise ImageError(f"archive has more than {_MAX_MEMBERS} members", limit=_MAX_MEMBERS)
        flag = header[156:157]
        if flag in (b"x", b"g", b"L", b"K"):
            size = _number(header[124:136])
            if size > _MAX_META:
                raise ImageError(f"archive has a header of more than {_MAX_META} bytes")
            padded = size + -size % _BLOCK
            meta.take(flag, _exactly(stream, padded)[:size])
            offset += padded
            continue
        member = _member(header, meta, offset)
        meta = _Meta()
        yield member
        offset += member.size + -member.size % _BLOCK
        if stream.seek(offset) != offset:
            raise ImageError("archive ends early")
    rest = stream.read(_MAX_PADDING + 1)
    if len(rest) > _MAX_PADDING or any(rest):
        raise _refuse("data after the end")


class Archive:
    """An open archive with its table. Close it after use.

    Args:
        path: A seekable, uncompressed tar file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            self._members = self._index()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _index(self) -> dict[str, Member]:
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        found: dict[str, Member] = {}
        for member in members(self._file):
            if member.offset + member.size > end:
                raise ImageError("archive ends early")
            if member.kind == "directory":
                continue
            if member.name in found:
                raise _refuse("two members of one name", member.name)
            found[member.name] = member
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def file(self, name: str) -> Member:
        """The regular file of this name, through at most one link inside the archive.

        Raises:
            ImageError: There is none.
        """
        member = self._members.get(normalised(name))
        if member is not None and member.kind == "link":
            member = self._members.get(member.target)
        if member is None or member.kind != "file":
            raise ImageError(f"archive lacks {name[:200]!r}, which its manifest names")
        return member

    def read(self, name: str, *, limit: int) -> bytes:
        """The content of a small file."""
        member = self.file(name)
        if member.size > limit:
            raise ImageError(f"{name[:200]!r} has {member.size} bytes, more than {limit}")
        self._file.seek(member.offset)
        return _exactly(self._file, member.size)

    def verify(self, member: Member, digest: str, should_go_on: Callable[[], None]) -> None:
        """Check that a file's SHA-256 is `digest`; `should_go_on` may raise between chunks.

        Raises:
            DigestMismatchError: It is not.
        """
        found = hashlib.sha256()
        self._file.seek(member.offset)
        left = member.size
        while left:
            should_go_on()
            chunk = _exactly(self._file, min(left, _CHUNK))
            found.update(chunk)
            left -= len(chunk)
        expect(f"blob {member.name!r}", digest, f"sha256:{found.hexdigest()}")


def expect(what: str, expected: str, found: str) -> None:
    """Compare two digests.

    Raises:
        DigestMismatchError: They differ.
    """
    if expected != found:
        raise DigestMismatchError(
            f"{what} has digest {found}, not {expected}",
            hint="the archive is damaged or was changed; make or download it again",
            expected=expected,
            found=found,
        )
