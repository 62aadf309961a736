"""The fan-out example knows the truth about its candidates."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import candidates

    return candidates


def test_right_programs_pass_and_wrong_ones_do_not(candidates: ModuleType) -> None:
    for seed in range(10):
        for candidate in candidates.candidates(100, seed=seed):
            if candidate.kind not in {"right", "wrong"}:
                continue
            names: dict[str, Any] = {}
            exec(candidate.source, names)
            answers = [names["solve"](*copy.deepcopy(case)) for case in candidate.inputs]
            passed = json.loads(json.dumps(answers)) == candidate.answers
            assert passed == (candidate.verdict == "passed"), candidate.source


def test_a_hundred_candidates_are_a_hundred_different_programs(candidates: ModuleType) -> None:
    pool = candidates.candidates(100)
    assert len({candidate.source for candidate in pool}) == 100
    assert {candidate.kind for candidate in pool} == set(candidates.kinds())
    assert len({candidate.task for candidate in pool}) == 5
