from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.sdk.tests.fake_node import FakeNode


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNode]:
    # Not tmp_path: a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="shoal-") as directory:
        fake = FakeNode(Path(directory)).start()
        monkeypatch.setenv("SHOAL_URL", fake.url)
        yield fake
        fake.stop()
