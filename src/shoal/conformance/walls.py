"""WA: the walls, as far as a program inside can see them at a glance. tests/security looks closely."""

from __future__ import annotations

import asyncio
import socket

from shoal.conformance._expect import holds, same
from shoal.conformance._help import python
from shoal.conformance._suite import Trial, check


@check("WA-01")
async def no_network(t: Trial) -> None:
    """There is no network but loopback, which works; anything else fails at once."""
    sandbox = await t.sandbox()
    program = """
import socket, time
print([name for _, name in socket.if_nameindex()])
start = time.monotonic()
for family, address in ((2, "1.1.1.1"), (2, "169.254.169.254"), (2, "10.0.0.1"), (10, "2606::1")):
    with socket.socket(family) as one:
        one.settimeout(3)
        try:
            one.connect((address, 80))
            print(address, "reached")
        except TimeoutError:
            print(address, "no answer")
        except OSError:
            pass
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname(), 3).close()
print(time.monotonic() - start < 2)
"""
    same("seen", (await sandbox.run(python(program))).stdout, "['lo']\nTrue\n")


@check("WA-02")
async def powerless_root(t: Trial) -> None:
    """Root inside cannot mount, change the clock or the host name, or make a device."""
    sandbox = await t.sandbox()
    program = """
import ctypes, os, socket, time
libc = ctypes.CDLL(None, use_errno=True)
print(os.getuid())
def fails(call):
    try:
        return call() != 0
    except OSError:
        return True
print(fails(lambda: libc.mount(b"none", b"/mnt", b"tmpfs", 0, None)),
      fails(lambda: time.clock_settime(time.CLOCK_REALTIME, 1)),
      fails(lambda: socket.sethostname("changed")),
      fails(lambda: libc.unshare(0x10000000)),
      fails(lambda: os.close(os.open("/dev/mem", os.O_RDONLY))))
"""
    seen = (await sandbox.run(python(program), user="0")).stdout
    same("seen", seen, "0\nTrue True True True True\n")


@check("WA-03")
async def users_apart(t: Trial) -> None:
    """A user inside cannot read what root inside keeps to itself."""
    sandbox = await t.sandbox()
    await sandbox.files.write("/app/secret", b"s", mode=0o600)
    end = await sandbox.run(["cat", "/app/secret"], user="65534")
    same("code and output", (end.exit_code, end.stdout), (1, ""))


@check("WA-04")
async def own_names(t: Trial) -> None:
    """Each sandbox has a host name of its own, and no process of others is visible."""
    one, two = await asyncio.gather(t.sandbox(), t.sandbox())
    await two.exec(["sleep", "7401"])
    names = [
        (await each.run("cat /proc/sys/kernel/hostname")).stdout.strip() for each in (one, two)
    ]
    holds(len({*names, socket.gethostname()}) == 3, "three different names", names)
    count = "ls -d /proc/[0-9]* | wc -l; cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
    seen = (await one.run(count)).stdout
    holds(int(seen.split()[0]) < 10, "next to no process", seen.split()[0])
    same("the other's", "sleep 7401" in seen, False)


@check("WA-05")
async def no_secret(t: Trial) -> None:
    """Nothing of the node is in the environment of a command or of PID 1."""
    sandbox = await t.sandbox()
    seen = await sandbox.run("env; cat /proc/1/environ | tr '\\0' '\\n'", user="0")
    same("variables", [line for line in seen.stdout.split("\n") if "SHOAL" in line], [])


@check("WA-06", deadline=60)
async def limits(t: Trial) -> None:
    """Memory, processes and disk end at their limits, and only the offender feels it."""
    sandbox = await t.sandbox(memory_mib=64, pids=32, disk_mib=64)
    other = await t.sandbox()
    same("memory", (await sandbox.run(python("b'x' * (200 << 20)"))).outcome, "oom_killed")
    crowd = await t.sandbox(pids=32)
    forks = "import os\nfor n in range(100):\n    os.fork() or os.execvp('sleep', ['sleep', '9'])"
    end = await crowd.run(python(forks), timeout=20)
    holds("BlockingIOError" in end.stderr, "EAGAIN from fork", end.stderr[-120:])
    end = await sandbox.run("head -c 200000000 /dev/zero >/var/large", timeout=30)
    holds(end.exit_code == 1, "a full disk", end)
    size = (await sandbox.files.stat("/var/large")).size
    holds(size <= 64 << 20, "no more than the limit", size)
    same("another sandbox", (await other.run("echo fine")).stdout, "fine\n")
