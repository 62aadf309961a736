"""A port needs a token unless its owner said otherwise, whatever became of the server meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.node import PrivateNode

SERVES = ["python3", "-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory", "/etc"]


@pytest.fixture
def served(node: PrivateNode) -> Iterator[dict[str, Any]]:
    """The access to a sandbox that serves files on port 8000, which is nobody's but its owner's."""
    spec = {"command": SERVES, "ready": {"port": 8000, "path": "/hostname"}}
    with node.unchanged():
        made = node.request("POST", "/v1/sandboxes", body=json.dumps(spec).encode()).json()
        yield made
        node.request("DELETE", f"/v1/sandboxes/{made['sandbox']['id']}")


def _get(access: dict[str, Any], token: str | None = None) -> int:
    """Status of a request to the port, made to the address that the node gave."""
    url = urlsplit(access["url_template"].format(port=8000, id=access["sandbox"]["id"]))
    assert url.hostname is not None
    assert url.hostname.endswith(".localhost")
    headers = {"Host": url.netloc} | ({"X-Shoal-Token": token} if token else {})
    connection = http.client.HTTPConnection("127.0.0.1", url.port or 0, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/hostname", headers=headers)
        response = connection.getresponse()
        response.read()
        return response.status


def _server(node: PrivateNode) -> int:
    [found] = [
        pid
        for pid in node.daemons()
        if b"shoal.node\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


def test_a_port_is_public_from_its_publishing_to_its_end(
    node: PrivateNode, served: dict[str, Any]
) -> None:
    path = f"/v1/sandboxes/{served['sandbox']['id']}/ports/8000"
    assert _get(served) == 401
    assert _get(served, "0" * 64) == 401
    assert _get(served, served["access_token"]) == 200

    assert node.request("PUT", path).json()["public_ports"] == [8000]
    assert _get(served) == 200
    assert node.request("PUT", path).status == 200  # as often as one likes

    answer = node.request("DELETE", path)
    assert (answer.status, answer.json()["public_ports"]) == (200, [])
    assert _get(served) == 401
    assert _get(served, served["access_token"]) == 200


def test_what_is_public_stays_so_when_the_server_dies(
    node: PrivateNode, served: dict[str, Any]
) -> None:
    path = f"/v1/sandboxes/{served['sandbox']['id']}"
    node.request("PUT", f"{path}/ports/8000")
    before = _server(node)
    os.kill(before, signal.SIGKILL)
    end = time.monotonic() + 20
    while before in node.daemons() or not node.answers():
        assert time.monotonic() < end, node.log
        time.sleep(0.05)
    assert node.request("GET", path).json()["public_ports"] == [8000]
    assert _get(served) == 200

    # The new server may not have shown the sandbox to the front door yet; its owner asks again then.
    while (answer := node.request("DELETE", f"{path}/ports/8000")).status == 503:
        assert time.monotonic() < end, answer
        time.sleep(0.05)
    assert answer.status == 200
    assert _get(served) == 401
    assert _get(served, node.token(served["sandbox"]["id"])) == 200
