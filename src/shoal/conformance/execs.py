"""EX: what goes into a command, what comes out of it, and how it is found again."""

from __future__ import annotations

import asyncio
import hashlib

from shoal.conformance._expect import Unmet, holds, refused, same
from shoal.conformance._help import (
    EVERY_BYTE,
    alive,
    another_client,
    breaking_connections,
    finished,
    none_left,
    python,
    read_until,
    until,
)
from shoal.conformance._suite import Trial, check
from shoal.errors import DeadlineExceededError, ExecFailedError, ExecNotFoundError, ShoalError

MIB = 1 << 20
LINES = "one\ntwo"

# ---- in


@check("EX-01")
async def argv(t: Trial) -> None:
    """Program and arguments arrive untouched: empty, blank, quotes, newline, dollar, letters beyond ASCII."""
    sandbox = await t.sandbox()
    words = ["", " ", "a b", "'", '"', "$HOME", "*", "\n", "-n", "ü€🐟", "\\", "\x7f\x01"]
    command = python("import sys; print(ascii(sys.argv[1:]))", *words)
    same("argv", (await sandbox.run(command)).stdout, ascii(words) + "\n")
    same("argv as arguments", (await sandbox.run(*command)).stdout, ascii(words) + "\n")


@check("EX-02")
async def shell(t: Trial) -> None:
    """One string is a shell's: pipes, variables, globs, sequences, its exit code."""
    sandbox = await t.sandbox()
    result = await sandbox.run("x=6; echo $((x*7)) | tr 4 5; cd /; ls -d et?; exit 3")
    same("stdout and code", (result.stdout, result.exit_code), ("52\netc\n", 3))


@check("EX-03")
async def directory(t: Trial) -> None:
    """A command starts in `cwd`, else in the sandbox's `workdir`."""
    sandbox = await t.sandbox(workdir="/usr")
    same("default", (await sandbox.run(["pwd"])).stdout, "/usr\n")
    same("cwd", (await sandbox.run(["pwd"], cwd="/etc")).stdout, "/etc\n")


@check("EX-04")
async def environment(t: Trial) -> None:
    """The command's `env` goes over the sandbox's; values with `=`, newlines and nothing in them arrive."""
    sandbox = await t.sandbox(env={"KEPT": "sandbox", "OVER": "sandbox"})
    program = "import os; print([os.environ.get(n) for n in 'KEPT OVER A B C D'.split()])"
    env = {"OVER": "exec", "A": "x=y=z", "B": LINES, "C": "", "D": "ü🐟"}
    seen = (await sandbox.run(python(program), env=env)).stdout
    same("environment", seen, f"{['sandbox', 'exec', 'x=y=z', LINES, '', 'ü🐟']}\n")
    plain = (await sandbox.run(python(program))).stdout
    same("the next command's", plain, f"{['sandbox', 'sandbox', None, None, None, None]}\n")


@check("EX-05")
async def user(t: Trial) -> None:
    """`user` is a name, a uid or uid:gid, looked up in the image's own passwd and group."""
    sandbox = await t.sandbox()
    await sandbox.run("echo shoalie:x:4321:5432::/:/bin/sh >>/etc/passwd", user="0", check=True)
    await sandbox.run("echo pool:x:6543:shoalie >>/etc/group", user="0", check=True)
    command = "echo $(id -u) $(id -g) $(id -G)"
    for name, expected in (
        ("shoalie", "4321 5432 5432 6543"),
        ("4321", "4321 5432 5432 6543"),
        ("4321:77", "4321 77 77"),
        ("shoalie:pool", "4321 6543 6543"),
        ("1234:567", "1234 567 567"),
        ("0", "0 0 0"),
    ):
        seen = (await sandbox.run(command, user=name)).stdout.split()
        # Whether supplementary groups come with an explicit group is not promised.
        if ":" in name:
            seen, expected = seen[:2], " ".join(expected.split()[:2])
        same(f"ids of user {name!r}", " ".join(dict.fromkeys(seen)), _unique(expected))


def _unique(words: str) -> str:
    return " ".join(dict.fromkeys(words.split()))


@check("EX-06")
async def default_user(t: Trial) -> None:
    """The sandbox's `user` is the default of its commands; a command may name another."""
    sandbox = await t.sandbox(user="65534")
    same("default", (await sandbox.run("id -u")).stdout, "65534\n")
    same("named", (await sandbox.run("id -u", user="0")).stdout, "0\n")


@check("EX-07")
async def stdin_bytes(t: Trial) -> None:
    """Standard input given as bytes or text arrives whole, every byte value, and then ends."""
    sandbox = await t.sandbox()
    data = EVERY_BYTE * 32768  # 8 MiB, far more than a pipe holds
    digest = (await sandbox.run(["sha256sum"], stdin=data)).stdout.split()[0]
    same("what was read", digest, hashlib.sha256(data).hexdigest())
    same("text", (await sandbox.run(["cat"], stdin="ü\n")).stdout_bytes, "ü\n".encode())


@check("EX-08")
async def stdin_stream(t: Trial) -> None:
    """Standard input is a stream: each write is answered before the next, and its close is the end."""
    sandbox = await t.sandbox()
    process = await sandbox.exec(["cat"], stdin=True)
    for word in (b"one\n", b"\x00\xff\n", b"three\n"):
        await process.stdin.write(word)
        same("echo", await process.stdout.readline(), word)
    same("still running", await process.poll(), None)
    await process.stdin.write_eof()
    same("code after the end", await process.wait(10), 0)


@check("EX-09")
async def no_stdin(t: Trial) -> None:
    """Without standard input a command reads the end at once."""
    sandbox = await t.sandbox()
    same("stdin", (await sandbox.run("cat; echo read", timeout=10)).stdout, "read\n")


# ---- out


@check("EX-10")
async def streams_apart(t: Trial) -> None:
    """stdout and stderr come apart, each byte for byte: all 256 values, half characters, no line end."""
    sandbox = await t.sandbox()
    program = """
import os
for n in range(2048):
    os.write(1, bytes([n % 256]) * 97)
    os.write(2, bytes([255 - n % 256]) * 89)
os.write(1, b"\\xe2\\x82"); os.write(2, b"\\xac\\xf0\\x9f")
"""
    result = await sandbox.run(python(program))
    out = b"".join(bytes([n % 256]) * 97 for n in range(2048)) + b"\xe2\x82"
    err = b"".join(bytes([255 - n % 256]) * 89 for n in range(2048)) + b"\xac\xf0\x9f"
    same("stdout", result.stdout_bytes, out)
    same("stderr", result.stderr_bytes, err)
    same("truncated", result.truncated, False)


@check("EX-11")
async def split_characters(t: Trial) -> None:
    """A character whose bytes come apart in time is one character; what is none shows as U+FFFD."""
    sandbox = await t.sandbox()
    program = """
import os, time
for part in (b"\\xe2", b"\\x82", b"\\xac", b"\\xff", b"!"):
    os.write(1, part); time.sleep(0.05)
"""
    same("text", (await sandbox.run(python(program))).stdout, "€\ufffd!")


@check("EX-12")
async def cap(t: Trial) -> None:
    """Beyond its cap a stream keeps head and tail and says `truncated`; the other stream is untouched."""
    sandbox = await t.sandbox()
    program = (
        "import sys; [print(f'{n:07}') for n in range(100000)]; print('whole', file=sys.stderr)"
    )
    result = await sandbox.run(python(program), max_output_bytes=4096)
    seen = result.stdout_bytes
    same("truncated", result.truncated, True)
    holds(len(seen) <= 4096 + 128, "no more than the cap (and a mark in between)", len(seen))
    same("head", seen[:800], b"".join(b"%07d\n" % n for n in range(100)))
    same("tail", seen[-800:], b"".join(b"%07d\n" % n for n in range(99900, 100000)))
    same("stderr", result.stderr, "whole\n")


@check("EX-13", deadline=60)
async def default_cap(t: Trial) -> None:
    """A stream of exactly 10 MiB comes whole, one byte more is truncated; the command never blocks on it."""
    sandbox = await t.sandbox()
    for size, truncated in ((10 * MIB, False), (10 * MIB + 1, True), (64 * MIB, True)):
        result = await sandbox.run(["head", "-c", str(size), "/dev/zero"])
        same(f"outcome of {size} bytes", (result.outcome, result.exit_code), ("exited", 0))
        same(f"truncated of {size} bytes", result.truncated, truncated)
        if not truncated:
            same("bytes", len(result.stdout_bytes), size)


@check("EX-14")
async def as_it_comes(t: Trial) -> None:
    """Output can be read as it is written."""
    sandbox = await t.sandbox()
    process = await sandbox.exec("echo first; read line; echo $line", stdin=True)
    same("first line", await process.stdout.readline(), b"first\n")
    await process.stdin.write("second\n")
    same("second line", await process.stdout.readline(), b"second\n")


# ---- found again


@check("EX-15", deadline=60)
async def resume(t: Trial) -> None:
    """Whoever attaches goes on at the first byte that nobody has read: nothing lost, nothing twice."""
    sandbox = await t.sandbox()
    process = await sandbox.exec("seq 1 300000; seq 1 1000 >&2; sleep 0.5; echo end")
    seen = b""
    while len(seen) < 500_000:
        seen += await process.stdout.read(8192)
    again = await sandbox.attach(process.exec_id)
    rest, errors = await asyncio.gather(again.stdout.read(), again.stderr.read())
    expected = b"".join(b"%d\n" % n for n in range(1, 300_001)) + b"end\n"
    same("both readers' stdout together", seen + rest, expected)
    same("stderr", errors, b"".join(b"%d\n" % n for n in range(1, 1001)))
    same("code", await again.wait(10), 0)


@check("EX-16", deadline=90)
async def broken_connection(t: Trial) -> None:
    """A reader whose connection breaks again and again ends up with each byte once."""
    async with breaking_connections(300_000) as url:
        await _reads_each_byte_once(t, url)


@check("EX-33", deadline=90)
async def broken_relay(t: Trial) -> None:
    """So does one behind a relay of the node's unix socket, where what was sent may not have arrived."""
    async with breaking_connections(300_000, t.directory()) as url:
        await _reads_each_byte_once(t, url)


async def _reads_each_byte_once(t: Trial, url: str) -> None:
    sandbox = await t.sandbox()
    expected = b"".join(b"%d\n" % n for n in range(1, 400_001)) + b"end\n"
    async with another_client(_READER, sandbox.id, url=url) as reader:
        told = (await finished(reader)).split()
    same("bytes and digest", told, [str(len(expected)), hashlib.sha256(expected).hexdigest()])


_READER = """
import hashlib
sandbox = await shoal.AsyncSandbox.connect(sys.argv[1])
process = await sandbox.exec("seq 1 400000; echo end")
seen, broken = b"", 0
while not seen.endswith(b"end\\n") and broken < 200:
    try:
        more = await process.stdout.read(65536)
        if not more:
            break
        seen += more
    except (shoal.ShoalError, OSError):
        broken += 1
        await asyncio.sleep(0.05)
        process = await sandbox.attach(process.exec_id)
print(len(seen), hashlib.sha256(seen).hexdigest())
"""


@check("EX-17")
async def own_id(t: Trial) -> None:
    """With an exec id of the client's choice a repeat is the same exec, never a second run."""
    sandbox = await t.sandbox()
    command = "echo run >>/ran; echo out; sleep 1"
    first = await sandbox.exec(command, exec_id="mine", cwd="/")
    again = await sandbox.exec(command, exec_id="mine", cwd="/")
    same("the repeat", (again.exec_id, again.pid), ("mine", first.pid))
    same("output", await again.stdout.read(), b"out\n")
    same("code", await again.wait(15), 0)
    late = await sandbox.exec("echo other >>/ran", exec_id="mine", cwd="/")
    same("code of a repeat after the end", (await late.wait(15), late.pid), (0, first.pid))
    same("runs", await sandbox.files.read("/ran"), b"run\n")


@check("EX-18")
async def outlives_client(t: Trial) -> None:
    """A command goes on when the client that started it is killed, and another client finds its output."""
    sandbox = await t.sandbox()
    program = """
sandbox = await shoal.AsyncSandbox.connect(sys.argv[1])
process = await sandbox.exec("echo started; while ! [ -e /go ]; do sleep 0.05; done; echo done",
                             exec_id="orphan")
print(process.pid, flush=True)
await asyncio.sleep(60)
"""
    async with another_client(program, sandbox.id) as client:
        assert client.stdout  # noqa: S101 - it was asked for
        pid = int(await client.stdout.readline())
    found = await sandbox.attach("orphan")
    same("process id", found.pid, pid)
    same("still running", await found.poll(), None)
    await sandbox.files.write("/go", b"")
    same("output", await found.stdout.read(), b"started\ndone\n")


@check("EX-19", deadline=60)
async def detached(t: Trial) -> None:
    """A detached command returns at once, outlives its client and never blocks on output nobody reads."""
    sandbox = await t.sandbox()
    program = """
sandbox = await shoal.AsyncSandbox.connect(sys.argv[1])
await sandbox.exec("head -c 80000000 /dev/zero; head -c 80000000 /dev/zero >&2; echo last; touch /written;"
                   "sleep 300", exec_id="behind", detached=True)
"""
    async with another_client(program, sandbox.id) as client:
        await finished(client)
    await until("the end of its output", lambda: sandbox.files.exists("/written"), 30)
    found = await sandbox.attach("behind")
    seen = await read_until(found, b"last\n")
    holds(len(seen) < 80_000_000, "the oldest output was dropped", len(seen))
    same("still running", await found.poll(), None)
    await found.kill()


@check("EX-20")
async def attach(t: Trial) -> None:
    """A running command can be attached to, with its pid and what it printed; an unknown id is not found."""
    sandbox = await t.sandbox()
    process = await sandbox.exec(["cat"], stdin=True, exec_id="one")
    again = await sandbox.attach("one")
    same("process id", again.pid, process.pid)
    await process.stdin.write("hello\n")
    same("its output", await again.stdout.readline(), b"hello\n")
    with refused("attach to an unknown exec", ExecNotFoundError):
        await sandbox.attach("no-such-exec")


@check("EX-21")
async def listing(t: Trial) -> None:
    """The list of commands tells id, pid, argv and outcome, oldest first, of those that ended too."""
    sandbox = await t.sandbox()
    first = await sandbox.exec(["sleep", "100"], exec_id="first")
    second = await sandbox.exec("exit 9", exec_id="second")
    await second.wait(10)
    found = {one.exec_id: one for one in await sandbox.execs()}
    same("ids in order", list(found)[-2:], ["first", "second"])
    one, two = found["first"], found["second"]
    same("first", (one.pid, one.argv, one.outcome), (first.pid, ["sleep", "100"], "running"))
    same("second", (two.outcome, two.exit_code), ("exited", 9))


# ---- signals and ends


@check("EX-22")
async def signals(t: Trial) -> None:
    """A signal is sent by number or by name, with and without SIG, and the program handles it."""
    sandbox = await t.sandbox()
    program = """
import os, signal
# print must not be entered from a handler while it prints.
for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, lambda got, frame: os.write(1, b"%d\\n" % got))
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""
    process = await sandbox.exec(python(program))
    same("ready", await process.stdout.readline(), b"ready\n")
    for word, number in ((10, b"10"), ("HUP", b"1"), ("SIGTERM", b"15"), ("term", b"15")):
        await process.signal(word)
        same(f"the program got {word!r}", await process.stdout.readline(), number + b"\n")
    same("still running", await process.poll(), None)
    await process.send_signal("KILL")
    same("return code", await process.wait(10), -9)


@check("EX-23")
async def signal_one_or_all(t: Trial) -> None:
    """A signal goes to the command alone, with `tree` to its descendants too, other sessions included."""
    sandbox = await t.sandbox()
    command = (
        "sleep 7001 & setsid sleep 7002 & sleep 7003 &"
        "trap 'echo got' USR1; echo ready; while :; do wait; done"
    )
    process = await sandbox.exec(command)
    await read_until(process, b"ready\n")
    await process.signal("USR1")
    await read_until(process, b"got\n")
    same("processes after a signal to one", await alive(sandbox, "^sleep 700"), 3)
    await process.signal("TERM", tree=True)
    await process.wait(10)
    await until("an end of all", none_left(sandbox, "^sleep 700"))


@check("EX-24")
async def kill_tree(t: Trial) -> None:
    """`kill` ends the whole tree: children, their own sessions, double forks, stopped ones."""
    sandbox = await t.sandbox()
    process = await sandbox.exec(python(_FAMILY))
    await read_until(process, b"ready\n")
    same("processes before", await alive(sandbox, "family-mark"), 6)
    await process.kill()
    await process.wait(10)
    same("outcome", process.exit and process.exit.outcome, "killed")
    same("processes after", await alive(sandbox, "family-mark"), 0)
    await process.kill()


_FAMILY = """
# family-mark
import os, signal, time
def child(*steps):
    if os.fork() == 0:
        for step in steps:
            step()
        os.write(writer, b".")
        while True:
            time.sleep(100)
def again():
    if os.fork():
        os._exit(0)
reader, writer = os.pipe()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child()
child(os.setsid)
child(os.setsid, again)
child(again)
child(lambda: os.close(0), lambda: os.close(1))
seen = b""
while len(seen) < 5:
    seen += os.read(reader, 10)
print("ready", flush=True)
time.sleep(1000)
"""


@check("EX-25")
async def server_deadline(t: Trial) -> None:
    """The node ends a command at its deadline with all its descendants, though the client is long gone."""
    sandbox = await t.sandbox()
    program = """
sandbox = await shoal.AsyncSandbox.connect(sys.argv[1])
await sandbox.exec("echo before; setsid sleep 7100 & sleep 7101", timeout=2, exec_id="late")
"""
    async with another_client(program, sandbox.id) as client:
        await finished(client)
    found = await sandbox.attach("late")
    await found.wait(15)
    same("outcome", found.exit and found.exit.outcome, "timed_out")
    same("output", await found.stdout.read(), b"before\n")
    same("processes left", await alive(sandbox, "^sleep 710"), 0)


@check("EX-26")
async def waiting(t: Trial) -> None:
    """`wait` gives up at its own deadline and the command goes on; `poll` never waits."""
    sandbox = await t.sandbox()
    process = await sandbox.exec(["cat"], stdin=True)
    with refused("wait(0.2) on a running command", DeadlineExceededError):
        await process.wait(0.2)
    same("poll", (await process.poll(), process.returncode), (None, None))
    await process.stdin.close()
    same("code", await process.wait(10), 0)
    same("poll after the end", await process.poll(), 0)


@check("EX-27")
async def cancelled_run(t: Trial) -> None:
    """Who cancels `run` kills the command."""
    sandbox = await t.sandbox()
    run = asyncio.create_task(sandbox.run("sleep 7200 & sleep 7201"))

    async def both() -> bool:
        return await alive(sandbox, "^sleep 720") == 2

    await until("both processes", both)
    run.cancel()
    await asyncio.wait([run])
    await until("an end of both", none_left(sandbox, "^sleep 720"))


@check("EX-28")
async def checked(t: Trial) -> None:
    """With `check` a failure raises and brings the result with it; success does not."""
    sandbox = await t.sandbox()
    await sandbox.run("true", check=True)
    try:
        await sandbox.run("echo out; echo err >&2; exit 3", check=True)
    except ExecFailedError as error:
        result = error.result
        got = (result.exit_code, result.stdout, result.stderr)
        same("the error's result", got, (3, "out\n", "err\n"))
    else:
        raise Unmet("expected ExecFailedError\ngot no error")


@check("EX-29", deadline=60)
async def many(t: Trial) -> None:
    """Fifty commands at once do not mix their streams, codes or environments."""
    sandbox = await t.sandbox()
    command = "cat; echo $N >&2; exit $N"
    results = await asyncio.gather(
        *(sandbox.run(command, stdin=f"{n}" * 5000, env={"N": f"{n}"}) for n in range(50))
    )
    for n, result in enumerate(results):
        got = (result.stdout, result.stderr, result.exit_code)
        same(f"command {n}", got, (f"{n}" * 5000, f"{n}\n", n))


@check("EX-30")
async def slow_reader(t: Trial) -> None:
    """A reader that stands still stops its own command only."""
    sandbox = await t.sandbox()
    flood = await sandbox.exec(["cat", "/dev/zero"])
    holds(bool(await flood.stdout.read(1)), "output", b"")
    for _ in range(5):
        same("another command", (await sandbox.run("echo fine", timeout=10)).stdout, "fine\n")
    await flood.kill()
    try:
        await flood.wait(10)
    except ShoalError as error:
        raise Unmet(f"expected an end after kill, though nobody reads\ngot {error}") from error


@check("EX-31")
async def every_handle(t: Trial) -> None:
    """Each handle on a command learns its end, whoever reads its output."""
    sandbox = await t.sandbox()
    first = await sandbox.exec("read x; echo out; exit 5", stdin=True)
    second = await sandbox.attach(first.exec_id)
    waiting = asyncio.gather(first.wait(15), second.wait(15))
    await second.stdin.write("go\n")
    same("codes", await waiting, [5, 5])
    same("output, to who attached last", await second.stdout.read(), b"out\n")


@check("EX-32")
async def repeats_at_once(t: Trial) -> None:
    """Eight repeats of an exec at the same time are one run too, and each gets a handle on it."""
    sandbox = await t.sandbox()
    command = "echo run >>/ran; sleep 0.5"
    started = await asyncio.gather(
        *(sandbox.exec(command, exec_id="mine", cwd="/") for _ in range(8))
    )
    same("process ids", len({one.pid for one in started}), 1)
    same("code", await (await sandbox.attach("mine")).wait(15), 0)
    same("runs", await sandbox.files.read("/ran"), b"run\n")
