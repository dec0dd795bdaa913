"""`internvl chat`: a conversation in the terminal."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.cli.common import (
    Arguments,
    add_loading_arguments,
    add_run_arguments,
    loading,
    open_named,
)
from internvl.errors import ConfigError, UserError


def run(args: Arguments) -> int:
    """Chat with a model in the terminal; with --prompt, get one answer."""
    from internvl.inference import commands

    if not args.prompt:
        # Standard error, as all messages of a conversation: answers alone can be redirected.
        print(commands.greeting(args.model), file=sys.stderr, flush=True)
    from internvl.data.images import as_rgb
    from internvl.data.video import read_video
    from internvl.inference.settings import Settings

    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "num_beams": args.num_beams,
    }
    # All before the model is loaded: in a conversation, errors are taken for a question's.
    Settings(**settings)
    if args.frames < 1:
        raise ConfigError(f"--frames: at least 1, not {args.frames}")
    for image in args.image:
        as_rgb(image)  # for its errors alone; the model reads it again, in its own way
    videos = [] if args.video is None else [read_video(args.video, args.frames)]
    opened = open_named(args, args.step)
    with loading(args.model):
        from internvl.inference import load

    model = load.load(
        opened,
        device=args.device,
        dtype=args.dtype,
        device_map=args.device_map,
        quantize=args.quantize,
    ).as_chat("a conversation")
    conversation = model.conversation(args.image, videos=videos, num_frames=args.frames, **settings)
    if args.prompt:
        _print_answer(conversation, args.prompt)
        return 0
    with _line_history():
        return _converse(conversation)


def _converse(conversation: Any) -> int:
    """Reads and answers questions until the input ends; after an error it asks again."""
    from internvl.inference import commands

    while True:
        try:
            line = input("> ")
            if not line.strip():
                continue
            message = commands.run(line, conversation)
            if message is not None:
                print(message, file=sys.stderr)
            elif not _print_answer(conversation, line):
                print("internvl: the answer is empty; the question is dropped", file=sys.stderr)
        except EOFError:
            return 0
        except (UserError, UnicodeDecodeError) as error:
            print(f"internvl: {error}", file=sys.stderr)


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Lets arrow keys edit a line and bring back earlier questions, of earlier conversations too;
    the tab key completes file names.

    They are kept in `$XDG_STATE_HOME/internvl/chat_history`, readable by their user alone.
    """
    try:
        import readline
    except ImportError:  # not on Windows
        readline = None  # type: ignore[assignment]
    # Without a terminal nobody types, and questions from a file are no history.
    if readline is None or not sys.stdin.isatty():
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    file = Path(state) / "internvl" / "chat_history"
    # A conversation must not end for want of its history, as in a read-only home.
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    # Tab completes names of files, whole paths included.
    readline.parse_and_bind("tab: complete")
    readline.set_completer_delims(" \t\n")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)


def _print_answer(conversation: Any, question: str) -> str:
    """Prints an answer, streamed if standard output is a terminal; returns it."""
    # Beam search knows its answer only at the end.
    if conversation.settings["num_beams"] > 1 or not sys.stdout.isatty():
        answer = conversation.ask(question)
        print(answer)
        return answer
    answer = ""
    try:
        # Closed at once: generation stops with its iterator.
        with contextlib.closing(conversation.stream(question)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                answer += piece
    except KeyboardInterrupt:
        # Nothing to read yet: whoever presses Ctrl-C then wants to leave.
        if not answer:
            raise
        print(" … stopped", end="", file=sys.stderr, flush=True)
    print()
    return answer


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    sub.add_argument("model", help="model, adapter or run folder, or hub id")
    sub.add_argument(
        "--image", action="append", default=[], help="image file; repeat it for several images"
    )
    sub.add_argument("--video", help="video file; each of its frames becomes one tile")
    sub.add_argument("--frames", type=int, default=8, help="frames taken from it (default: 8)")
    sub.add_argument("--prompt", help="the question; without it, a conversation starts")
    sub.add_argument(
        "--max-new-tokens", type=int, default=512, help="longest answer, in tokens (default: 512)"
    )
    sub.add_argument(
        "--temperature", type=float, help="sample at this temperature (default: greedy decoding)"
    )
    sub.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens of this total probability",
    )
    sub.add_argument(
        "--num-beams", type=int, default=1, help="beams of a beam search (default: 1, none)"
    )
    add_loading_arguments(sub)
    add_run_arguments(sub)
