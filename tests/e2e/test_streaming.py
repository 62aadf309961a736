"""Files larger than memory, both ways: what the client holds does not grow with them.

1 GiB each; with SHOAL_SOAK=1 10 GiB, for which the host needs as much disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.node import PrivateNode

MIB = 1 << 20
SIZE = (10 << 30) if os.environ.get("SHOAL_SOAK") == "1" else (1 << 30)
ROOM = 64 * MIB
"""Bytes of resident memory that a transfer may add to the client."""
PRELUDE = """
    import asyncio, json, re, sys, zlib
    import shoal

    size = int(sys.argv[1])

    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

    def blocks():
        # Each block another: one that is lost, doubled or moved changes the sum.
        block = bytearray(range(256)) * 4096
        for number in range(size >> 20):
            block[:8] = number.to_bytes(8, "big")
            yield bytes(block)

    def sum_of(pieces):
        total = 0
        for piece in pieces:
            total = zlib.crc32(piece, total)
        return total

    def sum_inside(sb):
        program = '''if True:
            import zlib
            total = 0
            with open("/big", "rb") as file:
                while piece := file.read(1 << 20):
                    total = zlib.crc32(piece, total)
            print(total)
        '''
        return int(sb.run(["python3", "-c", program], check=True).stdout)

    def ready():
        # The base: everything is imported, the loop's thread and a connection are there.
        sb = shoal.Sandbox.create(disk_mib=(size >> 20) + 512, timeout=3000)
        sb.files.write("/small", b"x")
        assert b"".join(sb.files.read_stream("/small")) == b"x"
        return sb, peak()
"""


def _measure(code: str, *arguments: str) -> dict[str, Any]:
    """Run a program in an interpreter of its own and return what it prints as JSON."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(code)),
            *(str(SIZE), *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=2400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_reading_takes_no_more_memory_than_a_piece(node: PrivateNode) -> None:
    told = _measure("""
        sb, base = ready()
        with sb:
            sb.run(f"truncate -s {size} /big", check=True)
            seen = sum(len(piece) for piece in sb.files.read_stream("/big"))
            print(json.dumps({"seen": seen, "grown": peak() - base}))
    """)
    assert told["seen"] == SIZE
    assert told["grown"] < ROOM


def test_writing_from_an_iterable_takes_no_more_memory_than_a_piece(node: PrivateNode) -> None:
    told = _measure("""
        sb, base = ready()
        with sb:
            info = sb.files.write("/big", blocks())
            grown = peak() - base
            same = sum_inside(sb) == sum_of(blocks())
            print(json.dumps({"size": info.size, "same": same, "grown": grown}))
    """)
    assert (told["size"], told["same"]) == (SIZE, True)
    assert told["grown"] < ROOM


def test_writing_from_a_file_in_async_takes_no_more_memory_than_a_piece(
    node: PrivateNode, tmp_path: Path
) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(SIZE)
        file.seek(SIZE - 3)
        file.write(b"end")
    told = _measure(
        """
        async def main():
            async with await shoal.AsyncSandbox.create(disk_mib=(size >> 20) + 512) as sb:
                await sb.files.write("/small", b"x")
                base = peak()
                with open(sys.argv[2], "rb") as file:
                    info = await sb.files.write("/big", file)
                grown = peak() - base
                end = await sb.files.read("/big", offset=size - 4)
                print(json.dumps({"size": info.size, "end": end.hex(), "grown": grown}))

        asyncio.run(main())
        """,
        str(sparse),
    )
    assert (told["size"], bytes.fromhex(told["end"])) == (SIZE, b"\0end")
    assert told["grown"] < ROOM


def test_a_write_beyond_the_disk_ends_early_and_leaves_what_was_there(node: PrivateNode) -> None:
    import shoal

    made = 0

    def blocks() -> Iterator[bytes]:
        nonlocal made
        while made < 1 << 30:
            made += MIB
            yield os.urandom(MIB)

    with shoal.Sandbox.create(disk_mib=64) as sb:
        sb.files.write("/x", b"before")
        with pytest.raises(shoal.errors.PathError, match="quota"):
            sb.files.write("/x", blocks())
        assert made < 256 * MIB
        assert sb.files.read("/x") == b"before"
        assert [info.name for info in sb.files.list("/") if info.name.startswith((".", "x"))] == [
            "x"
        ]
