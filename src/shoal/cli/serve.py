"""`shoal serve`: a node in the foreground."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import click

from shoal.errors import ConflictError, ShoalError


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="What survives a restart.  [default: /var/lib/shoal]",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Where the sockets are.  [default: /run/shoal]",
)
@click.option(
    "--idle-exit",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Leave after so long without a sandbox and a request.  [default: stay]",
)
@click.option(
    "--ready-fd",
    type=int,
    metavar="N",
    help="Descriptor that gets a line of JSON once it is ready, or failed.",
)
def command(
    data_dir: Path | None, run_dir: Path | None, idle_exit: float | None, ready_fd: int | None
) -> None:
    """Run a node in the foreground, as root; ^C stops it. Its log is JSON lines on stderr.

    The SDK and the other verbs start one by themselves, so this is for a node that shall stay, or be watched.
    Every setting is an environment variable SHOAL_…; see the documentation of `shoal.settings`.

    \b
    sudo shoal serve
    sudo shoal serve --data-dir /data/shoal --run-dir /run/shoal-2
    """
    from shoal.local import node, serve

    try:
        settings = node.settings()
        socket = (run_dir or settings.run_dir).absolute() / "shoal.sock"
        if node.answers(socket):
            raise ConflictError(
                f"a node already runs in {socket.parent}",
                hint="use that one, end it first, or choose another --run-dir and --data-dir",
            )
        serve.run(
            data_dir=data_dir or settings.data_dir,
            run_dir=run_dir or settings.run_dir,
            pool_mib=settings.pool_mib,
            listen=settings.listen,
            ready_fd=ready_fd,
            idle_exit=idle_exit if idle_exit is not None else settings.idle_exit,
        )
    except ShoalError as error:
        if ready_fd is not None:
            with contextlib.suppress(OSError):
                os.write(ready_fd, json.dumps({"error": error.to_problem()}).encode() + b"\n")
        raise
