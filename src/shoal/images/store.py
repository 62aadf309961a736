"""Images that the node has: names, metadata, and which layers they need.

`data_dir/images/<hex digest>.json` describes one image, `data_dir/images/names.json` maps names to
digests. Two locks hold between processes too. `names.lock` is held by whoever changes these files,
for milliseconds. `layers.lock` is held shared by an import, from its look at which layers are there
to the record that refers to them, and alone by whatever deletes layers: so a layer is never
collected between its commit and its record.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import cast

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec
import structlog

from shoal.errors import ConflictError, ImageError, ImageNotFoundError, InvalidArgumentError
from shoal.images.formats import (
    FORMATS,
    Format,
    ImageConfig,
    LayerBlob,
    Plan,
    compression_of,
    decompress,
    format_of,
    plan_archive,
    plan_rootfs,
    read_config,
    rootfs_config,
)
from shoal.images.layers import LayerStore, UnpackedLayer
from shoal.images.locks import lock
from shoal.images.outer import Archive, Member, expect
from shoal.images.records import ImageRecord, LayerRecord, Records, new_record
from shoal.images.reference import Reference, is_digest
from shoal.types import ImageInfo

log = structlog.get_logger(__name__)

_LOCK_TIMEOUT = 30.0
_CLEANUP_TIMEOUT = 30.0
# Blobs, headers and padding around the content of an image that came as a compressed archive.
_ARCHIVE_OVERHEAD = 1 << 30


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much an archive may hold; what goes over is an `ImageError`."""

    max_bytes: int = 32 << 30
    """Bytes of file content in all layers together."""
    max_layer_entries: int = 2_000_000
    max_layers: int = 512
    layer_deadline: float = 900.0
    """Seconds for one layer."""


class _Known(msgspec.Struct, frozen=True):
    """All images at one moment, ready to be looked up."""

    names: dict[str, str]
    images: dict[str, ImageRecord]
    by_manifest: dict[str, str]
    infos: dict[tuple[str, str], ImageInfo]


class ImageStore:
    """The node's images.

    Args:
        data_dir: The node's data directory; `images/` and `tmp/` in it are this store's.
        layers: Where layers are unpacked and kept.
        limits: How much an archive may hold.
    """

    def __init__(self, data_dir: Path, layers: LayerStore, *, limits: Limits | None = None) -> None:
        self._directory = data_dir / "images"
        self._spool = data_dir / "tmp"
        self._layers = layers
        self._limits = limits or Limits()
        for directory in (self._directory, self._spool):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._records = Records(self._directory)
        self._pins: Counter[str] = Counter()
        # Images that are being dropped right now: not to be found, so not to be pinned, any more.
        self._going: set[str] = set()
        self._stamp: tuple[int, int, int] | None = None
        self._known = _Known({}, {}, {}, {})

    @property
    def spool_dir(self) -> Path:
        """Where the server writes an uploaded archive before `import_archive`; `reconcile` empties it."""
        return self._spool

    # ---- looking up

    def get(self, reference: str) -> ImageInfo:
        """The image of this name, `name@digest`, or digest; no waiting.

        A digest is that of the image's config or of its manifest.

        Raises:
            InvalidArgumentError: It is no reference.
            ImageNotFoundError: The node has none; the hint lists what it has.
        """
        name, record = self._find(reference)
        return self._info(name, record)

    def layers_of(self, image: ImageInfo) -> list[str]:
        """Hex diffIDs of an image, top first, as the keeper's `create` takes them.

        A layer that an image has twice is listed where it is highest: there it hides all that the
        lower one shows, and overlayfs takes a directory once only.
        """
        return list(dict.fromkeys(_hex(diff_id) for diff_id in reversed(image.layers)))

    @asynccontextmanager
    async def pin(self, reference: str) -> AsyncIterator[ImageInfo]:
        """The image, which keeps its layers until the context is left. No I/O when it is known.

        Pins are this process's; after a restart whoever needs an image pins it again before `gc`.
        """
        image = self.get(reference)
        self._pins[image.digest] += 1
        try:
            yield image
        finally:
            self._pins[image.digest] -= 1
            if not self._pins[image.digest]:
                del self._pins[image.digest]

    def _current(self) -> _Known:
        """All images, read again when another process has changed them."""
        stamp = self._records.stamp()
        if stamp != self._stamp:
            names, images = self._records.read()
            by_manifest = {
                image.manifest_digest: digest
                for digest, image in images.items()
                if image.manifest_digest
            }
            self._known = _Known(names, images, by_manifest, {})
            self._stamp = stamp
        return self._known

    def _find(self, reference: str) -> tuple[str, ImageRecord]:
        """An image, with the name that it was asked for or else its first one."""
        known = self._current()
        if is_digest(reference):
            digest = known.by_manifest.get(reference, reference)
            if digest in known.images and digest not in self._going:
                names = sorted(name for name, own in known.names.items() if own == digest)
                return (names[0] if names else ""), known.images[digest]
        else:
            wanted = Reference.parse(reference)
            if wanted.digest:
                # As everywhere, the digest decides and the name only says where it came from.
                return self._find(wanted.digest)
            named = known.names.get(wanted.name)
            if named is not None and named not in self._going:
                return wanted.name, known.images[named]
        names = sorted(known.names)
        have = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
        raise ImageNotFoundError(
            f"no image {reference!r}",
            hint=f"there is {have}" if names else "there are no images yet; import one",
            reference=reference,
        )

    def _info(self, name: str, record: ImageRecord) -> ImageInfo:
        key = (name, record.digest)
        info = self._known.infos.get(key)
        if info is None:
            info = _info(name, record, read_config(record.config.encode()))
            self._known.infos[key] = info
        return info

    # ---- importing

    async def import_archive(
        self,
        path: Path,
        name: str,
        format: str = "auto",
        *,
        expected_digest: str | None = None,
        source: str | None = None,
    ) -> ImageInfo:
        """Make an image of an archive, or leave nothing behind.

        An archive that holds several images gives the one called `source`; without it, the one that
        is called like `name`, or whose tag is. An archive of one image gives that one. An image for
        several platforms gives the one for this machine.

        Args:
            path: A tar file, or a gzip of one; the caller owns it and removes it afterwards.
            name: Reference that the image gets, for example `base` or `team/app:v1`; moved if in use.
            format: `auto`, `oci` (a layout in a tar), `docker` (docker-archive) or `rootfs`.
            expected_digest: `sha256:` digest that the config or the manifest must have.
            source: Which image of an archive that holds several: a tag or a ref name of it.

        Raises:
            InvalidArgumentError: The name, format or digest is none.
            ImageError: The archive is malformed, incomplete, for another platform or over a limit.
            DigestMismatchError: Some content is not what its digest says.
            ConflictError: Another process kept the store busy.
            DeadlineExceededError: A layer took too long to unpack.
            ResourceExhaustedError: The disk pool has no room for it.
        """
        wanted = Reference.parse(name)
        if wanted.digest or not wanted.tag:
            raise InvalidArgumentError(
                f"an image is not named by a digest: {name!r}", hint="give a name, maybe with a tag"
            )
        if format not in FORMATS:
            raise InvalidArgumentError(
                f"unknown image format {format!r}", hint=f"one of {', '.join(FORMATS)}"
            )
        if expected_digest is not None and not is_digest(expected_digest):
            raise InvalidArgumentError(f"not a sha256 digest: {expected_digest!r}")
        async with AsyncExitStack() as undo:
            kind = await anyio.to_thread.run_sync(format_of, path, cast(Format, format))
            if kind == "rootfs":
                archive = None
                plan = await anyio.to_thread.run_sync(plan_rootfs, path)
            else:
                tar = await self._uncompressed(path, undo)
                archive = await anyio.to_thread.run_sync(Archive, tar)
                undo.callback(archive.close)
                plan = await self._plan(archive, kind, wanted.name, source)
            if expected_digest is not None and plan.config is not None:
                _expect_image(plan, expected_digest)
            return await self._import(plan, archive, wanted.name, expected_digest)

    async def _uncompressed(self, path: Path, undo: AsyncExitStack) -> Path:
        if await anyio.to_thread.run_sync(compression_of, path) != "gzip":
            return path
        plain = self._spool / f"archive-{secrets.token_hex(8)}"
        undo.callback(plain.unlink, missing_ok=True)
        most = self._limits.max_bytes + _ARCHIVE_OVERHEAD
        await anyio.to_thread.run_sync(lambda: decompress(path, plain, most=most))
        return plain

    async def _plan(self, archive: Archive, kind: Format, name: str, source: str | None) -> Plan:
        return await anyio.to_thread.run_sync(
            lambda: plan_archive(
                archive, kind, name=name, source=source, max_layers=self._limits.max_layers
            )
        )

    async def _import(
        self, plan: Plan, archive: Archive | None, name: str, expected_digest: str | None
    ) -> ImageInfo:
        temporary: dict[str, str] = {}
        committed = False
        try:
            async with lock(self._directory / "layers.lock", shared=True, timeout=_LOCK_TIMEOUT):
                layers, fresh = await self._unpack(plan, archive, temporary)
                record = self._record(plan, layers, name)
                if plan.config is None and expected_digest is not None:
                    expect("image", expected_digest, record.digest)
                # Nothing below looks at content any more: what is wrong has been found by now.
                committed = True
                for diff_id, layer in list(temporary.items()):
                    await self._layers.commit(layer, diff_id)
                    del temporary[diff_id]
                await self._keep(record, name)
        except BaseException:
            with anyio.move_on_after(_CLEANUP_TIMEOUT, shield=True):
                for layer in temporary.values():
                    await self._layers.discard(layer)
                if committed:
                    await self._try_collect()
            raise
        log.info(
            "image_imported",
            image=name,
            digest=record.digest,
            layers=len(record.layers),
            special_skipped=sum(layer.special_skipped for layer in fresh),
            set_id_dropped=sum(layer.set_id_dropped for layer in fresh),
            xattrs_dropped=sum(layer.xattrs_dropped for layer in fresh),
        )
        return self._info(name, record)

    async def _unpack(
        self, plan: Plan, archive: Archive | None, temporary: dict[str, str]
    ) -> tuple[list[LayerRecord], list[UnpackedLayer]]:
        """Have every layer of a plan unpacked that is not there yet, under the names in `temporary`.

        Returns all layers, and what is known of those that were not there.
        """
        there = set(await self._layers.list())
        sizes = self._known_sizes()
        budget = self._limits.max_bytes
        done: list[LayerRecord] = []
        fresh: list[UnpackedLayer] = []
        for blob in plan.layers:
            if archive is not None and blob.member is not None and blob.digest is not None:
                await _verify(archive, blob.member, blob.digest)
            diff_id = blob.diff_id
            if diff_id is not None and (diff_id in there or diff_id in temporary):
                done.append(LayerRecord(diff_id=diff_id, bytes=sizes.get(diff_id, 0)))
                continue
            name = f"import-{secrets.token_hex(12)}"
            # Noted first: whatever happens from here on, this name is discarded.
            temporary[name] = name
            layer = await self._unpack_blob(name, blob, budget)
            if diff_id is not None:
                # Some builders forget to end a layer's tar; then this alone tells that it is whole.
                expect("uncompressed layer", f"sha256:{diff_id}", f"sha256:{layer.diff_id}")
            elif layer.unterminated:
                raise ImageError("archive ends early", hint="make or download it again")
            del temporary[name]
            temporary[layer.diff_id] = name
            budget -= layer.bytes
            sizes[layer.diff_id] = layer.bytes
            done.append(LayerRecord(diff_id=layer.diff_id, bytes=layer.bytes))
            fresh.append(layer)
        return done, fresh

    async def _unpack_blob(self, name: str, blob: LayerBlob, budget: int) -> UnpackedLayer:
        descriptor = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.lseek(descriptor, blob.offset, os.SEEK_SET)
            return await self._layers.unpack(
                name,
                descriptor,
                length=blob.length,
                max_bytes=budget,
                max_entries=self._limits.max_layer_entries,
                deadline=self._limits.layer_deadline,
            )
        finally:
            os.close(descriptor)

    def _known_sizes(self) -> dict[str, int]:
        images = self._current().images.values()
        return {layer.diff_id: layer.bytes for image in images for layer in image.layers}

    def _record(self, plan: Plan, layers: list[LayerRecord], name: str) -> ImageRecord:
        config = plan.config
        if config is None:
            config = rootfs_config(layers[0].diff_id)
        try:
            return new_record(
                config=config,
                manifest_digest=plan.manifest_digest,
                layers=layers,
                created_at=time.time(),
                imported_as=name,
            )
        except UnicodeDecodeError as error:
            raise ImageError("image config is not UTF-8") from error

    async def _keep(self, record: ImageRecord, name: str) -> None:
        """Write an image and give it its name; no half of it can be seen."""
        async with self._changing():
            names, images = await anyio.to_thread.run_sync(self._records.read)
            known = images.get(record.digest)
            if known is not None:
                record = msgspec.structs.replace(
                    record,
                    created_at=known.created_at,
                    manifest_digest=record.manifest_digest or known.manifest_digest,
                )

            def write() -> None:
                self._records.write_image(record)
                self._records.write_names(names | {name: record.digest})

            # From here on the import has happened, so a cancel comes too late.
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(write)

    # ---- removing

    async def remove(self, reference: str) -> None:
        """Drop a name; with its last name the image goes, and layers that nothing else needs.

        A digest drops all names of the image. Layers stay until the next `gc` when an import is
        under way.

        Raises:
            ImageNotFoundError: The node has none.
            ConflictError: The image is pinned and this is its last name.
        """
        async with self._changing():
            asked, record = self._find(reference)
            names, _ = await anyio.to_thread.run_sync(self._records.read)
            own = {name for name, digest in names.items() if digest == record.digest}
            dropped = own if is_digest(reference) or "@" in reference else {asked}
            last = own <= dropped
            if last and self._pins[record.digest]:
                raise ConflictError(
                    f"image {reference!r} is in use by {self._pins[record.digest]} sandboxes",
                    hint="end them first",
                    reference=reference,
                )
            kept = {name: digest for name, digest in names.items() if name not in dropped}

            def write() -> None:
                # Names first: a name without an image would be a lie, the other way round is garbage.
                self._records.write_names(kept)
                if last:
                    self._records.drop_image(record.digest)

            with self._dropping([record.digest] if last else []):
                await anyio.to_thread.run_sync(write)
        log.info("image_removed", image=asked, digest=record.digest)
        if last:
            await self._try_collect()

    async def gc(self) -> list[str]:
        """Drop images that have no name and no pin, and layers that no image needs; what went, as `sha256:` digests.

        Raises:
            ConflictError: An import is under way, and went on for long.
        """
        async with lock(self._directory / "layers.lock", timeout=_LOCK_TIMEOUT):
            async with self._changing():
                names, images = await anyio.to_thread.run_sync(self._records.read)
                unused = [
                    digest for digest in images.keys() - names.values() if not self._pins[digest]
                ]
                with self._dropping(unused):
                    await anyio.to_thread.run_sync(self._drop_all, names, unused)
            return sorted(unused) + await self._collect()

    async def reconcile(self) -> list[str]:
        """After a start: empty the spool, drop records whose layers are missing, then as `gc`.

        Damaged records are put aside, in `images/damaged/`.
        """
        async with self._changing():
            moved = await anyio.to_thread.run_sync(self._records.quarantine)
            if moved:
                log.warning("image_records_damaged", files=moved)
            await anyio.to_thread.run_sync(self._empty_spool)
            there = set(await self._layers.list())
            names, images = await anyio.to_thread.run_sync(self._records.read)
            broken = [
                digest for digest, image in images.items() if not there.issuperset(image.diff_ids)
            ]
            if broken:
                log.warning("images_without_layers_dropped", digests=broken)
                kept = {name: digest for name, digest in names.items() if digest not in broken}
                await anyio.to_thread.run_sync(self._drop_all, kept, broken)
        return sorted(broken) + await self.gc()

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[None]:
        """The right to change names and records."""
        async with lock(self._directory / "names.lock", timeout=_LOCK_TIMEOUT):
            yield

    @contextmanager
    def _dropping(self, digests: Iterable[str]) -> Iterator[None]:
        """Hide images while they are dropped, which a cancel does not interrupt."""
        hidden = set(digests)
        self._going |= hidden
        try:
            with anyio.CancelScope(shield=True):
                yield
        finally:
            self._going -= hidden

    def _drop_all(self, names: dict[str, str], digests: Iterable[str]) -> None:
        digests = list(digests)
        if digests:
            self._records.write_names(names)
        for digest in digests:
            self._records.drop_image(digest)

    def _empty_spool(self) -> None:
        for path in self._spool.iterdir():
            if not path.is_dir() or path.is_symlink():
                path.unlink(missing_ok=True)

    async def _try_collect(self) -> None:
        """Drop layers that no image needs, if nothing is being imported right now."""
        try:
            async with lock(self._directory / "layers.lock", timeout=0):
                await self._collect()
        except ConflictError:
            log.debug("layers_left_for_gc")

    async def _collect(self) -> list[str]:
        _, images = await anyio.to_thread.run_sync(self._records.read)
        needed = {diff_id for image in images.values() for diff_id in image.diff_ids}
        unneeded = sorted(set(await self._layers.list()) - needed)
        for diff_id in unneeded:
            await self._layers.remove(diff_id)
        return [f"sha256:{diff_id}" for diff_id in unneeded]

    # ---- listing; last, as its name is that of a type which the signatures above use

    def list(self) -> list[ImageInfo]:
        """Every image, one entry a name, sorted by name; an image without a name comes last, with name ``."""
        known = self._current()
        named = [
            self._info(name, known.images[digest]) for name, digest in sorted(known.names.items())
        ]
        unnamed = known.images.keys() - known.names.values()
        return named + [self._info("", known.images[digest]) for digest in sorted(unnamed)]


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _info(name: str, record: ImageRecord, config: ImageConfig) -> ImageInfo:
    return ImageInfo(
        name=name,
        digest=record.digest,
        layers=[f"sha256:{diff_id}" for diff_id in record.diff_ids],
        size_bytes=sum(layer.bytes for layer in record.layers),
        created_at=record.created_at,
        architecture=config.architecture,
        env=config.env,
        workdir=config.workdir,
        user=config.user,
        entrypoint=config.entrypoint,
        cmd=config.cmd,
        labels=config.labels,
    )


def _expect_image(plan: Plan, expected: str) -> None:
    if plan.manifest_digest != expected:
        record = new_record(
            config=plan.config or b"",
            manifest_digest=None,
            layers=[],
            created_at=0.0,
            imported_as="",
        )
        expect("image", expected, record.digest)


async def _verify(archive: Archive, member: Member, digest: str) -> None:
    """Hash a blob in a thread that stops when the import is cancelled."""
    await anyio.to_thread.run_sync(
        lambda: archive.verify(member, digest, anyio.from_thread.check_cancelled)
    )
