"""What an archive holds: an OCI layout, a docker-archive, or a root file system.

Reading is in two steps. First everything small is read and checked: manifest and config, their
digests and sizes, how many layers there are and where. Only then may anybody touch a layer, and a
`Plan` says what its content must turn out to be.

Source: OCI image-spec (image-layout.md, image-index.md, manifest.md, config.md); Docker image
specification v1.2 for docker-archive.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import re
import zlib
from pathlib import Path
from typing import IO, Literal, TypeVar, cast

import msgspec

from shoal.errors import ImageError, InvalidArgumentError, ShoalError
from shoal.images.outer import Archive, Member, expect, members
from shoal.images.reference import Reference, is_digest

Format = Literal["auto", "oci", "docker", "rootfs"]
FORMATS = ("auto", "oci", "docker", "rootfs")

_MAX_JSON = 4 << 20
_MAX_NESTED = 4
_CHUNK = 1 << 20
_REF_NAME = "org.opencontainers.image.ref.name"
_CONTAINERD_NAME = "io.containerd.image.name"
_INDEX_TYPES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
_MANIFEST_TYPES = {
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
}
_LAYER_TYPES = {
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
}
# Only image archives have nothing but these at their top.
_ARCHIVE_NAME = re.compile(
    r"(?:|blobs(?:/.*)?|oci-layout|index\.json|manifest\.json|repositories|version"
    r"|[0-9a-f]{64}(?:\.json|\.tar|\.tar\.gz|/.*)?)"
)
_HEX_NAME = re.compile(r"(?:(?:blobs/sha256/)|)([0-9a-f]{64})(?:\.json)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

T = TypeVar("T")


def host_architecture() -> str:
    """This machine's architecture, as images name it."""
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}.get(machine, machine)


class _Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    platform: _Platform | None = None
    annotations: dict[str, str] | None = None
    urls: list[str] | None = None


class _Layout(msgspec.Struct, frozen=True, rename="camel"):
    image_layout_version: str


class _Index(msgspec.Struct, frozen=True, rename="camel"):
    manifests: list[_Descriptor]
    schema_version: int = 2


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    config: _Descriptor
    layers: list[_Descriptor]
    schema_version: int
    media_type: str = ""


class _DockerManifest(msgspec.Struct, frozen=True, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[str]
    type: str = "layers"


class _Process(msgspec.Struct, frozen=True, rename="pascal"):
    env: list[str] | None = None
    cmd: list[str] | None = None
    entrypoint: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None
    labels: dict[str, str] | None = None


class _Config(msgspec.Struct, frozen=True):
    rootfs: _RootFs
    architecture: str = ""
    os: str = "linux"
    config: _Process | None = None


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an image says about its processes; strings of a stranger, checked for shape only."""

    architecture: str
    diff_ids: list[str]
    """64 hex digits each, lowest layer first."""
    env: list[str]
    cmd: list[str]
    entrypoint: list[str]
    user: str
    workdir: str
    """Absolute, or empty."""
    labels: dict[str, str]


class LayerBlob(msgspec.Struct, frozen=True, kw_only=True):
    """Where a layer lies and what it must be."""

    path: Path
    offset: int = 0
    length: int | None = None
    """None: up to the end of the file."""
    member: Member | None = None
    digest: str | None = None
    """`sha256:` digest of these very bytes, when the manifest told it."""
    diff_id: str | None = None
    """64 hex digits of the uncompressed bytes; None: whatever it turns out to be."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """An image to import."""

    format: str
    config: bytes | None
    """The config's very bytes; None for a root file system, which has none."""
    manifest_digest: str | None
    layers: list[LayerBlob]
    """Lowest first."""


def _json(what: str, content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ImageError(f"{what} is malformed: {error}") from error
    except RecursionError as error:
        raise ImageError(f"{what} is nested too deeply") from error


def read_config(content: bytes) -> ImageConfig:
    """Read an image config.

    Raises:
        ImageError: It is malformed, or for another kind of machine.
    """
    raw = _json("image config", content, _Config)
    architecture = raw.architecture or host_architecture()
    if raw.os.lower() != "linux" or architecture != host_architecture():
        raise ImageError(
            f"image is for {raw.os}/{architecture}, this machine is linux/{host_architecture()}",
            hint="save the image for this machine's platform",
        )
    if raw.rootfs.type != "layers":
        raise ImageError(f"image config has a rootfs of type {raw.rootfs.type[:50]!r}")
    for diff_id in raw.rootfs.diff_ids:
        if not is_digest(diff_id):
            raise ImageError(f"image config has a diffID that is none: {diff_id[:100]!r}")
    process = raw.config or _Process()
    env = process.env or []
    for text in (*env, *(process.cmd or ()), *(process.entrypoint or ())):
        if "\0" in text:
            raise ImageError("image config has a NUL byte in a string")
    for assignment in env:
        if assignment.find("=") < 1:
            raise ImageError(f"image config has a variable without a name: {assignment[:100]!r}")
    user, workdir = process.user or "", process.working_dir or ""
    for text in (user, workdir):
        if _CONTROL.search(text):
            raise ImageError(f"image config has control characters: {text[:100]!r}")
    if workdir and not workdir.startswith("/"):
        workdir = f"/{workdir}"
    return ImageConfig(
        architecture=architecture,
        diff_ids=[diff_id.removeprefix("sha256:") for diff_id in raw.rootfs.diff_ids],
        env=env,
        cmd=process.cmd or [],
        entrypoint=process.entrypoint or [],
        user=user,
        workdir=workdir,
        labels=process.labels or {},
    )


def rootfs_config(diff_id: str) -> bytes:
    """The config of an image that came as a bare root file system; the same for the same files."""
    return msgspec.json.encode(
        {
            "architecture": host_architecture(),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
        }
    )


def _is_named(own: str, wanted: str) -> bool:
    """Whether a name in an archive is the one that the caller wants."""
    if own == wanted:
        return True
    try:
        return Reference.parse(own).name == Reference.parse(wanted).name
    except InvalidArgumentError:
        return False


def _choose(
    candidates: list[tuple[set[str], T]], name: str, source: str | None
) -> list[tuple[set[str], T]]:
    """The images of an archive that the caller means.

    With `source`, those of that name. Without, the only one; or else those that are called like
    the name that the image is to get.
    """
    if source is None and len({frozenset(names) for names, _ in candidates}) == 1:
        return candidates
    wanted = source or name
    tag = Reference.parse(name).tag
    chosen = [one for one in candidates if any(_is_named(own, wanted) for own in one[0])]
    if not chosen and source is None:
        chosen = [one for one in candidates if tag in one[0]]
    if not chosen:
        known = sorted({own for names, _ in candidates for own in names})
        raise ImageError(
            f"archive holds {len(candidates)} images, none is called {wanted!r}",
            hint=f"name one of them: {', '.join(known[:20])}" if known else "",
            images=known[:100],
        )
    return chosen


class _OciReader:
    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def _blob(self, descriptor: _Descriptor) -> tuple[str, Member]:
        if not is_digest(descriptor.digest):
            raise ImageError(f"not a sha256 digest: {descriptor.digest[:100]!r}")
        member = self._archive.file(f"blobs/sha256/{descriptor.digest.removeprefix('sha256:')}")
        if member.size != descriptor.size:
            raise ImageError(
                f"blob {descriptor.digest} has {member.size} bytes, not {descriptor.size}"
            )
        return descriptor.digest, member

    def _small(self, descriptor: _Descriptor) -> bytes:
        digest, member = self._blob(descriptor)
        content = self._archive.read(member.name, limit=_MAX_JSON)
        expect(f"blob {member.name!r}", digest, f"sha256:{hashlib.sha256(content).hexdigest()}")
        return content

    def _manifests(self, descriptor: _Descriptor, depth: int = 0) -> list[_Descriptor]:
        """The manifests that a descriptor stands for: itself, or what its index lists."""
        if descriptor.media_type in _MANIFEST_TYPES:
            return [descriptor]
        if descriptor.media_type not in _INDEX_TYPES:
            return []
        if depth == _MAX_NESTED:
            raise ImageError("image index is nested too deeply")
        found: list[_Descriptor] = []
        for inner in _json("image index", self._small(descriptor), _Index).manifests:
            if len(found) > 1000:
                raise ImageError("image index lists more than 1000 manifests")
            found += self._manifests(inner, depth + 1)
        return found

    def plan(self, name: str, source: str | None, max_layers: int) -> Plan:
        layout = _json("oci-layout", self._archive.read("oci-layout", limit=_MAX_JSON), _Layout)
        if not layout.image_layout_version.startswith("1."):
            raise ImageError(f"OCI layout of version {layout.image_layout_version[:50]!r}")
        index = _json("index.json", self._archive.read("index.json", limit=_MAX_JSON), _Index)
        if not index.manifests:
            raise ImageError("archive holds no image: its index.json is empty")
        candidates = [(_names(one), one) for one in index.manifests]
        descriptors: list[_Descriptor] = []
        for _, chosen in _choose(candidates, name, source):
            descriptors += self._manifests(chosen)
        return self._image(self._for_this_machine(descriptors), max_layers)

    def _for_this_machine(self, descriptors: list[_Descriptor]) -> _Descriptor:
        wanted = ("linux", host_architecture())
        offered = []
        fallback: _Descriptor | None = None
        for one in descriptors:
            if one.platform is None or not one.platform.os:
                fallback = fallback or one
            elif (one.platform.os, one.platform.architecture) == wanted:
                return one
            else:
                offered.append(f"{one.platform.os}/{one.platform.architecture}")
        if fallback is not None:
            return fallback  # its config tells, and is checked
        raise ImageError(
            f"archive holds no image for {'/'.join(wanted)}",
            hint=f"it holds {', '.join(sorted(set(offered))[:20])}" if offered else "",
        )

    def _image(self, descriptor: _Descriptor, max_layers: int) -> Plan:
        manifest = _json("image manifest", self._small(descriptor), _Manifest)
        if manifest.schema_version != 2:
            raise ImageError(f"image manifest of schema version {manifest.schema_version}")
        if manifest.media_type and manifest.media_type not in _MANIFEST_TYPES:
            raise ImageError(f"image manifest calls itself {manifest.media_type[:100]!r}")
        _check_layer_count(len(manifest.layers), max_layers)
        content = self._small(manifest.config)
        config = read_config(content)
        _check_diff_ids(config, len(manifest.layers))
        layers = []
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
            if layer.media_type not in _LAYER_TYPES:
                raise ImageError(
                    f"layer of type {layer.media_type[:100]!r} cannot be imported",
                    hint="foreign and encrypted layers are not in the archive"
                    if layer.urls or "foreign" in layer.media_type
                    else "",
                )
            digest, member = self._blob(layer)
            layers.append(_layer(self._archive, member, digest=digest, diff_id=diff_id))
        return Plan(format="oci", config=content, manifest_digest=descriptor.digest, layers=layers)


def _names(descriptor: _Descriptor) -> set[str]:
    annotations = descriptor.annotations or {}
    return {annotations[key] for key in (_REF_NAME, _CONTAINERD_NAME) if annotations.get(key)}


def _check_layer_count(count: int, most: int) -> None:
    if count == 0:
        raise ImageError("image has no layers")
    if count > most:
        raise ImageError(f"image has {count} layers, more than {most}", limit=most)


def _check_diff_ids(config: ImageConfig, layers: int) -> None:
    if len(config.diff_ids) != layers:
        raise ImageError(f"image has {layers} layers and {len(config.diff_ids)} diffIDs")


def _layer(
    archive: Archive, member: Member, *, digest: str | None, diff_id: str | None
) -> LayerBlob:
    if member.size == 0:
        raise ImageError(f"layer {member.name!r} is empty")
    return LayerBlob(
        path=archive.path,
        offset=member.offset,
        length=member.size,
        member=member,
        digest=digest,
        diff_id=diff_id,
    )


def _docker_plan(archive: Archive, name: str, source: str | None, max_layers: int) -> Plan:
    content = archive.read("manifest.json", limit=_MAX_JSON)
    images = _json("manifest.json", content, list[_DockerManifest])
    if not images:
        raise ImageError("archive holds no image: its manifest.json is empty")
    chosen = _choose([(set(one.repo_tags or ()), one) for one in images], name, source)
    if len(chosen) != 1:
        raise ImageError(f"archive holds {len(chosen)} images of that name")
    image = chosen[0][1]
    _check_layer_count(len(image.layers), max_layers)
    config_bytes = archive.read(image.config, limit=_MAX_JSON)
    if told := _HEX_NAME.fullmatch(image.config):
        found = hashlib.sha256(config_bytes).hexdigest()
        expect("image config", f"sha256:{told[1]}", f"sha256:{found}")
    config = read_config(config_bytes)
    _check_diff_ids(config, len(image.layers))
    layers = []
    for path, diff_id in zip(image.layers, config.diff_ids, strict=True):
        blob = re.fullmatch(r"blobs/sha256/([0-9a-f]{64})", path)
        digest = f"sha256:{blob[1]}" if blob else None
        layers.append(_layer(archive, archive.file(path), digest=digest, diff_id=diff_id))
    return Plan(format="docker", config=config_bytes, manifest_digest=None, layers=layers)


def detect(stream: IO[bytes]) -> Format:
    """Tell an OCI layout (`oci-layout`), a docker-archive (`manifest.json`) and a root file system apart.

    The first name that no image archive has at its top settles it, so a large tree is not read.
    """
    found = set()
    for member in members(stream):
        if not _ARCHIVE_NAME.fullmatch(member.name):
            return "rootfs"
        found.add(member.name)
    if "oci-layout" in found:
        return "oci"
    return "docker" if "manifest.json" in found else "rootfs"


def compression_of(path: Path) -> Literal["none", "gzip", "zstd"]:
    """How a file is compressed, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "zstd" if head == b"\x28\xb5\x2f\xfd" else "none"


def format_of(path: Path, wanted: Format) -> Format:
    """The format of an archive; `auto` is resolved by looking inside.

    Raises:
        ImageError: It is no tar, or compressed so that it cannot be looked into.
    """
    if wanted != "auto":
        return wanted
    compression = compression_of(path)
    if compression == "zstd":
        raise ImageError(
            "what is in an archive compressed with zstd cannot be told",
            hint="say that it is a root file system with the format rootfs, or decompress it",
        )
    try:
        if compression == "gzip":
            with gzip.open(path, "rb") as unzipped:
                return detect(cast(IO[bytes], unzipped))
        with path.open("rb") as file:
            return detect(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ImageError(f"archive cannot be decompressed: {error}") from error


def decompress(path: Path, into: Path, *, most: int) -> None:
    """Write the uncompressed bytes of a gzip file to a new file.

    Raises:
        ImageError: It is damaged, or there are more than `most` bytes.
    """
    left = most
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(into, flags, 0o600), "wb") as out, gzip.open(path, "rb") as unzipped:
        try:
            while chunk := unzipped.read(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise ImageError(f"archive has more than {most} bytes uncompressed", limit=most)
                out.write(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ImageError(f"archive cannot be decompressed: {error}") from error


def plan_rootfs(path: Path) -> Plan:
    """An image of one layer: the archive itself."""
    if path.stat().st_size == 0:
        raise ImageError("archive is empty")
    return Plan(format="rootfs", config=None, manifest_digest=None, layers=[LayerBlob(path=path)])


def plan_archive(
    archive: Archive, format: Format, *, name: str, source: str | None, max_layers: int
) -> Plan:
    """Find an image in an OCI layout or docker-archive and check everything but its layers.

    Raises:
        ImageError: There is none, or it is malformed, incomplete or for another platform.
        DigestMismatchError: Manifest or config are not what their digests say.
    """
    try:
        if format == "docker":
            return _docker_plan(archive, name, source, max_layers)
        return _OciReader(archive).plan(name, source, max_layers)
    except ShoalError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(f"archive cannot be read: {error}") from error
