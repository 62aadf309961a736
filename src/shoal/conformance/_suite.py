"""Checks, how they are found, and how they are run: each by itself, bounded, and cleaned up after."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import inspect
import shutil
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import anyio
import msgspec

from shoal.conformance._expect import Unmet
from shoal.errors import ShoalError
from shoal.sdk import AsyncSandbox
from shoal.types import Runtime

MODULES = (
    *("execs", "outcomes", "terminals", "files", "ports"),
    *("readiness", "lifetimes", "walls", "starvation", "bad_input"),
)
UNSUPPORTED: dict[str, frozenset[str]] = {"native": frozenset()}
"""For each runtime the ids that it declares it cannot do. They are not run and never count as passed."""

TIDYING = 20.0
"""Seconds that a check's sandboxes get to end in."""
_SPARE = 60.0
"""Seconds by which a check's sandboxes outlive its deadline, should nobody be left to end them."""

Verdict = Literal["passed", "failed", "not supported"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One sentence of the contract and the program that tries it."""

    id: str
    holds: str
    deadline: float
    """Seconds."""
    body: Callable[[Trial], Awaitable[None]]
    alone: bool = False
    """It takes all of the machine, so nothing runs beside it."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a check."""

    id: str
    holds: str
    result: Verdict
    ms: int
    detail: str = ""
    """Why it failed, in one or two lines."""


class Trial:
    """What a check works with: sandboxes of its own, and a directory on this machine. Both go with it."""

    def __init__(self, image: str, runtime: str, lifetime: float, undo: contextlib.AsyncExitStack):
        self.image = image
        self.runtime = cast(Runtime, runtime)  # the node has the last word on what it knows
        self.label = {"shoal-conformance": uuid.uuid4().hex}
        """On each of its sandboxes."""
        self._lifetime = lifetime
        self._undo = undo

    async def sandbox(self, **options: Any) -> AsyncSandbox:
        """A fresh sandbox; `options` as for `AsyncSandbox.create`."""
        options = {"timeout": self._lifetime, "labels": self.label, **options}
        return await self._undo.enter_async_context(
            await AsyncSandbox.create(self.image, runtime=self.runtime, **options)
        )

    def directory(self) -> Path:
        """A fresh directory on this machine."""
        path = Path(tempfile.mkdtemp(prefix="shoal-conformance-"))
        self._undo.callback(shutil.rmtree, path, ignore_errors=True)
        return path


_registered: dict[str, Check] = {}


def check(
    id: str, *, deadline: float = 30.0, alone: bool = False
) -> Callable[[Callable[[Trial], Awaitable[None]]], Callable[[Trial], Awaitable[None]]]:
    """Register a check; its docstring is the sentence that holds.

    Args:
        id: Two letters for the chapter and a number; stable, because pages link to it.
        deadline: Seconds after which it has failed.
        alone: Run nothing beside it.
    """

    def register(body: Callable[[Trial], Awaitable[None]]) -> Callable[[Trial], Awaitable[None]]:
        if id in _registered:
            raise ValueError(f"two checks are called {id}")
        holds = " ".join((inspect.getdoc(body) or "").split())
        _registered[id] = Check(id=id, holds=holds, deadline=deadline, body=body, alone=alone)
        return body

    return register


def load() -> list[Check]:
    """All checks, in the order of the contract."""
    for name in MODULES:
        importlib.import_module(f"shoal.conformance.{name}")
    return list(_registered.values())


def select(checks: Iterable[Check], patterns: Sequence[str]) -> list[Check]:
    """Those whose id a pattern fits (`EX-*`), or whose sentence has it in it; without patterns all."""
    return [
        one
        for one in checks
        if not patterns
        or any(
            fnmatch.fnmatchcase(one.id, word.upper()) or word.lower() in one.holds.lower()
            for word in patterns
        )
    ]


async def run(
    checks: Sequence[Check],
    *,
    image: str = "base",
    runtime: str = "native",
    jobs: int = 2,
    told: Callable[[Report], None] = lambda report: None,
) -> list[Report]:
    """Run checks and report on each, in their order.

    Args:
        checks: Which.
        image: What their sandboxes are made of.
        runtime: The wall that is tried.
        jobs: So many at once.
        told: Called with each report as it comes.
    """
    reports: dict[str, Report] = {}
    room = anyio.Semaphore(jobs)

    async def one(check: Check) -> None:
        async with room:
            report = await _judge(check, image, runtime)
        reports[check.id] = report
        told(report)

    async with anyio.create_task_group() as group:
        for check in checks:
            if not check.alone:
                group.start_soon(one, check)
    for check in checks:
        if check.alone:
            await one(check)
    return [reports[check.id] for check in checks]


async def _judge(check: Check, image: str, runtime: str) -> Report:
    def report(result: Verdict, detail: str = "") -> Report:
        ms = round((time.perf_counter() - start) * 1000)
        return Report(id=check.id, holds=check.holds, result=result, ms=ms, detail=detail)

    start = time.perf_counter()
    if check.id in UNSUPPORTED.get(runtime, frozenset()):
        return report("not supported")
    undo = contextlib.AsyncExitStack()
    trial = Trial(image, runtime, check.deadline + _SPARE, undo)
    detail = ""
    try:
        with anyio.move_on_after(check.deadline) as limit:
            await check.body(trial)
        if limit.cancelled_caught:
            detail = f"expected: an end within {check.deadline:g} s\ngot: none"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what came of the check
        detail = _told(error)
    finally:
        tidying = await _tidy(undo)
    return report("failed" if detail or tidying else "passed", detail or tidying)


async def _tidy(undo: contextlib.AsyncExitStack) -> str:
    """End what a check made, also when it is being cancelled; what went wrong with that, if anything."""
    try:
        with anyio.move_on_after(TIDYING, shield=True) as limit:
            await undo.aclose()
    except Exception as error:  # noqa: BLE001 - as above
        return f"its sandboxes did not end: {_told(error)}"
    return f"its sandboxes did not end within {TIDYING:g} s" if limit.cancelled_caught else ""


def _told(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, Unmet):
        return str(error)
    facts = f" {error.details}" if isinstance(error, ShoalError) and error.details else ""
    return f"raised {type(error).__name__}: {error}{facts}"
