"""The server process: reads its settings, wires the rooms together, leaves when it is told to or nobody needs it.

The keeper starts it, and starts it again when it dies; the sandboxes live on and are taken up. Three things are
inherited: a socket to the keeper, a listening socket for HTTP, and stderr for the log. It needs no privilege and writes under the data directory only.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from importlib import metadata
from typing import TextIO

import anyio
import structlog
from aiohttp import web
from pydantic import ValidationError
from structlog.tracebacks import ExceptionDictTransformer

from shoal.api.app import Node, build_app
from shoal.api.problems import Activity
from shoal.errors import HostUnsupportedError, InvalidArgumentError, ShoalError
from shoal.images import ImageStore
from shoal.node.admission import (
    Admission,
    Floor,
    Overcommit,
    available_disk_mib,
    available_memory_mib,
    host_resources,
)
from shoal.node.door_client import DoorClient
from shoal.node.engine import Engine, EngineConfig
from shoal.node.keeper_client import KeeperClient, KeeperHello, KeeperLayers
from shoal.node.recovery import recover
from shoal.node.secret import NodeSecret
from shoal.node.slots import Slots
from shoal.settings import Settings
from shoal.state import StateStore
from shoal.types import SandboxSpec

log = structlog.get_logger(__name__)

KEEPER_FD = "SHOAL_KEEPER_FD"
"""Environment variable with the descriptor of our end of the keeper's SOCK_SEQPACKET pair."""
SERVER_FD = "SHOAL_SERVER_FD"
"""Environment variable with the descriptor of the listening socket for HTTP."""
_MAX_HEADER = 64 * 1024
_IDLE_LOOK = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server; returns the process's exit code: 0 when it left as it should."""
    configure_log("info", sys.stderr)
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
        configure_log(settings.log_level, sys.stderr)
        keeper = _inherited(KEEPER_FD, socket.SOCK_SEQPACKET)
        listener = _inherited(SERVER_FD, socket.SOCK_STREAM)
        os.umask(0o077)
        _raise_file_limit()
        return anyio.run(serve, settings, keeper, listener)
    except ShoalError as error:
        log.error("server_failed", code=error.code, error=error.message, hint=error.hint)
        return 1
    except Exception:
        log.exception("server_broke")
        return 1


def read_settings(arguments: Sequence[str]) -> Settings:
    """Settings from the environment, with options on top: `--data-dir` is `data_dir`, and so on.

    Raises:
        InvalidArgumentError: A value makes no sense.
    """
    parser = argparse.ArgumentParser(
        prog="python -m shoal.node",
        description="The server process of a node; the keeper starts it. People use `shoal serve`.",
    )
    for name, field in Settings.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, help=text, default=argparse.SUPPRESS
        )
    given = vars(parser.parse_args(arguments))
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        raise InvalidArgumentError(
            f"{name}: {first['msg'].lower()}, not {first['input']!r}",
            hint=f"see SHOAL_{name.upper()} and --{name.replace('_', '-')}",
        ) from error


def configure_log(level: str, stream: TextIO) -> None:
    """JSON lines on a stream, ours and those of the libraries."""
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    to_json = structlog.processors.JSONRenderer(default=str)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            stamp,
            # Without local variables: they hold tokens.
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            to_json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    libraries = logging.StreamHandler(stream)
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, structlog.stdlib.add_log_level],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                stamp,
                structlog.processors.format_exc_info,  # the traceback as text, which has no local variables
                to_json,
            ],
        )
    )
    logging.basicConfig(handlers=[libraries], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


async def serve(settings: Settings, keeper_socket: socket.socket, listener: socket.socket) -> int:
    """Serve until told to stop, idle, or left alone by the keeper; returns the exit code.

    Args:
        settings: All of them.
        keeper_socket: Our end of the keeper's pair. Closed when this returns.
        listener: Bound and listening. Closed when this returns.

    Raises:
        ShoalError: The node cannot start; nothing was served.
    """
    stop = anyio.Event()
    activity = Activity()
    async with AsyncExitStack() as stack:
        stack.callback(listener.close)
        keeper = await stack.enter_async_context(KeeperClient(keeper_socket))
        data_dir = settings.data_dir
        (data_dir / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
        state = StateStore.open(data_dir / "state.db")
        stack.callback(state.close)
        images = ImageStore(data_dir, KeeperLayers(keeper))
        survivors = await recover(keeper=keeper, state=state, images=images)

        secret = NodeSecret.load(data_dir / "secret")
        # The keeper takes it for "the server is up" and says so to who started the node; hence not earlier.
        hello = await keeper.hello()
        admission = _admission(settings, hello)
        slots = Slots()
        for first in hello.id_blocks:
            slots.add(first, hello.ids_per_block)

        tasks = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(tasks.cancel_scope.cancel)
        door = DoorClient(settings.run_dir / "door.sock")
        engine = await stack.enter_async_context(
            Engine(
                keeper=keeper,
                door=door,
                images=images,
                state=state,
                admission=admission,
                secret=secret,
                config=EngineConfig(
                    start_timeout=settings.start_timeout,
                    stop_timeout=settings.stop_timeout,
                    create_concurrency=settings.create_concurrency,
                    keep_ended=settings.keep_ended,
                    max_ended=settings.max_ended,
                ),
                url_template=_url_template(settings.port_domain, hello.listen),
                slots=slots,
            )
        )
        await engine.adopt(survivors)
        tasks.start_soon(door.run)
        node = Node(
            engine=engine,
            images=images,
            stop=stop.set,
            version=_version(),
            walls={"kernel": hello.kernel, "cgroup": hello.cgroup, **hello.walls},
            default_spec=_default_spec(settings),
            max_image_bytes=settings.max_image_mib << 20,
        )
        runner = web.AppRunner(
            build_app(node, activity),
            access_log=None,
            handler_cancellation=True,  # a creator that went away gives its sandbox up
            shutdown_timeout=settings.stop_timeout,
            max_line_size=_MAX_HEADER,
            max_field_size=_MAX_HEADER,
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        # Kept for ourselves: the loop closes what it listens on, and the number must not be given on meanwhile.
        site = web.SockSite(runner, listener.dup(), backlog=1024)
        await site.start()
        tasks.start_soon(_watch_signals, stop)
        if settings.idle_exit:
            tasks.start_soon(_watch_idle, engine, activity, settings.idle_exit, stop)
        log.info(
            "server_ready",
            version=node.version,
            pid=os.getpid(),
            kernel=hello.kernel,
            cgroup=hello.cgroup,
        )

        async with anyio.create_task_group() as waiting:
            waiting.start_soon(_then_cancel, stop, waiting.cancel_scope)
            waiting.start_soon(_then_cancel, keeper.lost, waiting.cancel_scope)
        if keeper.lost.is_set():
            log.error("keeper_lost")
            return 1
        # Accept nothing more, end what is there, answer whoever is still waiting.
        engine.close_admission()
        await site.stop()
        await engine.shutdown()
        await runner.cleanup()
        log.info("server_stopped")
    return 0


async def _then_cancel(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _watch_signals(stop: anyio.Event) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("signal_received", signal=signal.Signals(number).name)
            stop.set()


async def _watch_idle(
    engine: Engine, activity: Activity, idle_exit: float, stop: anyio.Event
) -> None:
    while True:
        if engine.alive or activity.in_flight:
            remaining = idle_exit
        else:
            remaining = max(activity.last, engine.quiet_since) + idle_exit - time.monotonic()
        if remaining <= 0:
            log.info("idle_for_long", seconds=idle_exit)
            stop.set()
            return
        await anyio.sleep(min(remaining, _IDLE_LOOK) + 0.001)


def _inherited(variable: str, kind: socket.SocketKind) -> socket.socket:
    # Popped, so that nothing we ever start is told of it.
    text = os.environ.pop(variable, "")
    try:
        sock = socket.socket(fileno=int(text))
    except (ValueError, OSError) as error:
        raise HostUnsupportedError(
            f"{variable} names no socket: {text!r}",
            hint="the keeper starts this program; people use `shoal serve`",
        ) from error
    if sock.type != kind:
        raise HostUnsupportedError(
            f"{variable} is a socket of type {sock.type.name}, not {kind.name}"
        )
    os.set_inheritable(sock.fileno(), False)
    return sock


def _raise_file_limit() -> None:
    # A burst of a thousand creates is a thousand connections; the usual soft limit is 1024.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _admission(settings: Settings, hello: KeeperHello) -> Admission:
    return Admission(
        host_resources(
            disk_mib=hello.pool.total_bytes >> 20, reserve_memory_mib=settings.reserve_memory_mib
        ),
        overcommit=Overcommit(
            cpu=settings.overcommit_cpu,
            memory=settings.overcommit_memory,
            disk=settings.overcommit_disk,
            pids=settings.overcommit_pids,
        ),
        max_sandboxes=settings.max_sandboxes,
        max_timeout=settings.max_timeout,
        floors=(
            Floor(
                resource="memory",
                keep_mib=settings.reserve_memory_mib,
                available_mib=available_memory_mib,
            ),
            Floor(
                resource="disk",
                keep_mib=settings.reserve_disk_mib,
                available_mib=lambda: available_disk_mib(settings.data_dir),
            ),
        ),
    )


def _url_template(domain: str, listen: str | None) -> str | None:
    return f"http://{{port}}-{{id}}.{domain}:{listen.rpartition(':')[2]}" if listen else None


def _default_spec(settings: Settings) -> dict[str, object]:
    """The settings' defaults where they are not the type's own, so that the usual create decodes its body once."""
    own = SandboxSpec()
    chosen = {
        "image": settings.default_image,
        "cpu": settings.default_cpu,
        "memory_mib": settings.default_memory_mib,
        "disk_mib": settings.default_disk_mib,
        "pids": settings.default_pids,
        "timeout": settings.default_timeout,
    }
    return {name: value for name, value in chosen.items() if value != getattr(own, name)}


def _version() -> str:
    try:
        return metadata.version("shoal")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0"
