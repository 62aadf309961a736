"""The walls are strict, and ordinary programs do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support import images
from tests.support.node import PrivateNode

if TYPE_CHECKING:
    import shoal

PROGRAMS = {
    "multiprocessing": """
import multiprocessing
def square(x): return x * x
if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        with context.Pool(3) as pool:
            assert sum(pool.map(square, range(100))) == 328350
    queue = multiprocessing.Queue(); queue.put(1); assert queue.get() == 1
    from multiprocessing import shared_memory
    block = shared_memory.SharedMemory(create=True, size=1 << 20)
    block.buf[0] = 7; block.close(); block.unlink()
    print("done")
""",
    "asyncio": """
import asyncio
async def main():
    async def serve(reader, writer):
        writer.write(await reader.readline()); await writer.drain(); writer.close()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for _ in range(50):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hi\\n"); assert await reader.readline() == b"hi\\n"; writer.close()
    process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    assert (await process.communicate(b"x"))[0] == b"x"
    await asyncio.to_thread(sum, range(10))
    print("done")
asyncio.run(main())
""",
    "sqlite3": """
import sqlite3, concurrent.futures
for place in (":memory:", "/var/tmp/x.db", "/tmp/y.db"):
    with sqlite3.connect(place) as db:
        if place[0] == "/": db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT)")
        db.executemany("INSERT INTO t (b) VALUES (?)", [(str(n),) for n in range(10000)])
    assert db.execute("SELECT count(*) FROM t").fetchone() == (10000,)
print("done")
""",
    "threads and signals": """
import faulthandler, os, resource, signal, subprocess, tempfile, threading, time
hit = threading.Event()
signal.signal(signal.SIGALRM, lambda *_: hit.set()); signal.setitimer(signal.ITIMER_REAL, 0.05)
assert hit.wait(5)
threads = [threading.Thread(target=time.sleep, args=(0.05,)) for _ in range(50)]
[t.start() for t in threads]; [t.join() for t in threads]
with tempfile.TemporaryDirectory() as d:
    open(d + "/a", "w").close(); os.link(d + "/a", d + "/b"); os.rename(d + "/b", d + "/c")
os.nice(1); resource.getrusage(resource.RUSAGE_SELF); os.sched_yield()
subprocess.run(["sh", "-c", "ulimit -a; umask; trap : INT; exit 0"], check=True, stdout=-3)
print("done")
""",
}


@pytest.mark.parametrize("user", ["0", "1000"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_python_works_inside(name: str, user: str, sandbox: shoal.Sandbox) -> None:
    sandbox.files.write("/srv/program.py", PROGRAMS[name])
    result = sandbox.run(["python3", "/srv/program.py"], user=user, timeout=90)
    assert result.stdout.endswith("done\n"), (result.outcome, result.stderr)


@pytest.fixture(scope="module")
def workshop(node: PrivateNode) -> Iterator[shoal.Sandbox]:
    """A sandbox with gcc and git."""
    import shoal

    if "tools" not in node.cli("image", "ls").stdout.decode():
        done = node.cli("image", "import", str(images.tools_layout()), "tools", timeout=600)
        assert done.returncode == 0, done.stderr.decode()
    with shoal.Sandbox.create("tools", memory_mib=1024, timeout=1200) as sb:
        yield sb


@pytest.mark.slow
def test_gcc_builds_and_the_program_runs(workshop: shoal.Sandbox) -> None:
    source = '#include <stdio.h>\nint main(void) { printf("%d\\n", 6 * 7); return 0; }\n'
    workshop.files.write("/w/a.c", source)
    workshop.files.write("/w/Makefile", "a: a.c\n\tgcc -O2 -pipe -o a a.c -lpthread -lm\n")
    result = workshop.run("make -j4 && ./a", cwd="/w", timeout=120)
    assert result.stdout.endswith("42\n"), result.stderr


@pytest.mark.slow
def test_git_commits_clones_and_packs(workshop: shoal.Sandbox) -> None:
    script = """
set -e
export HOME=/g GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
mkdir -p /g/one && cd /g/one && git init -q -b main
for n in $(seq 30); do echo $n > $n; git add $n; git commit -q -m "add $n"; done
git gc -q && git fsck --strict && git clone -q /g/one /g/two && cd /g/two && git log --oneline | wc -l
git worktree add -q ../three && git rebase -q main && git stash list && git status --short | wc -l
"""
    result = workshop.run(script, timeout=120)
    assert result.stdout.split() == ["30", "0"], result.stderr


@pytest.mark.slow
def test_strace_traces_its_own_children(workshop: shoal.Sandbox) -> None:
    result = workshop.run(["strace", "-f", "-e", "trace=execve", "true"], timeout=60)
    assert "execve(" in result.stderr, result.stderr
