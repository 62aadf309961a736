"""ST: what a sandbox does to itself never makes a command, a kill or a file time out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import anyio

from shoal.conformance._expect import Unmet, holds, same
from shoal.conformance._help import python, read_until
from shoal.conformance._suite import Trial, check
from shoal.errors import PathError
from shoal.sdk import AsyncProcess, AsyncSandbox

_PATIENCE = 20.0
"""Seconds for what takes milliseconds on an idle machine."""


@check("ST-01", deadline=120, alone=True)
async def fork_bomb(t: Trial) -> None:
    """Under a fork bomb commands run, files are read, and the bomb can be killed."""
    sandbox = await t.sandbox(pids=128)
    await sandbox.files.write("/app/data", b"data")
    bomb = await sandbox.exec(python(_BOMB))
    await read_until(bomb, b"full\n")
    await _answers(sandbox)
    await _dies(bomb)
    await _answers(sandbox)
    same("room again", (await sandbox.run("echo $(echo $(echo fork))")).stdout, "fork\n")


_BOMB = """
import os, time
told = False
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        if not told:
            os.write(1, b"full\\n")
        told = True
"""


@check("ST-02", deadline=120, alone=True)
async def busy_threads(t: Trial) -> None:
    """Beside 200 busy threads commands run, files are read, and the threads can be killed."""
    sandbox = await t.sandbox(cpu=1)
    await sandbox.files.write("/app/data", b"data")
    busy = await sandbox.exec(python(_BUSY))
    await read_until(busy, b"busy\n")
    for _ in range(5):
        await _answers(sandbox)
    await _dies(busy)


_BUSY = """
import hashlib, threading
def work():
    while True:
        hashlib.sha256(block)  # lets go of the interpreter's lock
block = b"x" * 1_000_000
for _ in range(200):
    threading.Thread(target=work).start()
print("busy", flush=True)
"""


@check("ST-03", deadline=120, alone=True)
async def full_memory(t: Trial) -> None:
    """At the memory limit a command ends one way or the other, files are read, the hog can be killed."""
    sandbox = await t.sandbox(memory_mib=128)
    await sandbox.files.write("/app/data", b"data")
    hog = await sandbox.exec(_HOG)
    await read_until(hog, b"full\n")
    for _ in range(3):
        with _in_time("a command"):
            end = await sandbox.run(["cat", "/app/data"], timeout=60)
        fine = end.outcome in ("oom_killed", "not_started") or end.stdout == "data"
        holds(fine, "output, or a word of the memory", end)
        with _in_time("a read"):
            same("a file", await sandbox.files.read("/app/data"), b"data")
    if await hog.poll() is None:
        await _dies(hog)
    await sandbox.run("rm -f /dev/shm/*", user="0", timeout=20)
    await _answers(sandbox)


_HOG = """
# What goes over the limit is a child, again and again, so that memory is full most of the time.
while :; do
  python3 -c 'held = []
while True: held.append(b"x" * (1 << 20))'
  echo full
done
"""


@check("ST-04", deadline=90, alone=True)
async def full_disk(t: Trial) -> None:
    """On a full disk commands run, files are read and removed, and a write says what is wrong."""
    sandbox = await t.sandbox(disk_mib=64)
    await sandbox.files.write("/app/data", b"data")
    await sandbox.run("head -c 500000000 /dev/zero >/app/large", timeout=30)
    await _answers(sandbox)
    try:
        with _in_time("a write"):
            await sandbox.files.write("/app/more", b"x" * (16 << 20))
    except PathError as error:
        holds(error.details.get("errno") in (28, 122), "ENOSPC or EDQUOT", error.details)
    else:
        raise Unmet("expected PathError\ngot a write beyond the limit")
    same("what was half written", await sandbox.files.exists("/app/more"), False)
    with _in_time("a removal"):
        await sandbox.files.remove("/app/large")
    await sandbox.files.write("/app/more", b"room")


@check("ST-05", deadline=90, alone=True)
async def flood(t: Trial) -> None:
    """Beside twenty commands that print without end and are not read, commands run and files are read."""
    sandbox = await t.sandbox()
    await sandbox.files.write("/app/data", b"data")
    floods = [await sandbox.exec(["cat", "/dev/zero"]) for _ in range(20)]
    for one in floods:
        await one.stdout.read(1)
    await _answers(sandbox)
    for one in floods:
        with _in_time("a kill"):
            await one.kill()
    await _answers(sandbox)


@check("ST-06", deadline=90, alone=True)
async def stopped(t: Trial) -> None:
    """A tree that stopped itself is killed like any other."""
    sandbox = await t.sandbox()
    await sandbox.files.write("/app/data", b"data")
    still = await sandbox.exec("(kill -STOP $(exec sh -c 'echo $PPID')) & echo up; kill -STOP $$")
    await read_until(still, b"up\n")
    await _answers(sandbox)
    await _dies(still)


@check("ST-07", deadline=120, alone=True)
async def end_of_a_bomb(t: Trial) -> None:
    """A sandbox full of a fork bomb ends within its deadline."""
    sandbox = await t.sandbox(pids=256)
    bomb = await sandbox.exec(python(_BOMB))
    await read_until(bomb, b"full\n")
    with _in_time("terminate"):
        await sandbox.terminate()
    same("reason", (await sandbox.info()).reason, "terminated")


async def _answers(sandbox: AsyncSandbox) -> None:
    with _in_time("a command"):
        end = await sandbox.run(["cat", "/app/data"])
    same("a command", (end.outcome, end.exit_code, end.stdout), ("exited", 0, "data"))
    with _in_time("a read"):
        same("a file", await sandbox.files.read("/app/data"), b"data")
    with _in_time("a list"):
        holds(len(await sandbox.files.list("/app")) > 0, "entries", [])


async def _dies(process: AsyncProcess) -> None:
    with _in_time("a kill"):
        await process.kill()
        await process.wait()
    same("outcome", process.exit and process.exit.outcome, "killed")


@contextlib.contextmanager
def _in_time(what: str) -> Iterator[None]:
    """The block ends in time, or `what` is what failed."""
    with anyio.move_on_after(_PATIENCE) as limit:
        yield
    if limit.cancelled_caught:
        raise Unmet(f"expected {what} within {_PATIENCE:g} s\ngot no end of it")
