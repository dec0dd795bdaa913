"""`internvl compat`: command lines of the original code."""

import argparse
import os
import shlex
import sys
from typing import Any

from internvl.cli.common import Arguments
from internvl.files import write_text
from internvl.launch import launchers


def run(args: Arguments) -> int:
    """Run a command line of the original code: it is translated, shown and run by this package."""
    # Here: the command line imports this file.
    from internvl import cli, compat

    translation = compat.translate(args.command, args.words, os.environ)
    # Under torchrun every rank comes here.
    is_first = launchers.rank() == 0
    if is_first:
        _print_translation(translation)
    if not translation.runs:
        return 0
    if translation.file is not None and is_first:
        write_text(translation.file, translation.recipe)
    for words in translation.commands:
        parsed = cli.parse(words)
        parsed.debug = args.debug
        code = cli.VERBS[parsed.verb](parsed)
        if code:
            return code
    return 0


def _print_translation(translation: Any) -> None:
    for note in translation.notes:
        print(f"internvl: {note}", file=sys.stderr)
    if translation.file is not None:
        print(f"# {translation.file}\n{translation.recipe}")
    for words in translation.commands:
        print(f"internvl {shlex.join(words)}")
    if translation.done:
        print(translation.done)
    # Ranks that start next write to the same terminal.
    sys.stdout.flush()


# A literal: `internvl --help` must not read the tables of all flags and scripts.
COMMANDS = (
    *("evaluate.sh", "finetune", "shell", "clip_benchmark", "merge_lora"),
    *("internvl_custom2hf", "internvl_hf2custom", "install-shims"),
)


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    sub.usage = "internvl compat COMMAND …"
    names = ", ".join(COMMANDS)
    sub.epilog = f"commands: {names}; `internvl compat COMMAND --help` shows the words of one"
    sub.add_argument("command", metavar="COMMAND", help="command of the original, see below")
    sub.add_argument("words", nargs=argparse.REMAINDER, metavar="…", help="its words as they are")
