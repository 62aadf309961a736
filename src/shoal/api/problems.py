"""Every error as problem+json (RFC 9457), whoever raised it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from aiohttp import web

from shoal.errors import InternalError, InvalidArgumentError, NotFoundError, ShoalError

log = structlog.get_logger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Activity:
    """How busy the API is: requests that are being answered, and when the last one was."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.last = time.monotonic()


def json_response(value: Any, *, status: int = 200) -> web.Response:
    """A noun as an answer."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


def problem_response(error: ShoalError, *, status: int | None = None) -> web.Response:
    """An error as an answer; `status` is for those of HTTP itself, which no class of ours stands for."""
    problem = error.to_problem()
    if status is not None:
        problem["status"] = status
    return web.Response(
        body=msgspec.json.encode(problem),
        status=problem["status"],
        content_type="application/problem+json",
    )


def activity_middleware(activity: Activity) -> Any:
    """Counts requests. The outermost one, so that an answer is counted until it is written."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        activity.in_flight += 1
        try:
            return await handler(request)
        finally:
            activity.in_flight -= 1
            activity.last = time.monotonic()

    return count


@web.middleware
async def problem_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers every error with a problem; a bug of ours is logged with its traceback, which stays here."""
    try:
        return await handler(request)
    except ShoalError as error:
        if error.status >= 500:
            log.warning(
                "request_failed",
                method=request.method,
                path=request.path,
                code=error.code,
                error=error.message,
            )
        return problem_response(error)
    except web.HTTPException as error:
        return _from_http(request, error)
    except ConnectionError:
        raise  # the client is gone; there is nobody to answer
    except Exception:
        log.exception("request_broke", method=request.method, path=request.path)
        return problem_response(
            InternalError("a bug in the node broke the request", hint="see the node's log")
        )


def _from_http(request: web.Request, error: web.HTTPException) -> web.Response:
    match error:
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            problem: ShoalError = InvalidArgumentError(
                f"{request.method} cannot be done to {request.path[:200]}",
                hint=f"allowed: {allowed}",
            )
        case web.HTTPNotFound():
            problem = NotFoundError(
                f"no such path: {request.path[:200]}", hint="the API's paths begin with /v1/"
            )
        case web.HTTPRequestEntityTooLarge():
            problem = InvalidArgumentError(
                "the body is too large", hint="a JSON body has at most 8 MiB"
            )
        case _:
            problem = InvalidArgumentError(error.reason.lower())
    response = problem_response(problem, status=error.status)
    if isinstance(error, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    return response
