from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import pytest

from shoal.cli._terminal import _DetachKeys, _Screen
from shoal.cli.tests.test_cli import environment, shoal
from shoal.sdk.tests.fake_node import FakeNode


def _until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("typed", "passed", "pressed"),
    [
        ([b"plain"], [b"plain"], False),
        ([b"\x10\x11"], [b""], True),
        ([b"\x10", b"\x11"], [b"", b""], True),
        ([b"ls\r\x10\x11rm\r"], [b"ls\r"], True),
        ([b"\x10", b"a"], [b"", b"\x10a"], False),
        ([b"\x10a\x11"], [b"\x10a\x11"], False),
        ([b"\x10\x10\x11"], [b"\x10"], True),
        ([b"\x11\x10"], [b"\x11"], False),
    ],
)
def test_detach_keys_are_found_and_nothing_else_is_kept(
    typed: list[bytes], passed: list[bytes], pressed: bool
) -> None:
    keys = _DetachKeys()
    assert [keys.feed(data) for data in typed] == passed
    assert keys.pressed is pressed


def test_a_first_detach_key_that_waited_is_passed_on_and_still_counts() -> None:
    keys = _DetachKeys()
    assert keys.feed(b"\x10") == b""
    assert keys.holding
    assert keys.release() == b"\x10"
    assert keys.release() == b""
    assert keys.feed(b"\x11") == b""
    assert keys.pressed


@pytest.mark.parametrize(
    ("shown", "undo"),
    [
        (b"plain \x1b[31mred\x1b[m", b""),
        (b"\x1b[?1049h", b"\x1b[?1049l"),
        (b"\x1b[?1049h and \x1b[?1049l", b""),
        (b"\x1b[?25l", b"\x1b[?25h"),
        (b"\x1b[?1000;1006h\x1b=\x1b[>4;2m", b"\x1b[>4m\x1b>\x1b[?1006l\x1b[?1000l"),
        (b"\x1b=\x1b>\x1b[>4;2m\x1b[>4;m", b""),
        (b"\x1b[?12h\x1b[?9999h", b""),
    ],
)
def test_modes_that_were_left_on_are_taken_back(shown: bytes, undo: bytes) -> None:
    for step in (len(shown), 1, 3):
        screen = _Screen()
        for at in range(0, len(shown), step):
            screen.saw(shown[at : at + step])
        assert screen.undo(cut_off=False) == undo, step
        assert screen.undo(cut_off=True) == b"\x1b(B\x1b[m" + undo + b"\r\n"


def test_a_node_that_dies_under_a_shell_leaves_the_terminal_as_it_was(node: FakeNode) -> None:
    sandbox = shoal("create").stdout.decode().strip()
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "shoal", "shell", sandbox],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(),
            start_new_session=True,
        ) as program:
            _until(lambda: not termios.tcgetattr(theirs)[3] & termios.ICANON)
            node.stop()
            assert program.wait(60) == 1
        assert termios.tcgetattr(theirs) == before
        assert b"error: " in os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)
