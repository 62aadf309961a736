"""The routes of `/v1` that Python serves, and who answers them.

The front door stands before this application: it serves the data plane of the sandboxes it knows and passes on the
rest, so a data-plane path that arrives here belongs to a sandbox that ended or never was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from aiohttp import web

import shoal.types as nouns
from shoal.api.bodies import read_body, read_count, read_flag, read_query
from shoal.api.problems import Activity, activity_middleware, json_response, problem_middleware
from shoal.api.spool import spooled
from shoal.errors import ConflictError, InvalidArgumentError, NodeUnavailableError
from shoal.images import FORMATS
from shoal.node.engine import Engine

MAX_BODY = 8 * 1024 * 1024
_MOST_LISTED = 10_000
_LAST_PORT = 65_535


class ImageShelf(Protocol):
    """What the API asks of the image store."""

    @property
    def spool_dir(self) -> Path:
        """Where uploads are written."""
        ...

    async def import_archive(
        self,
        path: Path,
        name: str,
        format: str = "auto",
        *,
        expected_digest: str | None = None,
        source: str | None = None,
    ) -> nouns.ImageInfo:
        """Make an image of an archive, or leave nothing behind."""
        ...

    def get(self, reference: str) -> nouns.ImageInfo:
        """The image of this name or digest."""
        ...

    def list(self) -> Sequence[nouns.ImageInfo]:
        """Every image."""
        ...

    async def remove(self, reference: str) -> None:
        """Drop a name, and the image with its last one."""
        ...

    async def gc(self) -> Sequence[str]:
        """Drop what nothing needs; what went."""
        ...


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What the handlers work with."""

    engine: Engine
    images: ImageShelf
    stop: Callable[[], None]
    """Makes the node leave; returns at once."""
    version: str
    walls: dict[str, Any]
    default_spec: dict[str, Any] = {}
    """What a spec has, by field, when it does not say; a field that is not here has the type's own default."""
    max_image_bytes: int = 1 << 36
    started_at: float = msgspec.field(default_factory=time.time)


_NODE = web.AppKey("node", Node)


def build_app(node: Node, activity: Activity) -> web.Application:
    """The control plane of a node; `activity` tells how busy it is."""
    app = web.Application(
        middlewares=[activity_middleware(activity), problem_middleware], client_max_size=MAX_BODY
    )
    app[_NODE] = node
    router = app.router
    router.add_post("/v1/sandboxes", create_sandbox)
    router.add_get("/v1/sandboxes", list_sandboxes)
    router.add_get("/v1/sandboxes/{id}", get_sandbox)
    router.add_delete("/v1/sandboxes/{id}", terminate_sandbox)
    router.add_post("/v1/sandboxes/{id}/connect", connect_sandbox)
    router.add_put("/v1/sandboxes/{id}/ports/{port}", publish_port)
    router.add_delete("/v1/sandboxes/{id}/ports/{port}", unpublish_port)
    router.add_route(
        "*", "/v1/sandboxes/{id}/{plane:ports}/{port}/{rest:wait|connect}", unreachable
    )
    router.add_route("*", "/v1/sandboxes/{id}/{plane:execs|files}", unreachable)
    router.add_route("*", "/v1/sandboxes/{id}/{plane:execs|files}/{rest:.*}", unreachable)
    router.add_get("/v1/images", list_images)
    router.add_post("/v1/images", import_image)
    router.add_post("/v1/images/gc", collect_images)
    router.add_get("/v1/images/{reference:.+}", get_image)
    router.add_delete("/v1/images/{reference:.+}", remove_image)
    router.add_get("/v1/node", get_node)
    router.add_post("/v1/node/stop", stop_node)
    return app


async def create_sandbox(request: web.Request) -> web.Response:
    """POST /v1/sandboxes: a spec in, a running sandbox out, ready as the spec asks."""
    node = request.app[_NODE]
    read_query(request)
    spec = await read_body(request, nouns.SandboxSpec, defaults=node.default_spec)
    return json_response(await node.engine.create(spec), status=201)


async def list_sandboxes(request: web.Request) -> web.Response:
    """GET /v1/sandboxes: those alive, and with `all=true` the last `limit` that ended."""
    query = read_query(request, "all", "limit", repeated=("label",))
    labels: dict[str, str] = {}
    for pair in request.query.getall("label", []):
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise InvalidArgumentError(f"label must be name=value, not {pair[:200]!r}")
        if labels.setdefault(name, value) != value:
            raise InvalidArgumentError(f"label {name[:200]} cannot have two values")
    limit = read_count("limit", query.get("limit", "1000"), most=_MOST_LISTED)
    ended = limit if read_flag("all", query.get("all")) else 0
    return json_response(
        nouns.SandboxPage(sandboxes=request.app[_NODE].engine.list(labels=labels, ended=ended))
    )


async def get_sandbox(request: web.Request) -> web.Response:
    """GET /v1/sandboxes/{id}: what is known of it, alive or ended."""
    read_query(request)
    return json_response(request.app[_NODE].engine.get(request.match_info["id"]))


async def terminate_sandbox(request: web.Request) -> web.Response:
    """DELETE /v1/sandboxes/{id}: end it; one that has ended stays as it is."""
    read_query(request)
    return json_response(await request.app[_NODE].engine.terminate(request.match_info["id"]))


async def connect_sandbox(request: web.Request) -> web.Response:
    """POST /v1/sandboxes/{id}/connect: the token of a running one."""
    read_query(request)
    return json_response(request.app[_NODE].engine.access(request.match_info["id"]))


async def publish_port(request: web.Request) -> web.Response:
    """PUT /v1/sandboxes/{id}/ports/{port}: from now on the port needs no token."""
    read_query(request)
    port = read_count("port", request.match_info["port"], most=_LAST_PORT)
    return json_response(await request.app[_NODE].engine.publish(request.match_info["id"], port))


async def unpublish_port(request: web.Request) -> web.Response:
    """DELETE /v1/sandboxes/{id}/ports/{port}: from now on the port needs a token again."""
    read_query(request)
    port = read_count("port", request.match_info["port"], most=_LAST_PORT)
    return json_response(await request.app[_NODE].engine.unpublish(request.match_info["id"], port))


async def unreachable(request: web.Request) -> web.Response:
    """Any data-plane path: the front door does not serve this sandbox; say why."""
    sandbox = request.match_info["id"]
    # Raises for one that never was, has ended or is not up yet.
    request.app[_NODE].engine.access(sandbox)
    raise NodeUnavailableError(
        f"the connection to sandbox {sandbox} is being made again", hint="retry in a moment"
    )


async def list_images(request: web.Request) -> web.Response:
    """GET /v1/images: every image."""
    read_query(request)
    return json_response(nouns.ImagePage(images=list(request.app[_NODE].images.list())))


async def get_image(request: web.Request) -> web.Response:
    """GET /v1/images/{reference}: one image."""
    read_query(request)
    return json_response(request.app[_NODE].images.get(request.match_info["reference"]))


async def import_image(request: web.Request) -> web.Response:
    """POST /v1/images: an archive in the body becomes an image."""
    node = request.app[_NODE]
    query = read_query(request, "name", "format", "expected_digest", "source")
    if not query.get("name"):
        raise InvalidArgumentError("name is missing", hint="?name=base, or team/app:v1")
    form = query.get("format", "auto")
    if form not in FORMATS:
        raise InvalidArgumentError(
            f"format cannot be {form[:100]!r}", hint=f"one of: {', '.join(FORMATS)}"
        )
    async with spooled(request, node.images.spool_dir, max_bytes=node.max_image_bytes) as path:
        image = await node.images.import_archive(
            path,
            query["name"],
            form,
            expected_digest=query.get("expected_digest"),
            source=query.get("source"),
        )
    return json_response(image, status=201)


async def remove_image(request: web.Request) -> web.Response:
    """DELETE /v1/images/{reference}: drop a name, and the image with its last one."""
    read_query(request)
    await request.app[_NODE].images.remove(request.match_info["reference"])
    return web.Response(status=204)


async def collect_images(request: web.Request) -> web.Response:
    """POST /v1/images/gc: drop what nothing needs."""
    read_query(request)
    return json_response({"removed": list(await request.app[_NODE].images.gc())})


async def get_node(request: web.Request) -> web.Response:
    """GET /v1/node: the node and what is left of it."""
    read_query(request)
    node = request.app[_NODE]
    admission = node.engine.admission
    total, reserved = admission.host, admission.reserved
    return json_response(
        nouns.NodeInfo(
            version=node.version,
            started_at=node.started_at,
            sandboxes=node.engine.alive,
            cpu_total=total.cpu,
            cpu_reserved=reserved.cpu,
            memory_total_mib=total.memory_mib,
            memory_reserved_mib=reserved.memory_mib,
            disk_total_mib=total.disk_mib,
            disk_reserved_mib=reserved.disk_mib,
            walls=node.walls,
        )
    )


async def stop_node(request: web.Request) -> web.Response:
    """POST /v1/node/stop: leave; with sandboxes alive only when forced."""
    node = request.app[_NODE]
    force = read_flag("force", read_query(request, "force").get("force"))
    alive = node.engine.alive
    if alive and not force:
        raise ConflictError(
            f"{alive} sandboxes are alive",
            hint="end them first, or stop with force=true",
            sandboxes=alive,
        )
    node.stop()
    return json_response({}, status=202)
