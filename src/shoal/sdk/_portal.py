"""The one event-loop thread of a process, on which the sync half of the SDK runs.

A sync call hands its coroutine over and waits, so it has the same deadlines and cancels as an async one. The
thread starts with the first call. What bites, and how it is met:

- ^C while waiting cancels the task and waits until its cleanup is done; a second ^C does not wait.
- After a fork the child has no thread and must not touch the parent's loop, whose epoll both would share; it
  gets a loop of its own with its first call.
- Exit cancels what is pending, closes connections and waits for that only shortly.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import ctypes
import os
import select
import selectors
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, TypeVar

from shoal.sdk import _client

T = TypeVar("T")

CANCEL_GRACE = 5.0
"""Seconds that a cancelled call may take to clean up."""
EXIT_GRACE = 2.0
"""Seconds that all pending work together may take to clean up when the process exits."""


class _Portal:
    """An event loop and the thread that runs it."""

    def __init__(self) -> None:
        # The selector is ours so that a forked child can make its copy inert; see _abandon.
        self.closing = False
        self.selector = selectors.DefaultSelector()
        self.loop = asyncio.SelectorEventLoop(self.selector)
        self.thread = threading.Thread(target=self._main, name="shoal-portal", daemon=True)
        self.thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def close(self) -> None:
        """Cancel what is pending, close what is open, end the thread; all within `EXIT_GRACE`."""
        if not self.thread.is_alive():
            return
        self.closing = True
        done = asyncio.run_coroutine_threadsafe(self._wind_up(), self.loop)
        with contextlib.suppress(
            concurrent.futures.TimeoutError, concurrent.futures.CancelledError
        ):
            done.result(EXIT_GRACE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(EXIT_GRACE)

    async def _wind_up(self) -> None:
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending, timeout=EXIT_GRACE / 2)
        await self.loop.shutdown_asyncgens()


_lock = threading.Lock()
_current: _Portal | None = None


def _get() -> _Portal:
    global _current
    with _lock:
        if _current is None or not _current.thread.is_alive():
            _current = _Portal()
        return _current


def run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run the coroutine that `make` returns on the portal's loop and return its result.

    Args:
        make: Called on the loop's thread, so that what it builds belongs to that loop.

    Raises:
        RuntimeError: Called on the portal's own thread, where waiting would never end.
    """
    portal = _get()
    if threading.current_thread() is portal.thread:
        raise RuntimeError(
            "a sync call cannot be made from a callback of another one; use the async classes there"
        )

    async def call() -> T:
        return await make()

    future = asyncio.run_coroutine_threadsafe(call(), portal.loop)
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        if portal.closing:
            # The process exits, and this is a daemon thread that goes with it: nothing is left to tell anybody.
            threading.Event().wait()
        raise
    except KeyboardInterrupt:
        future.cancel()
        _settle(portal)
        raise


def iterate(make: Callable[[], AsyncGenerator[T]]) -> Generator[T]:
    """Give what the async generator of `make` gives.

    It is closed when this one is: at its end, by `close`, or when it is dropped half-read.
    """
    source, portal, end = make(), _get(), object()

    async def step() -> T | object:
        return await anext(source, end)

    try:
        while (item := run(step)) is not end:
            yield item  # type: ignore[misc]  # only the end is no T
    finally:
        # Not waited for: the thread that drops a generator may be any, the portal's own too.
        if portal.thread.is_alive() and not portal.closing:
            asyncio.run_coroutine_threadsafe(source.aclose(), portal.loop)


def _settle(portal: _Portal) -> None:
    """Wait until the tasks that are being cancelled have ended, so that a kill is sent before we go on."""

    async def wait() -> None:
        going = [
            task
            for task in asyncio.all_tasks()
            if task is not asyncio.current_task() and task.cancelling()
        ]
        if going:
            await asyncio.wait(going, timeout=CANCEL_GRACE)

    with contextlib.suppress(concurrent.futures.TimeoutError):
        asyncio.run_coroutine_threadsafe(wait(), portal.loop).result(CANCEL_GRACE)


@atexit.register
def _close() -> None:
    global _current
    portal, _current = _current, None
    if portal is not None:
        portal.close()


def _abandon() -> None:
    """In a forked child: leave the parent's loop alone.

    The epoll set behind the selector is shared with the parent. An empty one takes its place here, so that
    nothing done to this copy can make the parent deaf. And the loop, with all connections that hang on it, is
    kept for ever: its finalizers would warn of things that only the parent can close.
    """
    global _current, _lock
    _lock = threading.Lock()  # the parent may have held it while forking
    portal, _current = _current, None
    if portal is None:
        return
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(portal))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_client.clients_of(portal.loop)))
    portal.loop.set_exception_handler(lambda *_: None)
    if isinstance(portal.selector, getattr(selectors, "EpollSelector", ())):
        inert = select.epoll()
        os.dup2(inert.fileno(), portal.selector.fileno(), inheritable=False)
        inert.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon)
