"""A table on stdout: aligned columns, readable by people and by `awk`."""

from __future__ import annotations

from collections.abc import Sequence

import click


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; only the head if there are no rows. What a stranger named cannot move the cursor."""
    lines = [tuple(head), *(tuple(_tame(cell) for cell in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        click.echo(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def _tame(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
