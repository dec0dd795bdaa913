"""pydantic's errors as sentences with place and remedy."""

import dataclasses
import difflib
import re
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from internvl.config.unions import TAG_SEPARATOR, members, name_of, tag_of

# The second is pydantic's for a key that is no text, such as 1.
_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")


def sentences(error: ValidationError, root: Any) -> list[str]:
    """Returns one sentence for each problem.

    Args:
        root: the dataclass or union that was validated.
    """
    # A list whose elements are all bad is called too short as well.
    return [
        _sentence(entry, root)
        for entry in error.errors()
        if entry["type"] != "too_short" or not entry["input"]
    ]


def _sentence(error: Any, root: Any) -> str:
    path, section, siblings = _locate(error["loc"], root)
    where = ".".join(path)
    if error["type"] == "missing":
        return f"{where}: missing; it has no default"
    if error["type"] in _UNKNOWN:
        return f"{where}: {_unknown_key(str(error['loc'][-1]), section, siblings)}"
    if error["type"] == "union_tag_invalid":
        key, _, value = error["ctx"]["tag"].partition(TAG_SEPARATOR)
        names = [name_of(sibling, key) for sibling in siblings]
        return f"{'.'.join([*path, key])}: must be one of {', '.join(names)}, not {value!r}"
    # If a value may have several types, pydantic appends the type that it tried to the place.
    where = re.split(r"\.(?=[\w-]+\[)|\.(?:str|int|float|bool)$", where)[0]
    value = error.get("input")
    if error["type"] == "tuple_type":
        # pydantic asks for a tuple, which YAML does not have.
        remedy = f"write [{value}]" if isinstance(value, str | int | float) else "begin with - or ["
        return f"{where}: must be a list, not {value!r}; {remedy}"
    if error["type"] == "dataclass_type":
        return f"{where}: must be a section of keys, not {value!r}"
    message = "input should be a path" if error["type"] == "path_type" else error["msg"]
    return f"{where}: {message[0].lower()}{message[1:]}, not {value!r}"


def _unknown_key(key: str, section: Any, siblings: tuple[type, ...]) -> str:
    """Returns the message for a key that `section` does not have: the types that have it, else the
    nearest name."""
    names = [field.name for field in dataclasses.fields(section)]
    owners = [s for s in siblings if any(field.name == key for field in dataclasses.fields(s))]
    if owners:
        chooser = names[0]  # sections of a union declare `type` or `name` first
        owner_names = ", ".join(name_of(owner, chooser) for owner in owners)
        equivalent = getattr(section, "instead", {}).get(key)
        remedy = f"; set {equivalent} instead" if equivalent else ""
        return f"not a key of {name_of(section, chooser)} but of {owner_names}{remedy}"
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
    return f"unknown key; {hint}"


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
        if TAG_SEPARATOR in str(key) and len(options) > 1:
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
