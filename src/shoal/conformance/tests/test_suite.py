from __future__ import annotations

import asyncio
import re
from pathlib import Path

import anyio
import pytest

from shoal import conformance
from shoal.conformance import Check, Trial, _suite
from shoal.conformance._expect import Unmet, holds, refused, same
from shoal.errors import InvalidArgumentError, NotFoundError
from shoal.sdk.tests.fake_node import FakeNode


async def _fine(t: Trial) -> None:
    pass


async def _wrong(t: Trial) -> None:
    same("answer", 41, 42)


async def _hanging(t: Trial) -> None:
    await asyncio.Event().wait()


async def _crashing(t: Trial) -> None:
    raise InvalidArgumentError("no such thing", size=3)


def _check(id: str, body: object, *, deadline: float = 5.0, alone: bool = False) -> Check:
    return Check(id=id, holds="it holds", deadline=deadline, body=body, alone=alone)  # type: ignore[arg-type]


async def test_each_check_has_a_result_of_its_own_in_order() -> None:
    checks = [_check("A-1", _fine), _check("A-2", _wrong), _check("A-3", _crashing)]
    heard: list[str] = []
    reports = await conformance.run(checks, told=lambda report: heard.append(report.id))
    assert [one.result for one in reports] == ["passed", "failed", "failed"]
    assert reports[1].detail == "answer: expected 42\ngot 41"
    assert reports[2].detail == "raised InvalidArgumentError: no such thing {'size': 3}"
    assert sorted(heard) == ["A-1", "A-2", "A-3"]


async def test_a_check_that_hangs_ends_at_its_deadline_and_fails() -> None:
    with anyio.fail_after(5):
        reports = await conformance.run(
            [_check("A-1", _hanging, deadline=0.2), _check("A-2", _fine)]
        )
    assert [one.result for one in reports] == ["failed", "passed"]
    assert reports[0].detail == "expected: an end within 0.2 s\ngot: none"
    assert 150 < reports[0].ms < 4000


async def test_a_check_that_cleans_up_for_ever_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_suite, "TIDYING", 0.1)

    async def sticky(t: Trial) -> None:
        t._undo.push_async_callback(asyncio.Event().wait)

    with anyio.fail_after(5):
        (report,) = await conformance.run([_check("A-1", sticky)])
    assert report.result == "failed"
    assert report.detail == "its sandboxes did not end within 0.1 s"


async def test_what_a_runtime_cannot_do_is_not_run_and_not_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(conformance.UNSUPPORTED, "toy", frozenset({"A-1"}))
    reports = await conformance.run([_check("A-1", _crashing), _check("A-2", _fine)], runtime="toy")
    assert [one.result for one in reports] == ["not supported", "passed"]


def test_native_can_do_everything() -> None:
    assert conformance.UNSUPPORTED["native"] == frozenset()


async def test_a_check_that_is_to_be_alone_is() -> None:
    running = 0
    most: dict[str, int] = {}

    def counting(id: str) -> object:
        async def body(t: Trial) -> None:
            nonlocal running
            running += 1
            most[id] = running
            await asyncio.sleep(0.05)
            most[id] = max(most[id], running)
            running -= 1

        return body

    checks = [_check("A-1", counting("A-1"), alone=True)]
    checks += [_check(f"B-{n}", counting(f"B-{n}")) for n in range(4)]
    await conformance.run(checks, jobs=4)
    assert most["A-1"] == 1
    assert most["B-0"] == 4


async def test_sandboxes_and_directories_go_whatever_happens(node: FakeNode) -> None:
    left: list[Path] = []

    def ending(how: object) -> object:
        async def body(t: Trial) -> None:
            await t.sandbox()
            left.append(t.directory())
            await how(t)  # type: ignore[operator]

        return body

    bodies = [_fine, _wrong, _hanging, _crashing]
    checks = [_check(f"A-{n}", ending(body), deadline=1) for n, body in enumerate(bodies)]
    reports = await conformance.run(checks)
    assert [one.result for one in reports] == ["passed", "failed", "failed", "failed"]
    assert len(node.sandboxes) == 4
    assert all(sandbox.info.reason == "terminated" for sandbox in node.sandboxes.values())
    assert not [path for path in left if path.exists()]


def test_ids_are_stable_words_and_each_check_says_what_holds() -> None:
    checks = conformance.load()
    assert len(checks) == len({one.id for one in checks}) > 100
    for one in checks:
        assert re.fullmatch(r"[A-Z]{2}-\d{2}", one.id)
        assert one.holds.endswith(".") or one.holds.endswith("*")
        assert len(one.holds) <= 120, one.id
        assert one.deadline > 0


def test_two_checks_cannot_share_an_id() -> None:
    with pytest.raises(ValueError, match="two checks are called EX-01"):
        conformance.load() and _suite.check("EX-01")(_fine)


def test_checks_are_chosen_by_id_or_by_word() -> None:
    checks = conformance.load()
    assert [one.id for one in conformance.select(checks, ["ex-01"])] == ["EX-01"]
    assert {one.id[:2] for one in conformance.select(checks, ["OU-*", "TT-*"])} == {"OU", "TT"}
    assert "TT-02" in [one.id for one in conformance.select(checks, ["sigwinch"])]
    assert conformance.select(checks, ["nothing like it"]) == []


def test_a_long_difference_is_shown_where_it_begins() -> None:
    with pytest.raises(Unmet) as caught:
        same("bytes", b"x" * 5000 + b"A" + b"y" * 5000, b"x" * 5000 + b"B" + b"y" * 4999)
    assert str(caught.value).count("\n") == 1
    assert "xB" in str(caught.value)
    assert "at 4992 of 10000" in str(caught.value)
    assert "at 4992 of 10001" in str(caught.value)


def test_an_expectation_is_met_or_it_is_not() -> None:
    same("same", b"1", b"1")
    holds(True, "truth", None)
    with pytest.raises(Unmet, match="expected truth\ngot None"):
        holds(False, "truth", None)
    with refused("it", NotFoundError):
        raise NotFoundError("gone")
    with (
        pytest.raises(Unmet, match="it: expected NotFoundError\ngot no error"),
        refused("it", NotFoundError),
    ):
        pass
    with pytest.raises(Unmet, match="got InvalidArgumentError: no"), refused("it", NotFoundError):
        raise InvalidArgumentError("no")
