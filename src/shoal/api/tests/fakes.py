"""An image store in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from shoal.errors import ConflictError, ImageError, ImageNotFoundError
from shoal.node.tests.fakes import IMAGE
from shoal.types import ImageInfo


class FakeShelf:
    """An `ImageShelf` that takes any bytes but `bad` for an archive."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.images = {"base": IMAGE}
        self.imported: list[tuple[str, str, int, str]] = []
        self.pinned: set[str] = set()

    @property
    def spool_dir(self) -> Path:
        return self._directory

    async def import_archive(
        self,
        path: Path,
        name: str,
        format: str = "auto",
        *,
        expected_digest: str | None = None,
        source: str | None = None,
    ) -> ImageInfo:
        data = path.read_bytes()  # noqa: ASYNC240 - a few bytes
        if data == b"bad":
            raise ImageError("not an archive")
        if data == b"bug":
            raise ValueError("secret detail of a bug")
        self.imported.append((name, format, len(data), hashlib.sha256(data).hexdigest()))
        return ImageInfo(name=name, digest="sha256:1", layers=[], size_bytes=0, created_at=0.0)

    def get(self, reference: str) -> ImageInfo:
        if reference not in self.images:
            raise ImageNotFoundError(f"no image {reference!r}", hint="the node has: base")
        return self.images[reference]

    async def remove(self, reference: str) -> None:
        self.get(reference)
        if reference in self.pinned:
            raise ConflictError(f"image {reference} is in use", hint="end its sandboxes first")
        del self.images[reference]

    async def gc(self) -> list[str]:
        return ["sha256:2"]

    def list(self) -> list[ImageInfo]:
        return list(self.images.values())
