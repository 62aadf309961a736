"""TT: commands with a terminal."""

from __future__ import annotations

from shoal.conformance._expect import same
from shoal.conformance._help import EVERY_BYTE, alive, python, read_until
from shoal.conformance._suite import Trial, check
from shoal.types import PtySize


@check("TT-01")
async def size(t: Trial) -> None:
    """A terminal has the size that was asked for, 24 by 80 otherwise, on all three streams."""
    sandbox = await t.sandbox()
    program = "import os; print([(*os.get_terminal_size(fd), os.isatty(fd)) for fd in (0, 1, 2)])"
    for asked, (cols, rows) in ((PtySize(rows=51, cols=173), (173, 51)), (True, (80, 24))):
        process = await sandbox.exec(python(program), pty=asked)
        seen = await process.stdout.read_text()
        same("terminal", seen.strip(), f"{[(cols, rows, True)] * 3}")
        same("code", await process.wait(10), 0)


@check("TT-02")
async def resize(t: Trial) -> None:
    """A resize is there before its signal, SIGWINCH."""
    sandbox = await t.sandbox()
    program = """
import os, signal
# print must not be entered from a handler while it prints.
say = lambda text: os.write(1, f"{text}\\n".encode())
signal.signal(signal.SIGWINCH, lambda *_: say(tuple(os.get_terminal_size(0))))
say("ready")
while True:
    signal.pause()
"""
    process = await sandbox.exec(python(program), pty=PtySize(rows=10, cols=20))
    await read_until(process, b"ready\r\n")
    for rows, cols in ((40, 100), (7, 9)):
        await process.resize(rows, cols)
        same("new size", (await process.stdout.readline()).strip(), f"({cols}, {rows})".encode())
    await process.kill()


@check("TT-03")
async def term(t: Trial) -> None:
    """TERM is xterm-256color with a terminal and unset without; the command's `env` has the last word."""
    sandbox = await t.sandbox()
    process = await sandbox.exec(["printenv", "TERM"], pty=True)
    same("TERM", (await process.stdout.read()).strip(), b"xterm-256color")
    same("TERM without", (await sandbox.run(["printenv", "TERM"])).stdout, "")
    process = await sandbox.exec("echo $TERM", pty=True, env={"TERM": "vt52"})
    same("TERM from env", (await process.stdout.read()).strip(), b"vt52")


@check("TT-04")
async def controlling(t: Trial) -> None:
    """The command leads a session of its own, and the terminal controls it."""
    sandbox = await t.sandbox()
    program = """
import os
me = os.getpid()
print(os.getsid(0) == me, os.tcgetpgrp(0) == os.getpgrp(), os.ttyname(0) == os.ttyname(1))
with open("/dev/tty", "w") as tty:
    tty.write("reached\\n")
"""
    process = await sandbox.exec(python(program), pty=True)
    same("terminal", await process.stdout.read(), b"True True True\r\nreached\r\n")


@check("TT-05")
async def interrupt(t: Trial) -> None:
    """^C interrupts what runs in the foreground, and the shell lives on."""
    sandbox = await t.sandbox()
    shell = await sandbox.exec(["sh", "-i"], pty=True, env={"PS1": "$ "})
    await shell.stdin.write("echo $((6*7)); sleep 1000\n")
    await read_until(shell, b"42\r\n")
    await shell.stdin.write(b"\x03")
    await shell.stdin.write("echo on-$((6*8))\n")
    await read_until(shell, b"on-48\r\n")
    alone = await sandbox.exec("echo ready; exec sleep 1000", pty=True)
    await read_until(alone, b"ready\r\n")
    await alone.stdin.write(b"\x03")
    await alone.wait(10)
    same("end", alone.exit and (alone.exit.outcome, alone.exit.signal), ("signaled", 2))
    await shell.kill()


@check("TT-06")
async def job_control(t: Trial) -> None:
    """^Z stops the foreground job, `jobs` knows it, `fg` brings it back."""
    sandbox = await t.sandbox()
    shell = await sandbox.exec(["sh", "-i"], pty=True, env={"PS1": "$ "})
    await shell.stdin.write("sh -c 'echo r$((1+1))dy; read x; echo got-$x'\n")
    await read_until(shell, b"r2dy\r\n")
    await shell.stdin.write(b"\x1a")
    # What is typed before the shell prompts again, the job may get to read before it stops.
    seen = await read_until(shell, b"$ ")
    await shell.stdin.write("jobs; echo listed-$((1+2))\n")
    seen += await read_until(shell, b"listed-3\r\n")
    same("jobs tells", (b"Stopped" in seen or b"Suspended" in seen), True)
    await shell.stdin.write("fg\n")
    await shell.stdin.write("word\n")
    await read_until(shell, b"got-word\r\n")
    await shell.stdin.write("exit 5\n")
    same("code", await shell.wait(10), 5)


@check("TT-07")
async def end_of_input(t: Trial) -> None:
    """^D at the start of a line is the end of input."""
    sandbox = await t.sandbox()
    process = await sandbox.exec("stty -echo; echo ready; cat; echo over", pty=True)
    await read_until(process, b"ready\r\n")
    await process.stdin.write(b"line\n\x04")
    same("output", await process.stdout.read(), b"line\r\nover\r\n")
    same("code", await process.wait(10), 0)


@check("TT-08")
async def raw(t: Trial) -> None:
    """A terminal in raw mode passes every byte both ways."""
    sandbox = await t.sandbox()
    process = await sandbox.exec("stty raw -echo; echo ready; head -c 1024", pty=True)
    await read_until(process, b"ready\n")
    await process.stdin.write(EVERY_BYTE * 4)
    same("bytes", await process.stdout.read(), EVERY_BYTE * 4)


@check("TT-09")
async def one_stream(t: Trial) -> None:
    """With a terminal stderr comes with stdout, in order."""
    sandbox = await t.sandbox()
    process = await sandbox.exec("echo one; echo two >&2; echo three", pty=True)
    same("stdout", await process.stdout.read(), b"one\r\ntwo\r\nthree\r\n")
    same("stderr", await process.stderr.read(), b"")


@check("TT-10")
async def hangup(t: Trial) -> None:
    """`kill` of a command with a terminal ends its background jobs too."""
    sandbox = await t.sandbox()
    shell = await sandbox.exec(["sh", "-i"], pty=True)
    await shell.stdin.write("sleep 7301 & sleep 7302 & echo r$((1+1))dy\n")
    await read_until(shell, b"r2dy\r\n")
    await shell.kill()
    await shell.wait(10)
    same("jobs left", await alive(sandbox, "^sleep 730"), 0)
