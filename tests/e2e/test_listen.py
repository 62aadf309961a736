"""The front door on TCP: for this machine only."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shoal.local import serve
from tests.support.node import PrivateNode

DEADLINE = 60.0


def _start(node: PrivateNode, listen: str) -> dict[str, Any]:
    """Start a node that listens on an address too; what it says once it is up, or has failed."""
    ours, theirs = os.pipe()
    argv, environment = serve.prepare(
        data_dir=node.data_dir, run_dir=node.run_dir, pool_mib=512, ready_fd=theirs
    )
    with (node.data_dir.parent / "serve.log").open("ab") as log:
        node.process = subprocess.Popen(
            [*argv, "--listen", listen],
            env={**node.env, **environment, "SHOAL_POOL_MIB": "512"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[theirs],
            start_new_session=True,
        )
    os.close(theirs)
    with open(ours, encoding="utf-8") as said:
        line: dict[str, Any] = json.loads(said.readline())
    return line


def _status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/sandboxes/sb-none/execs")
        return connection.getresponse().status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_node_listens_on_the_loopback_address_it_was_given_whoever_dies(as_root: None) -> None:
    node, port = PrivateNode.make(), _free_port()
    try:
        assert "ok" in _start(node, f"127.0.0.1:{port}")
        first = _status(port)
        assert first in (401, 404)
        door = node.part("front door")
        assert door is not None
        os.kill(door, signal.SIGKILL)
        # The keeper holds the listener: whoever comes meanwhile waits for the next front door.
        assert _status(port) == first
        assert node.part("front door") != door
    finally:
        node.stop()
    with pytest.raises(ConnectionRefusedError):
        _status(port)
    node.remove()


@pytest.mark.parametrize(
    "address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "localhost:80", "80", ""]
)
def test_an_address_that_others_could_reach_is_refused(address: str, as_root: None) -> None:
    node = PrivateNode.make()
    try:
        error = _start(node, address)["error"]
        assert (error["code"], error["status"]) == ("invalid_argument", 400)
        assert repr(address)[1:-1] in error["detail"]
        assert node.process is not None
        assert node.process.wait(DEADLINE) == 1
    finally:
        node.stop()
    assert not node.owners()
    node.remove()


def test_a_port_that_is_taken_is_a_conflict(as_root: None) -> None:
    node = PrivateNode.make()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        try:
            error = _start(node, f"127.0.0.1:{port}")["error"]
        finally:
            node.stop()
    assert (error["code"], error["status"]) == ("conflict", 409)
    assert str(port) in error["detail"]
    assert Path(node.data_dir).exists()
    node.remove()
