from __future__ import annotations

from shoal.sdk.tests.conftest import anyio_backend, node

__all__ = ["anyio_backend", "node"]
