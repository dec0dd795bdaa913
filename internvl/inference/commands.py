"""Commands of a conversation in a terminal, such as `/image cat.jpg`. Prints nothing."""

import difflib
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvl.errors import UserError

# For annotations only: the greeting must not wait for torch.
if TYPE_CHECKING:
    from internvl.inference.conversation import Conversation


@dataclass(frozen=True)
class Command:
    """A command: its argument in the help, what it does, and the function that does it."""

    argument: str
    help: str
    run: "Callable[[Conversation, str], str]"
    """Takes the conversation and the text after the command; returns the message to show."""


def greeting(model: str) -> str:
    """Returns the line that opens a conversation, before the model is loaded."""
    names = ", ".join(f"/{name} {command.argument}".strip() for name, command in COMMANDS.items())
    return f"chat with {model}: {names} or Ctrl-D; loading the model …"


def run(line: str, conversation: "Conversation") -> str | None:
    """Runs the command in a line; returns its message, or None if the line is a question.

    Raises:
        EOFError: the conversation ends.
        UserError: no such command, or one that cannot be followed.
    """
    # Letters alone: a question may begin with a path.
    match = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", line.strip(), re.DOTALL)
    if match is None:
        return None
    name, argument = match[1], (match[2] or "").strip()
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"did you mean /{near[0]}?" if near else "/help lists them"
        raise UserError(f"there is no command /{name}; {remedy}")
    command = COMMANDS[name]
    if command.argument and not argument:
        raise UserError(f"/{name} needs a file: /{name} {command.argument}")
    return command.run(conversation, argument)


def _add_images(conversation: "Conversation", argument: str) -> str:
    paths = _paths(argument)
    conversation.add_images(paths)
    return f"{', '.join(paths)}: shown with your next question"


def _add_videos(conversation: "Conversation", argument: str) -> str:
    paths = _paths(argument)
    conversation.add_videos(paths)
    return f"{', '.join(paths)}: shown with your next question"


def _paths(argument: str) -> list[str]:
    """Splits an argument into paths; a name with spaces needs no quotes if the file exists."""
    whole = os.path.expanduser(argument)
    if os.path.exists(whole):
        return [whole]
    try:
        # Terminals quote what is dropped into them as a shell would.
        return [os.path.expanduser(word) for word in shlex.split(argument)]
    except ValueError:  # a single quotation mark, as in a name
        return [whole]


def _reset(conversation: "Conversation", argument: str) -> str:
    conversation.reset()
    return "the conversation starts again, as it was opened"


def _help(conversation: "Conversation", argument: str) -> str:
    rows = {f"/{name} {c.argument}".strip(): c.help for name, c in COMMANDS.items()}
    return "\n".join(f"  {row:14}{text}" for row, text in rows.items())


def _exit(conversation: "Conversation", argument: str) -> str:
    raise EOFError  # as Ctrl-D does


COMMANDS: dict[str, Command] = {
    "image": Command("FILE", "show an image with your next question", _add_images),
    "video": Command("FILE", "show a video with your next question", _add_videos),
    "reset": Command("", "forget questions, answers and what was shown since the start", _reset),
    "help": Command("", "list the commands; any other line is a question", _help),
    "exit": Command("", "end the conversation, as Ctrl-D does", _exit),
}
"""Name after the slash -> command."""
