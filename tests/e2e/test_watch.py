"""What happens to files is told as it happens; modes and owners are set; a command goes on alone."""

from __future__ import annotations

import asyncio

import pytest

import shoal
from shoal import FileEvent, Sandbox, errors


def _told(events: shoal.FileWatch, path: str, kind: str) -> FileEvent:
    """The first event of this kind at this path; others may come before."""
    for event in events:
        if (event.path, event.kind) == (path, kind):
            return event
    raise AssertionError(f"no {kind} of {path}")


def test_everything_below_a_watched_directory_is_told(sandbox: Sandbox) -> None:
    sandbox.run("mkdir -p /w/old /elsewhere; touch /w/old/a", check=True)
    with sandbox.files.watch("/w") as events:
        sandbox.files.write("/w/new.txt", "x")
        _told(events, "/w/new.txt", "create")
        sandbox.run("echo more >> /w/old/a; chmod 600 /w/old/a", check=True)
        _told(events, "/w/old/a", "write")
        _told(events, "/w/old/a", "chmod")
        sandbox.run("mkdir -p /w/d/e/f; echo x > /w/d/e/f/g", check=True)
        assert _told(events, "/w/d", "create").directory
        assert not _told(events, "/w/d/e/f/g", "create").directory
        sandbox.run("mv /w/d/e/f/g /w/moved; mv /w/moved /elsewhere/; mv /elsewhere/moved /w/back")
        assert _told(events, "/w/d/e/f/g", "rename").target == "/w/moved"
        _told(events, "/w/moved", "remove")
        _told(events, "/w/back", "create")
        sandbox.files.remove("/w/d", recursive=True)
        _told(events, "/w/d/e/f", "remove")
    assert list(events) == []


def test_a_watch_that_is_not_recursive_stays_above(sandbox: Sandbox) -> None:
    sandbox.files.make_dir("/w/below")
    with sandbox.files.watch("/w", recursive=False) as events:
        sandbox.run("touch /w/below/x /w/y", check=True)
        assert next(events).path == "/w/y"


def test_a_watch_ends_with_a_typed_error(sandbox: Sandbox) -> None:
    with pytest.raises(errors.PathNotFoundError), sandbox.files.watch("/nothing"):
        pass
    with sandbox.files.watch("/tmp") as events:
        sandbox.terminate()
        with pytest.raises((errors.SandboxGoneError, errors.SandboxLostError)):
            list(events)


async def test_giving_up_on_an_event_in_async_loses_none() -> None:
    async with await shoal.AsyncSandbox.create() as sb, sb.files.watch("/tmp") as events:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.1)
        await sb.files.write("/tmp/x", "x")
        async for event in events:
            if event.path == "/tmp/x":
                break


def test_modes_and_owners_are_set(sandbox: Sandbox) -> None:
    sandbox.run("touch /x; ln -s x /link", check=True)
    assert sandbox.files.chmod("/x", 0o751).mode == 0o751
    assert sandbox.files.chown("/link", "daemon").uid == sandbox.files.stat("/x").uid
    assert sandbox.run("stat -c '%a %U' /x").stdout == "751 daemon\n"
    assert sandbox.run("stat -c %U /link").stdout == "root\n"
    with pytest.raises(errors.PathNotFoundError):
        sandbox.files.chmod("/nothing", 0o600)
    with pytest.raises(errors.ShoalError):
        sandbox.files.chown("/x", "nobody-of-this-name")


def test_a_detached_command_outlives_its_connection_and_is_never_held_back(
    sandbox: Sandbox,
) -> None:
    process = sandbox.exec(
        "yes | head -c 100000000; touch /written; echo end; sleep 600", detached=True
    )
    other = Sandbox.connect(sandbox.id)
    with other.files.watch("/", recursive=False) as events:
        if not other.files.exists("/written"):
            _told(events, "/written", "create")
    assert process.poll() is None
    again = other.attach(process.exec_id)
    assert again.stdout.dropped_bytes > 0
    end = b""
    while not end.endswith(b"y\nend\n"):
        end = end[-8:] + again.stdout.read(1 << 16)
    again.kill()
    assert process.wait() == -9
