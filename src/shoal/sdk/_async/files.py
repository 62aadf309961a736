"""A sandbox's file system."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import errno
import os
import stat
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
)
from types import NoneType
from typing import BinaryIO, TypeVar

import aiohttp
import msgspec

from shoal.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NodeUnavailableError,
    PathError,
    PathNotFoundError,
    from_problem,
)
from shoal.sdk._async.watch import AsyncFileWatch
from shoal.sdk._client import TRANSFER_DEADLINE, flag
from shoal.sdk._exec import Access
from shoal.sdk._frames import FrameParser, Kind
from shoal.sdk._pack import CHUNK, in_thread, pack
from shoal.sdk._unpack import Unpacker
from shoal.types import (
    FileInfo,
    FilePage,
)

T = TypeVar("T")

STALL_DEADLINE = 60.0
"""Seconds without a byte after which a file that is read piece by piece is given up."""


class AsyncFiles:
    """A sandbox's file system. Paths are absolute."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Read a file, or `length` bytes of it from `offset` on.

        Raises:
            PathNotFoundError: No such file.
            PathError: It is a directory, or cannot be read.
        """
        query = _span(path, offset, length)
        async with self._transfer(), self._fetched("files/content", query) as pieces:
            return b"".join([piece async for piece in pieces])

    async def read_stream(
        self, path: str, *, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes]:
        """Read a file, or `length` bytes of it from `offset` on, piece by piece; no more than one is held.

            async for piece in sb.files.read_stream("/app/big"):
                ...

        A reader that stops early lets go of it by closing the generator, or by dropping it.

        Raises:
            PathNotFoundError: No such file.
            PathError: It is a directory, or cannot be read.
            DeadlineExceededError: Nothing came for `STALL_DEADLINE` seconds.
            ConflictError: The file shrank while it was read.
            NodeUnavailableError: The connection broke before the end.
            SandboxGoneError: The sandbox ended before the end.
        """
        async with self._fetched("files/content", _span(path, offset, length)) as pieces:
            while True:
                try:
                    async with asyncio.timeout(STALL_DEADLINE):
                        piece = await anext(pieces, b"")
                except TimeoutError as error:
                    raise DeadlineExceededError(
                        f"nothing came of {path} for {STALL_DEADLINE:g} s"
                    ) from error
                if not piece:
                    return
                yield piece

    async def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """Read a file as text."""
        return (await self.read(path)).decode(encoding)

    async def write(
        self,
        path: str,
        data: bytes | str | AsyncIterable[bytes] | Iterable[bytes] | BinaryIO,
        *,
        mode: int | None = None,
        user: str | None = None,
        parents: bool = True,
    ) -> FileInfo:
        """Write a file. It appears whole or not at all.

        Args:
            path: Where.
            data: What: bytes, text (as UTF-8), or pieces of bytes as they come, of any number: an iterable,
                which is iterated in a worker thread, or a file opened in binary mode, from where it stands.
            mode: Permission bits; None: those of the file it replaces, else 0644.
            user: Owner, by name or id; None: that of the file it replaces, else root.
            parents: Make missing directories above it.

        Raises:
            PathError: It is a directory, or the sandbox's disk is full; what was there before is there still.
            InvalidArgumentError: A piece is not bytes; what was there before is there still.
        """
        query = {"path": path, "parents": flag(parents)}
        if mode is not None:
            query["mode"] = f"{mode:04o}"
        if user is not None:
            query["user"] = user
        return await self._call(FileInfo, "PUT", "files/content", query, data=_content(data))

    async def list(self, path: str, *, depth: int = 1) -> builtins.list[FileInfo]:
        """List a directory, sorted by path; with `depth` also what lies that many levels below."""
        page = await self._call(FilePage, "GET", "files/list", {"path": path, "depth": str(depth)})
        return page.entries

    async def stat(self, path: str) -> FileInfo:
        """Tell what a path is; a link is not followed.

        Raises:
            PathNotFoundError: There is nothing.
        """
        return await self._call(FileInfo, "GET", "files/info", {"path": path})

    async def exists(self, path: str) -> bool:
        """Tell whether there is anything at a path; a link counts, wherever it points."""
        try:
            await self.stat(path)
        except PathNotFoundError:
            return False
        except PathError as error:
            if error.details.get("errno") == errno.ENOTDIR:
                return False
            raise
        return True

    async def make_dir(
        self, path: str, *, parents: bool = True, user: str | None = None
    ) -> FileInfo:
        """Make a directory; with `parents` also those above it, and one that is there already is fine."""
        query = {"path": path, "parents": flag(parents)} | (
            {"user": user} if user is not None else {}
        )
        return await self._call(FileInfo, "POST", "files/directory", query)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, a link or an empty directory; with `recursive` a directory with all in it."""
        await self._call(NoneType, "DELETE", "files", {"path": path, "recursive": flag(recursive)})

    async def rename(self, source: str, target: str) -> None:
        """Give a path another name; a file of that name is replaced."""
        await self._call(NoneType, "POST", "files/rename", {}, body={"from": source, "to": target})

    async def chmod(self, path: str, mode: int) -> FileInfo:
        """Set a path's permission bits; a link is followed.

        Raises:
            PathNotFoundError: There is nothing.
        """
        query = {"path": path, "mode": f"{mode:04o}"}
        return await self._call(FileInfo, "POST", "files/attributes", query)

    async def chown(self, path: str, user: str) -> FileInfo:
        """Give a path to a user, by name or id, and to that user's group; a link is followed.

        Raises:
            PathNotFoundError: There is nothing.
            InvalidArgumentError: The sandbox has no such user.
        """
        return await self._call(FileInfo, "POST", "files/attributes", {"path": path, "user": user})

    def watch(self, path: str, *, recursive: bool = True) -> AsyncFileWatch:
        """Tell what happens to a path, and with `recursive` to everything below it.

            async with sb.files.watch("/app") as events:
                async for event in events:
                    print(event.kind, event.path)

        A move out of the tree is a `remove`, one into it a `create`; a new directory is watched too.

        Args:
            path: A directory or a file; it must be there.
            recursive: False: of a directory only its own entries.
        """
        return AsyncFileWatch(self._access, path, recursive=recursive)

    async def upload(
        self,
        local: str | os.PathLike[str],
        remote: str,
        *,
        user: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Copy a file or a directory tree from this machine into the sandbox, with modes, links and times.

        `upload("a.txt", "/app/b.txt")` makes /app/b.txt; `upload("tree", "/app/tree")` makes or fills
        /app/tree with what is in tree. A file whose `remote` ends in `/` keeps its name.

        Args:
            local: What to copy. A link here is followed; links inside a tree are copied as links.
            remote: Where to, absolute.
            user: Owner of everything copied; None: root.
            progress: Called with the bytes of file content sent so far.

        Raises:
            FileNotFoundError: Nothing is at `local`.
        """
        _check_remote(remote)
        source, directory, name = await asyncio.to_thread(_upload_plan, os.fspath(local), remote)
        query = {"path": directory} | ({"user": user} if user is not None else {})
        body = in_thread(pack(source, name), progress)
        await self._call(
            NoneType, "PUT", "files/archive", query, data=body, deadline=TRANSFER_DEADLINE
        )

    async def download(
        self,
        remote: str,
        local: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> builtins.list[str]:
        """Copy a file or a directory tree from the sandbox to this machine, with modes, links and times.

        `download("/app/b.txt", "a.txt")` makes a.txt; `download("/app/tree", "tree")` makes or fills tree.
        If `local` is a directory, or ends in `/`, a file keeps its name in it.

        The sandbox is not trusted: nothing is written outside `local`, links that are in the way there are
        replaced and never followed, and a link that would point outside `local` is left out.

        Args:
            remote: What to copy, absolute; a link is followed.
            local: Where to.
            max_bytes: End with an error beyond so many bytes of file content.
            progress: Called with the bytes of file content received so far.

        Other file systems that are mounted below `remote` (of `/`: proc, dev) are left out; each can be a `remote`
        of its own.

        Returns:
            What was left out: links that point outside, devices, FIFOs, sockets, what is mounted.

        Raises:
            PathNotFoundError: Nothing is at `remote`.
            PathError: Something could not be read, or the stream is malformed or asks for something outside; what
                came before it stays.
        """
        skipped = await self._fetch(remote, local, max_bytes=max_bytes, progress=progress)
        return [name for name, _ in skipped]

    async def _fetch(
        self,
        remote: str,
        local: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> builtins.list[tuple[str, str]]:
        """As `download`; of what was left out also the reasons."""
        _check_remote(remote)
        found = await self._follow(remote)
        single = found.kind != "directory"
        target, name = await asyncio.to_thread(_download_plan, remote, os.fspath(local), single)
        unpacker = await asyncio.to_thread(Unpacker, target, name, max_bytes)
        try:
            async with (
                self._transfer(),
                self._fetched("files/archive", {"path": found.path}) as pieces,
            ):
                gathered = bytearray()
                async for chunk in pieces:
                    gathered += chunk
                    if len(gathered) >= CHUNK:
                        await asyncio.to_thread(unpacker.feed, bytes(gathered))
                        gathered.clear()
                        if progress is not None:
                            progress(unpacker.written)
                await asyncio.to_thread(unpacker.feed, bytes(gathered))
                await asyncio.to_thread(unpacker.finish)
                if progress is not None:
                    progress(unpacker.written)
        finally:
            unpacker.close()
        return unpacker.skipped

    async def _follow(self, path: str) -> FileInfo:
        """What a path is in the end, links followed as the sandbox would."""
        for _ in range(40):
            found = await self.stat(path)
            if found.kind != "symlink" or found.target is None:
                return found
            parent = path.rstrip("/").rpartition("/")[0]
            path = found.target if found.target.startswith("/") else f"{parent}/{found.target}"
        raise PathError("too many links", path=path, errno=40)

    @contextlib.asynccontextmanager
    async def _fetched(
        self, path: str, query: Mapping[str, str]
    ) -> AsyncIterator[AsyncGenerator[bytes]]:
        """Bytes as they come; what goes wrong on the way is raised while they are taken."""
        access = self._access
        query = {**query, "framed": "true"}
        try:
            async with (
                access.client.open(
                    "GET", access.path(path), query=query, token=access.token
                ) as response,
                contextlib.aclosing(_payloads(response.content)) as pieces,
            ):
                yield pieces
        except NodeUnavailableError:
            await self.stat("/")  # if it broke because the sandbox ended, this says so
            raise

    @contextlib.asynccontextmanager
    async def _transfer(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(TRANSFER_DEADLINE):
                yield
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the transfer took longer than {TRANSFER_DEADLINE:g} s"
            ) from error

    async def _call(
        self,
        kind: type[T],
        method: str,
        path: str,
        query: Mapping[str, str],
        *,
        body: object = None,
        data: bytes | AsyncIterable[bytes] | None = None,
        deadline: float = TRANSFER_DEADLINE,
    ) -> T:
        access = self._access
        return await access.client.call(
            kind,
            method,
            access.path(path),
            query=query,
            body=body,
            data=data,
            token=access.token,
            deadline=deadline,
            stream=data is not None,
        )


async def _payloads(body: aiohttp.StreamReader) -> AsyncGenerator[bytes]:
    parser = FrameParser()
    async for chunk in body.iter_any():
        for kind, payload in parser.feed(chunk):
            if kind is Kind.ERROR:
                raise from_problem(msgspec.json.decode(payload))
            yield payload


def _check_remote(path: str) -> None:
    """Refuse what is no path in a sandbox, before a part of it is taken for one."""
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgumentError(
            f"not an absolute path: {path!r}", hint="paths in a sandbox begin with a slash"
        )


def _upload_plan(local: str, remote: str) -> tuple[str, str, str]:
    """What to pack, the directory to unpack it in, and its name there (empty: its entries)."""
    source = os.path.realpath(local)
    if stat.S_ISDIR(os.stat(source).st_mode):
        return source, remote, ""
    directory, _, name = remote.rpartition("/")
    return source, directory or "/", name or os.path.basename(local)


def _download_plan(remote: str, local: str, single: bool) -> tuple[str, str | None]:
    """The directory to unpack in, and the name there if it is one file."""
    if not single:
        return local, None
    if os.path.isdir(local) or local.endswith((os.sep, "/")):
        local = os.path.join(local, remote.rstrip("/").rpartition("/")[2])
    directory, name = os.path.split(os.path.abspath(local))
    return directory, name


def _span(path: str, offset: int, length: int | None) -> dict[str, str]:
    """The query for a part of a file."""
    query = {"path": path}
    if offset:
        query["offset"] = str(offset)
    if length is not None:
        query["length"] = str(length)
    return query


def _content(
    data: bytes | str | AsyncIterable[bytes] | Iterable[bytes] | BinaryIO,
) -> bytes | AsyncIterable[bytes]:
    """What to send of what a caller may hand in."""
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    if isinstance(data, AsyncIterable):
        return _checked(data)
    if isinstance(data, Iterable):
        read = getattr(data, "read", None)  # iterating a file would give lines, however long
        pieces = iter(lambda: read(CHUNK), b"") if read is not None else iter(data)
        return _checked(in_thread((piece, 0) for piece in pieces))
    raise InvalidArgumentError(
        f"not something to write: {type(data).__name__}",
        hint="hand over bytes, text, pieces of bytes, or a file opened in binary mode",
    )


async def _checked(pieces: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    """`pieces`, which must be bytes, the large ones cut so that the loop does other things in between."""
    async for piece in pieces:
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise InvalidArgumentError(
                f"a piece to write is not bytes: {type(piece).__name__}",
                hint="encode text, or open the file in binary mode",
            )
        view = memoryview(piece).cast("B")
        for at in range(0, len(view), CHUNK):
            yield bytes(view[at : at + CHUNK])
