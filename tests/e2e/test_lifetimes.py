"""Sandboxes live as long as they were given, and tell how they ended."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.node import PrivateNode

if TYPE_CHECKING:
    import shoal


def _ended(sb: shoal.Sandbox) -> shoal.SandboxInfo:
    """What is known of a sandbox that must be gone within five seconds."""
    deadline = time.monotonic() + 5
    while sb.info().status != "stopped" and time.monotonic() < deadline:
        time.sleep(0.05)
    info = sb.info()
    assert info.status == "stopped"
    return info


def test_a_timeout_ends_a_sandbox(node: PrivateNode) -> None:
    import shoal

    with node.unchanged():
        sb = shoal.Sandbox.create(timeout=2)
        start = time.monotonic()
        with pytest.raises(shoal.ShoalError) as caught:
            sb.run("sleep 60")
        assert 1 < time.monotonic() - start < 8
        assert isinstance(caught.value, shoal.errors.SandboxGoneError)
        assert caught.value.details["reason"] == "timeout"
        info = _ended(sb)
        assert info.reason is shoal.Reason.TIMEOUT
        assert not info.reason.is_infra
        with pytest.raises(shoal.errors.SandboxGoneError) as caught_gone:
            sb.run("true")
        assert caught_gone.value.details["reason"] == "timeout"


def test_connect_finds_the_same_sandbox(sandbox: object, node: PrivateNode) -> None:
    import shoal

    assert isinstance(sandbox, shoal.Sandbox)
    sandbox.run("echo 1 > /note", check=True)
    other = shoal.Sandbox.connect(sandbox.id)
    assert other.id == sandbox.id
    assert other.files.read("/note") == b"1\n"


def test_list_knows_labels_and_the_dead(node: PrivateNode) -> None:
    import shoal

    with (
        shoal.Sandbox.create(labels={"job": "1", "who": "a"}) as first,
        shoal.Sandbox.create(labels={"job": "2", "who": "a"}) as second,
    ):
        assert {first.id, second.id} <= {row.id for row in shoal.Sandbox.list()}
        assert [row.id for row in shoal.Sandbox.list(labels={"job": "2"})] == [second.id]
        assert {row.id for row in shoal.Sandbox.list(labels={"who": "a"})} == {first.id, second.id}
        first.terminate()
        assert [row.id for row in shoal.Sandbox.list(labels={"who": "a"})] == [second.id]
        everyone = shoal.Sandbox.list(labels={"who": "a"}, all=True)
        assert {row.id for row in everyone} == {first.id, second.id}


def test_the_info_is_what_was_asked_for(node: PrivateNode) -> None:
    import shoal

    with shoal.Sandbox.create(
        cpu=0.5, memory_mib=200, disk_mib=300, pids=77, timeout=100, labels={"a": "b"}
    ) as sb:
        info = sb.info()
        assert (info.cpu, info.memory_mib, info.disk_mib, info.pids) == (0.5, 200, 300, 77)
        assert info.labels == {"a": "b"}
        assert (info.image, info.network, info.runtime) == ("base", "none", "native")
        assert info.expires_at - info.created_at == pytest.approx(100, abs=2)
        assert info.status is shoal.Status.RUNNING


def test_cp_03_ids_are_long_and_random(node: PrivateNode) -> None:
    import shoal

    with shoal.Sandbox.create() as one, shoal.Sandbox.create() as two:
        for sb in (one, two):
            assert len(sb.id) == 29
            assert set(sb.id[3:]) <= set("abcdefghijklmnopqrstuvwxyz234567")
        assert sum(a == b for a, b in zip(one.id[3:], two.id[3:], strict=True)) < 10


def test_terminate_is_idempotent_and_safe_at_once(node: PrivateNode) -> None:
    import shoal

    with node.unchanged():
        sb = shoal.Sandbox.create()
        threads = [threading.Thread(target=sb.terminate) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        sb.terminate()
        assert sb.info().reason is shoal.Reason.TERMINATED


def test_cl_04_nothing_is_inherited_from_the_one_before(node: PrivateNode) -> None:
    import shoal

    names: set[str] = set()
    for number in range(4):
        with shoal.Sandbox.create() as sb:
            probe = "cat /note /tmp/note /dev/shm/note 2>/dev/null; hostname 2>/dev/null || cat /proc/sys/kernel/hostname"
            left, _, name = sb.run(probe).stdout.rpartition("\n")[0].rpartition("\n")
            assert not left
            names.add(name)
            mark = f"echo {number} | tee /note /tmp/note /dev/shm/note"
            assert sb.run(mark, check=True).stdout == f"{number}\n"
    assert len(names) == 4


def _agent(node: PrivateNode, sandbox: str) -> int:
    """The host's number of a sandbox's PID 1."""
    for pid in node.sandbox_pids(sandbox):
        status = Path(f"/proc/{pid}/status").read_text()
        if status.partition("NSpid:")[2].partition("\n")[0].split()[-1] == "1":
            return pid
    raise AssertionError(f"{sandbox} has no PID 1")


def _connections(pid: int) -> Iterator[socket.socket]:
    """Copies of a process's connected unix sockets. Source: pidfd_getfd(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not os.readlink(entry).startswith("socket:"):
                continue
            copied = libc.syscall(438, process, int(entry.name), 0)
            assert copied >= 0, os.strerror(ctypes.get_errno())
            with socket.socket(fileno=copied) as one:
                if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield one
    finally:
        os.close(process)


def test_cr_02_a_guest_agent_that_breaks_the_protocol_ends_only_its_sandbox(
    node: PrivateNode,
) -> None:
    import shoal

    with node.unchanged(), shoal.Sandbox.create() as neighbour:
        lost = shoal.Sandbox.create()
        agent = _agent(node, lost.id)
        said = [one.send(b"\xff" * 64) for one in _connections(agent)]
        assert said == [64]
        info = _ended(lost)
        assert info.reason is shoal.Reason.LOST
        assert info.message.startswith("its guest agent was lost")
        assert not Path(f"/proc/{agent}").exists()
        assert neighbour.run("echo alive", check=True).stdout == "alive\n"


def test_cr_02_a_killed_guest_agent_ends_only_its_sandbox(node: PrivateNode) -> None:
    import shoal

    with node.unchanged(), shoal.Sandbox.create() as neighbour:
        lost = shoal.Sandbox.create()
        os.kill(_agent(node, lost.id), signal.SIGKILL)
        info = _ended(lost)
        assert info.reason is shoal.Reason.LOST
        # The keeper's account: the front door, which saw the connection end, may have been first.
        assert "signal 9" in info.message
        with pytest.raises(shoal.errors.SandboxGoneError) as caught:
            lost.run("true")
        assert caught.value.details["reason"] == "lost"
        assert neighbour.run("echo alive", check=True).stdout == "alive\n"
