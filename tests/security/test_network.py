"""NET: with no network declared, there is none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.security.conftest import PROBES, Canaries, Judge

if TYPE_CHECKING:
    import shoal


def test_net_01_there_is_only_loopback(judge: Judge) -> None:
    judge("NET-01")


def test_net_02_no_destination_is_reachable(judge: Judge) -> None:
    judge("NET-02")


def test_net_03_metadata_is_unreachable(judge: Judge) -> None:
    judge("NET-03")


def test_net_05_no_name_is_answered(judge: Judge) -> None:
    judge("NET-05")


def test_net_06_the_network_cannot_be_changed(judge: Judge) -> None:
    judge("NET-06")


def test_net_13_there_is_no_vsock(judge: Judge) -> None:
    judge("NET-13")


def test_net_04_neither_host_nor_private_networks(judge: Judge, canaries: Canaries) -> None:
    canaries.calls()
    judge("NET-04")
    assert canaries.calls() == 0


def test_net_07_nothing_listens_in_a_fresh_sandbox(sandbox: shoal.Sandbox) -> None:
    sandbox.files.upload(PROBES, "/opt/probes")
    result = sandbox.run(["python3", "-B", "-m", "probes", "NET-07"], cwd="/opt", check=True)
    assert json.loads(result.stdout)["violations"] == []


@pytest.mark.parametrize("user", ["0", "1000"])
def test_net_01_loopback_works(user: str, walled: shoal.Sandbox) -> None:
    program = """
import socket
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    with socket.create_server((address, 0), family=family) as server:
        with socket.create_connection(server.getsockname()[:2], timeout=5) as client:
            client.send(b"x")
            print(server.accept()[0].recv(1).decode())
"""
    assert walled.run(["python3", "-c", program], user=user, check=True).stdout == "x\nx\n"
