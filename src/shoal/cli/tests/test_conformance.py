from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from shoal.cli import cli, conformance
from shoal.conformance import UNSUPPORTED, Check, Trial
from shoal.conformance._expect import same


async def _fine(t: Trial) -> None:
    pass


async def _wrong(t: Trial) -> None:
    same("answer", 41, 42)


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
        Check(id="AA-01", holds="All is fine.", deadline=5, body=_fine),
        Check(id="BB-01", holds="The answer is 42.", deadline=5, body=_wrong),
    ]
    monkeypatch.setattr(conformance, "load", lambda: made)


def _run(*argv: str) -> Result:
    return CliRunner().invoke(cli, ["conformance", *argv])


def test_all_passed_is_0_and_a_table() -> None:
    done = _run("--only", "AA-*")
    assert done.exit_code == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["ID", "WHAT", "HOLDS", "RESULT", "MS"]
    assert lines[1][:5] == ["AA-01", "All", "is", "fine.", "passed"]
    assert done.stderr == "1 passed\n"


def test_one_failure_is_1_and_says_what_was_expected() -> None:
    done = _run()
    assert done.exit_code == 1
    assert "BB-01 failed: The answer is 42.\n  answer: expected 42\n  got 41\n" in done.stdout
    assert done.stderr == "1 passed, 1 failed\n"


def test_json_has_the_counts_and_each_report() -> None:
    done = _run("--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1
    assert told["counts"] == {"passed": 1, "failed": 1, "not supported": 0}
    assert [(one["id"], one["result"]) for one in told["checks"]] == [
        ("AA-01", "passed"),
        ("BB-01", "failed"),
    ]


def test_what_is_not_supported_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UNSUPPORTED, "toy", frozenset({"BB-01"}))
    done = _run("--runtime", "toy")
    assert done.exit_code == 0
    assert "not supported" in done.stdout
    assert done.stderr == "1 passed, 1 not supported\n"


def test_a_pattern_that_fits_nothing_is_an_error_not_a_success() -> None:
    done = _run("--only", "ZZ-*")
    assert done.exit_code == 2
    assert "no check fits ZZ-*" in done.stderr


def test_the_checks_can_be_listed() -> None:
    done = _run("--list")
    assert (done.exit_code, done.stdout.splitlines()[1].split()[0]) == (0, "AA-01")
