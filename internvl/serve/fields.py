"""Fields of a request's JSON object: every one is followed, or refused by its name."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from internvl.data.arguments import nearest, not_a_text
from internvl.serve.errors import ApiError

Read = Callable[[str, Any], Any]
"""Takes the field's name and value; returns the value as it is used, or raises ApiError."""


class Field(NamedTuple):
    """How a field is read; None in a request counts as left out."""

    read: Read
    default: Any = None


class Refused(NamedTuple):
    """A field of other servers: values that change nothing are taken, any other is refused."""

    neutral: tuple[Any, ...]
    remedy: str


def read_fields(
    body: Any, fields: Mapping[str, Field], refused: Mapping[str, Refused], where: str = ""
) -> dict[str, Any]:
    """Reads a JSON object; returns a value for every one of `fields`.

    Args:
        where: name of the object inside the request.

    Raises:
        ApiError: not an object, a wrong value, or a field that would not be followed.
    """
    if not isinstance(body, Mapping):
        subject = where or "the body"
        raise ApiError(f"{subject} must be a JSON object, not {_type(body)}", param=where or None)
    for name, value in body.items():
        # Clients send null for what they leave out.
        if name in fields or value is None:
            continue
        param = f"{where}.{name}" if where else name
        if name in refused:
            neutral, remedy = refused[name]
            # By type too: 0 == False, and neither stands for the other.
            if any(type(value) is type(v) and value == v for v in neutral):
                continue
            raise ApiError(
                f"{param} = {_short(value)} is not followed here; {remedy}",
                param=param,
                code="unsupported_parameter",
            )
        raise ApiError(
            f"there is no field {param!r}; {nearest(name, sorted(fields))}",
            param=param,
            code="unknown_parameter",
        )
    values = {}
    for name, entry in fields.items():
        value = body.get(name)
        param = f"{where}.{name}" if where else name
        values[name] = entry.default if value is None else entry.read(param, value)
    return values


def as_it_is(name: str, value: Any) -> Any:
    """Reads any value; what uses it checks it."""
    return value


def number_from(least: float, most: float = math.inf) -> Read:
    """Returns a reader of numbers from `least` to `most`."""

    def read(name: str, value: Any) -> float:
        # true is a number in Python.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared before it becomes a float, which the largest JSON numbers do not fit.
        if not is_number or not least <= value <= min(most, sys.float_info.max):
            raise _wrong(name, value, f"a number{_span(least, most)}")
        return float(value)

    return read


def whole_from(least: int, most: float = math.inf) -> Read:
    """Returns a reader of whole numbers from `least` to `most`."""

    def read(name: str, value: Any) -> int:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not least <= value <= most:
            raise _wrong(name, value, f"a whole number{_span(least, most)}")
        return int(value)

    return read


def flag(name: str, value: Any) -> bool:
    """Reads true or false."""
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def text(name: str, value: Any) -> str:
    """Reads a string that can be encoded."""
    reason = not_a_text(value)
    if reason is not None:
        raise ApiError(f"{name} {reason}", param=name)
    return str(value)


def texts(most: int) -> Read:
    """Returns a reader of a string or of a list of up to `most`; empty strings are refused."""

    def read(name: str, value: Any) -> tuple[str, ...]:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or len(listed) > most:
            raise _wrong(name, value, f"a string or a list of at most {most}")
        strings = tuple(text(f"{name}[{i}]", entry) for i, entry in enumerate(listed))
        # An empty stop string stands everywhere.
        if not all(strings):
            raise ApiError(f"{name} holds an empty string; leave it out", param=name)
        return strings

    return read


def choice(*choices: str) -> Read:
    """Returns a reader of one of some words."""

    def read(name: str, value: Any) -> str:
        if value not in choices:
            raise _wrong(name, value, f"one of {', '.join(choices)}")
        return str(value)

    return read


def _wrong(name: str, value: Any, expected: str) -> ApiError:
    return ApiError(f"{name} must be {expected}, not {_short(value)}", param=name)


def _span(least: float, most: float) -> str:
    low, high = _plain(least), _plain(most)
    return f" of at least {low}" if math.isinf(most) else f" from {low} to {high}"


def _plain(value: float) -> str:
    # Not 9.22337e+18, which is no bound to write.
    return str(value) if isinstance(value, int) else f"{value:g}"


def _short(value: Any) -> str:
    # A value may be a whole image.
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _type(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), repr(value)[:40])
