"""The table of the exec contract: each promise of ours names a test that is there, each word on others its source."""

from __future__ import annotations

import re
from pathlib import Path

from shoal import conformance

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "exec-contract.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| |")
]
IDS = {check.id for check in conformance.load()}


def _held(cell: str) -> list[str]:
    return re.findall(r"`([A-Z]{2}-\d{2}|(?:src|tests)/[^`]+)`", cell)


def test_each_promise_of_ours_names_a_check_or_a_test_that_is_there() -> None:
    assert len(ROWS) > 20
    for row in ROWS:
        held = _held(row[1])
        assert held, row[0]
        for one in held:
            path, _, name = one.partition("::")
            if "/" in one:
                assert (ROOT / path).is_file(), one
                assert not name or f"def {name}(" in (ROOT / path).read_text(), one
            else:
                assert one in IDS, one


def test_each_check_of_execs_is_in_the_table() -> None:
    named = {one for row in ROWS for one in _held(row[1])}
    wanted = {one for one in IDS if one[:2] in {"EX", "OU", "TT"}}
    assert wanted - named == set()


def test_each_word_on_others_names_its_source_or_says_that_there_is_none() -> None:
    defined = set(re.findall(r"^\[([A-Z]\d)\]: https://", PAGE, re.MULTILINE))
    for row in ROWS:
        assert len(row) == 6, row[0]
        for cell in row[2:]:
            used = set(re.findall(r"\[([A-Z]\d)\]", cell))
            assert used <= defined, cell
            assert used or cell.startswith(("not documented", "n/a")), f"{row[0]}: {cell}"
    body = PAGE.partition("## Sources")[0]
    assert defined == set(re.findall(r"\[([A-Z]\d)\]", body))
