"""What a client sends, decoded strictly; what is wrong with it, said in one line.

A misspelled option is the commonest mistake and must never pass as a default, so an unknown name is an error that
shows the nearest known one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web

from shoal.errors import InvalidArgumentError

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_AT = re.compile(r" - at `(?P<key>key in )?\$(?P<path>.*)`$", re.DOTALL)
_LONGEST_SHOWN = 100


async def read_body(
    request: web.Request, kind: type[T], *, defaults: Mapping[str, Any] | None = None
) -> T:
    """The request's JSON body as a struct.

    Args:
        request: Its body is read whole.
        kind: Forbids unknown fields.
        defaults: Values by field for those that the body does not have, in place of the type's own.

    Raises:
        InvalidArgumentError: It is empty, no JSON, has a field of a wrong type or one that is unknown.
    """
    data = await request.read()
    if not data.strip():
        raise InvalidArgumentError(
            "the body is empty", hint="send a JSON object; {} takes every default"
        )
    try:
        body = msgspec.json.decode(data, type=kind)
        if not defaults:
            return body
        given = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        missing = {name: value for name, value in defaults.items() if name not in given}
        return msgspec.structs.replace(body, **missing)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind) from error
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidArgumentError(f"the body is not JSON: {error}") from error


def read_query(request: web.Request, *known: str, repeated: Collection[str] = ()) -> dict[str, str]:
    """The query's parameters; those in `repeated` may come more than once and are read with `getall`.

    Raises:
        InvalidArgumentError: A parameter is unknown, or comes twice.
    """
    found: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in known and name not in repeated:
            raise InvalidArgumentError(
                f"unknown query parameter {_short(name)}", hint=_nearest(name, [*known, *repeated])
            )
        if name in found and name not in repeated:
            raise InvalidArgumentError(f"query parameter {name} is there twice")
        found[name] = value
    return found


def read_flag(name: str, value: str | None) -> bool:
    """A query parameter that is true or false; absent is false.

    Raises:
        InvalidArgumentError: It is neither.
    """
    words = {None: False, "false": False, "0": False, "true": True, "1": True}
    if value not in words:
        raise InvalidArgumentError(f"{name} must be true or false, not {_short(value or '')}")
    return words[value]


def read_count(name: str, value: str, *, most: int) -> int:
    """A query parameter that is a whole number.

    Raises:
        InvalidArgumentError: It is none, or not one of 1 to `most`.
    """
    if value.isascii() and value.isdigit() and len(value) < 10 and 1 <= int(value) <= most:
        return int(value)
    raise InvalidArgumentError(f"{name} must be a number of 1 to {most}, not {_short(value)}")


def _explain(text: str, kind: type[msgspec.Struct]) -> InvalidArgumentError:
    where = ""
    if at := _AT.search(text):
        where, text = at["path"].lstrip("."), text[: at.start()]
        if at["key"]:
            where = f"a key of {where}"
    if unknown := _UNKNOWN.fullmatch(text):
        name = unknown["name"]
        known = [] if where else [field.encode_name for field in msgspec.structs.fields(kind)]
        return InvalidArgumentError(
            f"unknown option {_short(name)}" + (f" in {where}" if where else ""),
            hint=_nearest(name, known),
            option=name,
        )
    text = text[:1].lower() + text[1:]
    if not where:
        return InvalidArgumentError(text)
    return InvalidArgumentError(f"{where}: {text}", hint=_values(kind, where), option=where)


def _values(kind: type[msgspec.Struct], field: str) -> str:
    hint: Any = get_type_hints(kind).get(field)
    if get_origin(hint) is Literal:
        return "one of: " + ", ".join(str(value) for value in get_args(hint))
    return ""


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(sorted(known))}" if known else ""


def _short(name: str) -> str:
    return repr(name if len(name) <= _LONGEST_SHOWN else name[:_LONGEST_SHOWN] + "…")
