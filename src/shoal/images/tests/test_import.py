"""IM-06, and IM-04, IM-05, IM-07 as far as the outer archive and the config go."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from shoal.errors import (
    DigestMismatchError,
    ImageError,
    ImageNotFoundError,
    InvalidArgumentError,
    ShoalError,
)
from shoal.images import ImageStore, Limits
from shoal.images.tests.fakes import (
    OCI_INDEX,
    FakeLayers,
    Oci,
    config,
    docker,
    layer,
    link,
    sha256,
    tar,
    tar_of,
)

pytestmark = pytest.mark.anyio

LAYERS = [layer("one"), layer("two")]


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "archive.tar"
    path.write_bytes(content)
    return path


async def refused(
    store: ImageStore,
    layers: FakeLayers,
    path: Path,
    kind: type[ShoalError] = ImageError,
    *,
    match: str | None = None,
    format: str = "auto",
    **more: Any,
) -> None:
    """Import, and find that it failed and left nothing."""
    data = path.parent / "data"
    before = sorted(str(one) for one in data.rglob("*") if "lock" not in one.name)
    with pytest.raises(kind, match=match):
        await store.import_archive(path, "bad", format, **more)
    assert not layers.temporary
    assert not layers.kept
    assert not store.list()
    assert sorted(str(one) for one in data.rglob("*") if "lock" not in one.name) == before


# ---- what works


def oci() -> bytes:
    made = Oci()
    return made.add(made.manifest(LAYERS)).pack()


def plain_oci() -> bytes:
    made = Oci()
    return made.add(made.manifest(LAYERS, zipped=False), name="latest").pack()


def hybrid() -> bytes:
    """What `docker save` writes since version 25."""
    made = Oci()
    made.add(made.manifest(LAYERS, zipped=False), name="latest")
    index = {"schemaVersion": 2, "manifests": made.manifests}
    both = docker(LAYERS, tags=["app:latest"], modern=True)
    return tar({"index.json": json.dumps(index).encode()} | made.files | both)


@pytest.mark.parametrize(
    ("make", "format"),
    [
        (oci, "auto"),
        (oci, "oci"),
        (plain_oci, "auto"),
        (lambda: tar(docker(LAYERS)), "auto"),
        (lambda: tar(docker(LAYERS, tags=["app:v1"])), "docker"),
        (lambda: tar(docker(LAYERS, modern=True)), "auto"),
        (hybrid, "auto"),
        (hybrid, "oci"),
        (hybrid, "docker"),
        (lambda: gzip.compress(oci()), "auto"),
        (lambda: gzip.compress(tar(docker(LAYERS))), "auto"),
    ],
)
async def test_an_image_is_the_same_in_every_kind_of_archive(
    store: ImageStore,
    layers: FakeLayers,
    tmp_path: Path,
    make: Callable[[], bytes],
    format: str,
) -> None:
    image = await store.import_archive(write(tmp_path, make()), "app", format)
    assert image == store.get("app") == store.get(image.digest)
    assert image.name == "app:latest"
    assert image.digest == sha256(config(LAYERS))
    assert image.layers == [sha256(one) for one in LAYERS]
    assert store.layers_of(image) == [sha256(one)[7:] for one in reversed(LAYERS)]
    assert (image.user, image.workdir, image.cmd) == ("1000:1000", "/work", ["sh"])
    assert (image.env, image.labels) == (["PATH=/usr/bin:/bin", "A=b=c"], {"made-by": "test"})
    assert image.size_bytes == len(b"onetwo")
    assert sorted(layers.kept) == sorted(store.layers_of(image))
    assert not layers.temporary
    assert not list(store.spool_dir.iterdir())


@pytest.mark.parametrize("format", ["auto", "rootfs"])
@pytest.mark.parametrize("zipped", [False, True])
async def test_a_root_file_system_becomes_an_image_of_one_layer(
    store: ImageStore, tmp_path: Path, format: str, zipped: bool
) -> None:
    content = tar({"./bin/sh": b"#!", "./etc/passwd": b"root"})
    path = write(tmp_path, gzip.compress(content) if zipped else content)
    image = await store.import_archive(path, "base", format)
    assert image.layers == [sha256(content)]
    again = await store.import_archive(path, "other", format)
    assert again.digest == image.digest, "the same files are the same image"


async def test_layers_that_are_there_are_not_unpacked_again(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    await store.import_archive(write(tmp_path, tar(docker(LAYERS[:1]))), "one")
    image = await store.import_archive(write(tmp_path, oci()), "both")
    assert layers.unpacked == [sha256(one)[7:] for one in LAYERS]
    assert image.size_bytes == len(b"onetwo")


async def test_a_layer_that_an_image_has_twice_is_unpacked_and_mounted_once(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    made = Oci()
    a, b = LAYERS
    image = await store.import_archive(
        write(tmp_path, made.add(made.manifest([a, b, a])).pack()), "app"
    )
    assert len(image.layers) == 3
    assert store.layers_of(image) == [sha256(a)[7:], sha256(b)[7:]]
    assert len(layers.unpacked) == 2


async def test_old_docker_archives_may_link_a_layer_to_another(
    store: ImageStore, tmp_path: Path
) -> None:
    files = docker([LAYERS[0], LAYERS[0]])
    files[f"{1:064x}/layer.tar"] = link(f"../{0:064x}/layer.tar")
    image = await store.import_archive(write(tmp_path, tar(files)), "app")
    assert image.layers == [sha256(LAYERS[0])] * 2


# ---- several images, several platforms


async def test_one_image_of_several_is_chosen_by_source_name_or_tag(
    store: ImageStore, tmp_path: Path
) -> None:
    made = Oci()
    made.add(made.manifest(LAYERS[:1]), name="v1")
    made.add(made.manifest(LAYERS), name="v2")
    path = write(tmp_path, made.pack())
    assert len((await store.import_archive(path, "app:v2")).layers) == 2
    assert len((await store.import_archive(path, "app", source="v1")).layers) == 1
    with pytest.raises(ImageError, match="2 images") as caught:
        await store.import_archive(path, "app")
    assert "v1, v2" in caught.value.hint
    with pytest.raises(ImageError, match="none is called 'v3'"):
        await store.import_archive(path, "app", source="v3")


async def test_one_docker_image_of_several_is_chosen(store: ImageStore, tmp_path: Path) -> None:
    one, two = docker(LAYERS[:1], modern=True), docker(LAYERS, modern=True)
    manifests = [json.loads(str(part["manifest.json"], "utf-8"))[0] for part in (one, two)]  # type: ignore[arg-type]  # both are bytes
    manifests[0]["RepoTags"] = ["docker.io/team/app:v1"]
    manifests[1]["RepoTags"] = ["other:latest", "team/app:v2"]
    files = one | two | {"manifest.json": json.dumps(manifests).encode()}
    path = write(tmp_path, tar(files))
    assert len((await store.import_archive(path, "team/app:v1")).layers) == 1
    assert len((await store.import_archive(path, "mine", source="team/app:v2")).layers) == 2


async def test_the_image_for_this_machine_is_taken_from_an_index(
    store: ImageStore, tmp_path: Path, layers: FakeLayers
) -> None:
    made = Oci()
    ours = made.manifest(LAYERS) | {
        "platform": {"os": "linux", "architecture": json.loads(config(LAYERS))["architecture"]}
    }
    foreign = made.manifest(LAYERS[:1]) | {"platform": {"os": "linux", "architecture": "s390x"}}
    attestation = {**foreign, "platform": {"os": "unknown", "architecture": "unknown"}}
    index = {"schemaVersion": 2, "manifests": [attestation, foreign, ours]}
    made.add(made.blob(json.dumps(index).encode(), OCI_INDEX))
    image = await store.import_archive(write(tmp_path, made.pack()), "app")
    assert len(image.layers) == 2
    only_foreign = Oci()
    only_foreign.add(only_foreign.manifest(LAYERS), platform=foreign["platform"])
    with pytest.raises(ImageError, match="no image for linux") as caught:
        await store.import_archive(write(tmp_path, only_foreign.pack()), "bad")
    assert "s390x" in caught.value.hint


@pytest.mark.parametrize(
    "changes", [{"architecture": "s390x"}, {"os": "windows"}, {"rootfs": {"diff_ids": []}}]
)
async def test_im_06_a_config_for_another_machine_or_other_layers_is_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = write(tmp_path, tar(docker(LAYERS, image_config=config(LAYERS, **changes))))
    await refused(store, layers, path)


# ---- digests


async def test_an_expected_digest_is_that_of_config_or_manifest(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    made = Oci()
    descriptor = made.manifest(LAYERS)
    path = write(tmp_path, made.add(descriptor).pack())
    await refused(store, layers, path, DigestMismatchError, expected_digest="sha256:" + "0" * 64)
    with pytest.raises(InvalidArgumentError):
        await store.import_archive(path, "app", expected_digest="sha256:../../x")
    for digest in (descriptor["digest"], sha256(config(LAYERS))):
        await store.import_archive(path, "app", expected_digest=digest)
    assert store.get(descriptor["digest"]) == store.get("app")
    assert store.get(f"whatever:tag@{descriptor['digest']}").digest == store.get("app").digest
    root = write(tmp_path, LAYERS[0])
    with pytest.raises(DigestMismatchError):
        await store.import_archive(root, "root", expected_digest="sha256:" + "0" * 64)
    with pytest.raises(ImageNotFoundError):
        store.get("root")


def _oci_with(change: Callable[[Oci, dict[str, Any]], None]) -> bytes:
    made = Oci()
    descriptor = made.manifest(LAYERS)
    change(made, descriptor)
    return made.add(descriptor).pack()


def _flip(name: str) -> Callable[[Oci, dict[str, Any]], None]:
    """Change one byte of a blob, found by what it contains or as a layer."""

    def change(made: Oci, descriptor: dict[str, Any]) -> None:
        for path, content in made.files.items():
            if isinstance(content, bytes) and path.startswith("blobs/"):
                kind = (
                    "manifest"
                    if b"schemaVersion" in content
                    else "config"
                    if b"rootfs" in content
                    else "layer"
                )
                if kind == name:
                    made.files[path] = content[:-1] + bytes([content[-1] ^ 0x20])
                    return

    return change


@pytest.mark.parametrize("blob", ["manifest", "config", "layer"])
async def test_im_06_a_changed_blob_is_found_before_it_is_used(
    store: ImageStore, layers: FakeLayers, tmp_path: Path, blob: str
) -> None:
    path = write(tmp_path, _oci_with(_flip(blob)))
    await refused(store, layers, path, DigestMismatchError)
    assert not layers.unpacked


async def test_im_06_a_layer_that_is_not_its_diff_id_is_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    lie = config([LAYERS[0], layer("three")])
    path = write(tmp_path, tar(docker(LAYERS, image_config=lie)))
    await refused(store, layers, path, DigestMismatchError, match="uncompressed layer")
    made = Oci()
    path = write(tmp_path, made.add(made.manifest(LAYERS, image_config=lie)).pack())
    await refused(store, layers, path, DigestMismatchError, match="uncompressed layer")


async def test_im_06_a_docker_config_must_match_its_name(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    for modern in (False, True):
        files = docker(LAYERS, modern=modern)
        own = next(
            name for name, one in files.items() if isinstance(one, bytes) and b"rootfs" in one
        )
        files[own] = config(LAYERS, os="linux ".strip(), author="somebody")
        await refused(store, layers, write(tmp_path, tar(files)), DigestMismatchError)
    files = docker(LAYERS, modern=True)
    files[f"blobs/sha256/{sha256(LAYERS[0])[7:]}"] = LAYERS[1]
    await refused(store, layers, write(tmp_path, tar(files)), DigestMismatchError)


def _remove(made: Oci, pattern: str) -> None:
    for path in [path for path in made.files if pattern in path]:
        del made.files[path]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m, d: _remove(m, d["digest"][7:]), "lacks"),
        (lambda m, d: d.update(size=d["size"] + 1), "bytes, not"),
        (lambda m, d: d.update(size=-1), "bytes, not"),
        (lambda m, d: d.update(digest="sha256:../../x"), "not a sha256 digest"),
        (lambda m, d: d.update(digest="../../../etc/passwd"), "not a sha256 digest"),
        (lambda m, d: d.update(digest="sha512:" + "0" * 128), "not a sha256 digest"),
        (lambda m, d: d.update(mediaType="text/plain"), "no image for"),
        (lambda m, d: m.files.update({"oci-layout": b"{}"}), "malformed"),
        (lambda m, d: m.files.update({"oci-layout": b'{"imageLayoutVersion":"9"}'}), "version"),
        (lambda m, d: m.files.update({"oci-layout": b"[" * 100_000}), "nested|malformed"),
        (lambda m, d: m.files.update({"oci-layout": b'"' + b"x" * (5 << 20) + b'"'}), "more than"),
        (lambda m, d: m.files.update({"oci-layout": b"\xff"}), "malformed"),
        (lambda m, d: m.files.update({"oci-layout": link("/etc/passwd")}), "lacks"),
        (lambda m, d: m.files.update({"oci-layout": link("../../etc/passwd")}), "lacks"),
        (lambda m, d: m.files.update({"oci-layout": link("oci-layout")}), "lacks"),
        (lambda m, d: m.files.update({"../x": b""}), "leaves"),
        (lambda m, d: m.files.update({"/blobs/x": b""}), "leaves"),
    ],
)
async def test_im_06_a_wrong_layout_is_refused(
    store: ImageStore,
    layers: FakeLayers,
    tmp_path: Path,
    change: Callable[[Oci, dict[str, Any]], None],
    match: str,
) -> None:
    path = write(tmp_path, _oci_with(change))
    await refused(store, layers, path, match=match, format="oci")
    assert not layers.unpacked


@pytest.mark.parametrize(
    ("changes", "layer_changes", "match"),
    [
        ({"layers": []}, {}, "no layers"),
        ({"schemaVersion": 1}, {}, "schema version"),
        ({"mediaType": "text/plain"}, {}, "calls itself"),
        ({"layers": "none"}, {}, "malformed"),
        ({}, {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"}, "type"),
        ({}, {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"}, "type"),
        ({}, {"digest": "sha256:../../x"}, "not a sha256 digest"),
        ({}, {"digest": "sha256:" + "1" * 64}, "lacks"),
        ({}, {"size": 5}, "bytes, not"),
    ],
)
async def test_im_06_wrong_missing_empty_or_foreign_layers_are_refused(
    store: ImageStore,
    layers: FakeLayers,
    tmp_path: Path,
    changes: dict[str, Any],
    layer_changes: dict[str, Any],
    match: str,
) -> None:
    made = Oci()
    made.add(made.manifest(LAYERS, layer_changes=layer_changes, changes=changes))
    await refused(store, layers, write(tmp_path, made.pack()), match=match)
    assert not layers.unpacked


async def test_im_06_a_layer_of_no_bytes_is_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    made = Oci()
    path = write(tmp_path, made.add(made.manifest([b""], zipped=False)).pack())
    await refused(store, layers, path, match="empty")
    await refused(store, layers, write(tmp_path, b""), match="early")
    await refused(store, layers, write(tmp_path, b""), match="empty", format="rootfs")


async def test_im_04_too_many_layers_are_refused_before_any_is_looked_at(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    made = Oci()
    one = made.blob(LAYERS[0], "application/vnd.oci.image.layer.v1.tar")
    descriptor = made.manifest([], image_config=config([]), changes={"layers": [one] * 100_000})
    descriptor_size = descriptor["size"]
    assert descriptor_size > 4 << 20
    path = write(tmp_path, made.add(descriptor).pack())
    await refused(store, layers, path, match="more than")
    made = Oci()
    descriptor = made.manifest([], image_config=config([]), changes={"layers": [one] * 10_000})
    path = write(tmp_path, made.add(descriptor).pack())
    await refused(store, layers, path, match="10000 layers")
    files = docker(LAYERS)
    files["manifest.json"] = json.dumps([{"Config": "x.json", "Layers": ["a"] * 100_000}]).encode()
    await refused(store, layers, write(tmp_path, tar(files)), match="100000 layers")


async def test_im_04_limits_hold_over_all_layers_together(tmp_path: Path) -> None:
    layers = FakeLayers()
    store = ImageStore(tmp_path / "data", layers, limits=Limits(max_bytes=5))
    await refused(store, layers, write(tmp_path, oci()), match="limit")
    bomb = ImageStore(tmp_path / "data", layers, limits=Limits(max_bytes=0))
    zeros = gzip.compress(tar({"oci-layout": b"{}"}) + bytes((1 << 20) + (64 << 20)))
    await refused(bomb, layers, write(tmp_path, zeros), format="oci", match="data after the end")


async def test_im_04_indexes_that_nest_without_end_are_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    made = Oci()
    descriptor = made.manifest(LAYERS)
    for _ in range(6):
        index = {"schemaVersion": 2, "manifests": [descriptor]}
        descriptor = made.blob(json.dumps(index).encode(), OCI_INDEX)
    await refused(store, layers, write(tmp_path, made.add(descriptor).pack()), match="nested")


# ---- the outer archive


def _archive_with(*extra: tuple[str, bytes | tarfile.TarInfo]) -> bytes:
    return tar_of([*docker(LAYERS).items(), *extra])


async def test_im_05_two_members_of_one_name_are_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    for name in ("manifest.json", "./manifest.json", ".//manifest.json"):
        path = write(tmp_path, _archive_with((name, b"[]")))
        await refused(store, layers, path, match="two members", format="docker")


async def test_im_05_a_cut_archive_is_refused_wherever_it_was_cut(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    whole = tar(docker(LAYERS)).rstrip(b"\0")
    for length in [0, 1, 511, 512, 513, len(whole) // 2, len(whole) - 1, len(whole)]:
        await refused(store, layers, write(tmp_path, whole[:length]), format="docker")
    zipped = gzip.compress(tar(docker(LAYERS)))
    for length in (10, len(zipped) // 2, len(zipped) - 1):
        await refused(store, layers, write(tmp_path, zipped[:length]))
        await refused(store, layers, write(tmp_path, zipped[:length]), format="docker")


async def test_im_05_a_layer_without_its_end_needs_a_digest_that_vouches_for_it(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    unended = LAYERS[0].rstrip(b"\0")
    await refused(store, layers, write(tmp_path, unended), match="early", format="rootfs")
    image = await store.import_archive(write(tmp_path, tar(docker([unended]))), "app")
    assert image.layers == [sha256(unended)]


async def test_im_05_damaged_headers_and_trailing_data_are_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    whole = tar(docker(LAYERS))
    path = write(tmp_path, bytes([whole[0] ^ 1]) + whole[1:])
    await refused(store, layers, path, match="checksum")
    path = write(tmp_path, whole + b"trailing")
    await refused(store, layers, path, match="after the end", format="docker")
    path = write(tmp_path, whole + whole)
    await refused(store, layers, path, match="after the end", format="docker")
    await refused(store, layers, write(tmp_path, b"no tar at all" * 100), match="checksum")


@pytest.mark.parametrize(
    ("headers", "match"),
    [
        ({"size": "3"}, "two sizes"),
        ({"GNU.sparse.major": "1"}, "sparse"),
        ({"path": "../x"}, "leaves"),
    ],
)
async def test_im_05_pax_records_that_lie_are_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path, headers: dict[str, str], match: str
) -> None:
    info = tarfile.TarInfo("x")
    info.pax_headers = headers
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info)
    await refused(store, layers, write(tmp_path, out.getvalue()), match=match, format="docker")


async def test_im_04_an_archive_of_very_many_members_is_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    block = tarfile.TarInfo("oci-layout").tobuf()
    path = write(tmp_path, block * 65_537 + bytes(1024))
    await refused(store, layers, path, match="more than 65536 members")
    info = tarfile.TarInfo("x" * (2 << 20))
    path = write(tmp_path, info.tobuf(tarfile.GNU_FORMAT))
    await refused(store, layers, path, match="header of more than", format="oci")


async def test_long_names_in_the_outer_archive_are_read(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = "d/" * 80 + "layer.tar"
        manifest = [{"Config": "c.json", "Layers": [long], "RepoTags": None}]
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
            for name, content in {
                "manifest.json": json.dumps(manifest).encode(),
                "c.json": config(LAYERS[:1]),
                long: LAYERS[0],
            }.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        path = write(tmp_path, out.getvalue())
        assert len((await store.import_archive(path, "app", "docker")).layers) == 1


# ---- hostile words


@pytest.mark.parametrize(
    "process",
    [
        {"Env": ["A=\0"]},
        {"Env": ["=x"]},
        {"Env": ["no-equals"]},
        {"Env": "A=b"},
        {"Env": [1]},
        {"Cmd": ["a\0b"]},
        {"User": "root\nsomebody:x:0:0"},
        {"WorkingDir": "/a\0b"},
        {"Labels": {"a": 1}},
    ],
)
async def test_im_07_hostile_strings_in_a_config_are_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path, process: dict[str, Any]
) -> None:
    content = config(LAYERS, config=process)
    path = write(tmp_path, tar(docker(LAYERS, image_config=content)))
    await refused(store, layers, path, match="config")


async def test_im_07_a_config_may_say_nothing_or_null(store: ImageStore, tmp_path: Path) -> None:
    for process in (None, {}, {"Env": None, "User": None, "Labels": None, "WorkingDir": "rel"}):
        content = config(LAYERS, config=process)
        path = write(tmp_path, tar(docker(LAYERS, image_config=content)))
        image = await store.import_archive(path, "app")
        assert (image.env, image.user) == ([], "")
        assert image.workdir in ("", "/rel")


@pytest.mark.parametrize("name", ["../x", "a@sha256:" + "0" * 64, "", "Upper", "sha256:abc/../x"])
async def test_cp_06_a_name_that_is_none_is_refused(
    store: ImageStore, layers: FakeLayers, tmp_path: Path, name: str
) -> None:
    path = write(tmp_path, oci())
    with pytest.raises(InvalidArgumentError):
        await store.import_archive(path, name)
    with pytest.raises(InvalidArgumentError, match="format"):
        await store.import_archive(path, "app", "iso")
    assert not layers.unpacked


# ---- no residue


async def test_im_06_an_import_that_is_cancelled_leaves_nothing(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    layers.hold = anyio.Event()
    path = write(tmp_path, gzip.compress(oci()))
    async with anyio.create_task_group() as group:
        group.start_soon(store.import_archive, path, "app")
        await layers.waiting.wait()
        group.cancel_scope.cancel()
    assert not layers.temporary
    assert not layers.kept
    assert not store.list()
    assert not list(store.spool_dir.iterdir())


async def test_im_06_a_commit_that_fails_half_way_leaves_nothing(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    layers.fail_commit = True
    await refused(store, layers, write(tmp_path, oci()), match="pool is gone")
    layers.fail_commit = False
    await store.import_archive(write(tmp_path, oci()), "app")


async def test_zstd_must_be_said_to_be_a_root_file_system(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    path = write(tmp_path, b"\x28\xb5\x2f\xfd" + bytes(100))
    await refused(store, layers, path, match="cannot be told")
