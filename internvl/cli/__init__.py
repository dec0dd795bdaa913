"""The command line: `internvl VERB …`. The only folder that prints or exits.

Exit codes: 0 success; 1 the work failed, with one sentence on standard error; 2 the command or
recipe is wrong; 130 stopped by Ctrl-C; 141 nobody reads the output. The last two print nothing.
A verb is a module with `run`, whose docstring is its help, and `add_arguments`.

A verb checks its arguments and files first, then says what it loads, then imports torch and
transformers, which take seconds (`common.loading`). What is imported before must not import them.
"""

import argparse
import contextlib
import io
import logging
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NoReturn

from internvl import errors, log
from internvl.cli import (
    chat,
    check,
    compare,
    compat,
    data,
    demo,
    doctor,
    evaluate,
    export,
    index,
    launch,
    merge,
    mistakes,
    models,
    search,
    serve,
    train,
)
from internvl.cli.common import Arguments
from internvl.errors import ConfigError, Interrupted, RanksFailed
from internvl.launch import launchers

_VERBS: dict[str, ModuleType] = {
    "demo": demo,
    "doctor": doctor,
    "models": models,
    "check": check,
    "train": train,
    "launch": launch,
    "evaluate": evaluate,
    "compare": compare,
    "chat": chat,
    "serve": serve,
    "merge": merge,
    "export": export,
    "index": index,
    "search": search,
    "data": data,
    "compat": compat,
}
"""Verb -> the module with its `run` and its `add_arguments`, in the order of --help."""

VERBS: dict[str, Callable[[Arguments], int]] = {name: verb.run for name, verb in _VERBS.items()}


def parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser of the whole command line, and verb -> its own parser."""
    top = mistakes.Parser(
        prog="internvl", description="Train, evaluate and ship the InternVL models."
    )
    # Of the package in memory, not of an installed one's metadata, which a checkout may not have.
    version = sys.modules["internvl"].__version__
    top.add_argument("--version", action="version", version=f"internvl {version}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    subs: dict[str, argparse.ArgumentParser] = {}
    for name, verb in _VERBS.items():
        text = verb.run.__doc__
        subs[name] = verbs.add_parser(name, help=text, description=text)
        subs[name].add_argument(
            "--debug", action="store_true", help="show tracebacks and debug messages"
        )
        verb.add_arguments(subs[name])
    return top, subs


def parse(argv: Sequence[str]) -> Arguments:
    """Parses a command line; options may stand between overrides."""
    top, verbs = parser()
    if not argv:
        # As other tools of verbs do: the list of verbs, and the code of a wrong command.
        top.print_help(sys.stderr)
        sys.exit(2)
    mistakes.check_verb(argv, verbs)
    # argparse's intermixed parsing refuses parsers with subparsers, so a verb's own is called.
    if argv[0] not in verbs or argv[0] in ("data", "compat"):
        return top.parse_args(argv, argparse.Namespace(argv=argv))
    if argv[0] == "launch":
        return _parse_launch(argv, verbs)
    started = argparse.Namespace(verb=argv[0], argv=argv)
    return verbs[argv[0]].parse_intermixed_args(argv[1:], started)


def _parse_launch(argv: Sequence[str], verbs: Mapping[str, argparse.ArgumentParser]) -> Arguments:
    """Parses the options of a launch, and what is left as the command line that it launches."""
    args, words = verbs["launch"].parse_known_args(argv[1:], argparse.Namespace(verb="launch"))
    if not words:
        verbs["launch"].error("which recipe, or evaluate and which model?")
    inner = words if words[0] in ("train", "evaluate") else ["train", *words]
    args.command = verbs[inner[0]].parse_intermixed_args(
        inner[1:], argparse.Namespace(verb=inner[0], argv=inner)
    )
    return args


def _configure_libraries(*, showing_progress: bool) -> None:
    """Sets environment variables that libraries read once, when they are imported."""
    # transformers draws a progress bar for every model it opens, however small.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not showing_progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


_OUTPUT_FILES = (1, 2)  # descriptors of standard output and error
_INTERRUPTED, _OUTPUT_CLOSED = 130, 141
"""Exit codes that a shell reports for SIGINT and SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a verb and exits with its code."""
    _escape_unprintable()
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        launchers.follow_parent()
        if not launchers.has_parent():
            mistakes.warn_of_variables(args.verb, os.environ)
        log.setup(logging.DEBUG if args.debug else logging.INFO, rank=launchers.rank())
        sends = bool(getattr(args, "push", None))
        _configure_libraries(showing_progress=sends or getattr(args, "download", False))
        code, message = _run_verb(args)
        # `internvl train`, which started this rank, prints one sentence for all of them.
        if message and not launchers.has_parent():
            # Whoever closed standard error reads no message either.
            with contextlib.suppress(BrokenPipeError):
                print(f"internvl: {launchers.describe_rank()}{message}", file=sys.stderr)
    finally:
        # Here too for --help, whose text is still in the buffer when it exits.
        _flush_or_close()
    sys.exit(code)


def _run_verb(args: Arguments) -> tuple[int, str]:
    """Runs a verb; returns (exit code, error message). With --debug errors are raised."""
    try:
        code = VERBS[args.verb](args)
        # Inside: a full disk shows only when buffered output is written.
        sys.stdout.flush()
        _leave_group()
    except KeyboardInterrupt:
        return _INTERRUPTED, ""
    except Exception as error:
        if _comes_of_closed_output(error):
            return _OUTPUT_CLOSED, ""
        if isinstance(error, Interrupted):
            _leave_group()
        code, message = _exit_code(error), _explain(error)
        launchers.report(message, code, lost_peer=errors.lost_peer(error))
        if args.debug:
            raise
        return code, message
    return code, ""


def _leave_group() -> None:
    """Leaves the process group, if a verb has joined one and ended in order."""
    # Its threads must not outlive the interpreter, which would abort in one run of some hundreds.
    dist = sys.modules.get("internvl.dist")
    if dist is not None:
        dist.shutdown()


def _exit_code(error: Exception) -> int:
    if isinstance(error, RanksFailed):
        return error.code
    return 2 if isinstance(error, ConfigError) else 1


def _explain(error: Exception) -> str:
    """Returns the message for an exception."""
    # torch reports a killed worker by its process id alone.
    if "DataLoader worker" in str(error):
        from internvl.data import workers

        return workers.explain(error) or errors.explain(error)
    return errors.explain(error)


def _escape_unprintable() -> None:
    """Makes terminals print an escape for a character that they cannot encode, not raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _comes_of_closed_output(error: BaseException | None) -> bool:
    """True if writing to standard output or error failed since nobody reads it (`… | head`)."""
    while error is not None:
        # The pipe itself is asked: a line that was logged while a file was open bears its name, and
        # connections break too.
        if isinstance(error, BrokenPipeError):
            return any(map(_has_no_reader, _OUTPUT_FILES))
        error = error.__cause__ or error.__context__
    return False


def _has_no_reader(file: int) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush_or_close() -> None:
    """Flushes standard output and error; one that cannot be written goes to the null device.

    Its failure is reported already; Python would flush, and fail, again when it exits.
    """
    for stream, file in zip((sys.stdout, sys.stderr), _OUTPUT_FILES, strict=True):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), file)
