"""An image with what the frameworks' suites call."""

from __future__ import annotations

import pytest

from tests.support import images
from tests.support.node import PrivateNode


def pytest_configure(config: pytest.Config) -> None:
    """Know the marks that LangChain's suites carry; the plugins behind them are off."""
    config.addinivalue_line("markers", "vcr: an HTTP exchange that is recorded")
    config.addinivalue_line("markers", "benchmark: a time that is measured")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def agents(node: PrivateNode) -> str:
    """The image's name on the node."""
    done = node.cli("image", "import", str(images.agents_tar()), "agents")
    assert done.returncode == 0, done.stderr.decode()
    return "agents"
