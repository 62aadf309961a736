"""`shoal cp`: files between this machine and a sandbox."""

from __future__ import annotations

import asyncio
import os

import click

from shoal.cli._ids import whole_id
from shoal.cli._options import drive, say
from shoal.errors import InvalidArgumentError, PathNotFoundError
from shoal.local import progress
from shoal.sdk import AsyncFiles, AsyncSandbox
from shoal.sdk._pack import measure

_SHOWN = 5
"""Paths that were left out and are named; a system's /etc has hundreds of links that point outside."""


def _split(place: str) -> tuple[str | None, str]:
    """Sandbox and path of `ID:/path`; no sandbox for a local path."""
    sandbox, colon, path = place.partition(":")
    if colon and sandbox.startswith("sb-") and "/" not in sandbox:
        if not path.startswith("/"):
            raise InvalidArgumentError(f"a path in a sandbox begins with /: {place}")
        return sandbox, path
    return None, place


@click.command()
@click.option(
    "--user", "-u", metavar="USER", help="Owner of what is copied into a sandbox.  [default: root]"
)
@click.argument("source")
@click.argument("target")
def command(source: str, target: str, user: str | None) -> None:
    """Copy a file or a directory tree between this machine and a sandbox: one of the two is ID:/path.

    As with cp -r: into TARGET if that is a directory, else to the name TARGET; of a SOURCE that ends in /. only what
    is in it. Modes, times and links are kept.
    Nothing is ever written outside TARGET, whatever the sandbox sends.

    \b
    shoal cp ./src $id:/src
    shoal cp $id:/out/report.xml .
    """
    from_sandbox, from_path = _split(source)
    to_sandbox, to_path = _split(target)
    if from_sandbox is not None and to_sandbox is not None:
        raise InvalidArgumentError(
            "SOURCE and TARGET are both in a sandbox",
            hint="copy it here first, and from here to the other",
        )
    if from_sandbox is None and to_sandbox is None:
        for place in (source, target):
            name, colon, path = place.partition(":")
            if colon and path.startswith("/") and "/" not in name and not os.path.lexists(place):
                raise InvalidArgumentError(
                    f"no sandbox {name}: {place}",
                    hint="an id begins with sb-; `shoal ps` lists sandboxes",
                )
        raise InvalidArgumentError(
            "one of SOURCE and TARGET must be in a sandbox",
            hint="write it as ID:/path, with an ID of `shoal ps`",
        )
    if to_sandbox is not None:
        drive(_upload(from_path, to_sandbox, to_path, user))
    elif from_sandbox is not None:
        drive(_download(from_sandbox, from_path, to_path))


async def _upload(local: str, sandbox_id: str, remote: str, user: str | None) -> None:
    source, name, total = await asyncio.to_thread(_look, local)
    sandbox_id = await whole_id(sandbox_id)
    files = (await AsyncSandbox.connect(sandbox_id)).files
    if _contents_only(local):
        remote = remote.rstrip("/") or "/"
    elif remote.endswith("/") or await _is_directory(files, remote):
        remote = f"{remote.rstrip('/')}/{name}"
    with progress.bar(f"copying to {sandbox_id[:11]}") as tell:
        await files.upload(
            source, remote, user=user, progress=lambda done: tell(min(1.0, done / (total or 1)), "")
        )


def _contents_only(path: str) -> bool:
    return path.rstrip("/").rpartition("/")[2] == "."


def _look(local: str) -> tuple[str, str, int]:
    """What to send, its name, and its bytes."""
    source = local.rstrip("/") or "/"
    return source, os.path.basename(os.path.abspath(source)), measure(os.path.realpath(source), "x")


async def _is_directory(files: AsyncFiles, path: str) -> bool:
    try:
        return (await files.stat(path)).kind == "directory"
    except PathNotFoundError:
        return False


async def _download(sandbox_id: str, remote: str, local: str) -> None:
    sandbox_id = await whole_id(sandbox_id)
    files = (await AsyncSandbox.connect(sandbox_id)).files
    contents = _contents_only(remote)
    if contents:
        remote = remote.rstrip("/").removesuffix(".").rstrip("/") or "/"
    kind = (await files.stat(remote)).kind
    if kind == "directory" and not contents and await asyncio.to_thread(os.path.isdir, local):
        local = os.path.join(local, remote.rstrip("/").rpartition("/")[2])
    with progress.bar(f"copying from {sandbox_id[:11]}") as tell:
        skipped = await files._fetch(
            remote, local, progress=lambda done: tell(None, f"{done >> 20} MiB")
        )
    for name, why in skipped[:_SHOWN]:
        say(f"left out: {name} ({why})")
    if len(skipped) > _SHOWN:
        reasons = ", ".join(dict.fromkeys(why for _, why in skipped[_SHOWN:]))
        say(f"left out: … and {len(skipped) - _SHOWN} more ({reasons})")
