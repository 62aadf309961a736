"""HTTP by hand: a connection that is raw after an upgrade, and one for many small requests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import urllib.parse

import msgspec

from shoal.errors import DeadlineExceededError, NodeUnavailableError, ShoalError, from_problem
from shoal.sdk._client import CONNECT_DEADLINE, Address

Pipe = tuple[asyncio.StreamReader, asyncio.StreamWriter]

BUFFER = 1 << 18
"""Bytes that a connection holds in each direction, about, before it stops taking more."""
_HEAD = 1 << 16
"""Bytes of an answer's head, and of a refusal's body, at most."""
_NOW = struct.pack("ii", 1, 0)
"""SO_LINGER: whoever closes resets the connection, so that the peer does not take it for an end."""


async def upgrade(address: Address, path: str, token: str) -> Pipe:
    """Open a connection that is raw from its first byte on.

    Args:
        address: The node.
        path: From `/v1` on, already quoted; what answers `Upgrade: tcp`.
        token: The sandbox's access token.

    Raises:
        NodeUnavailableError: Nobody answers, or not in HTTP.
        DeadlineExceededError: No answer within `CONNECT_DEADLINE`.
        ShoalError: What the node said.
    """
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(CONNECT_DEADLINE):
            reader, writer = await _dial(address)
            writer.write(_request(address, path, token))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            if (status := _status(head)) != 101:
                raise await _refusal(reader, head, status)
        return reader, writer
    except BaseException as error:
        if writer is not None:
            writer.transport.abort()
        if isinstance(error, TimeoutError):
            raise DeadlineExceededError(
                f"no answer within {CONNECT_DEADLINE:g} s: POST {path}"
            ) from error
        if isinstance(error, OSError | EOFError | asyncio.LimitOverrunError):
            raise NodeUnavailableError(f"no connection to {address.url}: {error}") from error
        raise


class Line:
    """A connection that is kept for small requests whose answer has no body: a tenth of what the pool's cost."""

    def __init__(self, address: Address, pipe: Pipe) -> None:
        self._host = _host(address)
        self._reader, self._writer = pipe

    @classmethod
    async def open(cls, address: Address) -> Line:
        """Connect.

        Raises:
            NodeUnavailableError: Nobody answers.
        """
        try:
            async with asyncio.timeout(CONNECT_DEADLINE):
                return cls(address, await _dial(address))
        except (OSError, TimeoutError) as error:
            raise NodeUnavailableError(f"no connection to {address.url}: {error}") from error

    @property
    def usable(self) -> bool:
        """Nobody has closed it."""
        return not self._writer.is_closing() and not self._reader.at_eof()

    def close(self) -> None:
        """Let go of it."""
        self._writer.transport.abort()

    async def post(self, path: str, token: str, body: bytes) -> None:
        """Send JSON and wait for 204. After an error the connection is of no use.

        Raises:
            NodeUnavailableError: It broke.
            ShoalError: What the node said.
        """
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nUser-Agent: shoal\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            self._writer.write(head.encode() + body)
            answer = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            if (status := _status(answer)) != 204:
                raise await _refusal(self._reader, answer, status)
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise NodeUnavailableError(f"the connection broke: {error}") from error


def _host(address: Address) -> str:
    return "shoal" if address.socket else urllib.parse.urlsplit(address.url).netloc


async def _dial(address: Address) -> Pipe:
    if address.socket is not None:
        return await asyncio.open_unix_connection(address.socket, limit=BUFFER)
    parts = urllib.parse.urlsplit(address.url)
    secure = parts.scheme == "https"
    return await asyncio.open_connection(
        parts.hostname, parts.port or (443 if secure else 80), ssl=secure or None, limit=BUFFER
    )


def _request(address: Address, path: str, token: str) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: {_host(address)}\r\nUser-Agent: shoal\r\nAuthorization: Bearer {token}\r\n"
        "Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n"
    ).encode()


def _status(head: str) -> int:
    words = head.split(" ", 2)
    if not words[0].startswith("HTTP/1.") or len(words) < 3 or not words[1].isdecimal():
        raise EOFError("that is not HTTP")
    return int(words[1])


async def _refusal(reader: asyncio.StreamReader, head: str, status: int) -> ShoalError:
    """The error behind an answer that is not 101."""
    fields = [line.partition(":") for line in head.split("\r\n")[1:]]
    lengths = [value.strip() for name, _, value in fields if name.lower() == "content-length"]
    length = int(lengths[0]) if lengths and lengths[0].isdecimal() else 0
    body = await reader.readexactly(min(length, _HEAD))
    with contextlib.suppress(msgspec.DecodeError):
        problem = msgspec.json.decode(body)
        if isinstance(problem, dict) and "code" in problem:
            return from_problem(problem)
    return NodeUnavailableError(f"HTTP {status} from the node")


async def splice(one: Pipe, two: Pipe) -> None:
    """Carry bytes both ways until either way has ended, and close both connections.

    The end of one way is passed on and leaves the other open (half-close), where the transport can: TLS cannot.
    If one connection breaks, or this is cancelled, both are reset.
    """
    try:
        async with asyncio.TaskGroup() as ways:
            ways.create_task(_carry(one[0], two[1]))
            ways.create_task(_carry(two[0], one[1]))
        for _, writer in (one, two):
            writer.close()
    except* OSError:
        pass
    finally:
        for _, writer in (one, two):
            if not writer.is_closing():
                reset(writer)


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.set_write_buffer_limits(high=BUFFER)
    while data := await reader.read(BUFFER):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


def reset(writer: asyncio.StreamWriter) -> None:
    """Cut a connection so that its peer sees that it broke."""
    here = writer.get_extra_info("socket")
    if here is not None and here.family != getattr(socket, "AF_UNIX", None):
        with contextlib.suppress(OSError):
            here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NOW)
    writer.transport.abort()
