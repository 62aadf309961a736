"""What several verbs take, and how they run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click
import msgspec

from shoal._compat import override

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
_UNITS = {"": 1, "m": 1, "g": 1024, "t": 1024 * 1024}


class Mebibytes(click.ParamType[int]):
    """A size: `512` (MiB), `512m`, `2g`."""

    name = "SIZE"

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The size in MiB."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mgt]?)(?:i?b)?", str(value).strip().lower())
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
        if size < 1:
            self.fail(f"{value!r} is no size; use 512, 512m or 2g", param, ctx)
        return size


class Pair(click.ParamType[tuple[str, str]]):
    """`KEY=VALUE`, or for the environment `KEY` alone, which takes the value from here."""

    name = "KEY=VALUE"

    def __init__(self, *, inherit: bool = False) -> None:
        self._inherit = inherit

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Key and value."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not key or not (equals or self._inherit):
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        if not equals:
            if key not in os.environ:
                self.fail(f"{key} is not set here; give {key}=VALUE", param, ctx)
            text = os.environ[key]
        return key, text


def exec_options(function: F) -> F:
    """Environment, user and directory of a command."""
    for option in (
        click.option(
            "--workdir", "-w", metavar="DIR", help="Working directory.  [default: the image's]"
        ),
        click.option(
            "--user", "-u", metavar="USER", help="User, by name or id.  [default: the image's]"
        ),
        click.option(
            "--env",
            "-e",
            multiple=True,
            type=Pair(inherit=True),
            metavar="KEY[=VALUE]",
            help="Environment; KEY alone takes the value from here. May be repeated.",
        ),
    ):
        function = option(function)
    return function


def sandbox_options(function: F) -> F:
    """What a new sandbox shall be."""
    for option in (
        click.option(
            "--label",
            multiple=True,
            type=Pair(),
            metavar="KEY=VALUE",
            help="A word to find it by. May be repeated.",
        ),
        click.option(
            "--runtime",
            type=click.Choice(["native"]),
            show_default="native",
            help="The wall.",
        ),
        click.option(
            "--network",
            type=click.Choice(["none"]),
            show_default="none",
            help="none: a loopback interface and nothing else.",
        ),
        click.option(
            "--pids",
            type=click.IntRange(min=1),
            show_default="512",
            metavar="N",
            help="Processes at most.",
        ),
        click.option(
            "--disk",
            type=Mebibytes(),
            show_default="1g",
            help="Hard limit on what it writes.",
        ),
        click.option("--memory", type=Mebibytes(), show_default="512m", help="Memory limit."),
        click.option(
            "--cpu",
            type=click.FloatRange(min=0, min_open=True),
            show_default="1",
            metavar="CPUS",
            help="CPUs at most.",
        ),
        click.option(
            "--image",
            metavar="NAME",
            default="base",
            show_default=True,
            help="Image to start from.",
        ),
    ):
        function = option(function)
    return function


def timeout_option(help: str, default: float | None = 300.0) -> Callable[[F], F]:
    """`--timeout` in seconds."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=default,
        show_default=f"{default:g}" if default is not None else False,
        metavar="SECONDS",
        help=help,
    )


def drive(main: Coroutine[Any, Any, T]) -> T:
    """Run a verb's coroutine. ^C and SIGTERM cancel it, so that what it made is cleaned up."""

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - we are one
        caught: list[int] = []

        def stop(number: int) -> None:
            caught.append(number)
            task.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            with contextlib.suppress(
                NotImplementedError, ValueError
            ):  # Windows, or not the main thread
                loop.add_signal_handler(number, stop, number)
        try:
            return await main
        except asyncio.CancelledError:
            if caught:
                raise SystemExit(128 + caught[0]) from None
            raise

    try:
        return asyncio.run(guarded())
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def print_json(value: object) -> None:
    """A value as indented JSON on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def say(text: str) -> None:
    """Talk: a line on stderr."""
    click.echo(text, err=True)
