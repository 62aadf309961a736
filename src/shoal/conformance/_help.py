"""What several checks need: programs in the sandbox, waiting for something, another client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from shoal.conformance._expect import Unmet
from shoal.sdk import AsyncNode, AsyncProcess, AsyncSandbox

EVERY_BYTE = bytes(range(256))


def python(program: str, *args: str) -> list[str]:
    """The command that runs a Python program."""
    return ["python3", "-c", program, *args]


async def until(what: str, condition: Callable[[], Awaitable[bool]], seconds: float = 15.0) -> None:
    """Wait until `condition` holds.

    Raises:
        Unmet: It did not within `seconds`.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not await condition():  # noqa: ASYNC110 - it is a question to the sandbox, not an event here
                await asyncio.sleep(0.05)
            return
    raise Unmet(f"expected {what} within {seconds:g} s\ngot nothing of it")


async def read_until(process: AsyncProcess, mark: bytes) -> bytes:
    """What a process prints up to and with `mark`.

    Raises:
        Unmet: It ended without.
    """
    seen = b""
    while mark not in seen:
        more = await process.stdout.read(65536)
        if not more:
            raise Unmet(f"expected {mark!r} in the output\ngot its end after {seen[-120:]!r}")
        seen += more
    return seen


async def alive(sandbox: AsyncSandbox, mark: str) -> int:
    """How many live processes' command lines the regular expression `mark` is found in, the asking one left out."""
    program = """
import os, re, sys
count = 0
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) != os.getpid():
        try:
            state = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[0]
            line = open(f"/proc/{name}/cmdline", errors="replace").read().replace("\\0", " ")
            count += bool(re.search(sys.argv[1], line)) and state not in "ZX"
        except OSError:
            pass
print(count)
"""
    return int((await sandbox.run(python(program, mark), check=True)).stdout)


def none_left(sandbox: AsyncSandbox, mark: str) -> Callable[[], Awaitable[bool]]:
    """A condition for `until`: no live process has `mark` in its command line, as `alive` looks for it."""

    async def none() -> bool:
        return await alive(sandbox, mark) == 0

    return none


@contextlib.asynccontextmanager
async def another_client(
    program: str, *args: str, url: str | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of this machine that runs a Python program with `shoal`; killed when the block is left.

    Args:
        program: The body of an async function; `shoal` and `sys` are there, arguments from `sys.argv[1]` on.
        args: The arguments.
        url: Node to use; None: the one that everybody uses.
    """
    body = "\n".join(f"    {line}" for line in program.strip().splitlines())
    text = f"import asyncio, sys\nimport shoal\nasync def main():\n{body}\nasyncio.run(main())\n"
    environment = {**os.environ, **({"SHOAL_URL": url} if url else {})}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", text, *args),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def finished(client: asyncio.subprocess.Process) -> str:
    """What another client printed.

    Raises:
        Unmet: It failed.
    """
    out, err = await client.communicate()
    if client.returncode:
        raise Unmet(f"expected a client that ends well\ngot {err.decode().splitlines()[-1:]}")
    return out.decode()


@contextlib.asynccontextmanager
async def breaking_connections(after: int, directory: Path | None = None) -> AsyncIterator[str]:
    """An address of the node behind which every connection breaks once `after` bytes came down it.

    It is a TCP port, or with `directory` a unix socket in it.
    """
    url = AsyncNode().url

    async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if url.startswith("unix://"):
            return await asyncio.open_unix_connection(url.removeprefix("unix://"))
        host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def up(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()

    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        source, target = await dial()
        upwards = asyncio.create_task(up(reader, target))
        left = after
        try:
            while left > 0 and (data := await source.read(min(65536, left))):
                left -= len(data)
                writer.write(data)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass  # it ends here either way; asyncio tells of a callback whose task was cancelled
        finally:
            upwards.cancel()
            for one in (writer, target):
                one.transport.abort()
            await asyncio.gather(upwards, return_exceptions=True)

    if directory is not None:
        address = f"unix://{directory / 'node.sock'}"
        server = await asyncio.start_unix_server(serve, directory / "node.sock")
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield address
    finally:
        server.close()
        tasks = [task for task in serving if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
