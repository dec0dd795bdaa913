"""What a command line of the original stands for here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Commands of ours, in the order in which they run."""

    commands: tuple[tuple[str, ...], ...] = ()
    """Words of each after `internvl`."""
    notes: tuple[str, ...] = ()
    """What differs, and what was said and changes nothing."""
    recipe: str = ""
    """Recipe of a training, as YAML."""
    file: Path | None = None
    """File that the recipe is written to."""
    done: str = ""
    """What was done already, where no command of ours is needed."""
    runs: bool = True
    """False to show the commands only."""


Translate = Callable[[Sequence[str], Mapping[str, str]], Translation]
"""A command line's words and its environment -> what it stands for."""


def take_flags(
    words: Sequence[str],
    valued: Mapping[str, str],
    switches: Sequence[str] = (),
    *,
    several: Sequence[str] = (),
    ours: Mapping[str, str] | None = None,
) -> tuple[list[str], dict[str, list[str]]]:
    """Splits words into positional ones and flags; returns (positional, flag -> values).

    Args:
        valued: flags with a value -> what it is, for messages.
        switches: flags without one.
        several: those of `valued` that take all values up to the next flag.
        ours: flags that only our own command has -> its line, for messages.

    Raises:
        ConfigError: a flag that the original's command does not have, or one without its value.
    """
    positional: list[str] = []
    flags: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        # A switch takes no value: the next word is a positional one.
        if flag in switches:
            flags[flag] = []
        elif flag not in valued:
            line = (ours or {}).get(flag)
            remedy = f"type `{line}`, or remove it" if line else "remove it"
            raise ConfigError(f"--{flag}: the original has no such flag; {remedy}")
        # argparse takes both forms.
        elif equals:
            flags[flag] = [value]
        else:
            values: list[str] = []
            while rest and not rest[0].startswith("--") and (not values or flag in several):
                values.append(rest.pop(0))
            if not values:
                raise ConfigError(f"--{flag}: {valued[flag]} is missing")
            # The last of a repeated flag counts, as in argparse.
            flags[flag] = values
    return positional, flags
