"""The build hook: what it says when it cannot build, and what it packs when it can."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

GOOD_VERSION = (
    'test "$1" = -vV && printf "release: 1.99.0-nightly\nhost: x86_64-unknown-linux-gnu\n" && exit'
)


class Aborted(Exception):
    pass


class FakeApp:
    def abort(self, message: str) -> None:
        raise Aborted(message)


@pytest.fixture
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with what the hook looks at."""
    shutil.copy(ROOT / "Cargo.toml", tmp_path)
    (tmp_path / "Cargo.lock").touch()
    (tmp_path / ".cargo").mkdir()
    (tmp_path / "crates" / "agent").mkdir(parents=True)
    (tmp_path / "crates" / "agent" / "main.rs").touch()
    (tmp_path / "src" / "shoal").mkdir(parents=True)
    return tmp_path


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_SDK_ONLY", raising=False)


def run_hook(hook: ModuleType, tree: Path, version: str = "standard") -> dict[str, Any]:
    build_data: dict[str, Any] = {"pure_python": True, "force_include": {}}
    plugin = hook.CustomBuildHook(str(tree), {}, None, None, str(tree), "wheel", FakeApp())
    plugin.initialize(version, build_data)
    return build_data


def put_programs(tree: Path) -> None:
    bin_dir = tree / "src" / "shoal" / "_bin"
    bin_dir.mkdir()
    for name in ("shoal-agent", "shoal-noded"):
        (bin_dir / name).write_bytes(b"a program")


def put_fake_cargo(directory: Path, script: str) -> None:
    directory.mkdir()
    cargo = directory / "cargo"
    cargo.write_text(f"#!/bin/sh\n{script}\n")
    cargo.chmod(cargo.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_another_system_gets_one_error_with_a_hint(
    hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(Aborted) as caught:
        run_hook(hook, tree)
    error, hint = str(caught.value).splitlines()
    assert error == f"error: a node runs on Linux only, and this is {platform}"
    assert hint.startswith("hint: ")
    assert "SHOAL_SDK_ONLY=1" in hint


@pytest.mark.parametrize("platform", ["darwin", "win32", "linux"])
def test_the_client_alone_builds_anywhere_and_packs_no_program(
    hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    put_programs(tree)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("SHOAL_SDK_ONLY", "1")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert run_hook(hook, tree) == {"pure_python": True, "force_include": {}}


def test_a_missing_cargo_gets_one_error_with_a_hint(
    hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tree / "nothing"))
    with pytest.raises(Aborted, match=r"^error: cargo is not on PATH\nhint: install Rust 1\.\d+"):
        run_hook(hook, tree)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (
            "echo 'release: 1.63.0'; echo 'host: x86_64-unknown-linux-gnu'",
            "cargo 1.63.0 is too old",
        ),
        ("echo 'no toolchain is set' >&2; exit 1", "cargo does not run: no toolchain is set"),
        (
            f"{GOOD_VERSION}; echo 'linker not found' >&2; exit 101",
            "cargo build ended with 101, its words are above",
        ),
    ],
)
def test_a_cargo_that_cannot_build_gets_one_error_and_leaves_no_program(
    hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    put_fake_cargo(tree / "bin", script)
    monkeypatch.setenv("PATH", str(tree / "bin"), prepend=os.pathsep)
    with pytest.raises(Aborted) as caught:
        run_hook(hook, tree)
    first, hint = str(caught.value).splitlines()
    assert first == f"error: {error}"
    assert hint.startswith("hint: ")
    assert not (tree / "src" / "shoal" / "_bin").exists()


def test_a_dynamic_program_is_refused(
    hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    dynamic = Path("/bin/sh").resolve()
    lines = "; ".join(
        f"""echo '{{"target":{{"name":"{name}"}},"executable":"{dynamic}"}}'"""
        for name in ("shoal-agent", "shoal-noded")
    )
    put_fake_cargo(tree / "bin", f"{GOOD_VERSION}; {lines}")
    monkeypatch.setenv("PATH", str(tree / "bin"), prepend=os.pathsep)
    with pytest.raises(Aborted, match="shoal-agent came out dynamically linked"):
        run_hook(hook, tree)


def test_programs_newer_than_their_sources_are_packed_without_cargo(
    hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    put_programs(tree)
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, (1_000, 1_000))
    for program in (tree / "src" / "shoal" / "_bin").iterdir():
        os.utime(program, (2_000, 2_000))
    monkeypatch.setenv("PATH", "/nonexistent")
    build_data = run_hook(hook, tree)
    assert sorted(build_data["force_include"].values()) == [
        "shoal/_bin/shoal-agent",
        "shoal/_bin/shoal-noded",
    ]
    assert build_data["pure_python"] is False
    assert build_data["tag"].startswith("py3-none-manylinux_2_17_")
    assert run_hook(hook, tree, "editable")["force_include"] == {}

    os.utime(tree / "crates" / "agent" / "main.rs", (3_000, 3_000))
    with pytest.raises(Aborted, match="cargo is not on PATH"):
        run_hook(hook, tree)


def test_a_removed_source_file_makes_the_programs_stale(
    hook: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    put_programs(tree)
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, (1_000, 1_000))
    for program in (tree / "src" / "shoal" / "_bin").iterdir():
        os.utime(program, (2_000, 2_000))
    (tree / "crates" / "agent" / "main.rs").unlink()
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Aborted, match="cargo is not on PATH"):
        run_hook(hook, tree)
