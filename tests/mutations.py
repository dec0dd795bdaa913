"""Seeded damage to files, for tests that feed it to a reader.

Every function takes a `random.Random` and returns the damaged copy; what it is given is unchanged.
A test makes one generator a case, `random.Random(f"{file} {number}")`, so that a case can be run
alone.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
HTML_PAGE = (
    b"<!DOCTYPE html>\n<html><head><title>401</title></head><body>Unauthorized</body></html>\n"
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**9, 10**30, 0.5, -2.5, 1e308, float("nan"), float("inf")),
    *("", "a", "64", "\ud83d", "\x00", "../../x", [], [None], [1], ["a", "b"], [[]], {}),
    *({"a": 1}, {"weight": [2]}),
)
"""What any key of a JSON tree may hold by mistake."""


def _flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(min(len(data), rng.choice((1, 1, 2, 8, 64)))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_head(data: bytes, rng: random.Random) -> bytes:
    """Where headers are: any byte of the first 64."""
    changed = bytearray(data)
    changed[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(changed)


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _truncate_end(data: bytes, rng: random.Random) -> bytes:
    return data[: max(0, len(data) - rng.choice((1, 2, 7, 100)))]


def _remove_range(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data))
    return data[:first] + data[first + rng.choice((1, 4, 50)) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    junk = rng.choice((b"\x00", b"\xff\xfe", b"\n", b'"', b"}", b"\xed\xa0\xbd", rng.randbytes(20)))
    return data[:place] + junk + data[place:]


def _repeat_range(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data))
    return data[:first] + data[first : first + 40] * 2 + data[first + 40 :]


def _zero_range(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data))
    length = len(data[first : first + rng.choice((1, 16, 4096))])
    return data[:first] + bytes(length) + data[first + length :]


def _replace_whole(data: bytes, rng: random.Random) -> bytes:
    """A file that is something else altogether, as a download leaves it."""
    text = data.decode("utf-8", errors="replace")
    return rng.choice(
        (
            *(b"", b"\n", LFS_POINTER, HTML_PAGE, b"null", b"[]", b"{}", b'"text"', b"1"),
            *(bytes(len(data)), b"PK\x03\x04" + data[4:], b"\x1f\x8b\x08" + data, b"[" * 100_000),
            *(b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("latin-1", "replace")),
        )
    )


BYTE_MUTATORS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip_bits, _flip_head, _truncate, _truncate_end, _remove_range, _insert, _repeat_range),
    *(_zero_range, _replace_whole),
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Damage a file's bytes in one way: bits, ends, ranges, or the file as a whole."""
    if not data:
        return _replace_whole(data, rng)
    return rng.choice(BYTE_MUTATORS)(data, rng)


def places(tree: Any) -> Iterator[tuple[Any, ...]]:
    """Path (keys and indices) of every value inside a JSON tree, outer ones first."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *rest) for rest in places(value))


def set_value(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value at a place."""
    changed = copy.deepcopy(tree)
    _parent(changed, place)[place[-1]] = value
    return changed


def delete_value(tree: Any, place: tuple[Any, ...]) -> Any:
    """A copy of the tree without the value at a place."""
    changed = copy.deepcopy(tree)
    del _parent(changed, place)[place[-1]]
    return changed


def rename_key(tree: Any, place: tuple[Any, ...], name: str) -> Any:
    """A copy of the tree with an object's key renamed (a list's entry is deleted)."""
    changed = copy.deepcopy(tree)
    parent = _parent(changed, place)
    value = parent.pop(place[-1])
    if isinstance(parent, dict):
        parent[name] = value
    return changed


def _parent(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        tree = tree[key]
    return tree


def _retyped(value: Any, rng: random.Random) -> Any:
    """Nearly the same value in another type or size: as text, in a list, negative, huge …"""
    text = value if isinstance(value, str) else json.dumps(value)
    near: list[Any] = [text, [value], {"value": value}, None]
    if isinstance(value, int | float) and not isinstance(value, bool):
        near += [-value, value + 1, value * 2, value / 2, 0, str(value)]
    elif isinstance(value, str):
        near += [value + "x", value[:-1], value.upper(), value + "\ud83d", value + "\x00"]
    elif isinstance(value, list | dict):
        near += [type(value)(), len(value), list(value)]
    return rng.choice(near)


def mutate_json(tree: Any, rng: random.Random, count: int = 1) -> Any:
    """Damage `count` values of a JSON tree: deleted, renamed, retyped, or any of `VALUES`."""
    for _ in range(count):
        found = list(places(tree)) if isinstance(tree, dict | list) else []
        if not found:
            return rng.choice(VALUES)
        place = rng.choice(found)
        way = rng.randrange(4)
        if way == 0:
            tree = delete_value(tree, place)
        elif way == 1:
            tree = rename_key(tree, place, rng.choice(("", "x", str(place[-1]).upper(), "a.b")))
        elif way == 2:
            tree = set_value(tree, place, rng.choice(VALUES))
        else:
            tree = set_value(tree, place, _retyped(_at(tree, place), rng))
    return tree


def _at(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def mutate_json_bytes(data: bytes, rng: random.Random) -> bytes:
    """Damage a JSON file in its structure, or, one time in four or if it is no JSON, its bytes."""
    try:
        tree = json.loads(data)
    except ValueError:
        return mutate_bytes(data, rng)
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    return json.dumps(mutate_json(tree, rng, rng.choice((1, 1, 1, 2)))).encode()


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Damage one line of a JSONL file, in its structure or its bytes."""
    lines = data.splitlines()
    if not lines:
        return mutate_bytes(data, rng)
    number = rng.randrange(len(lines))
    way = rng.randrange(4)
    if way == 0:
        lines[number] = mutate_bytes(lines[number], rng)
    elif way == 1:
        lines.insert(number, rng.choice((b"", b"null", b"[]", b"{}", lines[number])))
    else:
        lines[number] = mutate_json_bytes(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def mutate_file(file: Path, rng: random.Random) -> None:
    """Damage a file in place, by what its name says it is."""
    data = file.read_bytes()
    if file.suffix == ".json":
        file.write_bytes(mutate_json_bytes(data, rng))
    elif file.suffix == ".jsonl":
        file.write_bytes(mutate_lines(data, rng))
    else:
        file.write_bytes(mutate_bytes(data, rng))
