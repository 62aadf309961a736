"""With nothing configured a node starts by itself, once, and leaves when it has been idle."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support import images
from tests.support.node import PrivateNode


@pytest.fixture
def alone(as_root: None) -> Iterator[PrivateNode]:
    """Directories in which no node runs; the one that starts there leaves soon after its last work."""
    private = PrivateNode.make(SHOAL_IDLE_EXIT="3")
    yield private
    deadline = time.monotonic() + 60
    while private.owners() and time.monotonic() < deadline:
        time.sleep(0.2)
    left = private.owners()
    private.remove()
    assert not left, f"the node stays: {left}"


def test_a_node_starts_by_itself_and_leaves(alone: PrivateNode) -> None:
    assert not alone.owners()
    done = alone.cli("image", "import", str(images.base_tar()), "base", timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert alone.answers()
    done = alone.cli("run", "--", "python3", "-c", "print(6*7)")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"42\n", b"")
    deadline = time.monotonic() + 40
    while alone.owners() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alone.owners(), "it does not leave"
    assert not alone.answers()
    # What was imported is there when the next one starts.
    done = alone.cli("run", "--", "echo", "again")
    assert (done.returncode, done.stdout) == (0, b"again\n"), done.stderr.decode()


def test_two_that_start_at_once_share_one_node(alone: PrivateNode) -> None:
    program = """
import shoal
print(shoal.Node().info().started_at)
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=alone.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=120) for process in both]
    assert all(process.returncode == 0 for process in both), answers
    assert len({out for out, _ in answers}) == 1, answers


def test_serve_on_the_same_directories_is_refused(node: PrivateNode) -> None:
    second = PrivateNode(node.data_dir, node.run_dir)
    done = second.cli("serve", timeout=60)
    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
    assert node.answers()


def test_a_stopped_node_leaves_nothing_and_ends_its_sandboxes(as_root: None) -> None:
    private = PrivateNode.make()
    private.start()
    try:
        done = private.cli("image", "import", str(images.base_tar()), "base", timeout=300)
        assert done.returncode == 0, done.stderr.decode()
        made = private.cli("create").stdout.decode().strip()
        inside = private.sandbox_pids(made)
        groups = private.sandbox_cgroups(made)
        assert inside
        assert groups
    finally:
        private.stop()
    assert not private.owners()
    assert not [group for group in groups if group.exists()]
    census = private.census()
    assert not census.loops
    assert not [path for path in private.run_dir.rglob("*") if path.is_socket()]
    private.start()
    try:
        told = private.cli("inspect", made).stdout.decode()
        assert '"host_shutdown"' in told
    finally:
        private.stop()
        private.remove()
