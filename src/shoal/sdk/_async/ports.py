"""A sandbox's ports: who may reach them, and a local one that leads to them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
import urllib.parse
from types import TracebackType
from typing import Self

from shoal.errors import ConflictError, InvalidArgumentError, ShoalError
from shoal.sdk._exec import Access
from shoal.sdk._tunnel import BUFFER, reset, splice, upgrade

TOKEN_TTL = 3600.0
"""Seconds that a port token is good for, unless asked otherwise."""


class AsyncForward:
    """A port of this machine that leads to a port of a sandbox while its block lasts.

    Bytes go through raw, both ways, with half-close. Each connection stands alone: one that cannot be made, or
    breaks, is reset, and the others go on.
    """

    def __init__(self, access: Access, port: int, host: str, local_port: int) -> None:
        self._access = access
        self._target = port
        self._host = host
        self._local_port = local_port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._error: ShoalError | None = None

    @property
    def port(self) -> int:
        """The local TCP port."""
        return self._local_port

    @property
    def address(self) -> str:
        """`host:port` of the local end."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._local_port}"

    @property
    def error(self) -> ShoalError | None:
        """Why the latest connection did not reach the sandbox's port; None if every one did."""
        return self._error

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._accept, self._host, self._local_port, limit=BUFFER
        )
        self._local_port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is None:
            return
        server, self._server = self._server, None
        going = list(self._connections)
        for task in going:
            task.cancel()
        # What asyncio has accepted and not handed over yet, it leaves open when its server is closed: so first
        # nothing more is accepted, then that is handed over (to be reset), then the server is closed.
        with contextlib.suppress(NotImplementedError):
            for listener in server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
        try:
            for _ in range(2):
                await asyncio.sleep(0)
            if going:
                await asyncio.wait(going)
        finally:
            server.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._connections.discard(task)
            if not writer.is_closing():
                reset(writer)

        if self._server is None:  # accepted as the block was left
            reset(writer)
            return
        task = self._access.client.own(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(ended)  # a task that is cancelled at once never runs

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = self._access.path(f"ports/{self._target}/connect")
        try:
            inside = await upgrade(self._access.address, path, self._access.token)
            await splice((reader, writer), inside)
        except ShoalError as error:
            self._error = error


def port_number(port: int) -> int:
    """`port`, if it is one.

    Raises:
        InvalidArgumentError: It is none.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 1 << 16:
        raise InvalidArgumentError(
            f"not a port: {port!r}", hint="a port is a number from 1 to 65535"
        )
    return port


def port_url(template: str | None, sandbox: str, port: int) -> str:
    """The URL of a port, without a path.

    Raises:
        ConflictError: The node listens on no TCP port.
    """
    if template is None:
        raise ConflictError(
            "the node listens on no TCP port, so this sandbox's ports have no URL",
            hint="start it with SHOAL_LISTEN=127.0.0.1:0, or use forward()",
        )
    return template.replace("{port}", str(port_number(port))).replace("{id}", sandbox)


def by_address(url: str) -> str:
    """A port's URL with the address of this machine in the place of its name."""
    parts = urllib.parse.urlsplit(url)
    port = f":{parts.port}" if parts.port is not None else ""
    return f"{parts.scheme}://127.0.0.1{port}"


def sign(access: Access, port: int, ttl: float) -> str:
    """A token that opens one port of one sandbox for `ttl` seconds."""
    if ttl <= 0:
        raise InvalidArgumentError(f"not a time to live: {ttl!r} s")
    expires = int(time.time() + ttl)
    message = f"port:{access.sandbox}:{port_number(port)}:{expires}"
    return (
        f"{expires}.{hmac.new(access.token.encode(), message.encode(), hashlib.sha256).hexdigest()}"
    )


def entrance(url: str, token: str, path: str) -> str:
    """A URL that lets a browser in: the token stands in its fragment, which no browser sends."""
    if not path.startswith("/") or path.startswith("//"):
        raise InvalidArgumentError(f"not a path: {path!r}", hint="it begins with one /")
    return f"{url}/.shoal/enter#token={token}&next={urllib.parse.quote(path, safe='/')}"
