"""`internvl evaluate`: scores of a model, a run or a file of answers."""

import argparse
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from internvl.cli.common import (
    Arguments,
    add_loading_arguments,
    add_rank_arguments,
    add_run_arguments,
    loading,
    open_named,
    run_as_ranks,
    split_commas,
)
from internvl.config import eval_options
from internvl.config.docs import field_docs
from internvl.config.unions import members, name_of
from internvl.datasets import published as published_sets
from internvl.errors import ConfigError

_OPTIONS = (
    *("to", "root", "dataset_root", "split", "output", "features"),
    *("device", "dtype", "device_map", "quantize", "base"),
)
"""Options of the same name as the argument of `evaluate.run`."""


def run(args: Arguments) -> int:
    """Evaluate a model on published sets or your own files, or a run as its recipe says."""
    if args.answers is not None:
        return _score(args)
    if args.model is None:
        raise ConfigError("a model or run to evaluate is missing; or give --answers FILE")
    from internvl.models import hub

    # Nothing is asked of the hub before the tasks are checked.
    if not hub.is_hub_id(args.model):
        for asked_step in args.step or [None]:
            open_named(args, asked_step)
    from internvl.launch import local

    if args.device_map is not None and (args.gpus or args.processes):
        raise ConfigError(
            "--device-map auto spreads one model over all GPUs of a single process; leave --gpus "
            "and --processes out"
        )
    with loading(args.model):
        num_ranks = 1
        if args.device_map is None:
            num_ranks = local.choose_ranks(args.gpus, args.processes, args.device)
        if num_ranks == 1:
            from internvl import dist, evaluate
    if num_ranks > 1:
        return run_as_ranks(args, num_ranks)
    fields = {name: getattr(args, name) for name in eval_options()}
    options: dict[str, Any] = {
        **{name: getattr(args, name) for name in _OPTIONS},
        "languages": args.language,
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
    with loading(args.answers):
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


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_rank_arguments(sub)
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
        type=split_commas,
        default=(),
        help="languages of a multilingual set, separated by commas: en,cn",
    )
    sub.add_argument(
        "--output", type=Path, help="append the result lines of CLIP_benchmark to this file"
    )
    sub.add_argument("--features", type=Path, help="keep the features in this folder")
    add_loading_arguments(sub, dtype="a run's own; for a model bfloat16 on a GPU, float32 on a CPU")
    add_run_arguments(sub, several=True)
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
        return {"type": split_commas}
    return {"type": hint}
