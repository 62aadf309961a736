"""Three hundred at once."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.node import PrivateNode

CROWD = """
import asyncio, json, sys, time
import shoal

N = int(sys.argv[1])

async def main():
    start = time.monotonic()
    specs = [shoal.SandboxSpec(memory_mib=64, pids=32, timeout=600, labels={"n": str(n)}) for n in range(N)]
    made = await shoal.AsyncSandbox.create_many(specs)
    errors = [repr(one) for one in made if isinstance(one, shoal.ShoalError)]
    alive = [one for one in made if not isinstance(one, shoal.ShoalError)]
    created = time.monotonic() - start
    listed = len(await shoal.AsyncSandbox.list())
    gate = asyncio.Semaphore(32)

    async def ask(number, sandbox):
        async with gate:
            result = await sandbox.run(["sh", "-c", f"echo {number}; hostname 2>/dev/null || cat /proc/sys/kernel/hostname"])
        answer, host = result.stdout.split()
        assert int(answer) == number, result
        return host

    hosts = await asyncio.gather(*(ask(n, one) for n, one in enumerate(alive)))
    answered = time.monotonic() - start
    async def end(one):
        async with gate:
            await one.terminate()
    await asyncio.gather(*(end(one) for one in alive))
    print(json.dumps({
        "errors": errors, "alive": len(alive), "listed": listed, "hosts": len(set(hosts)),
        "created": created, "answered": answered, "ended": time.monotonic() - start,
    }))

asyncio.run(main())
"""


def test_three_hundred_at_once_answer_and_leave_nothing(node: PrivateNode) -> None:
    with node.unchanged(seconds=60, connections=True):
        done = subprocess.run(
            [sys.executable, "-c", CROWD, "300"],
            env=node.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        told = json.loads(done.stdout)
        assert told["errors"] == []
        assert told["alive"] == told["hosts"] == 300
        assert told["listed"] >= 300
