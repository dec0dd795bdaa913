"""The command line: `internvl VERB …`. The only module that prints or exits.

Exit codes: 0 success; 1 the work failed, with one sentence on standard error; 2 the command or
recipe is wrong; 130 stopped by Ctrl-C; 141 nobody reads the output. The last two print nothing.
A verb's docstring is its help.

A verb checks its arguments and files first, then says what it loads, then imports torch and
transformers, which take seconds (`_loading`). What is imported before must not import them.
"""

import argparse
import contextlib
import gc
import io
import logging
import os
import select
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from internvl import errors, launchers, log
from internvl.config import Recipe, eval_options
from internvl.config.docs import field_docs
from internvl.config.recipes import load_recipe
from internvl.config.unions import members, name_of
from internvl.datasets import published as published_sets
from internvl.errors import (
    ConfigError,
    Interrupted,
    RanksFailed,
    UnknownGpu,
    UnknownModel,
    UserError,
)
from internvl.files import write_text
from internvl.launch import options as launch_options

Arguments = argparse.Namespace


@contextlib.contextmanager
def _loading(name: object) -> Iterator[None]:
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


def demo(args: Arguments) -> int:
    """Train, evaluate, export and reload a tiny model on a CPU; writes report.html."""
    with _loading("the demo"):
        from internvl import demo

    page = demo.run(args.to, short=args.short)
    print(f"The report is {page.resolve()}; open it in a browser.")
    return 0


def doctor(args: Arguments) -> int:
    """Check this machine and its libraries; says how to install what is missing."""
    from internvl import doctor

    with _loading("the libraries of this machine"):
        findings = doctor.report()
    print(doctor.render(findings))
    return int(doctor.is_broken(findings))


def models(args: Arguments) -> int:
    """List the released models, or describe one: parts, size, memory, published scores."""
    from internvl import zoo

    if args.name is None:
        print(zoo.render_table())
        return 0
    try:
        text = zoo.describe(args.name)
        repository = zoo.repository(args.name) if args.download else ""
    except UnknownModel as error:
        # Exit code 2: the name is part of the command.
        raise ConfigError(str(error)) from None
    if args.download:
        from internvl.models import hub

        text = str(hub.download(repository, args.to))
    print(text)
    return 0


def check(args: Arguments) -> int:
    """Check a recipe, every sample and every image; with --plan, predict memory and time.

    With --parity, check that a model is asked as it was trained, here and elsewhere.
    """
    if args.parity:
        return _parity(args)
    recipe = load_recipe(args.recipe, args.overrides)
    if args.rehearse:
        return _rehearse(recipe, args)
    if args.plan:
        return _plan(recipe, args)
    from internvl.inference import opened

    opened.check_start(recipe, weights=False)
    with _loading(recipe.model.name):
        from internvl import check

    checked = check.run(recipe, report=args.report)
    print(checked.render())
    return int(bool(checked.problems))


def _parity(args: Arguments) -> int:
    """Prints how training, inference and an export render the same samples; 1 if they differ."""
    if args.overrides:
        raise ConfigError(f"{args.overrides[0]}: --parity takes a model, which has no keys to set")
    with _loading(args.recipe):
        from internvl.check import parity

    compared = parity.run(str(args.recipe), annotations=args.annotations, images=args.images)
    print(compared.render())
    return int(compared.num_different > 0)


def _plan(recipe: Recipe, args: Arguments) -> int:
    """Prints the check and the plan; only the plan if the model's files are not on this machine."""
    gpu = _gpu_to_plan_for(args.gpu)
    if args.gpus < 1:
        raise ConfigError(f"--gpus: at least 1, not {args.gpus}")
    with _loading(recipe.model.name):
        from internvl import plan

        # Its model may be a released one that was never downloaded.
        is_here = plan.is_here(recipe)
        if is_here:
            from internvl import check

    checked = None
    if is_here:
        checked = check.run(recipe, report=args.report)
        print(checked.render() + "\n")
    else:
        # The tokenizer is among them, so no sample can be encoded.
        message = "the files of %s are not on this machine, so the data is not checked"
        log.get_logger().warning(message, recipe.model.name)
    planned = plan.make(recipe, gpu, None if checked is None else checked.step, args.gpus)
    if checked is not None:
        planned = replace(planned, inherited="")  # printed by the check already
    print(planned.render())
    return int(not planned.fits or (checked is not None and bool(checked.problems)))


def _rehearse(recipe: Recipe, args: Arguments) -> int:
    """Prints what one rank of `--gpus` takes here, beside the plan."""
    if args.gpus < 1:
        raise ConfigError(f"--gpus: at least 1, not {args.gpus}")
    from internvl.data import sources
    from internvl.inference import opened

    opened.check_start(recipe, weights=False)
    sources.check_files(recipe.data)
    with _loading(recipe.model.name):
        import torch

        from internvl.check import rehearse

    # Without a GPU of the table there is nothing to plan for, and memory is measured all the same.
    is_meant = args.gpu != "auto" or torch.cuda.is_available()
    rehearsed = rehearse.run(recipe, args.gpus, _gpu_to_plan_for(args.gpu) if is_meant else None)
    print(rehearsed.render())
    return int(not rehearsed.fits)


def _gpu_to_plan_for(name: str) -> Any:
    """Returns the GPU of this name, or for "auto" this machine's.

    Raises:
        ConfigError: no such GPU, or this machine has none that the table lists.
    """
    from internvl.zoo import gpus

    try:
        if name != "auto":
            return gpus.find(name)
    except UnknownGpu as error:
        raise ConfigError(f"--gpu: {error}") from None
    # Only now: a plan for a named GPU needs no CUDA.
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = gpus.recognize(properties.name, properties.total_memory / 2**30)
    if gpu is None:
        names = ", ".join(gpus.GPUS)
        raise ConfigError(f"--gpu: this machine has no GPU of a known kind; name one of {names}")
    return gpu


def train(args: Arguments) -> int:
    """Train a recipe; if its run folder exists, resume where the run stopped."""
    recipe = _open_recipe(args)
    from internvl.launch import local

    with _loading(recipe.model.name):
        num_ranks = local.choose_ranks(args.gpus, args.processes, recipe.device)
        if num_ranks == 1:
            from internvl import dist, train
    if num_ranks > 1:
        return _run_as_ranks(args, num_ranks)
    try:
        train.run(recipe)
    except Interrupted:
        if dist.is_main():
            print(_next_commands(recipe, "what it has learned so far"))
        raise
    if dist.is_main():
        print(_next_commands(recipe, "the trained model"))
    return 0


def _open_recipe(args: Arguments) -> Recipe:
    """Reads the recipe to train, whose model and data files are here."""
    recipe = load_recipe(args.recipe, args.overrides)
    from internvl.data import sources
    from internvl.inference import opened

    # A run that goes on holds its weights: its base may be gone.
    if not opened.is_run(recipe.run):
        opened.check_start(recipe, weights=True)
    sources.check_files(recipe.data)
    return recipe


def _run_as_ranks(args: Arguments, num_ranks: int) -> int:
    """Runs this command once more, as several ranks, until they end.

    Raises:
        RanksFailed: one of them failed, for the reason in the text.
    """
    from internvl.launch import local

    log.get_logger().info("starting %d processes …", num_ranks)
    ended = local.run(local.verb(*args.argv), num_ranks)
    if ended.sentence:
        raise RanksFailed(ended.sentence, ended.code)
    return ended.code


def launch(args: Arguments) -> int:
    """Write a Slurm job that trains or evaluates on several nodes, and submit it if asked."""
    from internvl.launch import slurm

    inner: Arguments = args.command
    run = None
    if inner.verb == "train":
        run = _check_training(inner, args.nodes * launch_options.per_node(args))
    else:
        _check_evaluation(inner)
    job, file = launch_options.job_of(args, Path(inner.recipe if run else inner.model).stem, run)
    if args.dry_run:
        print(slurm.render(job), end="")
        return 0
    slurm.write(job, file)
    if args.submit:
        log_file = str(job.log).replace("%j", slurm.submit(file))
        print(f"Submitted {file}; its output will be in {log_file}.")
    else:
        print(f"Written: {file}. To submit it:\n  sbatch {shlex.quote(str(file))}")
    return 0


def _check_training(args: Arguments, num_ranks: int) -> Path:
    """Refuses what the run would refuse when it starts; returns its folder."""
    recipe = _open_recipe(args)
    if args.gpus is not None or args.processes is not None:
        raise ConfigError("--gpus, --processes: give --gpus-per-node instead")
    problem = recipe.parallel.unfit(num_ranks) if num_ranks > 1 else None
    if problem is not None:
        raise ConfigError(problem)
    return recipe.run


def _check_evaluation(args: Arguments) -> None:
    """Refuses models and options that `evaluate` would refuse."""
    if args.model is None or args.answers is not None:
        raise ConfigError("launch evaluate: name a model or run; answers are scored without GPUs")
    from internvl.models import hub

    if not hub.is_hub_id(args.model):
        for step in args.step or [None]:
            _open(args, step)


def _next_commands(recipe: Recipe, model: str) -> str:
    """Returns the commands that use a run's model, which is described in words."""
    run = shlex.quote(str(recipe.run))
    exported = shlex.quote(f"{recipe.run}-exported")
    commands = [f"internvl evaluate {run}" if recipe.evals else None]
    if recipe.objective.family == "chat":
        commands += [
            None if recipe.evals else f"internvl evaluate {run} --annotations FILE",
            f"internvl chat {run} --image FILE",
        ]
    else:
        commands += [f"internvl evaluate {run} retrieval-folder --annotations FILE"]
    commands += [f"internvl export {run} --to {exported}"]
    return "\n  ".join([f"To use {model}:", *filter(None, commands)])


def evaluate(args: Arguments) -> int:
    """Evaluate a model on published sets or your own files, or a run as its recipe says."""
    if args.answers is not None:
        return _score(args)
    if args.model is None:
        raise ConfigError("a model or run to evaluate is missing; or give --answers FILE")
    from internvl.models import hub

    # Nothing is asked of the hub before the tasks are checked.
    if not hub.is_hub_id(args.model):
        for asked_step in args.step or [None]:
            _open(args, asked_step)
    from internvl.launch import local

    if args.device_map is not None and (args.gpus or args.processes):
        raise ConfigError(
            "--device-map auto spreads one model over all GPUs of a single process; leave --gpus "
            "and --processes out"
        )
    with _loading(args.model):
        num_ranks = 1
        if args.device_map is None:
            num_ranks = local.choose_ranks(args.gpus, args.processes, args.device)
        if num_ranks == 1:
            from internvl import dist, evaluate
    if num_ranks > 1:
        return _run_as_ranks(args, num_ranks)
    fields = {name: getattr(args, name) for name in eval_options()}
    options: dict[str, Any] = {
        "to": args.to,
        "root": args.root,
        "dataset_root": args.dataset_root,
        "languages": args.language,
        "split": args.split,
        "output": args.output,
        "features": args.features,
        "device": args.device,
        "dtype": args.dtype,
        "device_map": args.device_map,
        "quantize": args.quantize,
        "base": args.base,
        # Options that were not given must not replace a recipe's values.
        **{name: value for name, value in fields.items() if value is not None},
    }
    if args.step is not None and len(args.step) > 1:
        compared = evaluate.compare(args.model, args.step, args.tasks, **options)
        if not dist.is_main():
            return 0
        print(evaluate.render_steps(compared))
        for measured_step, result in compared.items():
            print(f"step {measured_step}: {evaluate.closing(result)}")
        return 0
    step = None if args.step is None else args.step[0]
    measured = evaluate.measure(args.model, args.tasks, step=step, **options)
    if not dist.is_main():
        return 0
    # Published values are for test splits only.
    model = args.model if args.split == "test" else ""
    print(evaluate.render(measured.metrics, model, measured.counts, measured.tables))
    print(evaluate.closing(measured))
    return 0


def _score(args: Arguments) -> int:
    """Scores a file of answers; the first word may be a task, as no model is needed."""
    words = [word for word in (args.model, *args.tasks) if word is not None]
    tasks = {*published_sets.TASKS, *published_sets.USER_TASKS}
    model = words.pop(0) if words and words[0] not in tasks else ""
    if len(words) > 1:
        raise ConfigError("--answers: a file of answers is for one task")
    with _loading(args.answers):
        from internvl import evaluate
    fields = {name: getattr(args, name) for name in eval_options()}
    scored = evaluate.score(
        args.answers,
        *words,
        model=model,
        to=args.to,
        root=args.root,
        dataset_root=args.dataset_root,
        languages=args.language,
        split=args.split,
        step=None if args.step is None else args.step[0],
        **{name: value for name, value in fields.items() if value is not None},
    )
    shown_model = model if args.split == "test" else ""
    print(evaluate.render(scored.metrics, shown_model, scored.counts, scored.tables))
    print(evaluate.closing(scored))
    return 0


def chat(args: Arguments) -> int:
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
    opened = _open(args, args.step)
    with _loading(args.model):
        from internvl.inference import load as loading

    model = loading.load(
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


def merge(args: Arguments) -> int:
    """Merge adapters into their base model and export it as a self-contained folder."""
    exporter = _exporter(args)
    # Without adapters it would be a plain export, which is probably not what the user meant.
    if not exporter.has_adapters(args.model, step=args.step, base=args.base):
        raise UserError(
            f"{args.model}: has no adapters to merge; `internvl export` writes a model as it is"
        )
    return _export(exporter, args)


def export(args: Arguments) -> int:
    """Export a self-contained model folder, reload it and compare its outputs."""
    return _export(_exporter(args), args)


def _exporter(args: Arguments) -> ModuleType:
    """Imports `internvl.export`, after a check that the model is there."""
    _open(args, args.step)
    with _loading(args.model):
        from internvl import export

    return export


def _export(exporter: ModuleType, args: Arguments) -> int:
    chosen = {"code_from": args.code_from, "step": args.step, "base": args.base}
    print(exporter.run(args.model, args.to, args.format, **chosen))
    return 0


def _open(args: Arguments, step: int | None) -> Any:
    """Opens the model of a command line; its folder is refused before torch is imported."""
    from internvl.inference.opened import open_model

    opened = open_model(args.model, step=step, base=args.base)
    opened.check()
    return opened


def data(args: Arguments) -> int:
    """Prepare downloaded data sets for training, or convert boxes, captions and Parquet files."""
    if args.action == "convert":
        from internvl.datasets import convert

        converted = convert.run(args.name, args.source, args.target)
        print(_render_counts(converted.counts, converted.files))
        return 0
    from internvl.datasets import prepare

    prepared = prepare.run(args.name, args.root, download=args.download)
    print(_render_counts(prepared.counts, prepared.files))
    for missing in prepared.missing:
        print(missing, file=sys.stderr)
    return int(not prepared.ready)


def compat(args: Arguments) -> int:
    """Run a command line of the original code: it is translated, shown and run by this package."""
    from internvl import compat

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
        parsed = parse(words)
        parsed.debug = args.debug
        code = VERBS[parsed.verb](parsed)
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


def _render_counts(counts: Mapping[str, int], files: Sequence[Path]) -> str:
    return "\n".join([*(f"{name}: {n:,}" for name, n in counts.items()), *map(str, files)])


VERBS: dict[str, Callable[[Arguments], int]] = {
    "demo": demo,
    "doctor": doctor,
    "models": models,
    "check": check,
    "train": train,
    "launch": launch,
    "evaluate": evaluate,
    "chat": chat,
    "merge": merge,
    "export": export,
    "data": data,
    "compat": compat,
}


def parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser of the whole command line, and verb -> its own parser."""
    top = argparse.ArgumentParser(
        prog="internvl", description="Train, evaluate and ship the InternVL models."
    )
    # Of the package in memory, not of an installed one's metadata, which a checkout may not have.
    version = sys.modules["internvl"].__version__
    top.add_argument("--version", action="version", version=f"internvl {version}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = {
        name: verbs.add_parser(name, help=verb.__doc__, description=verb.__doc__)
        for name, verb in VERBS.items()
    }
    for sub in add.values():
        sub.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
    add["demo"].add_argument(
        "--to", type=Path, default=Path("runs/demo"), help="folder to write (default: runs/demo)"
    )
    add["demo"].add_argument(
        "--short", action="store_true", help="train for about a minute, only to see that it works"
    )
    add["models"].add_argument(
        "name", nargs="?", help="describe this model or part, such as InternVL2-2B"
    )
    add["models"].add_argument(
        "--download", action="store_true", help="download its files from the Hugging Face hub"
    )
    add["models"].add_argument(
        "--to", type=Path, help="folder for the download (default: the hub's cache)"
    )
    for name in ("check", "train"):
        add[name].add_argument(
            "recipe",
            type=Path,
            help="YAML file, run folder, or name of a recipe: internvl2_2b_lora",
        )
        add[name].add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="replace a value of the recipe, such as optim.lr=1e-5",
        )
    _add_rank_arguments(add["train"])
    _add_rank_arguments(add["evaluate"])
    launch_options.add_arguments(add["launch"])
    add["check"].add_argument("--report", type=Path, help="also write an HTML report to this file")
    add["check"].add_argument(
        "--plan", action="store_true", help="predict memory use and training time"
    )
    add["check"].add_argument(
        "--parity",
        action="store_true",
        help="compare how training, inference and an export render samples for a MODEL, which is "
        "named in place of the recipe",
    )
    add["check"].add_argument(
        "--annotations",
        type=Path,
        help="chat JSONL to compare with --parity, instead of drawn ones",
    )
    add["check"].add_argument(
        "--images", type=Path, default=Path(), help="folder of its images (default: here)"
    )
    add["check"].add_argument(
        "--gpu",
        default="auto",
        help="GPU to plan for: H200, A100-40, 4090 … (default: this machine's)",
    )
    add["check"].add_argument("--gpus", type=int, default=1, help="number of GPUs to plan for")
    add["check"].add_argument(
        "--rehearse",
        action="store_true",
        help="run a few steps as one of --gpus GPUs on the one that is here: memory and time",
    )
    _add_evaluate_arguments(add["evaluate"])
    add["chat"].add_argument("model", help="model, adapter or run folder, or hub id")
    _add_chat_arguments(add["chat"])
    for name in ("merge", "export"):
        add[name].add_argument("model", help="run, adapter or model folder, or hub id")
        add[name].add_argument("--to", type=Path, required=True, help="folder to create")
        add[name].add_argument(
            "--format",
            choices=("hf", "official"),
            default="hf",
            help="hf: for transformers (default); official: for the original's code",
        )
        add[name].add_argument(
            "--code-from",
            type=Path,
            help="with --format official: copy the original's Python files from this folder",
        )
    for name in ("evaluate", "chat", "merge", "export"):
        _add_run_arguments(add[name], several=name == "evaluate")
    _add_data_arguments(add["data"])
    _add_compat_arguments(add["compat"])
    return top, add


def _add_rank_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the options that say how many processes share the work on this machine."""
    sub.add_argument(
        "--gpus", type=int, metavar="N", help="use N GPUs of this machine (default: all of them)"
    )
    sub.add_argument(
        "--processes", type=int, metavar="N", help="without a GPU: share the work among N processes"
    )


def _add_run_arguments(sub: argparse.ArgumentParser, *, several: bool) -> None:
    """Adds the options of runs and adapters that a verb opens."""
    text = "step of a run's checkpoint (default: the newest); or name RUN/checkpoints/000400"
    if several:
        text += "; several steps, as 200,400, are compared"
    sub.add_argument("--step", type=_steps if several else int, metavar="STEP", help=text)
    sub.add_argument(
        "--base",
        action="append",
        metavar="DIR",
        help="model in place of a base that a moved run or adapter folder misses; repeat it for a "
        "chain that misses several",
    )


def _add_data_arguments(sub: argparse.ArgumentParser) -> None:
    actions = sub.add_subparsers(dest="action", required=True, metavar="prepare|convert")
    prepare = actions.add_parser("prepare", help="turn downloaded files into annotation files")
    prepare.add_argument(
        "name", help="data set: coco-caption, flickr30k, flickr30k-cn, nocaps, sft-v1.2 …"
    )
    prepare.add_argument("--root", type=Path, required=True, help="folder of the downloads")
    prepare.add_argument("--download", action="store_true", help="download missing files")
    convert = actions.add_parser("convert", help="convert a file or folder to another format")
    convert.add_argument(
        "name", help="conversion: boxes-to-1000, boxes-to-unit, captions or parquet"
    )
    convert.add_argument("source", type=Path, help="file or folder to convert")
    convert.add_argument("target", type=Path, help="file or folder to write")


# A literal: `internvl --help` must not read the tables of all flags and scripts.
COMPAT_COMMANDS = (
    *("evaluate.sh", "finetune", "shell", "clip_benchmark", "merge_lora"),
    *("internvl_custom2hf", "internvl_hf2custom", "install-shims"),
)


def _add_compat_arguments(sub: argparse.ArgumentParser) -> None:
    sub.usage = "internvl compat COMMAND …"
    names = ", ".join(COMPAT_COMMANDS)
    sub.epilog = f"commands: {names}; `internvl compat COMMAND --help` shows the words of one"
    sub.add_argument("command", metavar="COMMAND", help="command of the original, see below")
    sub.add_argument("words", nargs=argparse.REMAINDER, metavar="…", help="its words as they are")


def _add_evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    # argparse would wrap the list of tasks into one paragraph.
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = f"tasks:\n{published_sets.list_tasks()}"
    sub.add_argument("model", nargs="?", help="run folder, model folder or hub id")
    sub.add_argument(
        "tasks", nargs="*", metavar="TASK", help="from the list below, or of the run's recipe"
    )
    sub.add_argument("--to", type=Path, help="folder for the results")
    sub.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="score the answers in this file, without a model: rows of an earlier result "
        "(result/TASK.jsonl), or image_id and caption as the original writes them",
    )
    sub.add_argument(
        "--root",
        type=Path,
        default=Path("data"),
        help="folder of the published sets (default: data)",
    )
    sub.add_argument(
        "--dataset-root", help="folder of the set itself; {dataset} is replaced by its name"
    )
    sub.add_argument("--split", default="test", help="split to measure (default: test)")
    sub.add_argument(
        "--language",
        type=_split_commas,
        default=(),
        help="languages of a multilingual set, separated by commas: en,cn",
    )
    sub.add_argument(
        "--output", type=Path, help="append the result lines of CLIP_benchmark to this file"
    )
    sub.add_argument("--features", type=Path, help="keep the features in this folder")
    sub.add_argument("--device", help="cuda, cuda:1 or cpu (default: the GPU if there is one)")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: a run's own; for a model bfloat16 on a GPU, float32 on a CPU",
    )
    sub.add_argument(
        "--device-map", choices=("auto",), help="spread a model larger than a GPU over all GPUs"
    )
    sub.add_argument("--quantize", choices=("8bit", "4bit"), help="load 8- or 4-bit weights")
    _add_eval_options(sub)


def _add_eval_options(sub: argparse.ArgumentParser) -> None:
    """Adds an option for every key of the evaluations, grouped by the types that have it."""
    groups: dict[tuple[str, ...], Any] = {}
    for key, sections in eval_options().items():
        types = tuple(name_of(section, "type") for section in sections)
        if types not in groups:
            groups[types] = sub.add_argument_group(f"evaluations of type {', '.join(types)}")
        # Text -> the types that have it: types that share a text share its line.
        names: dict[str, list[str]] = {}
        for section, name in zip(sections, types, strict=True):
            names.setdefault(field_docs(section)[key], []).append(name)
        text = " ".join(f"{', '.join(n)}: {t}" if len(names) > 1 else t for t, n in names.items())
        option = f"--{key.replace('_', '-')}"
        groups[types].add_argument(
            # --mode c,g reads better; --modes is accepted too.
            *([option.removesuffix("s")] if key == "modes" else []),
            option,
            dest=key,
            # None tells an option that was not given from one that repeats the default.
            default=None,
            # An option that is not given is what null is in a recipe; argparse formats % itself.
            help=text.replace("null:", "default:").replace("%", "%%"),
            **_value_settings(get_type_hints(sections[0])[key]),
        )


def _value_settings(hint: Any) -> dict[str, Any]:
    """Returns `add_argument`'s settings for a value of this type."""
    (hint, *_) = members(hint)
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        # pydantic converts the elements, with its error for the whole key.
        return {"type": _split_commas}
    return {"type": hint}


def _steps(text: str) -> list[int]:
    """Parses steps separated by commas."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        # argparse's own message would name this function.
        raise argparse.ArgumentTypeError(
            f"{text!r} is no step; write a number, or several as 200,400"
        ) from None


def _split_commas(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _add_chat_arguments(sub: argparse.ArgumentParser) -> None:
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
    sub.add_argument("--device", help="cuda, cuda:1 or cpu (default: the GPU if there is one)")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    sub.add_argument("--device-map", choices=("auto",), help="spread the model over all GPUs")
    sub.add_argument("--quantize", choices=("8bit", "4bit"), help="load 8- or 4-bit weights")


def parse(argv: Sequence[str]) -> Arguments:
    """Parses a command line; options may stand between overrides."""
    top, verbs = parser()
    if not argv:
        # As other tools of verbs do: the list of verbs, and the code of a wrong command.
        top.print_help(sys.stderr)
        sys.exit(2)
    # argparse's intermixed parsing refuses parsers with subparsers, so a verb's own is called.
    if not argv or argv[0] not in verbs or argv[0] in ("data", "compat"):
        return top.parse_args(argv)
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


def _configure_libraries(*, downloading: bool) -> None:
    """Sets environment variables that libraries read once, when they are imported."""
    # transformers draws a progress bar for every model it opens, however small.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not downloading:
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
        log.setup(logging.DEBUG if args.debug else logging.INFO, rank=launchers.rank())
        _configure_libraries(downloading=getattr(args, "download", False))
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
    except KeyboardInterrupt:
        return _INTERRUPTED, ""
    except Exception as error:
        if _comes_of_closed_output(error):
            return _OUTPUT_CLOSED, ""
        code, message = _exit_code(error), _explain(error)
        launchers.report(message, code, lost_peer=errors.lost_peer(error))
        if args.debug:
            raise
        return code, message
    return code, ""


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
