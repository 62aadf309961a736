"""docs/dependencies.md names what the manifests name, no more and no less."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _page_section(title: str) -> set[str]:
    page = (ROOT / "docs" / "dependencies.md").read_text()
    section = page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    cells = re.findall(r"^\| ([a-z0-9_, -]+?) \|", section, re.MULTILINE)
    return {name for cell in cells for name in cell.split(", ")} - {"crate", "package"}


def test_each_rust_dependency_has_its_reason() -> None:
    named = set()
    for manifest in ROOT.glob("crates/*/Cargo.toml"):
        dependencies = tomllib.loads(manifest.read_text()).get("dependencies", {})
        named |= {
            name
            for name, value in dependencies.items()
            if not (isinstance(value, dict) and "path" in value)
        }
    assert _page_section("Rust") == named


def test_each_python_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[^a-z0-9_-]", name, maxsplit=1)[0] for name in project["dependencies"]}
    assert _page_section("Python") == named
