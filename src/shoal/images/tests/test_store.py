from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from shoal.errors import ConflictError, ImageNotFoundError, InternalError, InvalidArgumentError
from shoal.images import ImageStore
from shoal.images.tests.fakes import FakeLayers, docker, layer, sha256, tar

pytestmark = pytest.mark.anyio

A, B, C = layer("a"), layer("b"), layer("c")


async def put(store: ImageStore, tmp_path: Path, name: str, layers: list[bytes]) -> str:
    path = tmp_path / "archive.tar"
    path.write_bytes(tar(docker(layers)))
    return (await store.import_archive(path, name)).digest


def ids(*layers: bytes) -> list[str]:
    return sorted(sha256(one)[7:] for one in layers)


async def test_an_import_tells_what_was_left_out_of_the_layers_that_it_unpacked(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    layers.dropped = {"special_skipped": 1, "set_id_dropped": 2, "xattrs_dropped": 3}
    keys = ("layers", *layers.dropped)
    with capture_logs() as logged:
        await put(store, tmp_path, "two", [A, B])
        await put(store, tmp_path, "one", [A])
    told = [[one[key] for key in keys] for one in logged if one["event"] == "image_imported"]
    assert told == [[2, 2, 4, 6], [1, 0, 0, 0]]


async def test_an_unknown_image_is_told_with_what_there_is(
    store: ImageStore, tmp_path: Path
) -> None:
    with pytest.raises(ImageNotFoundError) as caught:
        store.get("nothing")
    assert "no images yet" in caught.value.hint
    await put(store, tmp_path, "base", [A])
    with pytest.raises(ImageNotFoundError) as caught:
        store.get("nothing")
    assert "base:latest" in caught.value.hint
    with pytest.raises(ImageNotFoundError):
        store.get("sha256:" + "0" * 64)
    with pytest.raises(InvalidArgumentError):
        store.get("../../etc/passwd")


async def test_every_spelling_of_a_name_finds_the_image(store: ImageStore, tmp_path: Path) -> None:
    digest = await put(store, tmp_path, "docker.io/library/debian", [A])
    for name in ("debian", "debian:latest", "docker.io/debian", f"debian@{digest}", digest):
        assert store.get(name).digest == digest
    assert [image.name for image in store.list()] == ["debian:latest"]


async def test_images_are_there_after_a_restart(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    await put(store, tmp_path, "base", [A, B])
    again = ImageStore(tmp_path / "data", layers)
    assert again.get("base") == store.get("base")
    assert await again.reconcile() == []
    assert again.list() == store.list()


async def test_layers_go_with_the_last_image_that_needs_them(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    await put(store, tmp_path, "one", [A, B])
    await put(store, tmp_path, "two", [A, C])
    await store.remove("one")
    assert sorted(layers.kept) == ids(A, C)
    await store.remove("two")
    assert not layers.kept
    assert not list((tmp_path / "data/images").glob("????*" * 16 + ".json"))
    with pytest.raises(ImageNotFoundError):
        await store.remove("two")


async def test_an_image_with_several_names_goes_with_the_last_or_by_digest(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    digest = await put(store, tmp_path, "one", [A])
    await put(store, tmp_path, "two", [A])
    await put(store, tmp_path, "three", [A])
    await store.remove("one")
    assert [image.name for image in store.list()] == ["three:latest", "two:latest"]
    assert layers.kept
    await store.remove(digest)
    assert not store.list()
    assert not layers.kept


async def test_a_name_that_moves_leaves_the_old_image_to_gc(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    old = await put(store, tmp_path, "base", [A])
    await put(store, tmp_path, "base", [B])
    assert [image.name for image in store.list()] == ["base:latest", ""]
    assert store.get(old).name == ""
    async with store.pin(old):
        assert await store.gc() == []
    assert await store.gc() == [old, sha256(A)]
    assert sorted(layers.kept) == ids(B)


async def test_a_pinned_image_keeps_its_layers(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    await put(store, tmp_path, "base", [A])
    async with store.pin("base") as image, store.pin(image.digest):
        with pytest.raises(ConflictError, match="in use by 2"):
            await store.remove("base")
        with pytest.raises(ConflictError):
            await store.remove(image.digest)
        await put(store, tmp_path, "alias", [A])
        await store.remove("base")
        assert await store.gc() == []
    await store.remove("alias")
    assert not layers.kept


async def test_an_image_that_is_going_can_no_longer_be_pinned(
    store: ImageStore, layers: FakeLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(store, tmp_path, "base", [A])
    in_thread = anyio.to_thread.run_sync
    seen = []

    async def run_sync(call: Callable[..., Any], *args: Any, **more: Any) -> Any:
        if call.__name__ == "write":
            with pytest.raises(ImageNotFoundError):
                store.get("base")
            seen.append(call)
        return await in_thread(call, *args, **more)

    monkeypatch.setattr(anyio.to_thread, "run_sync", run_sync)
    await store.remove("base")
    assert seen
    assert not layers.kept


async def test_no_layer_is_collected_while_an_import_is_under_way(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    await put(store, tmp_path, "one", [A])
    path = tmp_path / "second.tar"
    path.write_bytes(tar(docker([A, B])))
    layers.hold = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(store.import_archive, path, "two")
        await layers.waiting.wait()
        # The import has seen that layer A is there and relies on it.
        await store.remove("one")
        assert sorted(layers.kept) == ids(A)
        layers.hold.set()
    assert sorted(layers.kept) == ids(A, B)
    assert store.get("two").layers == [sha256(A), sha256(B)]


async def test_many_imports_at_once_agree(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    other = ImageStore(tmp_path / "data", layers)
    for name, parts in {"ab": [A, B], "bc": [B, C], "ca": [C, A]}.items():
        (tmp_path / name).write_bytes(tar(docker(parts)))
    async with anyio.create_task_group() as group:
        for turn, one in enumerate((store, other, store, other)):
            for name in ("ab", "bc", "ca"):
                group.start_soon(one.import_archive, tmp_path / name, f"{name}:{turn}")
    assert len(store.list()) == 12
    assert store.list() == other.list()
    assert sorted(layers.kept) == ids(A, B, C)
    assert not layers.temporary


def _import_in_a_process(data: Path, archive: Path, names: list[str]) -> None:
    async def main() -> None:
        store = ImageStore(data, FakeLayers())
        for name in names:
            await store.import_archive(archive, name)

    anyio.run(main)


async def test_two_processes_that_import_at_once_lose_no_name(
    store: ImageStore, tmp_path: Path
) -> None:
    archive = tmp_path / "archive.tar"
    archive.write_bytes(tar(docker([A])))
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(
            target=_import_in_a_process,
            args=(tmp_path / "data", archive, [f"app{worker}:{n}" for n in range(20)]),
        )
        for worker in range(2)
    ]
    for one in workers:
        one.start()
    for one in workers:
        await anyio.to_thread.run_sync(one.join)
        assert one.exitcode == 0
    assert len(store.list()) == 40


async def test_reconcile_drops_what_a_crash_has_left(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    whole = await put(store, tmp_path, "whole", [A])
    broken = await put(store, tmp_path, "broken", [A, B])
    layers.kept.pop(ids(B)[0])
    layers.kept[ids(C)[0]] = 1
    (store.spool_dir / "upload-1").write_bytes(b"half")
    (store.spool_dir / "link").symlink_to("/etc/passwd")
    (tmp_path / "data/images/.names.json.0.tmp").write_bytes(b"half")
    fresh = ImageStore(tmp_path / "data", layers)
    assert await fresh.reconcile() == [broken, sha256(C)]
    assert [image.digest for image in fresh.list()] == [whole]
    assert sorted(layers.kept) == ids(A)
    assert not list(store.spool_dir.iterdir())
    assert not list((tmp_path / "data/images").glob(".*"))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"version":99,"names":{}}'])
async def test_cr_06_a_damaged_file_of_names_is_put_aside_and_names_are_found_again(
    store: ImageStore, layers: FakeLayers, tmp_path: Path, content: bytes
) -> None:
    await put(store, tmp_path, "base", [A])
    names = tmp_path / "data/images/names.json"
    names.write_bytes(content)
    with pytest.raises(InternalError, match="damaged"):
        store.get("base")
    fresh = ImageStore(tmp_path / "data", layers)
    await fresh.reconcile()
    assert fresh.get("base").layers == [sha256(A)]
    assert [one.name.split(".")[0] for one in (names.parent / "damaged").iterdir()] == ["names"]


async def test_cr_06_a_changed_record_is_put_aside(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    digest = await put(store, tmp_path, "base", [A])
    await put(store, tmp_path, "other", [B])
    path = tmp_path / "data/images" / f"{digest[7:]}.json"
    record = json.loads(path.read_bytes())
    record["config"] = record["config"].replace("1000", "0")
    path.write_text(json.dumps(record))
    fresh = ImageStore(tmp_path / "data", layers)
    await fresh.reconcile()
    assert [image.name for image in fresh.list()] == ["other:latest"]
    assert sorted(layers.kept) == ids(B)


async def test_what_another_process_did_is_seen(
    store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    other = ImageStore(tmp_path / "data", layers)
    await put(store, tmp_path, "base", [A])
    assert other.get("base") == store.get("base")
    await other.remove("base")
    with pytest.raises(ImageNotFoundError):
        store.get("base")


async def test_files_are_for_their_owner_only(store: ImageStore, tmp_path: Path) -> None:
    await put(store, tmp_path, "base", [A])
    for root, _, files in os.walk(tmp_path / "data"):
        assert os.stat(root).st_mode & 0o077 == 0 or root == str(tmp_path / "data")
        for name in files:
            assert (Path(root) / name).stat().st_mode & 0o077 == 0
