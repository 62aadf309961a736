"""A progress bar on stderr, and nothing where stderr is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Tell = Callable[[float | None, str], None]
"""Called with the fraction done (None: not known) and what is going on (empty: as before)."""


@contextlib.contextmanager
def bar(title: str) -> Iterator[Tell]:
    """Show a bar while the block runs."""
    if not sys.stderr.isatty():
        yield lambda fraction, text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=1.0, text="")
        now = ""

        def tell(fraction: float | None, text: str) -> None:
            nonlocal now
            now = text[:40] or now
            progress.update(task, completed=fraction, text=now)

        yield tell
