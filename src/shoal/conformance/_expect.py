"""How a check says what it expected and what it got, in one or two lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from shoal.errors import ShoalError

_SHOWN = 160


class Unmet(Exception):
    """Something does not hold."""


def same(what: str, actual: object, expected: object) -> None:
    """Both are equal.

    Raises:
        Unmet: They are not.
    """
    if actual == expected:
        return
    if (isinstance(actual, bytes) and isinstance(expected, bytes)) or (
        isinstance(actual, str) and isinstance(expected, str)
    ):
        wanted, got = _where(actual, expected)
    else:
        wanted, got = _short(expected), _short(actual)
    raise Unmet(f"{what}: expected {wanted}\ngot {got}")


def holds(condition: bool, expected: str, got: object) -> None:
    """The condition is true.

    Raises:
        Unmet: It is not.
    """
    if not condition:
        raise Unmet(f"expected {expected}\ngot {_short(got)}")


@contextlib.contextmanager
def refused(what: str, *kinds: type[ShoalError]) -> Iterator[None]:
    """The block ends in one of these errors.

    Raises:
        Unmet: It ends in another one, or in none.
    """
    names = " or ".join(kind.__name__ for kind in kinds)
    try:
        yield
    except kinds:
        return
    except Exception as error:
        raise Unmet(f"{what}: expected {names}\ngot {type(error).__name__}: {error}") from error
    raise Unmet(f"{what}: expected {names}\ngot no error")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _where(actual: bytes | str, expected: bytes | str) -> tuple[str, str]:
    """The two where they part, so that long ones stay readable."""
    if max(len(actual), len(expected)) <= _SHOWN:
        return repr(expected), repr(actual)
    at = _parting(actual, expected)
    begin = max(0, at - 8)
    return tuple(  # type: ignore[return-value]  # two of them
        f"{one[begin : begin + 48]!r} at {begin} of {len(one)}" for one in (expected, actual)
    )


def _parting(actual: Sequence[object], expected: Sequence[object]) -> int:
    pairs = zip(actual, expected, strict=False)
    alike = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    return min(len(actual), len(expected)) if alike is None else alike
