"""PO: ports in a sandbox, reached from outside: HTTP, raw bytes, and who may."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio

from shoal.conformance._expect import Unmet, holds, refused, same
from shoal.conformance._help import EVERY_BYTE, python
from shoal.conformance._http import ECHO, Answer, direct, fetch, server, serving, session
from shoal.conformance._suite import Trial, check
from shoal.errors import DeadlineExceededError, ShoalError


@check("PO-01")
async def http(t: Trial) -> None:
    """A port's address answers HTTP with the token's headers, by name and through the node's own address."""
    sandbox = await t.sandbox()
    await serving(sandbox, server(8000))
    url, headers = sandbox.url(8000), sandbox.port_headers(8000)
    same("by name", _seen(await fetch(url, "/a?b=c%20d", headers=headers))["path"], "/a?b=c%20d")
    plain = f"http://127.0.0.1:{urlsplit(url).port}"
    same("through the node", _seen(await fetch(plain, "/x", headers=headers))["path"], "/x")
    token = {"X-Shoal-Token": sandbox.port_token(8000)}
    same("with a port token", (await fetch(url, headers=token)).status, 200)


@check("PO-02")
async def bodies(t: Trial) -> None:
    """Bodies pass byte for byte both ways, with a length and in chunks."""
    sandbox = await t.sandbox()
    await serving(sandbox, server(8000))
    url, headers = sandbox.url(8000), sandbox.port_headers(8000)
    data = EVERY_BYTE * 16384
    answer = await fetch(url, method="POST", headers=headers, data=data)
    same("with a length", (answer.status, answer.body), (200, data))

    async def pieces() -> Any:
        for at in range(0, len(data), 500_000):
            yield data[at : at + 500_000]

    answer = await fetch(url, method="POST", headers=headers, data=pieces())
    same("in chunks", (answer.status, answer.body), (200, data))


@check("PO-03")
async def as_it_comes(t: Trial) -> None:
    """An answer is passed on as it comes, so that server-sent events are events."""
    sandbox = await t.sandbox()
    await serving(sandbox, server(8000))
    there, host = direct(sandbox.url(8000) + "/events")
    headers = sandbox.port_headers(8000)
    async with session() as client, client.get(there, headers={**host, **headers}) as response:
        with anyio.fail_after(10):
            same("the first event", await response.content.readline(), b"data: 0\n")
        await fetch(sandbox.url(8000), "/go", headers=headers)
        same("the rest", await response.content.read(), b"\ndata: 1\n\n")


@check("PO-04")
async def websocket(t: Trial) -> None:
    """A websocket goes through."""
    sandbox = await t.sandbox()
    await serving(sandbox, server(8000))
    there, host = direct(sandbox.url(8000) + "/socket")
    headers = {**host, **sandbox.port_headers(8000)}
    async with session() as client, client.ws_connect(there, headers=headers) as socket:
        for word in ("one", "ü🐟"):
            await socket.send_str(word)
            same("echo", await socket.receive_str(timeout=10), word)


@check("PO-05")
async def private(t: Trial) -> None:
    """A port is private: without its token, with a wrong one, or another port's, nothing reaches the sandbox."""
    sandbox = await t.sandbox()
    process = await serving(sandbox, server(8000))
    other = await t.sandbox()
    url = sandbox.url(8000)
    expired = sandbox.port_token(8000, ttl=1)
    await asyncio.sleep(2.1)  # `expires` counts whole seconds
    for name, headers in (
        ("none", {}),
        ("a wrong one", {"X-Shoal-Token": "wrong"}),
        ("another port's", {"X-Shoal-Token": sandbox.port_token(8001)}),
        ("another sandbox's", {"X-Shoal-Token": other.port_token(8000)}),
        ("one that has expired", {"X-Shoal-Token": expired}),
    ):
        same(f"status with {name}", (await fetch(url, "/no", headers=headers)).status, 401)
    await fetch(url, "/yes", headers=sandbox.port_headers(8000))
    same("the only request that came", await process.stdout.readline(), b"/yes\n")


@check("PO-06")
async def public(t: Trial) -> None:
    """A port is public by choice, at the start or later, and private again when it is taken back."""
    sandbox = await t.sandbox(public_ports=[8000])
    await serving(sandbox, server(8000))
    await serving(sandbox, server(8001))
    same("public from the start", (await fetch(sandbox.url(8000))).status, 200)
    same("another port", (await fetch(sandbox.url(8001))).status, 401)
    same("info", (await sandbox.info()).public_ports, [8000])
    await sandbox.publish(8001)
    same("published", (await fetch(sandbox.url(8001))).status, 200)
    same("info", sorted((await sandbox.info()).public_ports), [8000, 8001])
    await sandbox.unpublish(8000)
    same("taken back", (await fetch(sandbox.url(8000))).status, 401)


@check("PO-07")
async def browser(t: Trial) -> None:
    """A browser is let in by a cookie, without a token in any address that is sent."""
    sandbox = await t.sandbox()
    await serving(sandbox, server(8000))
    url, origin = sandbox.url(8000), sandbox.url(8000).rstrip("/")
    page = urlsplit(sandbox.browser_url(8000, "/page"))
    same("path and query", (page.path, page.query), ("/.shoal/enter", ""))
    words = parse_qs(page.fragment)
    same("next", words["next"], ["/page"])
    answer = await fetch(url, page.path)
    same("page", (answer.status, answer.headers["Content-Type"].split(";")[0]), (200, "text/html"))
    same("cached", "no-store" in answer.headers.get("Cache-Control", ""), True)
    answer = await fetch(
        url, page.path, method="POST", data=words["token"][0], headers={"Origin": origin}
    )
    same("enter", answer.status, 204)
    cookie, _, attributes = answer.headers["Set-Cookie"].partition(";")
    for word in ("httponly", "samesite=strict", "path=/"):
        holds(word in attributes.lower().replace(" ", ""), f"a cookie with {word}", attributes)
    seen = _seen(await fetch(url, headers={"Cookie": cookie}))
    same("cookie inside", [pair for pair in seen["headers"] if pair[0] == "cookie"], [])
    foreign = {"Cookie": cookie, "Origin": "http://evil.example"}
    same("foreign POST", (await fetch(url, method="POST", headers=foreign, data=b"")).status, 403)
    wrong = await fetch(url, page.path, method="POST", data="wrong", headers={"Origin": origin})
    same("a wrong token", (wrong.status, "Set-Cookie" in wrong.headers), (401, False))


@check("PO-08")
async def headers(t: Trial) -> None:
    """The token never goes into the sandbox; Host stays, X-Forwarded-* are set, the rest is untouched."""
    sandbox = await t.sandbox()
    await serving(sandbox, server(8000))
    url, token = sandbox.url(8000), sandbox.port_token(8000)
    mine = {"X-Shoal-Token": token, "X-Mine": "kept", "Cookie": f"a=b; shoal_port={token}; c=d"}
    answer = await fetch(url, headers=mine)
    seen = dict(_seen(answer)["headers"])
    same("token inside", token in answer.body.decode(), False)
    same("mine", (seen.get("x-mine"), seen.get("cookie")), ("kept", "a=b; c=d"))
    same("host", seen.get("host"), urlsplit(url).netloc)
    same("forwarded", seen.get("x-forwarded-host"), urlsplit(url).netloc)
    same("protocol", seen.get("x-forwarded-proto"), "http")
    holds("x-forwarded-for" in seen, "x-forwarded-for", sorted(seen))


@check("PO-09")
async def nothing_there(t: Trial) -> None:
    """Where nothing listens the answer is 502 `port_unreachable`; a sandbox that never was is 404."""
    sandbox = await t.sandbox()
    answer = await fetch(sandbox.url(8000), headers=sandbox.port_headers(8000))
    same("nothing listens", (answer.status, _problem(answer)), (502, "port_unreachable"))
    unknown = sandbox.url(8000).replace(sandbox.id, f"{sandbox.id[:-8]}aaaaaaaa")
    same("no sandbox", (await fetch(unknown, headers=_token(sandbox.port_token(8000)))).status, 404)


@check("PO-10")
async def after_the_end(t: Trial) -> None:
    """After a sandbox's end its ports answer nobody, its own token included."""
    sandbox = await t.sandbox(public_ports=[8000])
    await serving(sandbox, server(8000))
    url, mine = sandbox.url(8000), sandbox.port_headers(8000)
    same("before", (await fetch(url)).status, 200)
    await sandbox.terminate()
    tokens: tuple[dict[str, str], ...] = ({}, mine)
    for given in tokens:
        status = (await fetch(url, headers=given)).status
        holds(status in (404, 410), "404 or 410", status)


@check("PO-11", deadline=60)
async def forward(t: Trial) -> None:
    """A forwarded port carries raw bytes both ways, many connections at once, and closes half by half."""
    sandbox = await t.sandbox()
    await serving(sandbox, python(ECHO, "9000"))
    data = EVERY_BYTE * 16384
    async with sandbox.forward(9000) as local:

        async def once() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", local.port)

            async def send() -> None:
                writer.write(data)
                await writer.drain()
                writer.write_eof()

            received, _ = await asyncio.gather(reader.read(-1), send())
            writer.close()
            return received

        for received in await asyncio.gather(*(once() for _ in range(8))):
            same("bytes", received, data + b"total %d" % len(data))
        port = local.port
    with contextlib.suppress(OSError):
        await asyncio.open_connection("127.0.0.1", port)
        raise Unmet("expected no listener after the block\ngot a connection")


@check("PO-12")
async def forward_to_nothing(t: Trial) -> None:
    """A forwarded connection to where nothing listens ends at once, and the forward goes on."""
    sandbox = await t.sandbox()
    async with sandbox.forward(9000) as local:
        reader, writer = await asyncio.open_connection("127.0.0.1", local.port)
        got = b"?"
        with anyio.fail_after(10), contextlib.suppress(ConnectionError):
            got = await reader.read(10)
            same("bytes", got, b"")
        writer.close()
        await serving(sandbox, python(ECHO, "9000"))
        reader, writer = await asyncio.open_connection("127.0.0.1", local.port)
        writer.write(b"now")
        writer.write_eof()
        same("later", await reader.read(-1), b"nowtotal 3")
        writer.close()


@check("PO-13")
async def wait(t: Trial) -> None:
    """Waiting for a port ends when something listens, on IPv4 or IPv6, and else at its deadline."""
    sandbox = await t.sandbox()
    with refused("wait for nothing", DeadlineExceededError):
        await sandbox.wait_for_port(8000, timeout=0.5)
    for port, host in ((8000, "127.0.0.1"), (8001, "::1"), (8002, "0.0.0.0")):  # noqa: S104
        waiting = asyncio.create_task(sandbox.wait_for_port(port, timeout=20))
        await asyncio.sleep(0.2)
        same("before", waiting.done(), False)
        await serving(sandbox, server(port, host))
        await waiting
        answer = await fetch(sandbox.url(port), headers=sandbox.port_headers(port))
        same(f"answer of {host}", answer.status, 200)


@check("PO-14")
async def wait_after_the_end(t: Trial) -> None:
    """Who waits for a port of a sandbox that ends is told."""
    sandbox = await t.sandbox()
    waiting = asyncio.create_task(sandbox.wait_for_port(8000, timeout=25))
    await asyncio.sleep(0.2)
    await sandbox.terminate()
    try:
        with anyio.fail_after(10):
            await waiting
    except ShoalError as error:
        holds(not isinstance(error, DeadlineExceededError), "that it is gone", error)
    else:
        raise Unmet("expected an error\ngot a port that listens")


def _token(token: str) -> dict[str, str]:
    return {"X-Shoal-Token": token}


def _seen(answer: Answer) -> dict[str, Any]:
    same("status", answer.status, 200)
    seen: dict[str, Any] = json.loads(answer.body)
    return seen


def _problem(answer: Answer) -> object:
    try:
        return json.loads(answer.body).get("code")
    except ValueError:
        return answer.body[:80]
