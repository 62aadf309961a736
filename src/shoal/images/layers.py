"""Where unpacked layers live, as the image store sees it.

The keeper does the work: it alone may write to the pool. `node` has the implementation that talks
to it; `tests/fakes.py` has the one that units use.
"""

from __future__ import annotations

from typing import Protocol

import msgspec


class UnpackedLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that lies unpacked under a temporary name."""

    diff_id: str
    """Hex SHA-256 of the uncompressed tar stream, as the unpacker computed it."""
    entries: int
    bytes: int
    """Bytes of its files."""
    compression: str
    """`none`, `gzip` or `zstd`, told from the first bytes."""
    special_skipped: int = 0
    """Devices and pipes that were left out."""
    set_id_dropped: int = 0
    """Files that lost a set-id bit."""
    xattrs_dropped: int = 0
    """Extended attributes that were left out."""
    unterminated: bool = False
    """The tar lacks its end blocks: only who expects this diffID knows that nothing is missing."""


class LayerStore(Protocol):
    """Unpacks layers and keeps them by diffID.

    A diffID is 64 hex digits here, without `sha256:`. A temporary name is 1 to 64 of `[a-z0-9-]`.
    """

    async def unpack(
        self,
        name: str,
        blob: int,
        *,
        length: int | None,
        max_bytes: int,
        max_entries: int,
        deadline: float,
    ) -> UnpackedLayer:
        """Unpack a layer under a temporary name.

        Args:
            name: Temporary name; not in use.
            blob: Descriptor positioned at the first byte of the layer. The caller closes it.
            length: Bytes that belong to the layer; None: up to the end of the file.
            max_bytes: Bytes of file content that it may hold.
            max_entries: Members that it may have.
            deadline: Seconds from now until it is given up.

        Raises:
            ImageError: The layer is malformed or over a limit. Nothing is left under `name`.
            DeadlineExceededError: It took longer than `deadline`. Nothing is left under `name`.
            ResourceExhaustedError: There is no room for it. Nothing is left under `name`.
        """
        ...

    async def commit(self, name: str, diff_id: str) -> bool:
        """Keep an unpacked layer under its diffID; True: it was there already and `name` was dropped."""
        ...

    async def discard(self, name: str) -> None:
        """Drop what lies under a temporary name, if anything does."""
        ...

    async def remove(self, diff_id: str) -> None:
        """Drop a layer, if it is there."""
        ...

    async def list(self) -> list[str]:
        """DiffIDs of the layers that are there."""
        ...
