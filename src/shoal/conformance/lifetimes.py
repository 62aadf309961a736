"""LI: how a sandbox begins, is found, and ends."""

from __future__ import annotations

import asyncio

import anyio

from shoal.conformance._expect import holds, refused, same
from shoal.conformance._help import until
from shoal.conformance._suite import Trial, check
from shoal.errors import ImageNotFoundError, SandboxGoneError, SandboxNotFoundError, ShoalError
from shoal.sdk import AsyncSandbox
from shoal.types import SandboxSpec, Status


@check("LI-01")
async def ready_at_once(t: Trial) -> None:
    """Who has a sandbox can run a command in it at once; it is what was asked for."""
    sandbox = await t.sandbox(cpu=0.5, memory_mib=200, disk_mib=300, pids=99, timeout=77)
    same("first command", (await sandbox.run("echo hi")).stdout, "hi\n")
    info = await sandbox.info()
    got = (info.status, info.runtime, info.network, info.cpu, info.memory_mib, info.disk_mib)
    same("info", got, ("running", t.runtime, "none", 0.5, 200, 300))
    same("more of it", (info.id, info.pids, info.labels), (sandbox.id, 99, t.label))
    holds(abs(info.expires_at - info.created_at - 77) < 1, "77 s of life", info)


@check("LI-02")
async def timeout(t: Trial) -> None:
    """A sandbox ends at its timeout, whatever runs in it, and tells the reason afterwards."""
    sandbox = await t.sandbox(timeout=2)
    process = await sandbox.exec("trap '' TERM; while :; do sleep 1; done")
    with refused("wait", SandboxGoneError):
        await process.wait(20)
    await until("the end", lambda: _ended(sandbox))
    info = await sandbox.info()
    same("end", (info.status, info.reason), ("stopped", "timeout"))
    holds(info.ended_at is not None and info.ended_at >= info.created_at, "a time of end", info)
    try:
        await sandbox.run("true")
    except SandboxGoneError as error:
        same("reason in the error", error.details.get("reason"), "timeout")
    else:
        holds(False, "SandboxGoneError", "no error")


async def _ended(sandbox: AsyncSandbox) -> bool:
    return (await sandbox.info()).status is Status.STOPPED


@check("LI-03")
async def terminate(t: Trial) -> None:
    """`terminate` is idempotent and safe at once, waits for the end, and is told as the reason."""
    sandbox = await t.sandbox()
    other = await AsyncSandbox.connect(sandbox.id)
    await asyncio.gather(*(one.terminate() for one in (sandbox, other) for _ in range(4)))
    info = await sandbox.info()
    same("end", (info.status, info.reason), ("stopped", "terminated"))
    await sandbox.terminate()
    same("reason after another one", (await sandbox.info()).reason, "terminated")


@check("LI-04")
async def gone(t: Trial) -> None:
    """After its end every call says that it is gone, and why; an id that never was is not found."""
    sandbox = await t.sandbox()
    process = await sandbox.exec(["sleep", "100"], exec_id="one")
    await sandbox.terminate()
    for name, call in (
        ("run", sandbox.run("true")),
        ("exec", sandbox.exec("true")),
        ("attach", sandbox.attach("one")),
        ("execs", sandbox.execs()),
        ("read", sandbox.files.read("/etc/passwd")),
        ("write", sandbox.files.write("/x", b"")),
        ("list", sandbox.files.list("/")),
        ("signal", process.signal("TERM")),
        ("connect", AsyncSandbox.connect(sandbox.id)),
    ):
        try:
            with anyio.fail_after(10):
                await call
        except SandboxGoneError as error:
            same(f"reason by {name}", error.details.get("reason"), "terminated")
        except (ShoalError, TimeoutError) as error:
            holds(False, f"SandboxGoneError by {name}", error)
        else:
            holds(False, f"SandboxGoneError by {name}", "no error")
    with refused("connect to an id that never was", SandboxNotFoundError):
        await AsyncSandbox.connect(f"{sandbox.id[:-8]}aaaaaaaa")


@check("LI-05")
async def block(t: Trial) -> None:
    """The `with` block ends its sandbox, also by an error, which comes through."""
    sandbox = await t.sandbox()
    try:
        async with sandbox:
            raise LookupError("mine")
    except LookupError as error:
        same("error", str(error), "mine")
    same("reason", (await sandbox.info()).reason, "terminated")


@check("LI-06")
async def found(t: Trial) -> None:
    """Sandboxes are listed newest first, by label, the ended ones if asked, and connected to by id."""
    first = await t.sandbox()
    second = await t.sandbox(labels={**t.label, "more": "yes"})
    listed = [one.id for one in await AsyncSandbox.list(labels=t.label)]
    same("newest first", listed, [second.id, first.id])
    both = {**t.label, "more": "yes"}
    same("by two labels", [one.id for one in await AsyncSandbox.list(labels=both)], [second.id])
    await first.files.write("/app/mark", b"1")
    connected = await AsyncSandbox.connect(first.id)
    same("the same one", await connected.files.read("/app/mark"), b"1")
    await first.terminate()
    same("alive", [one.id for one in await AsyncSandbox.list(labels=t.label)], [second.id])
    ended = await AsyncSandbox.list(labels=t.label, all=True)
    same("all", {one.id for one in ended}, {first.id, second.id})


@check("LI-07", deadline=60)
async def batch(t: Trial) -> None:
    """Of a batch each comes up or has an error of its own, in order."""
    good = SandboxSpec(image=t.image, runtime=t.runtime, timeout=60, labels=t.label)
    bad = SandboxSpec(image="no-such-image", runtime=t.runtime, timeout=60, labels=t.label)
    made = await AsyncSandbox.create_many([good, bad, good, good])
    try:
        kinds = [isinstance(one, AsyncSandbox) for one in made]
        same("came up", kinds, [True, False, True, True])
        holds(isinstance(made[1], ImageNotFoundError), "ImageNotFoundError", made[1])
        up = [one for one in made if isinstance(one, AsyncSandbox)]
        results = await asyncio.gather(*(one.run("echo hi") for one in up))
        same("answers", [one.stdout for one in results], ["hi\n"] * 3)
    finally:
        for one in made:
            if isinstance(one, AsyncSandbox):
                await one.terminate()


@check("LI-08")
async def nothing_left_inside(t: Trial) -> None:
    """A new sandbox has nothing of the one before."""
    first = await t.sandbox()
    await first.run(
        "echo x >/app-mark; echo y >/dev/shm/mark; echo z >/var/mark", user="0", check=True
    )
    await first.terminate()
    second = await t.sandbox()
    seen = await second.run("ls /app-mark /dev/shm/mark /var/mark")
    same("files", seen.stdout, "")
