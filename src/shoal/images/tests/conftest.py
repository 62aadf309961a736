from __future__ import annotations

from pathlib import Path

import pytest

from shoal.images import ImageStore
from shoal.images.tests.fakes import FakeLayers


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def layers() -> FakeLayers:
    return FakeLayers()


@pytest.fixture
def store(tmp_path: Path, layers: FakeLayers) -> ImageStore:
    return ImageStore(tmp_path / "data", layers)
