"""An upload on its way to disk, in constant memory, and gone again in every outcome."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread
from aiohttp import web
from aiohttp.client_exceptions import ClientPayloadError

from shoal.errors import ImageError, InvalidArgumentError, ResourceExhaustedError

_CHUNK = 1 << 20


@asynccontextmanager
async def spooled(request: web.Request, directory: Path, *, max_bytes: int) -> AsyncIterator[Path]:
    """The request's body as a file in `directory`, which is removed when the context is left.

    Raises:
        InvalidArgumentError: It is empty or larger than `max_bytes`.
        ImageError: The client stopped in the middle.
        ResourceExhaustedError: The disk is full.
    """
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(max_bytes)
    path = directory / f"upload-{secrets.token_hex(8)}"
    try:
        try:
            await _write(request, path, max_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhaustedError(
                    "no space is left for the upload",
                    hint=f"free some space on the file system of {directory}",
                ) from error
            raise
        yield path
    finally:
        path.unlink(missing_ok=True)


async def _write(request: web.Request, path: Path, max_bytes: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        size = 0
        pending = bytearray()
        try:
            async for chunk in request.content.iter_any():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                pending += chunk
                if len(pending) >= _CHUNK:
                    await anyio.to_thread.run_sync(_write_all, file.fileno(), bytes(pending))
                    pending.clear()
        except (ClientPayloadError, ConnectionError) as error:
            raise ImageError("the upload stopped in the middle", hint="send it again") from error
        await anyio.to_thread.run_sync(_write_all, file.fileno(), bytes(pending))
    if size == 0:
        raise InvalidArgumentError("the body is empty", hint="send the archive as the body")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _too_large(max_bytes: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the archive is larger than the node's maximum of {max_bytes >> 20} MiB",
        hint="raise max_image_mib on the node",
    )
