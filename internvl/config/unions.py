"""Sections of several types under one recipe key: one dataclass for each type."""

from collections.abc import Mapping, Set
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from internvl.files import read_yaml

# pydantic puts a member's name into the place of an error, between the recipe's keys; with a sign
# that no key contains, problems.py can tell the two apart.
TAG_SEPARATOR = "="
"""Separates key and value in the name of a union's member."""


def tag_of(section: type, key: str) -> str:
    """Returns the name of a union's member, such as `type=caption`."""
    return f"{key}{TAG_SEPARATOR}{name_of(section, key)}"


def name_of(section: type, key: str) -> str:
    """Returns the value of `key` that chooses this section: its default."""
    return next(str(field.default) for field in fields(section) if field.name == key)


def members(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, without None and `Annotated`; for any other hint, the hint
    alone."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) not in (Union, UnionType):
        return (hint,)
    return tuple(member for member in get_args(hint) if member is not NoneType)


@dataclass(frozen=True)
class OneOf:
    """Validates a mapping as the member of a union that its `key` names; without it, as the first.

    A key of another member is dropped if its value is that member's default, else refused.
    """

    key: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        sections = members(source)
        first = name_of(sections[0], self.key)

        def tag(value: Any) -> str:
            if isinstance(value, dict):
                return f"{self.key}{TAG_SEPARATOR}{value.get(self.key, first)}"
            # A dataclass when a section is written back to YAML.
            return f"{self.key}{TAG_SEPARATOR}{getattr(value, self.key, first)}"

        # Run folders of earlier versions have the keys of every type in their recipes.
        def drop_foreign_defaults(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            chosen = [s for s in sections if tag_of(s, self.key) == tag(value)]
            # Empty for an unknown tag, which the union then reports by its name.
            names = {field.name for section in chosen for field in fields(section)}
            value = {_todays_name(k, value, names): v for k, v in value.items()}
            return {
                k: v
                for k, v in value.items()
                if k in names or not _is_default(sections, _new_name(k), v)
            }

        choices = {tag_of(s, self.key): handler.generate_schema(s) for s in sections}
        union = core_schema.tagged_union_schema(choices, discriminator=tag)
        return core_schema.no_info_before_validator_function(drop_foreign_defaults, union)


def _todays_name(key: Any, value: Mapping[Any, Any], names: Set[str]) -> Any:
    """Returns the name that a key of a section has since, unless both names are there."""
    name = _new_name(key)
    # Not in a section without it: an error would name a key that nobody wrote.
    return key if key in names or name not in names or name in value else name


def _new_name(key: Any) -> Any:
    return _renamed().get(key, key)


@cache
def _renamed() -> dict[str, str]:
    """Reads the table old key -> name since, of recipes that earlier versions saved."""
    return cast(dict[str, str], read_yaml(Path(__file__).with_name("renamed.yaml")))


def _is_default(sections: tuple[type, ...], key: Any, value: Any) -> bool:
    """Returns True if a section has `key` with this default."""
    return any(
        field.name == key
        and field.default is not MISSING
        and _plain(field.default) == _plain(value)
        for section in sections
        for field in fields(section)
    )


def _plain(value: Any) -> Any:
    """Returns a default as YAML holds it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
