"""pydantic's errors as sentences with place and remedy."""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from internvl.config import foreign
from internvl.config.unions import TAG_SEPARATOR, members, name_of, tag_of
from internvl.errors import counted

# The second is pydantic's for a key that is no text, such as 1.
_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")
_MUST = {
    "missing": "missing; it has no default",
    "dataclass_type": "must be a section of keys, not {value}",
    "dict_type": "must be a section of keys, not {value}",
    "int_type": "must be a whole number, not {value}",
    "int_parsing": "must be a whole number, not {value}",
    "int_parsing_size": "must be a smaller whole number, not {value}",
    "int_from_float": "must be a whole number, not {value}",
    "float_type": "must be a number, not {value}",
    "float_parsing": "must be a number, not {value}",
    "finite_number": "must be a finite number, not {value}",
    "bool_type": "must be true or false, not {value}",
    "bool_parsing": "must be true or false, not {value}",
    "string_type": "must be a text, not {value}; put it in quotes",
    "path_type": "must be a path, not {value}",
    "greater_than": "must be above {gt:g}, not {value}",
    "greater_than_equal": "must be {ge:g} or more, not {value}",
    "less_than_equal": "must be {le:g} or less, not {value}",
    "literal_error": "must be {expected}, not {value}",
    "value_error": "{error}, not {value}",
    "too_long": "must have {max_length} values, not {actual_length}",
}
"""pydantic's type of error -> the message, with the fields of its context."""
_MOST_PLACES = 3
"""Sections that a message lists for a key that is in several."""


def sentences(error: ValidationError, root: Any) -> list[str]:
    """Returns one sentence for each problem.

    Args:
        root: the dataclass or union that was validated.
    """
    lines: dict[str, str] = {}
    for entry in error.errors():
        # A list whose elements are all bad is called too short as well.
        if entry["type"] != "too_short" or not entry["input"]:
            where, message = _sentence(entry, root)
            # A value that may have several types is reported once for each.
            lines.setdefault(where, f"{where}: {message}")
    return list(lines.values())


def headed(name: str, problems: list[str]) -> str:
    """Returns the message for the problems of a file: their count, then one a line."""
    return "\n".join([f"{name}: {counted(len(problems), 'problem')}", *problems])


def _sentence(error: Any, root: Any) -> tuple[str, str]:
    """Returns (dotted key, message)."""
    path, section, siblings = _locate(error["loc"], root)
    where = ".".join(path)
    value = error.get("input")
    if error["type"] in _UNKNOWN:
        return where, _unknown_key(path, value, section, siblings, root)
    if error["type"] == "union_tag_invalid":
        key, _, tag = error["ctx"]["tag"].partition(TAG_SEPARATOR)
        names = [name_of(sibling, key) for sibling in siblings]
        return ".".join([*path, key]), f"must be one of {', '.join(names)}, not {tag!r}"
    # If a value may have several types, pydantic appends the type that it tried to the place.
    where = re.split(r"\.(?=[\w-]+\[)|\.(?:str|int|float|bool)$", where)[0]
    if error["type"] == "tuple_type":
        # pydantic asks for a tuple, which YAML does not have.
        remedy = f"write [{value}]" if isinstance(value, str | int | float) else "begin with - or ["
        return where, f"must be a list, not {_yaml(value)}; {remedy}"
    if error["type"] in _MUST:
        context = {**error.get("ctx", {}), "value": _yaml(value)}
        return where, _MUST[error["type"]].format(**context)
    return where, f"{error['msg'][0].lower()}{error['msg'][1:]}, not {_yaml(value)}"


def _yaml(value: Any) -> str:
    """Formats a value as the recipe has it."""
    words = {None: "null", True: "true", False: "false"}
    # By identity: 1 equals True.
    return next((text for word, text in words.items() if value is word), repr(value))


def _unknown_key(
    path: list[str], value: Any, section: Any, siblings: tuple[type, ...], root: Any
) -> str:
    """Returns the message for a key that `section` does not have: the types that have it, its name
    here, the section that has it, or the nearest name."""
    key = path[-1]
    names = [field.name for field in dataclasses.fields(section)]
    owners = [s for s in siblings if any(field.name == key for field in dataclasses.fields(s))]
    if owners:
        chooser = names[0]  # sections of a union declare `type` or `name` first
        owner_names = ", ".join(name_of(owner, chooser) for owner in owners)
        equivalent = getattr(section, "instead", {}).get(key)
        remedy = f"; set {equivalent} instead" if equivalent else ""
        return f"not a key of {name_of(section, chooser)} but of {owner_names}{remedy}"
    # An evaluation alone (`root` is a union) has no other sections to name.
    if isinstance(root, type):
        # Variables of the original's scripts are in capitals: PER_DEVICE_BATCH_SIZE=4.
        if key.lower() in foreign.ours():
            ours, note = foreign.ours()[key.lower()]
            return f"unknown key; here it is {ours}" + (f" ({note})" if note else "")
        if key.lower() in foreign.OPTIONS:
            return f"no key of a recipe; {foreign.OPTIONS[key.lower()]}"
        homes = [dotted for dotted in keys(root) if dotted.rpartition(".")[2] == key]
        if homes:
            return f"unknown key; it is one of another section: {_home(homes, path, value)}"
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    # A key of an evaluation's other types is listed, not looked for elsewhere.
    if isinstance(root, type) and not siblings:
        every = {dotted.rpartition(".")[2]: dotted for dotted in reversed(keys(root))}
        every |= {name: dotted for name, (dotted, _) in foreign.ours().items()}
        close = difflib.get_close_matches(key, every, n=1, cutoff=0.75)
        if close:
            return f"unknown key; did you mean {every[close[0]]}?"
    return f"unknown key; known: {', '.join(names)}"


def _home(homes: list[str], path: list[str], value: Any) -> str:
    """Formats the dotted keys that have the name of an unknown key, with its value for one."""
    # A section's keys came with it: `lora: {rank: 8}` would be a long text.
    if len(homes) == 1 and not isinstance(value, dict | list) and "N" not in homes[0]:
        return f"write {homes[0]}={value}"
    listed = ", ".join(homes[:_MOST_PLACES])
    return listed + (", …" if len(homes) > _MOST_PLACES else "")


@cache
def keys(root: Any) -> tuple[str, ...]:
    """Returns every dotted key below a dataclass, sections included; N and NAME stand for an index
    and a name."""

    def walk(hint: Any, path: str) -> Iterator[str]:
        for option in members(hint):
            if dataclasses.is_dataclass(option):
                hints = get_type_hints(option)
                for field in dataclasses.fields(option):
                    dotted = f"{path}.{field.name}".lstrip(".")
                    yield dotted
                    yield from walk(hints[field.name], dotted)
            elif get_origin(option) is tuple:
                yield from walk(get_args(option)[0], f"{path}.N")
            elif get_origin(option) is dict:
                yield from walk(get_args(option)[1], f"{path}.NAME")

    # Members of a union share most keys.
    return tuple(dict.fromkeys(walk(root, "")))


def _locate(loc: tuple[Any, ...], root: Any) -> tuple[list[str], Any, tuple[Any, ...]]:
    """Follows the place of an error through the type hints of `root`.

    Returns:
        The recipe's keys up to the value; the innermost dataclass there; and the members of the
        union that this dataclass belongs to, or from which no member could be chosen.
    """
    path: list[str] = []
    hint, section, siblings = root, None, members(root)
    for key in loc:
        options = members(hint)
        # No key of the recipe but the chosen member, which pydantic puts between the keys.
        if TAG_SEPARATOR in str(key) and dataclasses.is_dataclass(options[0]) and len(options) > 1:
            chooser = key.partition(TAG_SEPARATOR)[0]
            section = hint = next(s for s in options if tag_of(s, chooser) == key)
            siblings = options
            continue
        path.append(str(key))
        hint = options[0]
        if dataclasses.is_dataclass(hint):
            if hint is not section:
                section, siblings = hint, ()
            hint = get_type_hints(hint).get(key)
        elif get_origin(hint) in (dict, tuple):
            hint = get_args(hint)[1 if get_origin(hint) is dict else 0]
    return path, section, siblings or tuple(filter(dataclasses.is_dataclass, members(hint)))
