"""A node: its images, its state."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import (
    Callable,
)
from types import NoneType

from shoal.errors import (
    ImageError,
)
from shoal.sdk._client import TRANSFER_DEADLINE, client, default_address, flag, quote
from shoal.sdk._pack import CHUNK, Pieces, in_thread, pack
from shoal.types import (
    ImageInfo,
    ImagePage,
    NodeInfo,
)


class AsyncNode:
    """The node behind it all: its images, its state."""

    def __init__(self) -> None:
        self._address = default_address()

    @property
    def url(self) -> str:
        """Where it is."""
        return self._address.url

    async def info(self) -> NodeInfo:
        """Tell what it is and what is left of it."""
        return await client(self._address).call(NodeInfo, "GET", "/v1/node")

    async def stop(self, *, force: bool = False) -> None:
        """Ask it to end; with `force` also while sandboxes run, which end with it."""
        await client(self._address).call(
            NoneType, "POST", "/v1/node/stop", query={"force": flag(force)}
        )

    async def images(self) -> list[ImageInfo]:
        """List its images, by name."""
        return (await client(self._address).call(ImagePage, "GET", "/v1/images")).images

    async def image(self, reference: str) -> ImageInfo:
        """Tell about one image.

        Raises:
            ImageNotFoundError: It has none of this name or digest.
        """
        return await client(self._address).call(ImageInfo, "GET", f"/v1/images/{quote(reference)}")

    async def import_image(
        self,
        source: str | os.PathLike[str],
        name: str,
        *,
        format: str = "auto",
        expected_digest: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ImageInfo:
        """Bring an image from this machine to the node.

        Args:
            source: An OCI layout (directory or tar), a docker-archive, or a root file system (directory or
                tar); a tar may be gzipped. Of a root file system directory owners, hard links and extended
                attributes are kept.
            name: Name, or `name:tag`.
            format: `auto`, `oci`, `docker` or `rootfs`.
            expected_digest: `sha256:` digest that it must have.
            progress: Called with the bytes of content sent so far: of a tar its own, of a directory its files'.

        Raises:
            ImageError: It is malformed, or not of that format; nothing of it was kept.
            FileNotFoundError: Nothing is at `source`.
        """
        chunks, format = await asyncio.to_thread(_import_plan, os.fspath(source), format)
        query = {"name": name, "format": format}
        if expected_digest is not None:
            query["expected_digest"] = expected_digest
        return await client(self._address).call(
            ImageInfo,
            "POST",
            "/v1/images",
            query=query,
            data=in_thread(chunks, progress),
            deadline=TRANSFER_DEADLINE,
            stream=True,
        )

    async def build_base(self, name: str = "base", *, refresh: bool = False) -> ImageInfo:
        """Build the `base` image from the Debian archive, or take the one built before, and import it.

        Progress goes to stderr, if that is a terminal. Needs root on this machine and mmdebstrap.

        Args:
            name: Name it gets on the node.
            refresh: Build it anew, with the archive's packages of today.
        """
        from shoal.local import base_image, progress

        given_up = threading.Event()

        def build() -> tuple[str, int]:
            with progress.bar("building the base image") as tell:

                def told(fraction: float | None, text: str) -> None:
                    if given_up.is_set():
                        raise InterruptedError("nobody waits for this build any more")
                    tell(fraction, text)

                path = base_image.build(told, refresh=refresh)
            return str(path), path.stat().st_size

        try:
            path, total = await asyncio.to_thread(build)
        except asyncio.CancelledError:
            given_up.set()
            raise
        with progress.bar("importing the base image") as tell:
            return await self.import_image(
                path, name, format="rootfs", progress=lambda done: tell(done / total, "")
            )

    async def remove_image(self, reference: str) -> None:
        """Remove an image's name; its layers go with `collect_garbage` once nothing uses them.

        Raises:
            ConflictError: A sandbox uses it.
        """
        await client(self._address).call(NoneType, "DELETE", f"/v1/images/{quote(reference)}")

    async def collect_garbage(self) -> list[str]:
        """Remove layers that no image and no sandbox uses, and return what was removed."""
        answer = await client(self._address).call(
            dict[str, list[str]], "POST", "/v1/images/gc", deadline=TRANSFER_DEADLINE
        )
        return answer.get("removed", [])


def _file_chunks(path: str) -> Pieces:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk, len(chunk)


def _import_plan(source: str, format: str) -> tuple[Pieces, str]:
    """The bytes to send, and what they are."""
    if not os.path.isdir(source):
        os.stat(source)
        return _file_chunks(source), format
    path = os.path.realpath(source)
    format = directory_format(path, format)
    return pack(path, whole=format == "rootfs"), format


_MARKS = {"oci": ("oci-layout", "OCI layout"), "docker": ("manifest.json", "docker-archive")}


def directory_format(path: str, format: str) -> str:
    """What an image in a directory is: `oci`, `docker` or `rootfs`.

    Raises:
        ImageError: It is not what `format` says.
    """
    if format == "auto":
        return "oci" if os.path.exists(os.path.join(path, "oci-layout")) else "rootfs"
    mark, name = _MARKS.get(format, ("", ""))
    if mark and not os.path.exists(os.path.join(path, mark)):
        raise ImageError(
            f"no {name} in {path}",
            hint=f"it has no {mark}; a directory that is a root file system is of the format rootfs",
        )
    return format
