"""What the pages of this repository say of it is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMISED = re.findall(
    r"^\| ([A-Z]{2,3}-\d{2}) \|", (ROOT / "SPECIFICATION.md").read_text(), re.MULTILINE
)
PLACES = [ROOT / "tests", ROOT / "src", ROOT / "crates"]


def _tested() -> set[str]:
    """Ids that a test names, in Python or in Rust, as `FS-01`, `FS_01` or `fs_01`."""
    here = Path(__file__).resolve()
    found: set[str] = set()
    for place in PLACES:
        for path in [*place.rglob("*.py"), *place.rglob("*.rs")]:
            if path.resolve() == here or (path.suffix == ".py" and "tests" not in path.parts):
                continue
            names = re.findall(r"(?i)(?<![a-z])([a-z]{2,3})[-_](\d{2})(?!\d)", path.read_text())
            found |= {f"{letters.upper()}-{digits}" for letters, digits in names}
    return found


def test_each_promised_property_has_a_test_that_names_it() -> None:
    assert len(PROMISED) == len(set(PROMISED)) > 50
    assert set(PROMISED) - _tested() == set()


def test_each_promise_is_held_by_something_that_is_there() -> None:
    page = (ROOT / "SPECIFICATION.md").read_text()
    cells = re.findall(r"^\|.*\| (`(?:src|tests|bench|examples)/.*) \|$", page, re.MULTILINE)
    held = [one for cell in cells for one in re.findall(r"`([^`]+)`", cell)]
    assert len(held) > 10
    for path, _, name in (one.partition("::") for one in held):
        assert (ROOT / path).exists(), path
        if name:
            assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


def test_ci_runs_the_command_that_readme_gives() -> None:
    blocks = re.findall(
        r"^```\n(\./tools/setup.*)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(blocks) == 2
    assert blocks[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize(
    "page",
    [path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]],
    ids=str,
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert missing == []
