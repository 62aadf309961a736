"""Two real libraries, their own test suites, no network: the same counts as outside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import images
from tests.support.node import PrivateNode

if TYPE_CHECKING:
    import shoal

pytestmark = pytest.mark.slow

PROJECTS = {"more-itertools": "11.2.1", "toolz": "1.2.0"}


@pytest.fixture(scope="module")
def workshop(node: PrivateNode) -> Iterator[shoal.Sandbox]:
    """A sandbox from an image with gcc, git and pytest that mmdebstrap and umoci made."""
    import shoal

    done = node.cli("image", "import", str(images.tools_layout()), "workshop", timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    with shoal.Sandbox.create("workshop", memory_mib=1024, timeout=1800) as sb:
        yield sb
    assert node.cli("image", "rm", "workshop").returncode == 0


def _source(name: str, version: str, where: Path) -> Path:
    """The unpacked source distribution from PyPI."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--no-binary", ":all:", "--dest", str(where), f"{name}=={version}"),
        ],
        check=True,
        timeout=600,
    )
    (archive,) = where.glob("*.tar.gz")
    with tarfile.open(archive) as handle:
        handle.extractall(where, filter="data")
    return where / archive.name.removesuffix(".tar.gz")


def _outcomes(report: Path) -> dict[str, str]:
    """Each test of a JUnit file with its outcome."""
    found: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in {"failure", "error", "skipped"}]
        found[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return found


def _outside(source: Path, where: Path, pytest_version: str) -> dict[str, str]:
    """The same suite on this machine, without a sandbox, by the same version of pytest."""
    python = shutil.which("python3.11") or sys.executable
    venv = where / "venv"
    subprocess.run([python, "-m", "venv", str(venv)], check=True, timeout=300)
    subprocess.run(
        [str(venv / "bin" / "pip"), "install", "--quiet", f"pytest=={pytest_version}"],
        check=True,
        timeout=300,
    )
    copy = where / "copy"
    shutil.copytree(source, copy)
    report = where / "outside.xml"
    subprocess.run(
        [str(venv / "bin" / "python"), *SUITE, f"--junitxml={report}"],
        cwd=copy,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "."},
        capture_output=True,
        timeout=600,
        check=True,
    )
    return _outcomes(report)


SUITE = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@pytest.mark.parametrize("name", PROJECTS)
def test_a_librarys_own_suite_gives_the_counts_it_gives_outside(
    name: str, workshop: shoal.Sandbox, tmp_path: Path
) -> None:
    source = _source(name, PROJECTS[name], tmp_path)
    home = f"/work/{name}"
    workshop.files.upload(source, home)
    version = workshop.run(
        ["python3", "-c", "import pytest; print(pytest.__version__)"], check=True
    )
    result = workshop.run(
        ["python3", *SUITE, "--junitxml=/work/report.xml"],
        cwd=home,
        env={"PYTHONPATH": "."},
        timeout=600,
    )
    assert result.ok, result.stdout[-3000:] + result.stderr[-1000:]
    workshop.files.download("/work/report.xml", tmp_path / "inside.xml")
    inside = _outcomes(tmp_path / "inside.xml")
    outside = _outside(source, tmp_path, version.stdout.strip())
    assert len(inside) > 150
    assert inside == outside


def test_a_suite_that_tries_the_network_gets_nowhere(workshop: shoal.Sandbox) -> None:
    program = "import urllib.request; urllib.request.urlopen('http://pypi.org', timeout=20)"
    result = workshop.run(["python3", "-c", program], timeout=30)
    assert result.exit_code == 1
    assert "URLError" in result.stderr
