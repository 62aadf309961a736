"""What the frameworks ask of a sandbox alike: files as its own user sees them, and one number for an end.

`sandbox.files` acts as root, who may read and write everything. The frameworks expect a refusal where the
sandbox's user has no right, and files that this user owns: so here a command of that user does it, and the kernel
judges. Needs `sh`, `mkdir`, `cat` and `head` in the image.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from shoal.types import ExecResult, Outcome

DEADLINE = 600.0
"""Seconds for one file to move."""
ENV = {"LC_ALL": "C"}
"""For `read_argv` and `write_argv`: `os_error` knows the kernel's words in English."""

_WRITE = 'case $1 in */*) mkdir -p -- "${1%/*}/" || exit ;; esac; exec cat >"$1"'
_WORDS = {
    os.strerror(number): number
    for number in (
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
        *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP, errno.ENAMETOOLONG),
    )
}


def read_argv(path: str, limit: int) -> list[str]:
    """The command that prints up to `limit` bytes of a file."""
    return ["head", "-c", str(limit), "--", path]


def write_argv(path: str) -> list[str]:
    """The command that makes a file of its stdin, and the directories above it."""
    return ["/bin/sh", "-c", _WRITE, "sh", path]


def os_error(result: ExecResult, path: str) -> OSError:
    """Why a command of this module failed, as the exception that Python has for it."""
    if result.outcome is Outcome.TIMED_OUT:
        return OSError(errno.ETIMEDOUT, f"not done within {DEADLINE:g} s", path)
    said = result.stderr.strip()
    for words, number in _WORDS.items():
        if said.endswith(words):
            return OSError(number, words, path)
    return OSError(errno.EIO, said or remark(result, "the command") or "the command failed", path)


def exit_code(result: ExecResult) -> int:
    """A command's end as a shell tells it: 124 when its time was up, 127 or 126 if it never ran, 128+n for signal n."""
    match result.outcome:
        case Outcome.EXITED:
            return result.exit_code or 0
        case Outcome.NOT_STARTED:
            return 127 if result.errno == errno.ENOENT and result.stage in (None, "exec") else 126
        case Outcome.TIMED_OUT:
            return 124
        case _:
            return 128 + (result.signal or 9)


def remark(result: ExecResult, program: str, about: Mapping[str, str | None] | None = None) -> str:
    """What there is to say about an end that the command could not tell itself; mostly nothing.

    Args:
        result: The end.
        program: What was started.
        about: By stage, what a failure there was about.
    """
    match result.outcome:
        case Outcome.NOT_STARTED:
            subject = (about or {}).get(result.stage or "exec") or program
            why = os.strerror(result.errno) if result.errno else "refused"
            return f"{subject}: {why} (at {result.stage or 'exec'})"
        case Outcome.TIMED_OUT:
            return f"{program}: killed, its time was up"
        case Outcome.OOM_KILLED:
            return f"{program}: killed, it went over the sandbox's memory limit"
        case Outcome.LOST:
            return f"{program}: lost"
        case _:
            return ""
