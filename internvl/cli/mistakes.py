"""What to type instead of a wrong verb or option, also for those who know the original's."""

import argparse
import difflib
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from internvl.cli.compat import COMMANDS
from internvl.config import foreign

_UNKNOWN = "unrecognized arguments: "  # argparse's words
_RECIPE_VERBS = ("train", "check", "launch")
_KNOWN_SCRIPTS = (".sh", ".py")
_GPUS = "all GPUs are used, or those of --gpus N"
_VARIABLES = {
    "train": {
        "GPUS": _GPUS,
        "BATCH_SIZE": "the samples of a step are global_batch=N",
        "PER_DEVICE_BATCH_SIZE": "samples share rows, and those of a step are global_batch=N",
    },
    "evaluate": {"GPUS": _GPUS},
}
"""Verb -> variable that the guides of the original set before a line -> what stands for it."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a sentence with a remedy, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the sentence and exits."""
        # argparse's intermixed parsing counts overrides, of which there may be none, as missing.
        message = message.replace(", key=value", "")
        if message.startswith(_UNKNOWN):
            words = message.removeprefix(_UNKNOWN).split()
            message = f"{words[0]}: {self._remedy(words)}"
        print(f"{self.prog}: {message}; `{self.prog} --help` lists all options", file=sys.stderr)
        sys.exit(2)

    def _remedy(self, words: Sequence[str]) -> str:
        """Returns what stands here for an option that the verb does not have."""
        option, _, value = words[0].partition("=")
        if not option.startswith("-"):
            return "one word too many"
        if not value and len(words) > 1 and not words[1].startswith("-"):
            value = words[1]
        verb = self.prog.rpartition(" ")[2]
        theirs = _of_original(verb, option.lstrip("-"), value or "VALUE")
        if theirs is not None:
            return theirs
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        return f"no option; did you mean {near[0]}?" if near else "no option"


def check_verb(argv: Sequence[str], verbs: Collection[str]) -> None:
    """Exits with a remedy if a command line begins with no verb."""
    word = argv[0]
    if word in verbs or word.startswith("-"):
        return
    near = difflib.get_close_matches(word, verbs, n=1)
    path = Path(word)
    # `sh evaluate.sh …` and `python tools/merge_lora.py …` without their first words.
    names = (word, path.name, path.stem) if path.suffix in _KNOWN_SCRIPTS else (word,)
    command = next((name for name in names if name in COMMANDS), None)
    if word.endswith("clip_benchmark/cli.py"):
        command = "clip_benchmark"
    if command is not None:
        remedy = f"`internvl compat {shlex.join([command, *argv[1:]])}` runs the original's line"
    elif path.suffix in _KNOWN_SCRIPTS:
        remedy = _of_script(path, argv)
    elif near:
        remedy = f"did you mean `internvl {near[0]}`?"
    else:
        remedy = f"verbs: {', '.join(verbs)}"
    print(f"internvl: {word}: no verb; {remedy}", file=sys.stderr)
    sys.exit(2)


def _of_script(path: Path, argv: Sequence[str]) -> str:
    """Returns what runs a script or program of the original that has no command of its own."""
    # Here: it reads tables, for a wrong verb only.
    from internvl.compat import finetune

    if path.suffix == ".py" and path.stem not in finetune.ENTRIES:
        return "`internvl compat --help` lists the original's programs that have a command"
    called = "finetune" if path.suffix == ".py" else "shell"
    return f"`internvl compat {called} {shlex.join(argv)}` runs a script of the original"


def warn_of_variables(verb: str, environment: Mapping[str, str]) -> None:
    """Prints what stands for variables of the original's scripts, which a verb does not read."""
    for name, ours in _VARIABLES.get(verb, {}).items():
        if name in environment:
            shown = f"{name}={environment[name]}"
            print(f"internvl: {shown} changes nothing here; {ours}", file=sys.stderr)


def _of_original(verb: str, flag: str, value: str) -> str | None:
    """Returns what a flag of the original's programs is here; None for any other option."""
    # Here: its tables are read for a wrong option only.
    from internvl.compat import evaluation, finetune

    if verb == "evaluate":
        ours = evaluation.options().get(flag)
        return ours and f"a flag of the original's evaluate.sh; here it is {ours}"
    if verb not in _RECIPE_VERBS:
        return None
    if "." in flag:
        return f"no option but a key of the recipe; write it without dashes: {flag}={value}"
    name = flag.replace("-", "_")
    row = {**finetune.flags_of("preference"), **finetune.flags_of("pairs")}.get(name, {})
    if "nothing" in row:
        return f"a flag of the original that changes nothing here: {row['nothing']}"
    sets = row.get("sets") or ()
    key = row["to"] if "to" in row else ", ".join(sets)
    if not key and name in foreign.ours():
        key = foreign.ours()[name][0]
    # A flag with a rule, such as --freeze_llm, has another value than its key.
    shown = key if sets or "values" in row else f"{key}={value}"
    return f"no option; write the recipe's key: {shown}" if key else None
