"""Layers in memory, and archives made by hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from typing import Any

import anyio

from shoal.errors import ImageError
from shoal.images import UnpackedLayer
from shoal.images.formats import host_architecture


class FakeLayers:
    """A `LayerStore` that keeps nothing of a layer but that it was there."""

    def __init__(self) -> None:
        self.temporary: dict[str, str] = {}
        self.kept: dict[str, int] = {}
        self.unpacked: list[str] = []
        self.removed: list[str] = []
        self.hold: anyio.Event | None = None
        self.waiting = anyio.Event()
        self.fail_commit = False
        self.dropped: dict[str, int] = {}
        """Counts of an `UnpackedLayer`, the same for each."""

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
        assert name not in self.temporary
        self.temporary[name] = ""
        content = os.pread(blob, 1 << 26, os.lseek(blob, 0, os.SEEK_CUR))[:length]
        compression = "gzip" if content[:2] == b"\x1f\x8b" else "none"
        if compression == "gzip":
            content = gzip.decompress(content)
        if self.hold is not None:
            self.waiting.set()
            await self.hold.wait()
        unterminated = bool(content) and any(content[-1024:])
        try:
            with tarfile.open(fileobj=io.BytesIO(content + bytes(2048 if content else 0))) as tar:
                members = tar.getmembers()
        except tarfile.TarError as error:
            del self.temporary[name]
            raise ImageError(f"bad layer: {error}") from error
        diff_id = hashlib.sha256(content).hexdigest()
        self.temporary[name] = diff_id
        self.unpacked.append(diff_id)
        size = sum(member.size for member in members)
        if size > max_bytes or len(members) > max_entries:
            del self.temporary[name]
            raise ImageError("layer is over a limit")
        return UnpackedLayer(
            diff_id=diff_id,
            entries=len(members),
            bytes=size,
            compression=compression,
            unterminated=unterminated,
            **self.dropped,
        )

    async def commit(self, name: str, diff_id: str) -> bool:
        assert self.temporary[name] == diff_id
        if self.fail_commit and self.kept:
            raise ImageError("the pool is gone")
        del self.temporary[name]
        existing = diff_id in self.kept
        self.kept[diff_id] = 1
        return existing

    async def discard(self, name: str) -> None:
        self.temporary.pop(name, None)

    async def remove(self, diff_id: str) -> None:
        self.removed.append(diff_id)
        self.kept.pop(diff_id, None)

    async def list(self) -> list[str]:
        return sorted(self.kept)


def sha256(content: bytes) -> str:
    """`sha256:` digest."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def tar(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar of files, and of what a TarInfo says."""
    return tar_of(list(members.items()))


def tar_of(members: list[tuple[str, bytes | tarfile.TarInfo]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def link(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A link to be put into `tar`."""
    info = tarfile.TarInfo()
    info.type = kind
    info.linkname = target
    return info


def layer(text: str) -> bytes:
    """A layer with one file."""
    return tar({f"etc/{text}": text.encode()})


def config(layers: list[bytes], **changes: Any) -> bytes:
    """An image config for uncompressed layers."""
    content: dict[str, Any] = {
        "architecture": host_architecture(),
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/bin:/bin", "A=b=c"],
            "Cmd": ["sh"],
            "Entrypoint": None,
            "User": "1000:1000",
            "WorkingDir": "/work",
            "Labels": {"made-by": "test"},
        },
        "rootfs": {"type": "layers", "diff_ids": [sha256(one) for one in layers]},
    }
    return json.dumps(content | changes).encode()


OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"


class Oci:
    """An OCI layout whose every part can be changed before it is packed."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | tarfile.TarInfo] = {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}'
        }
        self.manifests: list[dict[str, Any]] = []

    def blob(self, content: bytes, media_type: str) -> dict[str, Any]:
        digest = sha256(content)
        self.files[f"blobs/sha256/{digest[7:]}"] = content
        return {"mediaType": media_type, "digest": digest, "size": len(content)}

    def manifest(
        self,
        layers: list[bytes],
        *,
        zipped: bool = True,
        image_config: bytes | None = None,
        layer_changes: dict[str, Any] | None = None,
        changes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        suffix = "+gzip" if zipped else ""
        blobs = [
            self.blob(gzip.compress(one, mtime=0) if zipped else one, OCI_LAYER + suffix)
            | (layer_changes or {})
            for one in layers
        ]
        content = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.blob(
                config(layers) if image_config is None else image_config,
                "application/vnd.oci.image.config.v1+json",
            ),
            "layers": blobs,
        }
        return self.blob(json.dumps(content | (changes or {})).encode(), OCI_MANIFEST)

    def add(self, descriptor: dict[str, Any], name: str = "", **changes: Any) -> Oci:
        if name:
            changes["annotations"] = {"org.opencontainers.image.ref.name": name}
        self.manifests.append(descriptor | changes)
        return self

    def pack(self) -> bytes:
        index = {"schemaVersion": 2, "manifests": self.manifests}
        return tar({**self.files, "index.json": json.dumps(index).encode()})


def docker(
    layers: list[bytes],
    *,
    tags: list[str] | None = None,
    modern: bool = False,
    image_config: bytes | None = None,
) -> dict[str, bytes | tarfile.TarInfo]:
    """The members of a docker-archive of one image, as old or new `docker save` writes it."""
    content = config(layers) if image_config is None else image_config
    name = sha256(content)[7:]
    files: dict[str, bytes | tarfile.TarInfo] = {}
    if modern:
        own = f"blobs/sha256/{name}"
        paths = [f"blobs/sha256/{sha256(one)[7:]}" for one in layers]
    else:
        own = f"{name}.json"
        paths = [f"{n:064x}/layer.tar" for n, _ in enumerate(layers)]
    files[own] = content
    files |= dict(zip(paths, layers, strict=True))
    manifest = [{"Config": own, "RepoTags": tags, "Layers": paths}]
    files["manifest.json"] = json.dumps(manifest).encode()
    return files
