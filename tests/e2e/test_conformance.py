"""The suite that any runtime must pass, against the native one, as a user runs it."""

from __future__ import annotations

import pytest

from shoal import conformance
from tests.support.node import PrivateNode

CHAPTERS = sorted({check.id[:2] for check in conformance.load()})


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_native_runtime_keeps_the_contract(chapter: str, node: PrivateNode) -> None:
    with node.unchanged(60):
        done = node.cli("conformance", "--runtime", "native", "--only", f"{chapter}-*", timeout=590)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    rows = [line for line in done.stdout.decode().splitlines() if line.startswith(f"{chapter}-")]
    wanted = [check.id for check in conformance.load() if check.id.startswith(chapter)]
    assert [row.split()[0] for row in rows] == wanted
    assert all(row.split()[-2] == "passed" for row in rows)
