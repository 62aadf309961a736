"""The `shoal` command. One file a verb; a verb is loaded when it is used."""

from __future__ import annotations

import os
import sys

from shoal.cli._group import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line, and exit with its code."""
    _open_standard_streams()
    cli.main()


def _open_standard_streams() -> None:
    """Make a descriptor that our parent closed /dev/null, or the next socket would become stdin or stdout."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
            stream = open(fd, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays
            setattr(sys, name, stream)
