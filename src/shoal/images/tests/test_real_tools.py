"""Archives that other programs made: umoci and skopeo, where they are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from shoal.images import ImageStore
from shoal.images.tests.fakes import FakeLayers

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        not (shutil.which("umoci") and shutil.which("skopeo")),
        reason="needs umoci and skopeo",
    ),
]


def run(*argv: str | Path) -> None:
    subprocess.run([str(part) for part in argv], check=True, capture_output=True)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with an image `made` of two layers."""
    root = tmp_path_factory.mktemp("umoci")
    layout = root / "layout"
    tree = root / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_text("hello")
    (tree / "link").symlink_to("/etc/passwd")
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:made")
    run("umoci", "insert", "--image", f"{layout}:made", tree, "/opt/one")
    run("umoci", "insert", "--image", f"{layout}:made", tree / "sub", "/opt/two")
    run(
        "umoci",
        "config",
        "--image",
        f"{layout}:made",
        "--config.env",
        "GREETING=hello there",
        "--config.workingdir",
        "/opt",
        "--config.user",
        "7:8",
        "--config.cmd",
        "cat",
        "--config.label",
        "a=b",
    )
    return layout


def tarred(layout: Path, to: Path) -> Path:
    with tarfile.open(to, "w") as tar:
        tar.add(layout, arcname=".")
    return to


async def test_what_umoci_and_skopeo_make_is_the_same_image(
    layout: Path, store: ImageStore, layers: FakeLayers, tmp_path: Path
) -> None:
    archives = {"layout": tarred(layout, tmp_path / "layout.tar")}
    for kind in ("oci-archive", "docker-archive"):
        archives[kind] = tmp_path / f"{kind}.tar"
        run(
            "skopeo",
            "copy",
            "--insecure-policy",
            f"oci:{layout}:made",
            f"{kind}:{archives[kind]}:example.org/made:v1",
        )
    gnu = tmp_path / "gnu.tar"
    run("tar", "-C", layout, "-czf", gnu, ".")
    archives["gnu"] = gnu
    images = {
        kind: await store.import_archive(path, f"example.org/{kind}:v1")
        for kind, path in archives.items()
    }
    assert len({tuple(image.layers) for image in images.values()}) == 1
    # skopeo rewrites the config for docker, the others keep it.
    digests = {images[kind].digest for kind in ("layout", "oci-archive", "gnu")}
    assert len(digests) == 1
    for image in images.values():
        assert "GREETING=hello there" in image.env
        assert (image.workdir, image.user, image.cmd) == ("/opt", "7:8", ["cat"])
        assert len(image.layers) == 2
    assert len(layers.unpacked) == 2
    await store.gc()


async def test_docker_archives_of_several_images(
    layout: Path, store: ImageStore, tmp_path: Path
) -> None:
    path = tmp_path / "archive.tar"
    run(
        "skopeo",
        "copy",
        "--insecure-policy",
        f"oci:{layout}:made",
        f"docker-archive:{path}:made:v1",
        "--additional-tag",
        "made:v2",
    )
    image = await store.import_archive(path, "made:v2")
    assert image.name == "made:v2"
    assert sys.version_info >= (3, 11)
