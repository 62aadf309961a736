"""What a test suite does: processes of every start method, threads, asyncio, sockets, files, ptys, sqlite."""

import asyncio
import concurrent.futures
import fcntl
import mmap
import multiprocessing
import os
import pty
import select
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from multiprocessing import shared_memory


def square(n):
    return n * n


async def streams():
    async def answer(reader, writer):
        writer.write(await reader.read(100))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello")
    await writer.drain()
    assert await reader.read() == b"hello"
    server.close()
    process = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert (await process.communicate(b"x"))[0] == b"x"
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(20)))


def processes():
    for method in "fork", "spawn", "forkserver":
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(square, range(10))[-1] == 81
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        assert list(pool.map(square, range(5))) == [0, 1, 4, 9, 16]
    block = shared_memory.SharedMemory(create=True, size=4096)
    block.buf[0] = 7
    block.close()
    block.unlink()
    queue = multiprocessing.Queue()
    child = multiprocessing.Process(target=queue.put, args=(1,))
    child.start()
    assert queue.get() == 1
    child.join()
    assert subprocess.run(["true"], close_fds=True, start_new_session=True).returncode == 0
    assert subprocess.run("exit 3", shell=True, preexec_fn=os.getpid).returncode == 3
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    os.close(os.pidfd_open(os.getpid()))
    pid, _ = pty.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def files():
    with sqlite3.connect("t.db") as db:
        db.execute("pragma journal_mode=wal")
        db.execute("create table t(x)")
        db.executemany("insert into t values(?)", ((i,) for i in range(1000)))
    assert sqlite3.connect("t.db").execute("select sum(x) from t").fetchone() == (499500,)
    memory = os.memfd_create("m")
    os.write(memory, b"abc")
    os.sendfile(os.open("out", os.O_CREAT | os.O_WRONLY), memory, 0, 3)
    fcntl.flock(open("lock", "w"), fcntl.LOCK_EX)
    mmap.mmap(-1, 1 << 20).madvise(mmap.MADV_DONTNEED)
    master, slave = os.openpty()
    os.write(slave, b"tty")
    assert os.read(master, 3) == b"tty"
    tempfile.TemporaryDirectory().cleanup()


def sockets():
    left, right = socket.socketpair()
    left.send(b"a")
    assert right.recv(1) == b"a"
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(("127.0.0.1", 0))
    socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    socket.if_nameindex()
    socket.getaddrinfo("localhost", 80)
    epoll = select.epoll()
    epoll.register(left.fileno())
    epoll.poll(0)


def the_rest():
    threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.sigtimedwait([signal.SIGUSR1], 0.05)


if __name__ == "__main__":
    processes()
    files()
    sockets()
    the_rest()
    asyncio.run(streams())
