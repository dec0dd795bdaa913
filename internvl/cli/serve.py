"""`internvl serve`: a model over HTTP."""

import argparse
import functools
import os
from collections.abc import Callable
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
    """Serve a model over HTTP as OpenAI's clients ask, with a page to talk to it."""
    from internvl.serve import Limits, Options, parse_adapters

    # Options that were not given keep the defaults of Limits.
    counts = {
        key: value * (2**20 if unit == "MIB" else 1)
        for key, (unit, _) in _LIMITS.items()
        if (value := getattr(args, key)) is not None
    }
    limits = Limits(
        **counts, allow_hosts=tuple(args.allow_hosts), allow_files=tuple(args.allow_files)
    )
    # A key on the command line is seen by everyone on the machine.
    environment = os.environ.get("INTERNVL_API_KEY")
    options = Options(
        host=args.host,
        port=args.port,
        port_file=args.port_file,
        name=args.name or _name_of(args.model),
        api_keys=tuple(args.api_key or ([environment] if environment else [])),
        limits=limits,
        slots=args.slots,
        temperature=args.temperature,
        compiled=False if args.no_compile else None,
        drain_s=args.drain,
        readers=args.readers,
    )
    # All before the model is loaded: a wrong option must not cost minutes.
    adapters = parse_adapters(args.adapter, options.name)
    opened = open_named(args, args.step)
    family = opened.files.family
    if family != "chat":
        _check_dual(args)
    with loading(args.model):
        server = _server()
    loads = _loads(args, opened, options, adapters)
    server.serve(family, loads, options, list(adapters))
    return 0


def _check_dual(args: Arguments) -> None:
    """Raises ConfigError for options of chat models alone."""
    for key in ("adapter", "engine", "readers"):
        if getattr(args, key) not in (None, []):
            raise ConfigError(
                f"--{key} is for chat models, and {args.model} is an InternVL-14B, a retrieval "
                f"model without a chat engine; leave --{key} out"
            )


def _server() -> Any:
    """Imports the server. Raises UserError if its libraries are missing."""
    try:
        from internvl.serve import server
    except ModuleNotFoundError as error:
        # A broken module of our own is a bug, not a missing package.
        if error.name is None or error.name.startswith("internvl"):
            raise
        raise UserError(
            f"`internvl serve` needs {error.name}; python -m pip install 'internvl[serve]'"
        ) from None
    return server


def _loads(
    args: Arguments, opened: Any, options: Any, adapters: dict[str, Path]
) -> list[Callable[[], Any]]:
    """Returns what loads the model of each engine."""
    import torch

    from internvl.inference import load as loading_models

    # Here too: in an engine's thread it would be an engine that died.
    if args.device is not None:
        loading_models.resolve_device(args.device)
    if args.gpus is not None:
        _check_gpus(args, torch.cuda.device_count())
    settings = {key: getattr(args, key) for key in ("dtype", "device_map", "quantize")}
    # Called in the engines' threads, all at once.
    devices = [args.device] if args.gpus is None else [f"cuda:{i}" for i in range(args.gpus)]
    loads = [
        functools.partial(_load, device, opened, settings, options, adapters) for device in devices
    ]
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    # Answers of 14B are few numbers each: its thread hardly waits for others.
    if opened.files.family != "chat" or (args.engine or _ENGINES[on_gpu]) == "thread":
        return [*loads]
    from internvl.serve.apart import Apart

    return [functools.partial(Apart, load) for load in loads]


_ENGINES = ("thread", "process")
"""Where an engine runs; on a CPU, and on a GPU, unless the command says."""


def _load(
    device: str | None,
    opened: Any,
    settings: dict[str, Any],
    options: Any,
    adapters: dict[str, Path],
) -> Any:
    """Loads a model; returns what answers with it. Top-level, so that it can be pickled."""
    import torch

    from internvl.inference import load as loading_models

    # Of this thread alone: what is built for a GPU goes to the current one.
    # A plain `cuda` is the current one already, and refused by `set_device`.
    if device is not None and device.startswith("cuda:"):
        torch.cuda.set_device(device)
    handle = loading_models.load(opened, device=device, **settings)
    # Each needs half of the server's modules.
    if handle.family == "dual":
        from internvl.serve.dual_engine import DualEngine

        return DualEngine(handle.as_dual("embeddings"))
    from internvl.serve.chat_engine import ChatEngine

    return ChatEngine(handle.as_chat("a conversation"), options, adapters)


def _check_gpus(args: Arguments, present: int) -> None:
    """Raises ConfigError unless each copy of the model gets a GPU of its own."""
    if args.device is not None or args.device_map is not None:
        raise ConfigError(
            "--gpus puts a copy of the model on each GPU; leave --device and --device-map out"
        )
    # Another GPU than those that are there would fail in a thread, after the loading of others.
    if not 1 <= args.gpus <= present:
        raise ConfigError(f"--gpus {args.gpus}: this machine has {present} GPUs that torch can use")


def _name_of(model: str) -> str:
    """Returns the name that a model is listed under: a hub id's or folder's last word."""
    path = Path(model)
    # `.` and `..` have no name of their own.
    return path.name or path.resolve().name


_LIMITS: dict[str, tuple[str, str]] = {
    "max_length": ("N", "most tokens of a prompt and its answer together (default: 8192)"),
    "max_tokens": ("N", "tokens of an answer if the request does not say (default: 1024)"),
    "max_images": ("N", "most images of a conversation (default: 16)"),
    "max_videos": ("N", "most videos of a conversation (default: 4)"),
    "max_waiting": (
        "N",
        "most requests that wait for a slot; more are answered 429 (default: 64)",
    ),
    "max_body": ("MIB", "largest request (default: 128)"),
}
"""Whole number of Limits -> its unit and help."""


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    sub.add_argument("model", help="model, adapter or run folder, or hub id")
    sub.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="adapter folder that requests choose by its name as their model; repeat it",
    )
    _add_address(sub)
    sub.add_argument("--gpus", type=int, metavar="N", help="a copy of the model on each of N GPUs")
    sub.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="most requests at a time (default: as many as the GPU's memory holds, up to 128)",
    )
    for key, (unit, text) in _LIMITS.items():
        option = f"--{key.replace('_', '-')}"
        sub.add_argument(option, dest=key, type=int, metavar=unit, help=text)
    sub.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="of requests that do not say (default: 0, greedy)",
    )
    sub.add_argument(
        "--engine",
        choices=_ENGINES,
        help="where a chat model runs (default: on a GPU in a process of its own, so that requests "
        "that are read cost no time of it)",
    )
    sub.add_argument(
        "--readers",
        type=int,
        metavar="N",
        help="processes that decode images, 0 for threads (default: up to 8 for a GPU)",
    )
    sub.add_argument("--no-compile", action="store_true", help="start sooner, answer more slowly")
    add_loading_arguments(sub)
    add_run_arguments(sub)


def _add_address(sub: argparse.ArgumentParser) -> None:
    """Adds where the server listens, and whom it trusts."""
    # Not all addresses: whoever reaches the port uses the GPU.
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    sub.add_argument("--port", type=int, default=8000, help="0 for any free one (default: 8000)")
    sub.add_argument("--port-file", type=Path, metavar="FILE", help="write the port there")
    sub.add_argument("--name", help="name of the model (default: the last word of its folder)")
    sub.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="refuse requests without this key; repeat it (default: $INTERNVL_API_KEY, or none)",
    )
    sub.add_argument(
        "--allow-hosts",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch images from this host although its address is not public; repeat it",
    )
    sub.add_argument(
        "--allow-files",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="read file:// images below this folder; repeat it",
    )
    sub.add_argument(
        "--drain", type=int, default=60, metavar="S", help="seconds for running answers at the end"
    )
