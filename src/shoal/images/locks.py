"""Locks on files, which hold between processes and go with the process that held them.

Source: `flock(2)`: a lock belongs to the open file, so two tasks of one process exclude each other
as two processes do.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from shoal.errors import ConflictError

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.1


@asynccontextmanager
async def lock(path: Path, *, shared: bool = False, timeout: float) -> AsyncIterator[None]:
    """Hold a lock while the context is open.

    Args:
        path: The file that stands for it; made if need be, never removed.
        shared: Let others in who want it shared as well.
        timeout: Seconds to wait for it; with 0 it is free now or not.

    Raises:
        ConflictError: Somebody else held it all the time.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        end = anyio.current_time() + timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                fcntl.flock(descriptor, kind)
                break
            except BlockingIOError:
                # A blocking flock could not be cancelled, so it asks again.
                if anyio.current_time() >= end:
                    raise ConflictError(
                        "images are being changed by somebody else", hint="try again in a moment"
                    ) from None
            await anyio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        yield
    finally:
        os.close(descriptor)
