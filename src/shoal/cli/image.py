"""`shoal image`: what sandboxes start from."""

from __future__ import annotations

import asyncio
import os
import time

import click

from shoal.cli._group import Failure
from shoal.cli._options import drive, print_json, say
from shoal.cli.ps import span
from shoal.errors import ShoalError
from shoal.local import progress
from shoal.sdk import AsyncNode
from shoal.sdk._async import directory_format
from shoal.sdk._pack import measure
from shoal.types import ImageInfo

_TOP = ("bin", "usr", "etc")
"""A root file system has at least one of these."""


@click.group()
def command() -> None:
    """Bring, build, list and remove images.

    \b
    shoal image build                          the `base` image, from the Debian archive
    shoal image import ./layout mine:1         an OCI layout, as skopeo, buildah and umoci write it
    docker save app | shoal image import - app
    shoal image ls
    """


@command.command("import")
@click.option(
    "--format",
    type=click.Choice(["auto", "oci", "docker", "rootfs"]),
    default="auto",
    show_default=True,
    help="What PATH is.",
)
@click.option("--digest", metavar="sha256:…", help="Refuse any other image than this.")
@click.option("--json", "as_json", is_flag=True, help="Print all about it as JSON.")
@click.argument("path")
@click.argument("name", required=False)
def import_(path: str, name: str | None, format: str, digest: str | None, as_json: bool) -> None:
    """Bring an image from this machine: an OCI layout (directory or tar), a docker-archive, or a root file system
    (directory or tar). A tar may be gzipped; `-` is a tar on stdin.

    NAME defaults to PATH's last part, less its ending. Prints the image's digest.

    \b
    shoal image import ./layout mine:1
    shoal image import --format rootfs ./tree tools
    mmdebstrap --variant=minbase bookworm - | shoal image import - debian
    """
    if path == "-" and name is None:
        raise click.UsageError("an image from stdin needs a NAME")
    image = drive(_import(path, name or _name_of(path), format, digest))
    if as_json:
        print_json(image)
    else:
        click.echo(image.digest)


def _name_of(path: str) -> str:
    name = os.path.basename(os.path.abspath(path)).lower()
    for ending in (".gz", ".tgz", ".tar", ".oci", ".zst"):
        name = name.removesuffix(ending)
    return name


async def _import(path: str, name: str, format: str, digest: str | None) -> ImageInfo:
    node = AsyncNode()
    if path == "-":
        path = "/dev/stdin"
    if await asyncio.to_thread(_looks_wrong, path, format):
        say(
            f"warning: this does not look like a root file system: {path} has none of {', '.join(_TOP)}"
        )
    total = await asyncio.to_thread(_size, path)
    with progress.bar(f"importing {name}") as tell:

        def moved(done: int) -> None:
            share = min(1.0, done / total) if total else None
            tell(share, "unpacking" if share == 1.0 else f"{done >> 20} MiB")

        return await node.import_image(
            path, name, format=format, expected_digest=digest, progress=moved
        )


def _looks_wrong(path: str, format: str) -> bool:
    """Whether a directory shall be a root file system and is hardly one."""
    if not os.path.isdir(path) or directory_format(path, format) != "rootfs":
        return False
    return not any(os.path.lexists(os.path.join(path, name)) for name in _TOP)


def _size(path: str) -> int:
    """Bytes to send, about; 0 if that cannot be known."""
    if os.path.isdir(path):
        return measure(os.path.realpath(path))
    return os.stat(path).st_size


@command.command()
@click.option("--name", default="base", show_default=True, help="Name it gets.")
@click.option(
    "--refresh", is_flag=True, help="Build it anew, with the archive's packages of today."
)
@click.option("--json", "as_json", is_flag=True, help="Print all about it as JSON.")
def build(name: str, refresh: bool, as_json: bool) -> None:
    """Build the `base` image: a small Debian with Python, made by mmdebstrap from the Debian archive.

    It is built once a machine and kept in /var/cache/shoal (SHOAL_CACHE_DIR). SHOAL_DEBIAN_MIRROR names another
    mirror than http://deb.debian.org. The first sandbox of a fresh machine does this by itself.
    """

    async def main() -> ImageInfo:
        return await AsyncNode().build_base(name, refresh=refresh)

    image = drive(main())
    if as_json:
        print_json(image)
    else:
        click.echo(image.digest)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def ls(as_json: bool) -> None:
    """List images, by name."""

    async def main() -> list[ImageInfo]:
        return await AsyncNode().images()

    images = drive(main())
    if as_json:
        print_json(images)
        return
    from shoal.cli._table import table

    now = time.time()
    table(
        ("NAME", "DIGEST", "LAYERS", "SIZE", "AGE"),
        [
            (
                image.name,
                image.digest[:19],
                str(len(image.layers)),
                f"{image.size_bytes / (1 << 20):.0f} MiB",
                span(now - image.created_at),
            )
            for image in images
        ],
    )


@command.command()
@click.argument("images", metavar="NAME...", nargs=-1, required=True)
def rm(images: tuple[str, ...]) -> None:
    """Remove images by name or digest. Their layers go with `shoal image gc`."""

    async def main() -> list[tuple[str, ShoalError]]:
        node, failed = AsyncNode(), []
        for image in images:
            try:
                await node.remove_image(image)
            except ShoalError as error:
                failed.append((image, error))
            else:
                click.echo(image)
        return failed

    failed = drive(main())
    for image, error in failed:
        Failure(f"{image}: {error.message}", error.hint).show()
    raise SystemExit(1 if failed else 0)


@command.command()
def gc() -> None:
    """Remove layers that no image and no sandbox uses; print what was removed."""

    async def main() -> list[str]:
        return await AsyncNode().collect_garbage()

    for layer in drive(main()):
        click.echo(layer)
