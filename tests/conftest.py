"""A private node for the tests that need one, and marks that tell what a test needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import images
from tests.support.node import PrivateNode

if TYPE_CHECKING:
    import shoal

HERE = Path(__file__).parent
NEED_ROOT = (HERE / "security", HERE / "e2e", HERE / "integrations")


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks of these tests."""
    config.addinivalue_line(
        "markers", "slow: builds images or runs other projects' tests (minutes)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs a node needs root."""
    for item in items:
        if any(item.path.is_relative_to(place) for place in NEED_ROOT):
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def as_root() -> None:
    """Fail, and say why, where a test cannot judge."""
    if sys.platform != "linux":
        pytest.fail("needs Linux; leave it out with: pytest -m 'not root'")
    if os.geteuid() != 0:
        pytest.fail("needs root; run it as root, or leave it out with: pytest -m 'not root'")


@pytest.fixture(scope="session")
def node(as_root: None) -> Iterator[PrivateNode]:
    """A running node with the image `base`; SDK and command line in these tests find it.

    At the end nothing of it may be left on the host.
    """
    tree = images.base_tar()
    private = PrivateNode.make()
    private.start()
    before = dict(os.environ)
    os.environ.pop("SHOAL_URL", None)
    os.environ.update(
        {key: value for key, value in private.env.items() if key.startswith("SHOAL_")}
    )
    try:
        done = private.cli("image", "import", str(tree), "base")
        assert done.returncode == 0, f"{done.stderr.decode()}\n{private.log}"
        warm = private.cli("run", "--", "true")
        assert warm.returncode == 0, f"{warm.stderr.decode()}\n{private.log}"
        yield private
    finally:
        os.environ.clear()
        os.environ.update(before)
        private.stop()
    left = private.owners()
    assert not left, f"processes are left: {left}"
    census = private.census()
    assert not census.cgroups, census.cgroups
    assert not census.loops, census.loops
    sockets = [path for path in private.run_dir.rglob("*") if path.is_socket()]
    assert not sockets, sockets
    private.remove()


@pytest.fixture
def sandbox(node: PrivateNode) -> Iterator[shoal.Sandbox]:
    """A fresh sandbox from `base`."""
    import shoal

    with shoal.Sandbox.create() as made:
        yield made
