"""Programs that take a whole terminal behave in a sandbox as they do here, and ours is left as it was found."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support import images
from tests.support.node import PrivateNode, descendants
from tests.support.terminal import Terminal, terminal

if TYPE_CHECKING:
    import shoal

DETACH = "\x10\x11"


@pytest.fixture(scope="module")
def screens(node: PrivateNode) -> str:
    """An image with vim, less and top."""
    done = node.cli("image", "import", str(images.screens_tar()), "screens", timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return "screens"


@pytest.fixture
def machine(screens: str) -> Iterator[shoal.Sandbox]:
    """A sandbox with vim, less and top."""
    import shoal

    with shoal.Sandbox.create(screens) as sb:
        yield sb


@contextlib.contextmanager
def on_a_terminal(
    node: PrivateNode, *argv: str, rows: int = 24, cols: int = 80, **env: str
) -> Iterator[Terminal]:
    """The command line on a terminal, which is as before when the block is left."""
    program = [sys.executable, "-m", "shoal", *argv]
    with terminal(program, {**node.env, **env}, rows=rows, cols=cols) as shown:
        yield shown
        shown.ended()
        assert shown.attributes() == shown.before


@contextlib.contextmanager
def a_shell(
    node: PrivateNode, machine: shoal.Sandbox, *, rows: int = 24, cols: int = 80
) -> Iterator[Terminal]:
    """A shell at its prompt. It is left with ^D at the end."""
    with on_a_terminal(node, "shell", machine.id, rows=rows, cols=cols) as shown:
        shown.prompt()
        yield shown
        shown.prompt()
        shown.type("\x04")
        shown.ended()


def _running(machine: shoal.Sandbox) -> list[str]:
    return [one.exec_id for one in machine.execs() if one.outcome == "running"]


def _until(holds: object, what: str) -> None:
    assert callable(holds)
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def _in_the_foreground(machine: shoal.Sandbox, command: str) -> bool:
    """It runs, and keys that make signals reach it. Not when it is echoed: the shell starts it later."""
    lines = machine.run(["ps", "-eo", "stat=,args="]).stdout.splitlines()
    return any("+" in line.split()[0] and line.split(None, 1)[1] == command for line in lines)


def test_vim_edits_a_file_and_follows_the_window(node: PrivateNode, machine: shoal.Sandbox) -> None:
    with a_shell(node, machine) as shown:
        shown.type("vim /srv/poem.txt\r")
        shown.until(lambda: shown.lines[1] == "~" and "[New" in shown.lines[23])
        shown.type("ifirst line\rsecond line")
        shown.until("-- INSERT --")
        shown.until("second line")
        shown.type("\x1b")
        shown.until(lambda: "INSERT" not in shown.text)
        shown.resize(31, 101)
        shown.type(":echo 'now' &lines &columns\r")
        shown.until("now 31 101")
        assert shown.lines[:3] == ["first line", "second line", "~"]
        shown.type("ggdd:wq\r")
        shown.prompt()
    assert machine.files.read("/srv/poem.txt") == b"second line\n"


def test_top_draws_fills_a_larger_window_and_quits(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    def sleepers() -> int:
        return sum(line.endswith(" sleep") for line in shown.lines)

    with a_shell(node, machine) as shown:
        shown.command("for n in $(seq 30); do sleep 700 & done 2>/dev/null; echo up=$n", "up=30")
        shown.type("top -d 600\r")  # so that what is drawn later is drawn for a reason of ours
        shown.until("load average")
        shown.until(lambda: sleepers() > 10)
        assert sleepers() < 20
        shown.resize(45, 90)
        shown.until(lambda: sleepers() == 30)
        shown.type("q")
        shown.prompt()
        shown.command("kill $(jobs -p); wait 2>/dev/null; echo left=$(jobs -r | wc -l)", "left=0")


def test_less_pages_searches_and_quits(node: PrivateNode, machine: shoal.Sandbox) -> None:
    machine.files.write("/srv/numbers", "".join(f"number {n}\n" for n in range(1, 501)))
    with a_shell(node, machine) as shown:
        shown.type("less /srv/numbers\r")
        shown.until(lambda: shown.lines[0] == "number 1" and shown.lines[22] == "number 23")
        shown.type(" ")
        shown.until(lambda: shown.lines[0] == "number 24")
        shown.type("/number 400\r")
        shown.until(lambda: shown.lines[0] == "number 400")
        shown.resize(12, 80)
        shown.until(lambda: shown.lines[10].startswith("number 4") and not shown.lines[11][1:])
        shown.type("G")
        shown.until(lambda: shown.lines[10] == "number 500")
        shown.type("q")


def test_jobs_are_stopped_listed_and_brought_back(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    with a_shell(node, machine) as shown:
        shown.type("sleep 100\r")
        shown.until(lambda: _in_the_foreground(machine, "sleep 100"))
        shown.type("\x1a")
        shown.until("Stopped")
        shown.command("jobs", "Stopped                 sleep 100")
        shown.type("fg\r")
        shown.until(lambda: _in_the_foreground(machine, "sleep 100"))
        shown.type("\x03")
        shown.command("echo code=$?", "code=130")
        shown.command("jobs | wc -l", "0")


def test_an_interrupt_reaches_the_foreground_alone(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    with a_shell(node, machine) as shown:
        shown.command("sleep 101 & echo started", "started")
        shown.type("sleep 102\r")
        shown.until(lambda: _in_the_foreground(machine, "sleep 102"))
        shown.type("\x03")
        shown.command("jobs", "Running                 sleep 101 &")
        shown.command("kill %1; wait; echo over", "over")


def test_the_end_of_input_ends_the_shell(node: PrivateNode, machine: shoal.Sandbox) -> None:
    with on_a_terminal(node, "shell", machine.id) as shown:
        shown.command("(exit 7)", "#")
        shown.type("\x04")
        assert shown.ended() == 7
        assert shown.line == ""


def test_the_size_is_the_windows_whatever_the_environment_says(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    argv = ("shell", machine.id)
    with on_a_terminal(node, *argv, rows=31, cols=97, COLUMNS="11", LINES="7") as shown:
        shown.command("stty size", "31 97")
        for rows, cols in ((40, 120), (50, 80), (24, 132)):
            shown.resize(rows, cols)
            shown.command(
                f"until [ \"$(stty size)\" = '{rows} {cols}' ]; do :; done; echo is", "is"
            )
        shown.type("exit\r")


def test_a_window_that_changes_while_a_sandbox_comes_up_is_followed(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    with on_a_terminal(node, "exec", "-it", machine.id, "--", "bash") as shown:
        # Before the program can have asked for it, and again when it may have.
        for rows, cols in ((30, 90), (31, 91), (32, 92), (33, 93)):
            shown.resize(rows, cols)
        shown.command("until [ \"$(stty size)\" = '33 93' ]; do :; done; echo is", "is")
        shown.type("exit 3\r")
        assert shown.ended() == 3


def test_detach_and_come_back(node: PrivateNode, machine: shoal.Sandbox) -> None:
    with on_a_terminal(node, "exec", "-it", machine.id, "--", "vim", "/srv/later.txt") as shown:
        shown.until("[New")
        shown.type("ione two three\x1b")
        shown.until("one two three")
        # So much in the last line that what drew the others is forgotten, and not shown again for that reason.
        shown.type(':for n in range(99999) | echon "\\r" n | endfor\r')
        shown.until("99998")
        shown.type(DETACH)
        assert shown.ended() == 0
        assert shown.attributes() == shown.before
        told = re.search(r"shoal attach (sb-\w{26}) (ex-\w{26})", "".join(shown.screen.display))
        assert told, shown.text
        assert b"\x1b[?1049l" in shown.said, "vim's own screen is left"
    sandbox, process = told.groups()
    assert sandbox == machine.id
    assert _running(machine) == [process]
    with on_a_terminal(node, "attach", sandbox, process) as shown:
        shown.until(lambda: shown.lines[:2] == ["one two three", "~"] and shown.lines[22] == "~")
        shown.resize(28, 70)
        shown.type("A four\x1b:echo 'now' &lines &columns\r")
        shown.until("now 28 70")
        shown.type(":wq\r")
        assert shown.ended() == 0
    assert machine.files.read("/srv/later.txt") == b"one two three four\n"
    assert _running(machine) == []


def test_a_shell_that_was_left_goes_on_though_nobody_reads_it(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    with on_a_terminal(node, "shell", machine.id) as shown:
        shown.prompt()
        shown.type("seq 3000000; touch /srv/counted\r" + DETACH)
        assert shown.ended() == 0
    (process,) = _running(machine)
    _until(lambda: machine.files.exists("/srv/counted"), "its output held it back")
    with on_a_terminal(node, "attach", machine.id, process) as shown:
        shown.command("echo still-$((40+2))", "still-42")
        shown.type("exit 4\r")
        assert shown.ended() == 4


def test_a_new_sandbox_lives_on_when_its_shell_is_detached_from(node: PrivateNode) -> None:
    with on_a_terminal(node, "shell") as shown:
        shown.prompt()
        shown.type("A=kept\r")
        shown.prompt()
        shown.type(DETACH)
        assert shown.ended() == 0
        text = "".join(shown.screen.display)
        told = re.search(r"shoal attach (sb-\w{26}) (ex-\w{26})", text)
        assert told, text
        assert f"sandbox {told[1]} lives on" in text
    try:
        with on_a_terminal(node, "attach", told[1], told[2]) as shown:
            shown.command("echo $A", "kept")
            shown.type("exit\r")
            assert shown.ended() == 0
        assert told[1] in node.cli("ps", "-q").stdout.decode()
    finally:
        assert node.cli("rm", told[1]).returncode == 0


def test_a_key_of_the_detach_sequence_alone_reaches_the_program(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    with a_shell(node, machine) as shown:
        shown.command("echo before-$((1+1))", "before-2")
        shown.type("\f")
        shown.until(lambda: shown.lines[0].endswith("#") and not any(shown.lines[1:]))
        shown.type("\x10")  # the command before this one
        shown.until(lambda: shown.lines[0].endswith("echo before-$((1+1))"))
        shown.type("\r")
        shown.until("before-2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_killed_command_line_gives_the_terminal_back_and_leaves_no_process(
    node: PrivateNode, machine: shoal.Sandbox, number: signal.Signals
) -> None:
    with on_a_terminal(node, "exec", "-it", machine.id, "--", "vim") as shown:
        shown.until("VIM - Vi IMproved")
        assert shown.raw
        shown.program.send_signal(number)
        assert shown.ended() == 128 + number
        for mode in (b"\x1b[?1049", b"\x1b[?2004"):
            assert shown.said.rindex(mode + b"l") > shown.said.rindex(mode + b"h")
    assert _running(machine) == []


def test_the_terminal_is_given_back_when_the_sandbox_ends_under_it(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    with on_a_terminal(node, "exec", "-it", machine.id, "--", "top") as shown:
        shown.until("load average")
        machine.terminate()
        assert shown.ended() == 1
        assert shown.attributes() == shown.before
        assert "error: the sandbox has ended" in shown.text
        assert not shown.screen.cursor.hidden


def test_a_closed_window_ends_what_ran_in_it(node: PrivateNode, machine: shoal.Sandbox) -> None:
    for argv in (["shell", machine.id], ["exec", "-it", machine.id, "--", "sleep", "1000"]):
        with terminal([sys.executable, "-m", "shoal", *argv], node.env) as shown:
            shown.until(lambda: bool(_running(machine)) and shown.raw)
            shown.hang_up()
            assert shown.program.wait(30) == 129
        _until(lambda: not _running(machine), "it runs on")


def test_nothing_stops_the_command_line_with_a_raw_terminal(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    # From a shell with job control, for the kernel stops nobody whom nobody could bring back.
    command = shlex.join([sys.executable, "-m", "shoal", "shell", machine.id])
    with terminal(["bash", "-mc", f"{command}; echo came-back"], node.env) as shown:
        shown.prompt()
        ours = next(pid for pid in descendants(shown.program.pid) if pid != shown.program.pid)
        os.kill(ours, signal.SIGTSTP)
        shown.command("echo on", "on")
        assert "came-back" not in shown.text
        shown.type("exit\r")
        shown.until("came-back")


def test_after_a_stop_that_nobody_can_refuse_keys_pass_unseen_again(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    with a_shell(node, machine) as shown:
        os.kill(shown.program.pid, signal.SIGSTOP)
        _, stopped = os.waitpid(shown.program.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(stopped)
        shown.set_attributes(shown.before)  # as a shell does that gets the terminal then
        assert not shown.raw
        os.kill(shown.program.pid, signal.SIGCONT)
        shown.until(lambda: shown.raw)
        shown.command("echo on", "on")


def test_without_a_terminal_there_is_an_error_and_no_process(
    node: PrivateNode, machine: shoal.Sandbox
) -> None:
    for argv in (["shell", machine.id], ["exec", "-it", machine.id, "--", "bash"]):
        done = node.cli(*argv)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"error: stdin is no terminal\nhint: ")
    assert _running(machine) == []
