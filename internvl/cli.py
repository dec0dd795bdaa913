"""The command line: `internvl VERB …`. The only place that prints or exits.

Exit codes: 0 done; 1 the work failed, one sentence on standard error; 2 the command or recipe is
wrong; 130 stopped by Ctrl-C, 141 nobody reads the output any more, both without a word. Each verb
imports what it needs when it runs, so `--help` is instant.
"""

import argparse
import gc
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from internvl import errors, log
from internvl.config import Recipe, eval_options
from internvl.config.docs import field_docs
from internvl.config.recipes import load_recipe
from internvl.config.unions import members, name_of
from internvl.datasets import published as published_sets
from internvl.errors import ConfigError, UnknownGpu, UnknownModel, UserError

Arguments = argparse.Namespace


def demo(args: Arguments) -> int:
    """Embedded data, a tiny model, a CPU: train, evaluate, export, reload, report.html."""
    from internvl import demo

    page = demo.run(args.to, short=args.short)
    print(f"The report is {page.resolve()}; open it in a browser.")
    return 0


def doctor(args: Arguments) -> int:
    """What this machine has, what is missing, and how to get it."""
    from internvl import doctor

    findings = doctor.report()
    print(doctor.render(findings))
    return int(doctor.is_broken(findings))


def models(args: Arguments) -> int:
    """The released models: size, parts, template, memory, published scores."""
    from internvl import zoo

    if args.name is None:
        print(zoo.render_table())
        return 0
    try:
        described = zoo.describe(args.name)
    except UnknownModel as error:
        raise ConfigError(str(error)) from None
    if args.download:
        from internvl.models import hub

        name = args.name if "/" in args.name else zoo.find(args.name).repository
        described = str(hub.download(name, args.to))
    print(described)
    return 0


def check(args: Arguments) -> int:
    """Resolve a recipe, read every sample, open every image; with --plan, memory and time."""
    recipe = load_recipe(args.recipe, args.overrides)
    if args.plan:
        return _plan(recipe, args)
    from internvl import check

    checked = check.run(recipe, report=args.report)
    print(checked.render())
    return int(bool(checked.problems))


def _plan(recipe: Recipe, args: Arguments) -> int:
    """The check and the plan; where the model's files are not here, the plan alone."""
    gpu = _gpu(args.gpu)
    if args.gpus < 1:
        raise ConfigError(f"--gpus: at least 1, not {args.gpus}")
    # Imports make a million objects that all stay: looking through them takes a fifth of the time.
    gc.disable()
    from internvl import check, plan

    gc.enable()

    checked = None
    if plan.is_here(recipe):
        checked = check.run(recipe, report=args.report)
        print(checked.render() + "\n")
    else:
        log.get_logger().warning("%s is not here, so the data are not read", recipe.model.name)
    made = plan.make(recipe, gpu, None if checked is None else checked.step, args.gpus)
    if checked is not None:
        made = replace(made, inherited="")  # the check has said it
    print(made.render())
    return int(not made.fits or (checked is not None and bool(checked.problems)))


def _gpu(name: str) -> Any:
    """The GPU to plan for: by name, or with "auto" this machine's.

    Raises:
        ConfigError: no such GPU, or none here that the table knows.
    """
    from internvl.zoo import gpus

    try:
        if name != "auto":
            return gpus.find(name)
    except UnknownGpu as error:
        raise ConfigError(f"--gpu: {error}") from None
    import torch

    found = None
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found = gpus.recognize(card.name, card.total_memory / 2**30)
    if found is None:
        raise ConfigError(f"--gpu: no known GPU is here; name one of {', '.join(gpus.GPUS)}")
    return found


def train(args: Arguments) -> int:
    """Train; on an existing run folder, go on where it stopped."""
    recipe = load_recipe(args.recipe, args.overrides)
    from internvl import train

    train.run(recipe)
    return 0


def evaluate(args: Arguments) -> int:
    """Measure a model on published sets or your own files, or a run as its recipe says."""
    from internvl import evaluate

    fields = {name: getattr(args, name) for name in eval_options()}
    found = evaluate.measure(
        args.model,
        args.tasks,
        to=args.to,
        root=args.root,
        dataset_root=args.dataset_root,
        languages=args.language,
        split=args.split,
        output=args.output,
        features=args.features,
        device=args.device,
        dtype=args.dtype,
        **{name: value for name, value in fields.items() if value is not None},
    )
    model = args.model if args.split == "test" else ""
    print(evaluate.render(found.metrics, model, found.counts))
    print(f"computed in {found.computed}")
    return 0


def chat(args: Arguments) -> int:
    """A conversation in the terminal; with --prompt one answer."""
    from internvl.data.images import as_rgb
    from internvl.inference import load as loading
    from internvl.inference.generate import Request, Settings

    # Before a model is loaded: what is wrong here is not the fault of a question.
    settings = Settings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
    )
    for image in args.image:
        as_rgb(image)  # only to see that it can be: how it is read, the model says
    images: list[Any] = [*args.image]
    model = loading.load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        device_map=args.device_map,
        quantize=args.quantize,
    ).as_chat("a conversation")
    video_marks = ""
    if args.video is not None:
        model, frames = _frames(model, args.video, args.frames)
        images += frames
        video_marks = "".join(f"Frame{i}: <image>\n" for i in range(1, len(frames) + 1))

    def marked(question: str) -> str:
        return _marked(question, len(args.image), video_marks)

    if args.prompt:
        turns = [{"role": "user", "content": marked(args.prompt)}]
        _say(model, Request(turns, images), vars(settings))
        return 0
    return _converse(model, images, marked, vars(settings))


def _converse(
    model: Any, images: list[Any], marked: Callable[[str], str], settings: dict[str, Any]
) -> int:
    """Asks for questions and answers them until the input ends. What is wrong with a question is
    said, and it is asked for again."""
    from internvl.inference.generate import Request

    turns: list[dict[str, str]] = []
    while True:
        try:
            prompt = input("> ")
            if not prompt.strip():
                continue
            question = prompt if turns else marked(prompt)  # the images belong to the first one
            asked = [*turns, {"role": "user", "content": question}]
            answer = _say(model, Request(asked, images), settings)
        except EOFError:
            return 0
        except (UserError, UnicodeDecodeError) as error:
            print(f"internvl: {error}", file=sys.stderr)
            continue
        if answer:
            turns = [*asked, {"role": "assistant", "content": answer}]
        else:
            print("internvl: the answer is empty; the question is forgotten", file=sys.stderr)


def _marked(question: str, num_images: int, video_marks: str) -> str:
    """A first question with the marks of its images and video, where it has none of its own."""
    from internvl.data.messages import IMAGE_MARK, VIDEO_MARK, count_marks, fill_marks

    if count_marks(question, IMAGE_MARK):
        return question
    if video_marks and count_marks(question, VIDEO_MARK) == 1:
        return f"{IMAGE_MARK}\n" * num_images + fill_marks(question, VIDEO_MARK, video_marks.strip)
    return f"{IMAGE_MARK}\n" * num_images + video_marks + question


def _say(model: Any, request: Any, settings: dict[str, Any]) -> str:
    """Prints an answer, piece by piece where a person watches; returns it."""
    if settings["num_beams"] > 1 or not sys.stdout.isatty():
        answer = model.answer([request], **settings)[0]
        print(answer)
        return answer
    answer = ""
    for piece in model.stream(request, **settings):
        print(piece, end="", flush=True)
        answer += piece
    print()
    return answer


def _frames(model: Any, video: str, count: int) -> tuple[Any, list[Any]]:
    """(the model with one tile for every image, `count` frames spread evenly over a video)."""
    from dataclasses import replace

    import numpy as np

    from internvl.config import VideoConfig
    from internvl.data.records import Video
    from internvl.data.video import read_frames

    spread = VideoConfig(min_frames=count, max_frames=count, sampling="middle")
    frames = read_frames(Video(video), spread, np.random.default_rng(0))
    return replace(model, tiles=replace(model.tiles, min=1, max=1)), frames


def merge(args: Arguments) -> int:
    """Adapters into their base model, as a folder that stands alone."""
    from internvl import export as exporter

    if not exporter.has_adapters(args.model):
        raise UserError(
            f"{args.model}: has no adapters to merge; `internvl export` writes a model as it is"
        )
    return export(args)


def export(args: Arguments) -> int:
    """A complete, self-contained model folder, read back and compared."""
    from internvl import export

    print(export.run(args.model, args.to, args.format, code_from=args.code_from))
    return 0


def data(args: Arguments) -> int:
    """From downloads as they lie to annotation files; boxes, captions and parquet converted."""
    if args.action == "convert":
        from internvl.datasets import convert

        converted = convert.run(args.name, args.source, args.target)
        print(_counts(converted.counts, converted.files))
        return 0
    from internvl.datasets import prepare

    prepared = prepare.run(args.name, args.root, download=args.download)
    print(_counts(prepared.counts, prepared.files))
    for missing in prepared.missing:
        print(missing, file=sys.stderr)
    return int(not prepared.ready)


def _counts(counts: Mapping[str, int], files: Sequence[Path]) -> str:
    return "\n".join([*(f"{name}: {n:,}" for name, n in counts.items()), *map(str, files)])


VERBS: dict[str, Callable[[Arguments], int]] = {
    "demo": demo,
    "doctor": doctor,
    "models": models,
    "check": check,
    "train": train,
    "evaluate": evaluate,
    "chat": chat,
    "merge": merge,
    "export": export,
    "data": data,
}


def parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole surface of the command line, and the part of each verb."""
    top = argparse.ArgumentParser(prog="internvl", description="InternVL: train, evaluate, ship.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = {
        name: verbs.add_parser(name, help=verb.__doc__, description=verb.__doc__)
        for name, verb in VERBS.items()
    }
    for sub in add.values():
        sub.add_argument("--debug", action="store_true", help="show tracebacks and debug lines")
    add["demo"].add_argument("--to", type=Path, default=Path("runs/demo"), help="folder to fill")
    add["demo"].add_argument("--short", action="store_true", help="a minute, to see that it works")
    add["models"].add_argument("name", nargs="?", help="one model, such as InternVL2-2B")
    add["models"].add_argument("--download", action="store_true", help="fetch it from the hub")
    add["models"].add_argument("--to", type=Path, help="folder to fetch it to")
    for name in ("check", "train"):
        add[name].add_argument(
            "recipe", type=Path, help="a YAML file, or a name: internvl2_2b_lora"
        )
        add[name].add_argument("overrides", nargs="*", metavar="key=value", help="optim.lr=1e-5")
    add["check"].add_argument("--report", type=Path, help="also write an HTML page there")
    add["check"].add_argument("--plan", action="store_true", help="predict memory and time")
    add["check"].add_argument("--gpu", default="auto", help="plan for it: H200, A100-40, 4090 …")
    add["check"].add_argument("--gpus", type=int, default=1, help="plan for as many of them")
    _evaluate_arguments(add["evaluate"])
    add["chat"].add_argument("model", help="a model, adapter or run folder, or a hub id")
    _chat_arguments(add["chat"])
    for name in ("merge", "export"):
        add[name].add_argument("model", help="a run, adapter or model folder, or a hub id")
        add[name].add_argument("--to", type=Path, required=True, help="the new folder")
        add[name].add_argument("--format", choices=("hf", "official"), default="hf")
        add[name].add_argument(
            "--code-from", type=Path, help="official: copy the original's Python files from there"
        )
    actions = add["data"].add_subparsers(dest="action", required=True, metavar="prepare|convert")
    prepare = actions.add_parser("prepare", help="downloads as they lie to annotation files")
    prepare.add_argument("name", help="coco-caption, flickr30k, flickr30k-cn, nocaps, sft-v1.2 …")
    prepare.add_argument("--root", type=Path, required=True, help="folder the downloads lie in")
    prepare.add_argument("--download", action="store_true", help="fetch what is missing")
    convert = actions.add_parser("convert", help="one file or folder into another form")
    convert.add_argument("name", help="boxes-to-1000, boxes-to-unit, captions or parquet")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    return top, add


def _evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = f"tasks:\n{published_sets.list_tasks()}"
    sub.add_argument("model", help="a run folder, or a model folder or hub id")
    sub.add_argument("tasks", nargs="*", metavar="TASK", help="see below, or of a run's recipe")
    sub.add_argument("--to", type=Path, help="folder for the results")
    sub.add_argument("--root", type=Path, default=Path("data"), help="where the sets lie")
    sub.add_argument("--dataset-root", help="the folder of the set itself; {dataset} is filled in")
    sub.add_argument("--split", default="test")
    sub.add_argument("--language", type=_listed, default=(), help="en, cn …; several with commas")
    sub.add_argument("--output", type=Path, help="append CLIP_benchmark's result lines there")
    sub.add_argument("--features", type=Path, help="keep features there")
    sub.add_argument("--device", help="cuda, cuda:1, cpu; by default the GPU if there is one")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="by default a run's own; of a model, bfloat16 on a GPU and float32 on a CPU",
    )
    _add_eval_options(sub)


def _add_eval_options(sub: argparse.ArgumentParser) -> None:
    """Adds an option for every key of the evaluations, grouped by the types that have it."""
    groups: dict[tuple[str, ...], Any] = {}
    for key, sections in eval_options().items():
        types = tuple(name_of(section, "type") for section in sections)
        if types not in groups:
            groups[types] = sub.add_argument_group(f"evaluations of type {', '.join(types)}")
        names: dict[str, list[str]] = {}  # text -> the types that have it
        for section, name in zip(sections, types, strict=True):
            names.setdefault(field_docs(section)[key], []).append(name)
        text = " ".join(f"{', '.join(n)}: {t}" if len(names) > 1 else t for t, n in names.items())
        option = f"--{key.replace('_', '-')}"
        groups[types].add_argument(
            *([option.removesuffix("s")] if key == "modes" else []),  # its name on the command line
            option,
            dest=key,
            default=None,  # what is not given keeps the section's default, or a recipe's value
            help=text.replace("%", "%%"),
            **_argument(get_type_hints(sections[0])[key]),
        )


def _argument(hint: Any) -> dict[str, Any]:
    """Returns argparse's settings for a value of this type."""
    (hint, *_) = members(hint)
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"type": _listed}
    return {"type": hint}


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _chat_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--image", action="append", default=[], help="may be given again")
    sub.add_argument("--video", help="a video file; its frames are one tile each")
    sub.add_argument("--frames", type=int, default=8, help="how many stand for the video")
    sub.add_argument("--prompt", help="one question; without it, a conversation")
    sub.add_argument("--max-new-tokens", type=int, default=512)
    sub.add_argument("--temperature", type=float, help="sample; without it the likeliest token")
    sub.add_argument("--top-p", type=float, default=1.0, help="sampling: of the likeliest tokens")
    sub.add_argument("--num-beams", type=int, default=1, help="beam search")
    sub.add_argument("--device", help="cuda, cuda:1, cpu; by default the GPU if there is one")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    sub.add_argument("--device-map", choices=("auto",), help="spread over all GPUs")
    sub.add_argument("--quantize", choices=("8bit", "4bit"), help="through bitsandbytes")


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments of a command line; options may stand between overrides.

    argparse allows that for a parser without verbs only, so the verb's own one is called.
    """
    top, verbs = parser()
    if not argv or argv[0] not in verbs or argv[0] == "data":
        return top.parse_args(argv)
    return verbs[argv[0]].parse_intermixed_args(argv[1:], argparse.Namespace(verb=argv[0]))


def _set_up_libraries(*, downloading: bool) -> None:
    """What libraries read once, when they are imported.

    transformers draws a bar for every model it opens, however small; what we say is enough.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not downloading:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


_INTERRUPTED, _NOBODY_READS = 130, 141
"""What a shell reports of SIGINT and SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a verb and exits with its code."""
    _print_anything()
    args = parse(sys.argv[1:] if argv is None else argv)
    log.setup(logging.DEBUG if args.debug else logging.INFO)
    _set_up_libraries(downloading=getattr(args, "download", False))
    code, message = _outcome(args)
    if message:
        print(f"internvl: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # said already; Python would fail again when it exits
        _close_output()
    sys.exit(code)


def _outcome(args: Arguments) -> tuple[int, str]:
    """Runs a verb; (exit code, what to say of an error). With --debug errors stay as they are."""
    try:
        code = VERBS[args.verb](args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED, ""
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            return _NOBODY_READS, ""
        if args.debug:
            raise
        return (2 if isinstance(error, ConfigError) else 1), _explain(error)
    return code, ""


def _explain(error: Exception) -> str:
    """The sentence for what went wrong."""
    if "DataLoader worker" in str(error):
        from internvl.data import workers

        return workers.explain(error) or errors.explain(error)
    return errors.explain(error)


def _print_anything() -> None:
    """A terminal that cannot show a character shows its escape; that is no reason to stop."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _close_output() -> None:
    """So that Python does not write what is left when it exits, and fail again."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
