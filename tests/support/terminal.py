"""A terminal with a program on it and a screen that shows what the program draws: `pyte` stands in for the glass."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyte

from shoal._compat import override

DEADLINE = 60.0
"""Seconds for anything to appear; a test that fails waits as long, one that passes does not."""


class _Screen(pyte.Screen):
    """What `pyte` lacks: vim asks for the state of its keys with what looks like colours."""

    @override
    def select_graphic_rendition(self, *attrs: int, private: bool = False) -> None:
        if not private:
            super().select_graphic_rendition(*attrs)


class Terminal:
    """A terminal and the program that has it as its controlling one."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], *, rows: int = 24, cols: int = 80
    ) -> None:
        self.screen = _Screen(cols, rows)
        self.said = b""
        """Everything that was written to it."""
        self._stream = pyte.ByteStream(self.screen)
        # Their end stays open here too: its attributes can be read after the program has gone.
        self._ours, self._theirs = pty.openpty()
        self._set_size(rows, cols)
        self.before = self.attributes()
        self.program = subprocess.Popen(
            argv,
            env={**env, "TERM": "xterm-256color"},
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - one system call
        )

    def attributes(self) -> list[Any]:
        """Its attributes now."""
        return termios.tcgetattr(self._theirs)

    def set_attributes(self, attributes: list[Any]) -> None:
        """Change its attributes, as another program on it may."""
        termios.tcsetattr(self._theirs, termios.TCSANOW, attributes)

    @property
    def raw(self) -> bool:
        """Keys pass it unseen."""
        return not self.attributes()[3] & (termios.ICANON | termios.ISIG | termios.ECHO)

    @property
    def lines(self) -> list[str]:
        """What the screen shows, without trailing blanks."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        """What the screen shows as one text."""
        return "\n".join(self.lines)

    @property
    def line(self) -> str:
        """The line that the cursor is in."""
        return self.lines[self.screen.cursor.y]

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def resize(self, rows: int, cols: int) -> None:
        """Change the window; the kernel tells the program."""
        self.screen.resize(rows, cols)
        self._set_size(rows, cols)

    def _set_size(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def until(self, what: str | Callable[[], bool]) -> None:
        """Wait until the screen shows a text, or something holds."""
        end = time.monotonic() + DEADLINE
        while not (what in self.text if isinstance(what, str) else what()):
            left = end - time.monotonic()
            assert left > 0, f"no {what!r} on the screen:\n{self.text}"
            self._look(min(left, 0.1))

    def _look(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        data = os.read(self._ours, 1 << 16)
        self.said += data
        self._stream.feed(data)
        return True

    def prompt(self) -> None:
        """Wait until a shell asks for the next command."""
        self.until(lambda: self.line.endswith("#"))

    def command(self, line: str, shows: str) -> None:
        """Type a command for a shell and wait for what it shows and the next prompt; the screen is clear before."""
        self.prompt()
        self.type("\f")  # clear the screen, as every shell with line editing does
        self.until(lambda: self.lines[0].endswith("#") and not any(self.lines[1:]))
        self.type(f"{line}\r")
        self.until(lambda: any(shows in shown for shown in self.lines[1:]))
        self.prompt()

    def ended(self) -> int:
        """Wait for the program's end and return its exit code; all that it wrote is on the screen then."""
        self.until(lambda: self.program.poll() is not None)
        while self._look(0):
            pass
        return int(self.program.returncode)

    def hang_up(self) -> None:
        """Close the window."""
        os.close(self._ours)
        self._ours = -1

    def close(self) -> None:
        """End the program, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.program.pid, signal.SIGKILL)
        self.program.wait()
        for fd in (self._ours, self._theirs):
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def terminal(
    argv: Sequence[str], env: Mapping[str, str], *, rows: int = 24, cols: int = 80
) -> Iterator[Terminal]:
    """A program on a terminal of its own, ended with the block."""
    shown = Terminal(argv, env, rows=rows, cols=cols)
    try:
        yield shown
    finally:
        shown.close()
