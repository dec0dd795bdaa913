"""What several verbs share: what they load, open, and run as several processes."""

import argparse
import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl import log
from internvl.errors import RanksFailed

Arguments = argparse.Namespace


@contextlib.contextmanager
def loading(name: object) -> Iterator[None]:
    """Logs what is loaded; the block imports what takes seconds."""
    log.get_logger().info("loading %s …", name)
    # Imports create a million objects that all stay; collecting garbage among them, during the
    # imports and after them, would take a fifth of their time.
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def open_named(args: Arguments, step: int | None) -> Any:
    """Opens the model of a command line; its folder is refused before torch is imported."""
    # Here: --help and wrong options need none of what it imports.
    from internvl.inference.opened import open_model

    opened = open_model(args.model, step=step, base=args.base)
    opened.check()
    return opened


def add_recipe_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the recipe and its overrides."""
    sub.add_argument(
        "recipe",
        type=Path,
        help="YAML file, run folder, or name of a recipe: internvl2_2b_lora",
    )
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replace a value of the recipe, such as optim.lr=1e-5",
    )


def add_rank_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the options that say how many processes share the work on this machine."""
    sub.add_argument(
        "--gpus", type=int, metavar="N", help="use N GPUs of this machine (default: all of them)"
    )
    sub.add_argument(
        "--processes", type=int, metavar="N", help="without a GPU: share the work among N processes"
    )


def add_loading_arguments(
    sub: argparse.ArgumentParser,
    *,
    dtype: str = "bfloat16 on a GPU, float32 on a CPU",
    device_map: bool = True,
    quantize: bool = True,
) -> None:
    """Adds how a verb's model is loaded.

    Args:
        dtype: the default in words.
        device_map: the verb can spread a model over several GPUs.
        quantize: the verb's models can be rounded.
    """
    sub.add_argument("--device", help="cuda, cuda:1 or cpu (default: the GPU if there is one)")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help=f"dtype of the weights (default: {dtype})",
    )
    if device_map:
        text = "spread a model larger than a GPU over all GPUs"
        sub.add_argument("--device-map", choices=("auto",), help=text)
    if quantize:
        text = "load 8- or 4-bit weights, or compute in float8"
        sub.add_argument("--quantize", choices=("8bit", "4bit", "float8"), help=text)


def add_run_arguments(sub: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Adds the options of runs and adapters that a verb opens."""
    text = "step of a run's checkpoint (default: the newest); or name RUN/checkpoints/000400"
    if several:
        text += "; several steps, as 200,400, are compared"
    sub.add_argument("--step", type=_steps if several else int, metavar="STEP", help=text)
    # Repeated, not separated by commas, which a folder's name may have.
    sub.add_argument(
        "--base",
        action="append",
        metavar="DIR",
        help="model in place of a base that a moved run or adapter folder misses; repeat it for a "
        "chain that misses several",
    )


def _steps(text: str) -> list[int]:
    """Parses steps separated by commas."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        # argparse's own message would name this function.
        raise argparse.ArgumentTypeError(
            f"{text!r} is no step; write a number, or several as 200,400"
        ) from None


def split_commas(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def run_as_ranks(args: Arguments, num_ranks: int) -> int:
    """Runs this command once more, as several ranks, until they end.

    Raises:
        RanksFailed: one of them failed, for the reason in the text.
    """
    from internvl.launch import local

    log.get_logger().info("starting %d processes …", num_ranks)
    # The words as they were typed: every rank parses and checks them by itself.
    ended = local.run(local.verb(*args.argv), num_ranks)
    if ended.sentence:
        raise RanksFailed(ended.sentence, ended.code)
    return ended.code
