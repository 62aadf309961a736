"""The `shoal` command. One file a verb; a verb is loaded when it is used."""

from __future__ import annotations

from shoal.cli._group import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line, and exit with its code."""
    cli.main()
