"""A process's terminal shown on ours: keys go in unseen, the window's size follows, and ours is left as it was."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator

from shoal.cli._options import say
from shoal.cli._streams import Writer, killed_with_us, pump, read_fd
from shoal.errors import InvalidArgumentError, ShoalError
from shoal.sdk import AsyncProcess, AsyncSandbox
from shoal.types import ExecExit, PtySize

_P, _Q = 0x10, 0x11
"""The keys that detach, pressed one after the other."""
_HUNG_UP = 128 + 1
"""Our exit code when the terminal goes away, as SIGHUP's."""
_HOLD = 0.3
"""Seconds that ^P is held back in case ^Q follows; shells and editors have a use for ^P alone."""
_UNSENT = 1 << 20
"""Bytes typed (pasted) ahead of a process that does not take them."""
_LAST_WORDS = 1.0
"""Seconds that what is still to be sent, or shown, may hold up our leaving."""
_REDRAW_PAUSE = 0.1
"""Seconds between the two sizes that make a program redraw: of two at once it would see only the last, no change."""


def need(hint: str) -> None:
    """Refuse to go on where keys cannot be passed on one by one.

    Raises:
        InvalidArgumentError: stdin is no terminal.
    """
    if not sys.stdin.isatty():
        raise InvalidArgumentError("stdin is no terminal", hint=hint)


def variables(tty: bool) -> dict[str, str]:
    """What a command with a terminal must know of it."""
    return {"TERM": os.environ.get("TERM", "xterm")} if tty else {}


def size() -> PtySize:
    """The size of our terminal now, whatever COLUMNS and LINES say: they do not change with it."""
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(fd)
            if columns and lines:
                return PtySize(rows=lines, cols=columns)
    return PtySize()


async def start(
    sandbox: AsyncSandbox,
    argv: list[str],
    *,
    env: dict[str, str],
    user: str | None = None,
    cwd: str | None = None,
    timeout: float | None = None,
) -> AsyncProcess:
    """Start a command on a terminal of the size of ours.

    It can be left: what it prints while nobody reads does not hold it back. While we read, nothing is dropped.
    """
    process = await sandbox.exec(
        argv,
        pty=size(),
        env=variables(True) | env,
        user=user,
        cwd=cwd,
        timeout=timeout,
        detached=True,
    )
    if process.exit is not None:  # it did not start
        return process
    async with killed_with_us(process):
        return await sandbox.attach(process.exec_id)


def say_detached(sandbox: str, process: AsyncProcess) -> None:
    """Tell how to come back to a process that was left."""
    say(
        f"detached; it goes on, and this comes back to it: shoal attach {sandbox} {process.exec_id}"
    )


async def join(process: AsyncProcess, *, redraw: bool = False) -> ExecExit | None:
    """Show a process's terminal on ours until it ends, or the user detaches.

    Whatever happens, our terminal is as before afterwards. If we are cancelled or our terminal goes away, the process
    is killed.

    Args:
        process: It has a terminal, and our stdin is one.
        redraw: It has drawn its screen before, for somebody else; have it do that again.

    Returns:
        How it ended; None: the detach keys were pressed, and it lives on.

    Raises:
        SystemExit: Our terminal has gone; the code is that of a SIGHUP.
    """
    screen, writer = _Screen(), Writer(1)

    async def show(data: bytes) -> None:
        screen.saw(data)
        await writer.write(data)

    end: ExecExit | None = None
    async with killed_with_us(process):
        with _raw():
            conversation = asyncio.create_task(pump(process, show, show))
            keys = asyncio.create_task(_pass_on(process, redraw=redraw))
            try:
                await asyncio.wait({conversation, keys}, return_when=asyncio.FIRST_COMPLETED)
                if conversation.done():
                    end = conversation.result()
                elif not keys.result():
                    raise SystemExit(_HUNG_UP)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise SystemExit(_HUNG_UP) from error
                raise
            finally:
                for task in (conversation, keys):
                    task.cancel()
                if os.isatty(1) and (undo := screen.undo(cut_off=end is None)):
                    with contextlib.suppress(OSError, TimeoutError):
                        async with asyncio.timeout(_LAST_WORDS):
                            await writer.write(undo)
    return end


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Have the terminal pass every key on as it is while the block runs, and give it back as it was.

    Nobody stops us meanwhile with SIGTSTP, which would leave a raw terminal to a shell; after a SIGSTOP the terminal
    is made raw again. Neither change waits for output to drain, for a terminal that takes none would hold us for ever.
    """
    import termios
    import tty

    before = termios.tcgetattr(0)

    def enter() -> None:
        with contextlib.suppress(termios.error):
            tty.setraw(0, termios.TCSANOW)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTSTP, lambda: None)
    loop.add_signal_handler(signal.SIGCONT, enter)
    try:
        enter()
        yield
    finally:
        loop.remove_signal_handler(signal.SIGCONT)
        loop.remove_signal_handler(signal.SIGTSTP)
        with contextlib.suppress(termios.error):  # it has gone
            termios.tcsetattr(0, termios.TCSANOW, before)


async def _pass_on(process: AsyncProcess, *, redraw: bool) -> bool:
    """Tell the process what is typed and our window's size, in the order in which these happen.

    Keys are read on while earlier ones are on their way, so that one can leave a process, or a node, that takes none.

    Returns:
        True: the detach keys were pressed. False: no more keys will come, the terminal has gone.
    """
    loop, keys, unsent = asyncio.get_running_loop(), _DetachKeys(), bytearray()
    news, room = asyncio.Event(), asyncio.Event()
    news.set()  # the window may have changed since the process was started

    def put(data: bytes) -> None:
        unsent.extend(data)
        news.set()

    async def send() -> None:
        told = None
        if redraw:
            now = size()
            await _resize(process, now.rows, now.cols - 1 or 2)
            await asyncio.sleep(_REDRAW_PAUSE)
        while unsent or not keys.pressed:
            await news.wait()
            news.clear()
            if (now := size()) != told:
                await _resize(process, now.rows, now.cols)
                told = now
            data = bytes(unsent)
            unsent.clear()
            room.set()
            if data:
                with contextlib.suppress(ShoalError):  # what became of it, its output tells
                    await process.stdin.write(data)

    loop.add_signal_handler(signal.SIGWINCH, news.set)
    sender = asyncio.create_task(send())
    try:
        async for data in read_fd(0):
            put(keys.feed(data))
            if keys.pressed:
                await asyncio.wait({sender}, timeout=_LAST_WORDS)
                return True
            if keys.holding:
                loop.call_later(_HOLD, lambda: put(keys.release()))
            while len(unsent) > _UNSENT:
                room.clear()
                await room.wait()
        return False
    finally:
        sender.cancel()
        loop.remove_signal_handler(signal.SIGWINCH)


async def _resize(process: AsyncProcess, rows: int, cols: int) -> None:
    with contextlib.suppress(ShoalError):
        await process.resize(rows, cols)


class _DetachKeys:
    """Finds the detach keys in what is typed."""

    def __init__(self) -> None:
        self.pressed = False
        self.holding = False
        """The last key was ^P, and it has not been passed on."""
        self._begun = False
        """The last key was ^P."""

    def feed(self, data: bytes) -> bytes:
        """Take the next keys; return those to pass on."""
        passed = bytearray()
        for key in data:
            if key == _Q and self._begun:
                self.pressed = True
                break
            passed += self.release()
            self._begun = self.holding = key == _P
            if not self._begun:
                passed.append(key)
        return bytes(passed)

    def release(self) -> bytes:
        """The ^P that was held back, if one was. ^Q detaches all the same if it comes next."""
        held, self.holding = self.holding, False
        return bytes([_P]) if held else b""


class _Screen:
    """The modes that a process has put a terminal in, so that they can be taken back when it cannot do that itself."""

    _SEQUENCE = re.compile(rb"\x1b(?:\[\?([0-9;]{1,40})([hl])|\[>4;?([0-9]?)m|([=>]))")
    _LONGEST = 48
    # Keys and cursor, mouse, other screen, brackets around what is pasted, updates held back.
    _SET = frozenset(
        (1, 9, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1015, 1016, 2004, 2026, 47, 1047, 1049)
    )
    _UNSET = frozenset((7, 25))
    """Modes that are set in a terminal that nobody touched: lines wrap, the cursor shows."""

    def __init__(self) -> None:
        self._changed: dict[bytes, None] = {}
        """What takes each change back, in the order of the changes."""
        self._rest = b""

    def saw(self, data: bytes) -> None:
        """Take the next bytes on their way to the terminal."""
        data = self._rest + data
        last = 0
        for found in self._SEQUENCE.finditer(data):
            last = found.end()
            numbers, to, keys, keypad = found.groups()
            if numbers is not None:
                for number in (int(word) for word in numbers.split(b";") if word):
                    if number in self._SET:
                        self._note(b"\x1b[?%dl" % number, changed=to == b"h")
                    elif number in self._UNSET:
                        self._note(b"\x1b[?%dh" % number, changed=to == b"l")
            elif keypad is not None:
                self._note(b"\x1b>", changed=keypad == b"=")
            else:
                self._note(b"\x1b[>4m", changed=keys not in (b"", b"0"))
        tail = data[max(last, len(data) - self._LONGEST) :]
        begun = tail.rfind(b"\x1b")  # a sequence may go on in the next bytes
        self._rest = tail[begun:] if begun >= 0 else b""

    def _note(self, undo: bytes, *, changed: bool) -> None:
        if changed:
            self._changed[undo] = None
        else:
            self._changed.pop(undo, None)

    def undo(self, *, cut_off: bool) -> bytes:
        """What puts the terminal back; with `cut_off`, in the middle of something: also colours, and a new line."""
        back = b"".join(reversed(self._changed))
        return b"\x1b(B\x1b[m" + back + b"\r\n" if cut_off else back
