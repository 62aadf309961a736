"""A probe that cannot fail proves nothing: on the bare host, as root, these report violations."""

from __future__ import annotations

from collections.abc import Callable

import pytest

CAN_FAIL_ANYWHERE = (
    *("FS-01", "FS-03", "FS-04", "FS-05", "FS-06", "FS-07", "FS-09"),
    *("PR-01", "PR-03", "PR-04", "PR-05", "PR-06", "PR-10"),
    *("KS-01", "KS-02", "KS-03", "KS-04", "KS-05", "KS-06", "KS-09", "KS-10", "KS-11", "KS-12"),
    *("KS-13", "KS-14", "KS-16", "KS-18", "NET-06"),
)


@pytest.mark.parametrize("name", CAN_FAIL_ANYWHERE)
def test_the_probe_reports_a_bare_host(name: str, on_the_host: Callable[[str], list[str]]) -> None:
    assert on_the_host(name)
