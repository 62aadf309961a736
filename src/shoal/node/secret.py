"""The node's secret and the access tokens made of it."""

from __future__ import annotations

import hashlib
import hmac
import os
import sys
from pathlib import Path

import structlog

if sys.version_info >= (3, 12):
    from typing import override
else:
    from typing_extensions import override

log = structlog.get_logger(__name__)

_LENGTH = 32


class NodeSecret:
    """32 bytes that only this node knows; its repr shows none of them."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @override
    def __repr__(self) -> str:
        return "***"

    @classmethod
    def load(cls, path: Path) -> NodeSecret:
        """Read the secret, or make one where none is.

        A file of another length (cut off by a full disk) is replaced: it protects nothing that still runs.
        """
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = b""
        if len(key) != _LENGTH:
            if key:
                log.warning("secret_replaced", path=str(path), length=len(key))
            key = os.urandom(_LENGTH)
            fresh = path.with_name(path.name + ".new")
            fresh.unlink(missing_ok=True)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(key)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        return cls(key)

    def token(self, sandbox: str) -> str:
        """The access token of a sandbox's data plane."""
        return hmac.new(self._key, sandbox.encode(), hashlib.sha256).hexdigest()
