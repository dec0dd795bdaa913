"""Reads shell scripts of the original's form without running them.

The subset that its 126 training scripts use: assignments with defaults and arithmetic, `export`,
`if [ … ]; then mkdir …; fi`, and one `torchrun`, `srun`, `deepspeed` or `python` with a Python file
and its flags. Anything else is listed as skipped; loops and programs whose output counts are
refused, for their values would be guesses.
"""

import ast
import fnmatch
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from internvl.errors import ConfigError

LAUNCHERS = ("torchrun", "srun", "deepspeed", "accelerate", "python", "python3")
"""Commands that start the training of a script."""

_QUIET = ("set", "mkdir", "echo", "tee", "[", "[[", "test", "true", ":", "ulimit", "date")
"""Commands without an effect on what a script trains."""
_KEYWORDS = ("if", "then", "else", "elif", "fi", "do", "done", "!", "{", "}")
_REFUSED = ("for", "while", "until", "case", "function", "select", "declare", "eval")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_ENDS = frozenset("\n;|&")
_VALUELESS = frozenset({"-u", "-O", "-OO", "-B", "--standalone", "--no_python", "--no-python"})
"""Options of launchers and Python that no value follows."""


@dataclass(frozen=True)
class Launch:
    """The training that a script starts."""

    launcher: str
    options: Mapping[str, str]
    """Options of the launcher, with underscores and without dashes, such as nproc_per_node."""
    entry: str
    """The Python file, such as internvl/train/internvl_chat_finetune.py."""
    flags: tuple[str, ...]
    environment: Mapping[str, str]
    """The caller's environment after the script's assignments."""
    skipped: tuple[str, ...]
    """Statements that are not translated, with their lines."""

    @property
    def num_gpus(self) -> int:
        """Number of processes, one for each GPU."""
        options = self.options
        if self.launcher == "srun":
            # srun starts a task a GPU.
            tasks = options.get("ntasks") or options.get("n")
            if tasks is not None:
                return _whole("--ntasks", tasks)
            per_node = _whole("--ntasks-per-node", options.get("ntasks_per_node", "1"))
            return per_node * self.num_nodes
        counts = ("nproc_per_node", "num_gpus", "num_processes")
        text = next((options[name] for name in counts if name in options), "1")
        # accelerate counts the processes of all machines.
        nodes = 1 if "num_processes" in options else self.num_nodes
        return _whole("processes of a node", text) * nodes

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        names = ("nnodes", "nodes", "N", "num_nodes", "num_machines")
        text = next((self.options[name] for name in names if name in self.options), "1")
        return _whole("nodes", text)


def _whole(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{name}: {text!r} is not a number from 1 on")
    return int(text)


@dataclass
class _Word:
    """One word of a statement, before expansion."""

    pieces: list[tuple[str, str]] = field(default_factory=list)
    """(quoting, text): quoting is "'", '"' or "" for none."""

    @property
    def plain(self) -> str:
        """The text without quotes, not expanded."""
        return "".join(text for _, text in self.pieces)


@dataclass
class _Statement:
    line: int
    words: list[_Word]
    after_pipe: bool
    """True if it reads the output of the statement before."""

    @property
    def text(self) -> str:
        """The words as they stand, without quotes."""
        return " ".join(word.plain for word in self.words)


def read(
    text: str, environment: Mapping[str, str], *, name: str, arguments: Sequence[str] = ()
) -> Launch:
    """Reads a script.

    Args:
        environment: variables that the caller has set; they replace the script's defaults.
        name: path of the script, its `$0`.
        arguments: its `$1`, `$2`, …

    Raises:
        ConfigError: it starts no training, or holds what cannot be read without running it.
    """
    variables = dict(environment)
    expansion = _Expansion(variables, name, tuple(arguments))
    skipped: list[str] = []
    depth = 0
    launches = []
    for statement in _statements(text, name):
        expansion.line = statement.line
        words = statement.words
        # `then mkdir …` is one statement to the reader above.
        while words and words[0].plain in _KEYWORDS:
            keyword = words[0].plain
            depth += (keyword == "if") - (keyword == "fi")
            words = words[1:]
        if not words:
            continue
        first = words[0].plain
        if first in _REFUSED:
            raise ConfigError(
                f"{name} line {statement.line}: `{first}` is not read without running it; write "
                "the one command that it stands for"
            )
        # What reads the training's output does not train.
        if statement.after_pipe or first in _QUIET:
            continue
        exports = first == "export"
        words = words[1:] if exports else words
        # `A=1 B=2 torchrun …` sets both for the command.
        count = next((i for i, w in enumerate(words) if not _ASSIGNMENT.match(w.plain)), len(words))
        # Its condition is not evaluated, so neither is what it sets.
        if depth and (count or exports or first not in LAUNCHERS):
            skipped.append(f"line {statement.line}: {statement.text} (inside an if)")
            continue
        for word in words[:count]:
            variable, _, value = "".join(expansion.expand(word, split=False)).partition("=")
            variables[variable] = value
        command = words[count:]
        if exports or not command:
            continue
        if command[0].plain in LAUNCHERS:
            expanded = [text for word in command for text in expansion.expand(word)]
            launches.append((statement.line, expanded))
        else:
            skipped.append(f"line {statement.line}: {statement.text}")
    # Two trainings need two recipes: which is meant would be a guess.
    if len(launches) != 1:
        lines = ", ".join(str(line) for line, _ in launches) or "none"
        raise ConfigError(
            f"{name}: one torchrun, srun, deepspeed or python with a training file is expected; "
            f"lines: {lines}"
        )
    return _launch(launches[0][1], variables, skipped, name)


def _launch(
    words: Sequence[str], variables: Mapping[str, str], skipped: Sequence[str], name: str
) -> Launch:
    """Cuts an expanded command into launcher, its options, Python file and flags."""
    options: dict[str, str] = {}
    rest = list(words[1:])
    while rest:
        word = rest.pop(0)
        if word.endswith(".py"):
            return Launch(words[0], options, word, tuple(rest), dict(variables), tuple(skipped))
        if word == "-m" and rest:
            entry = rest.pop(0).replace(".", "/") + ".py"
            return Launch(words[0], options, entry, tuple(rest), dict(variables), tuple(skipped))
        if not word.startswith("-"):
            continue  # the `python` after srun, the `launch` after accelerate
        option, equals, value = word.partition("=")
        # Most options of launchers take a value; a flag or a file is none.
        takes_next = not equals and option not in _VALUELESS and rest
        if takes_next and not rest[0].startswith("-") and not rest[0].endswith(".py"):
            value = rest.pop(0)
        options[option.lstrip("-").replace("-", "_")] = value
    raise ConfigError(f"{name}: {words[0]} starts no Python file")


def _statements(text: str, name: str) -> Iterator[_Statement]:
    """Yields the simple commands of a script, cut at line ends, `;`, pipes, `&&` and `||`."""
    words: list[_Word] = []
    word: _Word | None = None
    line, start, index, piped = 1, 1, 0, False

    def add(quoting: str, piece: str) -> None:
        nonlocal word, start
        if word is None:
            word = _Word()
            words.append(word)
            start = line if len(words) == 1 else start
        # One piece: the letters of $NAME come one by one.
        if not quoting and word.pieces and not word.pieces[-1][0]:
            piece = word.pieces.pop()[1] + piece
        word.pieces.append((quoting, piece))

    while index < len(text):
        character = text[index]
        if character == "\\" and text[index + 1 : index + 2] == "\n":
            line, index, word = line + 1, index + 2, None
        elif character == "\\":
            add("'", text[index + 1 : index + 2])
            index += 2
        # Inside a word it is a letter, as in ${X#y}.
        elif character == "#" and word is None:
            end = text.find("\n", index)
            index = len(text) if end < 0 else end
        elif character in "'\"":
            end = _closing(text, index)
            if end < 0:
                raise ConfigError(f"{name} line {line}: a quote is not closed")
            piece = text[index + 1 : end]
            add(character, piece)
            line, index = line + piece.count("\n"), end + 1
        elif character == "$" and text[index + 1 : index + 2] in ("(", "{"):
            end = _closing_bracket(text, index + 1)
            if end < 0:
                raise ConfigError(f"{name} line {line}: ${text[index + 1]} is not closed")
            add("", text[index : end + 1])
            index = end + 1
        elif character == "`":
            end = text.find("`", index + 1)
            end = len(text) - 1 if end < 0 else end
            add("", text[index : end + 1])
            index = end + 1
        elif character in "<>":
            # Where output goes changes no training; `2>&1` leaves its 2 as a word.
            if words and word is not None and word.plain.isdigit():
                words.pop()
            match = re.compile(r"[<>&]*\s*[^\s;|&]*").match(text, index)
            assert match is not None
            index, word = match.end(), None
        elif character in _ENDS:
            if words:
                yield _Statement(start, words, piped)
                piped = False
            # Only `|`: after `||` and `&&` a command stands for itself.
            piped = piped or (character == "|" and text[index + 1 : index + 2] != "|")
            piped = piped and character != "\n"
            line += character == "\n"
            words, word, index = [], None, index + 1
        elif character.isspace():
            word, index = None, index + 1
        else:
            add("", character)
            index += 1
    if words:
        yield _Statement(start, words, piped)


def _closing(text: str, index: int) -> int:
    """Returns the index of the quote that closes the one at `index`, or -1."""
    quote = text[index]
    end = text.find(quote, index + 1)
    # A backslash keeps a double quote inside; single quotes have no such rule.
    while quote == '"' and end > 0 and text[end - 1] == "\\":
        end = text.find(quote, end + 1)
    return end


def _closing_bracket(text: str, index: int) -> int:
    """Returns the index of the bracket that closes the one at `index`, or -1."""
    pair = {"(": ")", "{": "}"}[text[index]]
    depth = 0
    for position in range(index, len(text)):
        depth += (text[position] == text[index]) - (text[position] == pair)
        if depth == 0:
            return position
    return -1


_NAME = re.compile(r"\$([A-Za-z_]\w*|[0-9#@*])")
_BRACES = re.compile(r"(?P<name>[A-Za-z_]\w*|[0-9])(?P<op>:?[-=?+]|%%?|##?)?(?P<word>.*)", re.S)


@dataclass
class _Expansion:
    """Replaces variables, arithmetic and a few harmless programs by their values."""

    variables: dict[str, str]
    script: str
    arguments: tuple[str, ...]
    line: int = 0

    def expand(self, word: _Word, *, split: bool = True) -> list[str]:
        """Returns the words that a word becomes; an empty variable without quotes becomes none."""
        result = ""
        quoted = False
        for quoting, text in word.pieces:
            quoted = quoted or bool(quoting)
            result += text if quoting == "'" else self.substitute(text)
        if not split or quoted:
            return [result]
        return result.split()

    def substitute(self, text: str) -> str:
        """Expands every `$` and backquote of a text."""
        result, index = "", 0
        while index < len(text):
            if text[index] == "`":
                end = text.find("`", index + 1)
                end = len(text) if end < 0 else end
                result, index = result + self._program(text[index + 1 : end]), end + 1
            elif text.startswith("$((", index):
                end = _closing_bracket(text, index + 1)
                result += str(self._arithmetic(text[index + 3 : end - 1]))
                index = end + 1
            elif text.startswith("$(", index):
                end = _closing_bracket(text, index + 1)
                result, index = result + self._program(text[index + 2 : end]), end + 1
            elif text.startswith("${", index):
                end = _closing_bracket(text, index + 1)
                result, index = result + self._braces(text[index + 2 : end]), end + 1
            elif match := _NAME.match(text, index):
                result, index = result + self._value(match[1]), match.end()
            else:
                result, index = result + text[index], index + 1
        return result

    def _value(self, name: str) -> str:
        # Scripts hand their words on with these.
        if name in ("@", "*"):
            return " ".join(self.arguments)
        if name == "#":
            return str(len(self.arguments))
        if name == "0":
            return self.script
        if name.isdigit():
            return self.arguments[int(name) - 1] if int(name) <= len(self.arguments) else ""
        return self.variables.get(name, "")

    def _braces(self, inside: str) -> str:
        match = _BRACES.fullmatch(inside)
        if match is None or (match["op"] is None and match["word"]):
            raise self._refuse(f"${{{inside}}}", "write its value")
        value, operation, word = self._value(match["name"]), match["op"] or "", match["word"]
        # A default may stand in quotes: ${GPUS:-"8"}.
        default = "".join(text for _, text in _unquoted(word))
        if operation in ("%", "%%", "#", "##"):
            return _trimmed(value, default, operation)
        # With a colon an empty value counts as none.
        is_set = bool(value) or (match["name"] in self.variables and ":" not in operation)
        if operation.endswith("+"):
            return self.substitute(default) if is_set else ""
        if operation.endswith("?") and not is_set:
            raise self._refuse(f"${{{inside}}}", f"set {match['name']}")
        if is_set or not operation:
            return value
        value = self.substitute(default)
        if operation.endswith("="):
            self.variables[match["name"]] = value
        return value

    def _program(self, command: str) -> str:
        """Returns the output of pwd, basename and dirname, the only programs that are computed."""
        statements = list(_statements(command, self.script))
        if len(statements) == 1:
            name, *words = [text for word in statements[0].words for text in self.expand(word)]
            if name == "pwd" and not words:
                # A path from here means the same, and a recipe with it can be moved.
                return "."
            if name == "basename" and words:
                base = PurePosixPath(words[0]).name
                return base.removesuffix(words[1]) if len(words) > 1 else base
            if name == "dirname" and len(words) == 1:
                return str(PurePosixPath(words[0]).parent)
        raise self._refuse(f"$({command})", "nothing is run here; write its output instead")

    def _arithmetic(self, text: str) -> int:
        # Names count without a `$` too.
        expression = self.substitute(text)
        names = set(re.findall(r"[A-Za-z_]\w*", expression))
        for name in names:
            value = self.variables.get(name, "")
            # A shell takes an unset variable for 0, and would divide by it.
            if not re.fullmatch(r"-?\d+", value.strip()):
                problem = f"is {value!r}, no number" if value else "is not set"
                raise self._refuse(f"$(({text}))", f"{name} {problem}; set it: {name}=8 …")
            # Whole names: N is a part of NODES.
            expression = re.sub(rf"\b{name}\b", value.strip(), expression)
        try:
            return _computed(ast.parse(expression.strip(), mode="eval").body)
        except ZeroDivisionError:
            raise self._refuse(f"$(({text}))", "it divides by 0") from None
        except (SyntaxError, KeyError):
            raise self._refuse(f"$(({text}))", "write its value") from None

    def _refuse(self, text: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self.script} line {self.line}: {text}: {remedy}")


def _unquoted(text: str) -> Iterator[tuple[str, str]]:
    """Yields the pieces of a word whose blanks belong to it."""
    for piece in re.findall(r"'[^']*'|\"[^\"]*\"|[^'\"]+", text):
        yield ("", piece.strip(piece[0])) if piece[0] in "'\"" else ("", piece)


def _trimmed(value: str, pattern: str, operation: str) -> str:
    """Returns a value without its shortest or longest end or start that matches a pattern."""
    # The shortest first; a doubled operator takes the longest.
    lengths: Sequence[int] = range(len(value) + 1)
    if len(operation) == 2:
        lengths = lengths[::-1]
    for length in lengths:
        at_end = operation[0] == "%"
        piece = value[len(value) - length :] if at_end else value[:length]
        if fnmatch.fnmatchcase(piece, pattern):
            return value[: len(value) - length] if at_end else value[length:]
    return value


def _divided(left: int, right: int) -> int:
    # A shell rounds towards 0, Python down.
    quotient = abs(left) // abs(right)
    return quotient if (left < 0) == (right < 0) else -quotient


_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divided,
    ast.Mod: lambda left, right: left - right * _divided(left, right),
}


def _computed(node: ast.AST) -> int:
    """Evaluates whole numbers, + - * / % and brackets. Raises KeyError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_computed(node.operand)
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_computed(node.left), _computed(node.right))
    raise KeyError(type(node).__name__)
