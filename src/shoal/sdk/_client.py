"""HTTP to a node's front door: one pool of connections per event loop, every answer checked, every error typed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import urllib.parse
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import msgspec

from shoal.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    NodeUnavailableError,
    ShoalError,
    from_problem,
)

if TYPE_CHECKING:
    from shoal.sdk._receipts import Receipts
    from shoal.sdk._tunnel import Line

T = TypeVar("T")
Query = Mapping[str, str] | Sequence[tuple[str, str]]

CALL_DEADLINE = 60.0
"""Seconds for a call that only asks or tells."""
CONNECT_DEADLINE = 10.0
"""Seconds for a connection to be accepted."""
START_DEADLINE = 60.0
"""Seconds for a sandbox to come up, and for a command to start."""
CLEANUP_DEADLINE = 15.0
"""Seconds that ending a sandbox may take when its `with` block is left, and killing a command."""
TRANSFER_DEADLINE = 3600.0
"""Seconds for one file or tree to move."""
RETRY_FOR = 8.0
"""Seconds for which a call that may be made twice is tried again while the node restarts."""
_CONTROL_CONNECTIONS = 100
"""Short calls at once. Streams have a pool of their own: a long exec must not keep a kill from being sent."""
_PIECE = 1 << 18
"""Bytes of a body that are handed over at once."""


@dataclass(frozen=True)
class Address:
    """Where a node is: `unix:///path/to/shoal.sock` or `http://host:port`."""

    url: str
    embedded: bool = False
    """This machine's own node, which is started when nobody answers."""

    @property
    def socket(self) -> str | None:
        """Path of the unix socket, if it is one."""
        return self.url.removeprefix("unix://") if self.url.startswith("unix://") else None


def default_address() -> Address:
    """The node of `SHOAL_URL`, or else the embedded one.

    Raises:
        InvalidArgumentError: `SHOAL_URL` is no address of a node.
    """
    url = os.environ.get("SHOAL_URL", "").strip()
    if not url:
        from shoal.local import node

        return Address(f"unix://{node.socket_path()}", embedded=True)
    return parse_address(url)


def parse_address(url: str) -> Address:
    """Check a node's address.

    Raises:
        InvalidArgumentError: It is neither a unix socket nor an http URL.
    """
    parts = urllib.parse.urlsplit(url)
    plain = not parts.query and not parts.fragment
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/") and plain:
        return Address(url)
    if parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/") and plain:
        return Address(url.rstrip("/"))
    raise InvalidArgumentError(
        f"not a node's address: {url!r}", hint="use unix:///path/to/shoal.sock or http://host:port"
    )


_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Address, Client]] = (
    weakref.WeakKeyDictionary()
)


def clients_of(loop: asyncio.AbstractEventLoop) -> dict[Address, Client]:
    """The clients that belong to a loop."""
    return _clients.setdefault(loop, {})


def client(address: Address) -> Client:
    """The running loop's client for `address`; it closes with the loop."""
    here = clients_of(asyncio.get_running_loop())
    if (known := here.get(address)) is None or known.closed:
        known = here[address] = Client(address)
    return known


class Client:
    """Connections of one event loop to one node."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.closed = False
        self.base_lock = asyncio.Lock()
        """Held while the `base` image is being built."""
        self._base = "http://shoal" if address.socket else address.url
        self.lines: list[Line] = []
        """Kept connections that nobody uses now."""
        self.receipts: weakref.WeakSet[Receipts] = weakref.WeakSet()
        """What is read of execs through this client."""
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        """Made when first used, so that a client without a request has nothing to close."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._guard: AsyncGenerator[None] | None = None
        self._starting = asyncio.Lock()

    def _session(self, *, stream: bool) -> aiohttp.ClientSession:
        if (known := self._sessions.get(stream)) is not None:
            return known
        if self.closed:
            raise RuntimeError("this client is closed")
        path, limit = self.address.socket, 0 if stream else _CONTROL_CONNECTIONS
        connector: aiohttp.BaseConnector = (
            aiohttp.UnixConnector(path=path, limit=limit)
            if path
            else aiohttp.TCPConnector(limit=limit)
        )
        made = self._sessions[stream] = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            read_bufsize=1 << 18,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_DEADLINE),
            headers={"User-Agent": "shoal"},
        )
        return made

    async def aclose(self) -> None:
        """End what this client still does and close its connections."""
        if self.closed:
            return
        self.closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=1.0)
        for line in self.lines:
            line.close()
        self.lines.clear()
        for session in self._sessions.values():
            await session.close()

    def own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that ends with this client at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def call(
        self,
        kind: type[T],
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = None,
        data: bytes | AsyncIterable[bytes] | None = None,
        token: str | None = None,
        deadline: float | None = CALL_DEADLINE,
        stream: bool = False,
        headers: Mapping[str, str] | None = None,
        again: bool | None = None,
    ) -> T:
        """One request with one JSON answer, decoded as `kind`; `NoneType` for an answer without a body.

        Args:
            kind: What the answer is; unknown fields in it are ignored.
            method: HTTP method.
            path: From `/v1` on, already quoted.
            query: Parameters.
            body: Sent as JSON, unless `data` is given.
            data: Sent as it is; an iterable is sent as it comes.
            token: A sandbox's access token.
            deadline: Seconds for all of it; None only where the caller bounds it.
            stream: Use the pool for long transfers.
            headers: More headers.
            again: Making it twice is as good as once, so it is tried again while the node restarts. None:
                that is so for GET.

        Raises:
            DeadlineExceededError: The deadline passed; whether the node acted is not known.
            NodeUnavailableError: Nobody answers, or the node went away in the middle.
            ShoalError: What the node said.
        """

        async def once() -> bytes:
            async with self.open(
                method,
                path,
                query=query,
                body=body,
                data=data,
                token=token,
                stream=stream,
                headers=headers,
            ) as response:
                return await response.read()

        try:
            async with asyncio.timeout(deadline):
                if again if again is not None else method == "GET":
                    raw = await patiently(once)
                else:
                    raw = await once()
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"no answer within {deadline:g} s: {method} {path}"
            ) from error
        if kind is type(None):
            return None
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.DecodeError as error:
            raise InternalError(f"unexpected answer to {method} {path}: {error}") from error

    @contextlib.asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = None,
        data: bytes | AsyncIterable[bytes] | None = None,
        token: str | None = None,
        stream: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A request whose answer the caller reads; the status is checked already.

        No deadline of its own except that for the connection.

        Raises:
            NodeUnavailableError: Nobody answers, or the node went away, also while the caller reads.
            ShoalError: What the node said.
        """
        if self._guard is None:
            # asyncio closes async generators together with their loop, and so this client.
            self._guard = _close_with_loop(self)
            await anext(self._guard)
        for _, text in query.items() if isinstance(query, Mapping) else query or ():
            try:
                text.encode()  # left to the URL, what is not UTF-8 would be dropped: another path
            except UnicodeEncodeError as error:
                raise _not_utf8(text) from error
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        if data is None and body is not None:
            try:
                data = msgspec.json.encode(body)
            except UnicodeEncodeError as error:
                raise _not_utf8(str(error.object)) from error
            sent["Content-Type"] = "application/json"
        elif data is not None:
            sent.setdefault("Content-Type", "application/octet-stream")
        whole = data if isinstance(data, bytes) and len(data) > _PIECE else None
        if whole is not None:
            sent["Content-Length"] = str(len(whole))
        broken: list[Exception] = []
        if data is not None and not isinstance(data, bytes):
            data = _watched(data, broken)
        session = self._session(stream=stream)
        url = self._base + path
        for attempt in (1, 2):
            try:
                async with session.request(
                    method,
                    url,
                    params=query,
                    data=data if whole is None else _pieces(whole),
                    headers=sent,
                    allow_redirects=False,
                ) as response:
                    if response.status >= 300:
                        raise await _refusal(response)
                    yield response
                return
            except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
                # Nothing was sent, so trying again repeats nothing.
                if attempt == 2 or not self.address.embedded:
                    raise self._unavailable(error) from error
            except (aiohttp.ClientError, ConnectionError) as error:
                if broken:
                    raise broken[0] from None
                raise self._unavailable(error, lost=True) from error
            await self._start_node()

    async def _start_node(self) -> None:
        from shoal.local import node

        async with self._starting:
            await asyncio.to_thread(node.ensure)

    def _unavailable(self, error: Exception, *, lost: bool = False) -> NodeUnavailableError:
        where = self.address.url
        if lost:
            return NodeUnavailableError(f"the connection to the node at {where} broke: {error}")
        if isinstance(
            error, aiohttp.ClientConnectorError
        ):  # it says "ssl:default" also without TLS
            number = error.os_error.errno or 0
            error = OSError(os.strerror(number)) if number > 0 else error.os_error
        hint = "" if self.address.embedded else "is `shoal serve` running there? see SHOAL_URL"
        return NodeUnavailableError(f"no node answers at {where}: {error}", hint=hint)


def pauses(patience: float = RETRY_FOR) -> Iterator[float]:
    """Seconds to wait between tries: they grow, and their sum stays below `patience`."""
    pause, left = 0.05, patience
    while (left := left - pause) > 0:
        yield pause
        pause = min(pause * 2, 1.0)


async def patiently(work: Callable[[], Coroutine[Any, Any, T]], patience: float = RETRY_FOR) -> T:
    """Do what may be done twice, again and again while the node restarts.

    A node that nobody runs is not waited for: while one restarts, its sockets stay open.

    Raises:
        NodeUnavailableError: It stayed away.
    """
    waits = pauses(patience)
    while True:
        try:
            return await work()
        except NodeUnavailableError as error:
            pause = next(waits, None)
            if pause is None or isinstance(error.__cause__, aiohttp.ClientConnectorError):
                raise
        await asyncio.sleep(pause)


async def _watched(data: AsyncIterable[bytes], broken: list[Exception]) -> AsyncGenerator[bytes]:
    """`data`; what it raises is kept, because aiohttp tells it as a failure of the connection."""
    try:
        async for piece in data:
            yield piece
    except Exception as error:
        broken.append(error)
        raise


async def _pieces(data: bytes) -> AsyncGenerator[bytes]:
    """A large body bit by bit, so that the loop does other things in between."""
    for at in range(0, len(data), _PIECE):
        yield data[at : at + _PIECE]


async def _close_with_loop(client: Client) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await client.aclose()


async def _refusal(response: aiohttp.ClientResponse) -> ShoalError:
    """The error behind an answer that is not a success."""
    try:
        async with asyncio.timeout(10):
            raw = await response.content.read(1 << 20)
    except (TimeoutError, aiohttp.ClientError):
        raw = b""
    try:
        problem = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        problem = None
    if isinstance(problem, dict) and "code" in problem:
        return from_problem(problem)
    text = raw[:200].decode("utf-8", "replace").strip()
    message = f"HTTP {response.status} from the node" + (f": {text}" if text else "")
    if response.status in (502, 503, 504):
        return NodeUnavailableError(message)
    return InternalError(message)


def quote(part: str) -> str:
    """One path segment of a URL."""
    if not part:
        raise InvalidArgumentError("an id or name is empty", hint="`shoal ps` lists sandboxes")
    try:
        return urllib.parse.quote(part, safe="")
    except UnicodeEncodeError as error:
        raise _not_utf8(part) from error


def flag(value: bool) -> str:
    """A truth value in a query."""
    return "true" if value else "false"


def _not_utf8(text: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"not UTF-8: {text!a}")
