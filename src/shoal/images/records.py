"""What is remembered about images: one file an image, one file of names.

`<hex digest>.json` has an image's config, word for word, so its digest can be checked whenever it is
read. `names.json` maps names to digests. Both are replaced whole. A file that cannot be read is put
aside by `reconcile` and never guessed at.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal.errors import InternalError

_VERSION = 1
_MAX_RECORD = 16 << 20

T = TypeVar("T")


class LayerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A layer of an image."""

    diff_id: str
    """64 hex digits."""
    bytes: int
    """Bytes of its files, as the unpacker counted them."""


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An image, as its file has it."""

    version: int
    digest: str
    """`sha256:` digest of `config`."""
    manifest_digest: str | None
    config: str
    layers: list[LayerRecord]
    """Lowest first."""
    created_at: float
    imported_as: str
    """The name it got first, to find it again should the file of names be lost."""

    @property
    def diff_ids(self) -> list[str]:
        """64 hex digits each, lowest first."""
        return [layer.diff_id for layer in self.layers]


class _Names(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    names: dict[str, str]


class _BadRecordError(Exception):
    pass


class Records:
    """The files below one directory.

    Whoever writes holds the lock of names; reading needs none, as files are replaced whole.

    Args:
        directory: Exists already.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names = directory / "names.json"

    def stamp(self) -> tuple[int, int, int]:
        """Changes whenever names or images do; one system call."""
        try:
            stat = self._names.stat()
        except FileNotFoundError:
            return (0, 0, 0)
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def read(self) -> tuple[dict[str, str], dict[str, ImageRecord]]:
        """Names to digests, and images by digest; names of images that are not there are left out.

        Raises:
            InternalError: A file is damaged; `quarantine` puts it aside.
        """
        try:
            images = {image.digest: image for image in map(_read_image, self._files())}
            names = self._read_names()
        except _BadRecordError as error:
            raise InternalError(
                f"image record is damaged: {error}", hint="restart the node: it puts the file aside"
            ) from error
        return {name: digest for name, digest in names.items() if digest in images}, images

    def quarantine(self) -> list[str]:
        """Put what is damaged aside, find lost names again; names of the files that were moved."""
        moved = []
        images = {}
        for path in self._files():
            try:
                image = _read_image(path)
                images[image.digest] = image
            except _BadRecordError:
                moved.append(self._aside(path))
        try:
            self._read_names()
        except _BadRecordError:
            moved.append(self._aside(self._names))
            oldest_first = sorted(images.values(), key=lambda image: image.created_at)
            self.write_names({image.imported_as: image.digest for image in oldest_first})
        for left in self._directory.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        return moved

    def write_image(self, image: ImageRecord) -> None:
        """Keep an image, replacing what was known of it."""
        self._write(self._path(image.digest), msgspec.json.encode(image))

    def write_names(self, names: dict[str, str]) -> None:
        """Keep all names."""
        content = msgspec.json.encode(_Names(version=_VERSION, names=names))
        self._write(self._names, msgspec.json.format(content, indent=2))

    def drop_image(self, digest: str) -> None:
        """Forget an image."""
        self._path(digest).unlink(missing_ok=True)
        _sync(self._directory)

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest.removeprefix('sha256:')}.json"

    def _files(self) -> list[Path]:
        return sorted(path for path in self._directory.glob("*.json") if len(path.stem) == 64)

    def _read_names(self) -> dict[str, str]:
        try:
            names = _decode(self._names, _Names)
        except FileNotFoundError:
            return {}
        if names.version != _VERSION:
            raise _BadRecordError(f"{self._names} has version {names.version}")
        return names.names

    def _aside(self, path: Path) -> str:
        target = self._directory / "damaged"
        target.mkdir(mode=0o700, exist_ok=True)
        path.rename(target / f"{path.name}.{secrets.token_hex(4)}")
        return path.name

    def _write(self, path: Path, content: bytes) -> None:
        temporary = self._directory / f".{path.name}.{secrets.token_hex(4)}.tmp"
        try:
            descriptor = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(self._directory)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _decode(path: Path, kind: type[T]) -> T:
    with path.open("rb") as file:
        content = file.read(_MAX_RECORD + 1)
    if len(content) > _MAX_RECORD:
        raise _BadRecordError(f"{path} is larger than {_MAX_RECORD} bytes")
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _BadRecordError(f"{path}: {error}") from error


def _read_image(path: Path) -> ImageRecord:
    image = _decode(path, ImageRecord)
    digest = f"sha256:{hashlib.sha256(image.config.encode()).hexdigest()}"
    if image.version != _VERSION or image.digest != digest or path.stem != digest[7:]:
        raise _BadRecordError(f"{path} is of another version or does not match its digest")
    return image


def new_record(
    *,
    config: bytes,
    manifest_digest: str | None,
    layers: list[LayerRecord],
    created_at: float,
    imported_as: str,
) -> ImageRecord:
    """A record in today's version, with the digest of its config."""
    return ImageRecord(
        version=_VERSION,
        digest=f"sha256:{hashlib.sha256(config).hexdigest()}",
        manifest_digest=manifest_digest,
        config=config.decode(),
        layers=layers,
        created_at=created_at,
        imported_as=imported_as,
    )
