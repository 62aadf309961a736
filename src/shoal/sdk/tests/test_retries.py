from __future__ import annotations

import time
from collections import Counter

import pytest
from aiohttp import web

from shoal import AsyncSandbox, errors
from shoal.sdk.tests.fake_node import FakeNode


@pytest.fixture
def absent(node: FakeNode) -> Counter[str]:
    """The node's server is away for the first two requests of each kind; what was asked how often."""
    seen: Counter[str] = Counter()

    async def answer(request: web.Request) -> web.StreamResponse | None:
        key = f"{request.method} {request.path.rpartition('/')[2]}"
        seen[key] += 1
        if seen[key] == 1:
            assert request.transport is not None
            request.transport.abort()
        if seen[key] == 2:
            raise errors.NodeUnavailableError("the node's server is restarting")
        return None

    node.answer = answer
    return seen


async def test_what_may_be_asked_twice_is_asked_again_while_the_node_restarts(
    node: FakeNode, absent: Counter[str]
) -> None:
    node.answer, answer = None, node.answer
    sb = await AsyncSandbox.create()
    node.answer = answer
    await sb.info()
    assert len(await AsyncSandbox.list()) == 1
    await AsyncSandbox.connect(sb.id)
    assert (await sb.publish(80)).public_ports == [80]
    await sb.unpublish(80)
    await sb.execs()
    await sb.terminate()
    assert absent == {
        f"GET {sb.id}": 3,
        "GET sandboxes": 3,
        "POST connect": 3,
        "PUT 80": 3,
        "DELETE 80": 3,
        "GET execs": 3,
        f"DELETE {sb.id}": 3,
    }


async def test_a_create_is_not_made_again(node: FakeNode, absent: Counter[str]) -> None:
    for _ in range(2):
        with pytest.raises(errors.NodeUnavailableError):
            await AsyncSandbox.create()
    assert absent == {"POST sandboxes": 2}


async def test_trying_again_ends_with_the_callers_deadline(node: FakeNode) -> None:
    async def away(request: web.Request) -> web.StreamResponse:
        raise errors.NodeUnavailableError("the node's server is restarting")

    sb = await AsyncSandbox.create()
    node.answer = away
    started = time.monotonic()
    with pytest.raises((errors.NodeUnavailableError, errors.DeadlineExceededError)):
        await sb._access.client.call(dict, "GET", "/v1/node", deadline=0.3)
    assert time.monotonic() - started < 5


async def test_a_node_that_stays_away_is_told_of(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.sdk._client.RETRY_FOR", 0.5)

    async def away(request: web.Request) -> web.StreamResponse:
        raise errors.NodeUnavailableError("the node's server is restarting", hint="wait")

    node.answer = away
    with pytest.raises(errors.NodeUnavailableError) as caught:
        await AsyncSandbox.list()
    assert caught.value.hint == "wait"
    assert len(node.requests) > 2
