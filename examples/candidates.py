"""Programs as a model in training would write them: many right, some wrong, a few dangerous.

Each defines `solve`. What becomes of each is known beforehand, so a run over all of them also shows
that the sandboxes told the truth.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice, zip_longest
from typing import Any

Solve = Callable[..., Any]
Cases = list[list[Any]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One program, the inputs to try it on, and what must come of it."""

    task: str
    kind: str
    verdict: str
    source: str
    inputs: Cases
    answers: list[Any]
    """Stay outside the sandbox: what is not in there cannot be copied."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A small problem, with programs that solve it and programs that nearly do."""

    name: str
    solve: Solve
    cases: Callable[[random.Random], Cases]
    right: list[str]
    wrong: list[str]


def is_prime(n: int) -> bool:
    """Whether n is a prime number."""
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


_PRIME = """\
def solve(n):
    if n < {least}:
        return False
    d = {first}
    while {more}:
        if n % d == 0:
            return False
        d += {step}
    return True
"""

PRIMES = Task(
    name="is_prime",
    solve=is_prime,
    cases=lambda rng: [[n] for n in (0, 1, 2, 3, 4, 9, 25, 49, 121, *rng.sample(range(2000), 30))],
    right=[
        _PRIME.format(least=2, first=2, more="d * d <= n", step=1),
        _PRIME.format(least=2, first=2, more="d < n", step=1),
        _PRIME.format(least=2, first=2, more="d <= n // 2", step=1),
        _PRIME.format(least=2, first=2, more="d * d < n + 1", step="1 if d == 2 else 2"),
        "def solve(n):\n    return n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1))\n",
        "import re\ndef solve(n):\n    return not re.fullmatch(r'1?|(11+?)\\1+', '1' * n)\n",
    ],
    wrong=[
        _PRIME.format(least=2, first=2, more="d * d < n", step=1),
        _PRIME.format(least=1, first=2, more="d * d <= n", step=1),
        _PRIME.format(least=3, first=2, more="d * d <= n", step=1),
        _PRIME.format(least=2, first=2, more="d * d <= n", step=2),
        _PRIME.format(least=2, first=3, more="d * d <= n", step=2),
        "def solve(n):\n    return n > 1 and pow(2, n - 1, n) == 1\n",
        "def solve(n):\n    return n % 2 == 1\n",
    ],
)


def roman(n: int) -> str:
    """N in Roman numerals."""
    text = ""
    for value, letters in _ROMAN:
        text += letters * (n // value)
        n %= value
    return text


_ROMAN = [
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
]  # fmt: skip

_ROMAN_GREEDY = """\
TABLE = {table}
def solve(n):
    text = ""
    for value, letters in TABLE:
        while n >= value:
            text += letters
            n -= value
    return text
"""

ROMANS = Task(
    name="roman",
    solve=roman,
    cases=lambda rng: [
        [n] for n in (1, 4, 9, 40, 90, 400, 900, 1994, *rng.sample(range(1, 4000), 30))
    ],
    right=[
        _ROMAN_GREEDY.format(table=_ROMAN),
        _ROMAN_GREEDY.format(table=f"sorted({_ROMAN[::-1]}, reverse=True)"),
        (
            f"def solve(n, table={_ROMAN}):\n"
            "    for value, letters in table:\n"
            "        if n >= value:\n"
            "            return letters + solve(n - value)\n"
            "    return ''\n"
        ),
        (
            "def solve(n):\n"
            "    out = []\n"
            "    for one, five, ten, unit in (('M', '', '', 1000), ('C', 'D', 'M', 100),\n"
            "                                 ('X', 'L', 'C', 10), ('I', 'V', 'X', 1)):\n"
            "        d = n // unit % 10\n"
            "        out.append(['', one, one * 2, one * 3, one + five, five, five + one,\n"
            "                    five + one * 2, five + one * 3, one + ten][d])\n"
            "    return ''.join(out)\n"
        ),
    ],
    # Each knows one numeral too few.
    wrong=[
        _ROMAN_GREEDY.format(table=_ROMAN[:skip] + _ROMAN[skip + 1 :])
        for skip, (value, _) in enumerate(_ROMAN)
        if value in {4, 9, 40, 90, 400, 900}
    ],
)


def balanced(text: str) -> bool:
    """Whether every bracket is closed, in order."""
    stack: list[str] = []
    pairs = {")": "(", "]": "[", "}": "{"}
    for letter in text:
        if letter in pairs.values():
            stack.append(letter)
        elif letter in pairs and (not stack or stack.pop() != pairs[letter]):
            return False
    return not stack


def _bracket_cases(rng: random.Random) -> Cases:
    fixed = ["", "()", "([{}])", "(]", "([)]", "{[}]", "((", "))", ")(", "[", "{", "{}[]", "[]]"]
    return [[text] for text in fixed + ["".join(rng.choices("()[]{}", k=6)) for _ in range(20)]]


_BRACKETS = """\
PAIRS = {pairs}
def solve(text):
    stack = []
    for letter in text:
        if letter in PAIRS.values():
            stack.append(letter)
        elif letter in PAIRS:
            if {bad}:
                return False
    return {end}
"""
_ALL = {")": "(", "]": "[", "}": "{"}
_BAD = "not stack or stack.pop() != PAIRS[letter]"

BRACKETS = Task(
    name="balanced",
    solve=balanced,
    cases=_bracket_cases,
    right=[
        _BRACKETS.format(pairs=_ALL, bad=_BAD, end="not stack"),
        _BRACKETS.format(pairs=_ALL, bad=_BAD, end="len(stack) == 0"),
        _BRACKETS.format(
            pairs=_ALL, bad="stack[-1:] != [PAIRS[letter]] or not stack.pop()", end="stack == []"
        ),
        (
            "def solve(text):\n"
            "    while True:\n"
            "        less = text.replace('()', '').replace('[]', '').replace('{}', '')\n"
            "        if less == text:\n"
            "            return not text\n"
            "        text = less\n"
        ),
    ],
    wrong=[
        _BRACKETS.format(pairs=_ALL, bad=_BAD, end="True"),
        _BRACKETS.format(pairs=_ALL, bad="not stack or not stack.pop()", end="not stack"),
        *(
            _BRACKETS.format(
                pairs={close: open_ for close, open_ in _ALL.items() if close != left_out},
                bad=_BAD,
                end="not stack",
            )
            for left_out in _ALL
        ),
        "def solve(text):\n    return all(text.count(a) == text.count(b) for a, b in ('()', '[]', '{}'))\n",
        "def solve(text):\n    return text == text[::-1].translate(str.maketrans('()[]{}', ')(][}{'))\n",
    ],
)


def merge(spans: list[list[int]]) -> list[list[int]]:
    """The spans in order, those that touch made one."""
    merged: list[list[int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def _span_cases(rng: random.Random) -> Cases:
    fixed: Cases = [[[]], [[[1, 2]]], [[[1, 4], [4, 5]]], [[[1, 9], [2, 3]]], [[[5, 6], [1, 2]]]]
    for _ in range(20):
        starts = rng.sample(range(50), 6)
        fixed.append([[[start, start + rng.randrange(1, 12)] for start in starts]])
    return fixed


_MERGE = """\
def solve(spans):
    merged = []
    for start, end in {order}:
        if merged and start {touch} merged[-1][1]:
            merged[-1][1] = {longer}
        else:
            merged.append([start, end])
    return merged{rest}
"""
_LONGER = "max(merged[-1][1], end)"

SPANS = Task(
    name="merge",
    solve=merge,
    cases=_span_cases,
    right=[
        _MERGE.format(order="sorted(spans)", touch="<=", longer=_LONGER, rest=""),
        _MERGE.format(order="sorted(map(tuple, spans))", touch="<=", longer=_LONGER, rest=""),
        _MERGE.format(
            order="sorted(spans, key=lambda s: s[0])", touch="<=", longer=_LONGER, rest="[:]"
        ),
        (
            "def solve(spans):\n"
            "    covered = {2 * p for s, e in spans for p in range(s, e + 1)}\n"
            "    covered |= {2 * p + 1 for s, e in spans for p in range(s, e)}\n"
            "    starts = sorted(p for p in covered if p - 1 not in covered)\n"
            "    ends = sorted(p for p in covered if p + 1 not in covered)\n"
            "    return [[s // 2, e // 2] for s, e in zip(starts, ends)]\n"
        ),
    ],
    wrong=[
        _MERGE.format(order="spans", touch="<=", longer=_LONGER, rest=""),
        _MERGE.format(order="sorted(spans)", touch="<", longer=_LONGER, rest=""),
        _MERGE.format(order="sorted(spans)", touch="<=", longer="end", rest=""),
        _MERGE.format(order="sorted(spans)", touch="<=", longer=_LONGER, rest="[1:]"),
        _MERGE.format(order="sorted(spans, reverse=True)", touch="<=", longer=_LONGER, rest=""),
        _MERGE.format(
            order="sorted(spans, key=lambda s: s[1])", touch="<=", longer=_LONGER, rest=""
        ),
    ],
)


def distance(a: str, b: str) -> int:
    """Fewest letters to insert, delete or replace to make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def _word_cases(rng: random.Random) -> Cases:
    fixed: Cases = [["", ""], ["", "abc"], ["kitten", "sitting"], ["abc", "abc"], ["ab", "ba"]]
    return fixed + [
        ["".join(rng.choices("abc", k=rng.randrange(1, 7))) for _ in "ab"] for _ in range(20)
    ]


_DISTANCE = """\
from functools import cache
@cache
def solve(a, b):
    if not a or not b:
        return {end}
    if a[0] == b[0]:
        return solve(a[1:], b[1:])
    return 1 + min({choices})
"""
_DROP, _ADD, _SWAP = "solve(a[1:], b)", "solve(a, b[1:])", "solve(a[1:], b[1:])"

DISTANCES = Task(
    name="distance",
    solve=distance,
    cases=_word_cases,
    right=[
        _DISTANCE.format(end="len(a) + len(b)", choices=f"{_DROP}, {_ADD}, {_SWAP}"),
        _DISTANCE.format(end="len(a or b)", choices=f"{_SWAP}, {_ADD}, {_DROP}"),
        _DISTANCE.format(end="max(len(a), len(b))", choices=f"{_ADD}, {_DROP}, {_SWAP}"),
        (
            "def solve(a, b):\n"
            "    row = list(range(len(b) + 1))\n"
            "    for i, x in enumerate(a, 1):\n"
            "        new = [i]\n"
            "        for j, y in enumerate(b, 1):\n"
            "            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))\n"
            "        row = new\n"
            "    return row[-1]\n"
        ),
    ],
    wrong=[
        _DISTANCE.format(end="len(a) + len(b)", choices=f"{_DROP}, {_ADD}"),
        _DISTANCE.format(end="len(a) + len(b)", choices=f"{_DROP}, {_SWAP}"),
        _DISTANCE.format(end="len(a)", choices=f"{_DROP}, {_ADD}, {_SWAP}"),
        _DISTANCE.format(end="0", choices=f"{_DROP}, {_ADD}, {_SWAP}"),
        "def solve(a, b):\n    return abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b))\n",
        "def solve(a, b):\n    return len(set(a) ^ set(b))\n",
    ],
)

TASKS = [PRIMES, ROMANS, BRACKETS, SPANS, DISTANCES]

# Kind, what must come of it, and the program.
HAZARDS = [
    ("raises", "crashed", "def solve(*args):\n    raise RuntimeError('no idea')\n"),
    ("does not parse", "crashed", "def solve(*args)\n    return 1\n"),
    ("loops for ever", "timed_out", "def solve(*args):\n    while True:\n        pass\n"),
    (
        "eats memory",
        "oom_killed",
        (
            "def solve(*args):\n"
            "    hoard = []\n"
            "    while True:\n"
            "        hoard.append(b'x' * (16 << 20))\n"
        ),
    ),
    (
        "fork bomb",
        "timed_out",
        (
            "import os\n"
            "def solve(*args):\n"
            "    while True:\n"
            "        try:\n"
            "            os.fork()\n"
            "        except OSError:\n"
            "            pass\n"
        ),
    ),
    ("ends early, claims success", "wrong", "import os\ndef solve(*args):\n    os._exit(0)\n"),
    (
        "forges its grade",
        "wrong",
        "import os\ndef solve(*args):\n    os.write(1, b'true\\n' * 1000)\n    os._exit(0)\n",
    ),
    (
        "segfaults",
        "crashed",
        "import ctypes\ndef solve(*args):\n    return ctypes.string_at(0)\n",
    ),
    (
        "fills the disk",
        "crashed",
        (
            "def solve(*args):\n"
            "    with open('/hoard', 'wb', buffering=0) as file:\n"
            "        while True:\n"
            "            file.write(b'x' * (1 << 20))\n"
        ),
    ),
    (
        "fetches the answer",
        "crashed",
        (
            "import socket\n"
            "def solve(*args):\n"
            "    return socket.create_connection(('192.0.2.1', 443), timeout=60)\n"
        ),
    ),
]


def _retold(source: str, times: int) -> str:
    """The program once more in other words: models repeat themselves, but not to the letter."""
    for again in range(times):
        source += f"attempt_{again} = solve\ndef solve(*args):\n    return attempt_{again}(*args)\n"
    return source


def _each(programs: list[list[str]]) -> Iterator[tuple[Task, str]]:
    """Task and source, for ever, the tasks in turn and no source twice."""
    for times in count():
        for row in zip_longest(*programs):
            for task, source in zip(TASKS, row, strict=True):
                if source is not None:
                    yield task, _retold(source, times)


def _programs() -> Iterator[tuple[Task, str, str, str]]:
    """Task, kind, verdict and source, for ever: every fifth is a hazard."""
    right = _each([task.right for task in TASKS])
    wrong = _each([task.wrong for task in TASKS])
    for turn in count():
        yield from ((task, "right", "passed", source) for task, source in islice(right, 2))
        yield from ((task, "wrong", "wrong", source) for task, source in islice(wrong, 2))
        times, which = divmod(turn, len(HAZARDS))
        kind, verdict, source = HAZARDS[which]
        yield TASKS[turn % len(TASKS)], kind, verdict, _retold(source, times)


def candidates(number: int, *, seed: int = 0) -> list[Candidate]:
    """As many different candidates as asked for, each with inputs of its own."""
    rng = random.Random(seed)  # noqa: S311 - test inputs, not secrets
    made = []
    for task, kind, verdict, source in islice(_programs(), number):
        inputs = task.cases(rng)
        answers = [task.solve(*copy.deepcopy(case)) for case in inputs]
        made.append(
            Candidate(
                task=task.name,
                kind=kind,
                verdict=verdict,
                source=source,
                inputs=inputs,
                answers=answers,
            )
        )
    return made


def kinds() -> list[str]:
    """Every kind, in the order in which a table shows them."""
    return ["right", "wrong", *(kind for kind, _, _ in HAZARDS)]
