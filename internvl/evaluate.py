"""A model, adapter or run folder, measured: `evaluate.run(...)`."""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from internvl import evals, zoo
from internvl.compute import backends, compilation, placement
from internvl.config import (
    CaptionEval,
    ClassifyEval,
    EvalConfig,
    EvalSection,
    Recipe,
    RetrievalEval,
    eval_config,
    eval_keys,
)
from internvl.config.recipes import load_recipe
from internvl.data.arguments import list_texts
from internvl.datasets import published as published_sets
from internvl.errors import ConfigError, UnknownModel
from internvl.files import write_json
from internvl.inference import load as loading
from internvl.models import hub
from internvl.training import checkpoint

_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")
_CAPTION_METRICS = {f"bleu_{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)} | {
    "meteor": "METEOR",
    "rouge_l": "ROUGE_L",
    "cider": "CIDEr",
}
"""Our names and pycocoevalcap's, in its order."""

_METRICS = {"image_retrieval": "t2i", "text_retrieval": "i2t"}
"""CLIP_benchmark's words for the two directions, and those of the papers."""


@dataclass(frozen=True)
class Job:
    """An evaluation, and what result files call it."""

    config: EvalSection
    dataset: str
    language: str


@dataclass(frozen=True)
class Measured:
    """What was found of a model."""

    metrics: dict[str, float]
    """Named "evaluation/metric", each from 0 to 1 unless its evaluator says otherwise."""
    counts: dict[str, dict[str, int]]
    """Evaluation -> what it measured on, such as images and texts, and how many."""
    computed: str = ""
    """In which precision, and where a run's own evaluations compute otherwise, what differs:
    "float32; inside the run: bfloat16 autocast"."""


@dataclass(frozen=True)
class _Computed:
    """How a model computes, in words: in this evaluation, and in the run or folder it is from."""

    here: tuple[str, ...]
    there: tuple[str, ...]
    whose: str

    @property
    def differs(self) -> str:
        """What differs, as `Measured.computed`; empty where nothing does."""
        pairs = [(h, t) for h, t in zip(self.here, self.there, strict=True) if h != t]
        if not pairs:
            return ""
        here, there = (", ".join(words) for words in zip(*pairs, strict=True))
        return f"{here}; {self.whose}: {there}"

    def __str__(self) -> str:
        return self.differs or ", ".join(self.here)


def run(model_or_run: str | Path, tasks: Sequence[str] | str = (), **how: Any) -> dict[str, float]:
    """The metrics of `measure`, which takes the same."""
    return measure(model_or_run, tasks, **how).metrics


def measure(
    model_or_run: str | Path,
    tasks: Sequence[str] | str = (),
    *,
    to: str | Path | None = None,
    root: str | Path = Path("data"),
    dataset_root: str | None = None,
    languages: Sequence[str] | str = (),
    split: str = "test",
    output: str | Path | None = None,
    features: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **fields: Any,
) -> Measured:
    """Evaluates a model on published sets, on one's own files, or as the recipe of its run says.

    What is wrong with the data is found before the model is loaded. Features are kept while they
    are computed, so the same call goes on after an interruption. A run is measured as it measures
    itself (trained weights in float32, products in its `dtype`, its attention and threads): the
    last step's scores are the same. What differs is in `computed`, in `result.json` as
    NAME/computed, and in CLIP_benchmark's lines.

    Args:
        tasks: names of published.TASKS or USER_TASKS, or of evaluations of the run's recipe;
            by default all of the recipe's, or `caption-file` for a model.
        to: folder for `result.json` and the answers; the run's evals folder, or out/evaluate.
        root: folder that the published sets lie in.
        dataset_root: the folder of the one set itself; `{dataset}` is filled in.
        languages: of sets that have several, as CLIP_benchmark writes them.
        dtype: of a run, the compute type, by default its own; of a model, that of all weights, by
            default bfloat16 on a GPU and float32 on a CPU.
        output: file that the originals' result lines are appended to; by default `to`/result.jsonl.
        features: folder where features stay; otherwise they go when everything is measured.
        fields: of EvalConfig, such as `annotations`, `modes`, `limit`; they override a recipe's.

    Returns:
        Metrics, and what they were measured on.

    Raises:
        ConfigError: an unknown task, or files of a set that are not there, with their addresses.
        UserError: data that cannot be used.
    """
    tasks, languages = list_texts(tasks, "task"), list_texts(languages, "language")
    root, to, output, features = Path(root), _path(to), _path(output), _path(features)
    if isinstance(fields.get("modes"), str):
        fields["modes"] = [fields["modes"]]
    is_run = loading.is_run(Path(model_or_run))
    recipe = load_recipe(Path(model_or_run) / "recipe.yaml") if is_run else None
    in_run = {} if recipe is None else recipe.evals
    own_file = not in_run or "annotations" in fields
    names = tasks or (["caption-file"] if own_file else list(in_run))
    types = {name: _type_of(name, in_run) for name in names}
    jobs: dict[str, Job] = {}
    for name, type_name in types.items():
        options = _options_of(type_name, set(types.values()), fields)
        if name in in_run:
            jobs[name] = Job(eval_config(**{**vars(in_run[name]), **options}), name, "en")
        elif name in published_sets.TASKS:
            jobs |= _published_set(name, root, dataset_root, languages, split, options)
        else:
            jobs[name] = _own(name, languages, split, options)
    folder = to or (Path(model_or_run) / "evals/evaluate" if is_run else Path("out/evaluate"))
    evaluators = evals.build({name: job.config for name, job in jobs.items()})
    kept = features or folder / "features"
    with placement.threads(None if recipe is None else recipe.threads):
        if recipe is None:
            opened = _open_model(model_or_run, device, dtype)
        else:
            opened = _open_run(Path(model_or_run), recipe, device, dtype)
        handle, computed = opened.handle, opened.computed
        own = kept / _identity(Path(model_or_run), handle, computed)
        with opened.computing:
            metrics = evals.run_all(evaluators, handle, folder, features=own)
    _note(folder / "result.json", list(jobs), computed.differs)
    if features is None:
        shutil.rmtree(kept, ignore_errors=True)
    differs = computed.differs
    for name, job in jobs.items():
        mine = f"{name}/"
        values = {m.removeprefix(mine): v for m, v in metrics.items() if m.startswith(mine)}
        if isinstance(job.config, CaptionEval):
            _write_captions(folder, name, job)
            lines: list[Any] = [_caption_line(job, job.config, values, handle, str(model_or_run))]
        else:
            lines = _benchmark_lines(job, values, str(model_or_run))
            lines = [line | ({"computed": differs} if differs else {}) for line in lines]
        _append(output or folder / "result.jsonl", lines)
    counts = {name: evaluators[name].counts() for name in jobs}
    return Measured(metrics, counts, str(computed))


@dataclass(frozen=True)
class _Opened:
    """A model that is ready to be measured, within `computing`."""

    handle: Any
    computing: AbstractContextManager[None]
    computed: _Computed


def _open_run(folder: Path, recipe: Recipe, device: str | None, dtype: str | None) -> _Opened:
    """The model of a run as its own evaluations have it, or where `dtype` names another compute
    type, in that."""
    place = loading.resolve_device(device)
    chosen = dtype or recipe.dtype
    inside = _precision(recipe.dtype)
    inside += " with float8 products" if recipe.compute.float8 else ""
    inside += f" on {recipe.model.quantize} weights" if recipe.model.quantize else ""
    where = place.type if recipe.device == "auto" else recipe.device
    attention = recipe.compute.attention
    computing: AbstractContextManager[None]
    if chosen not in placement.DTYPES:  # float16, which nothing trains in
        handle = loading.load(folder, device=place, dtype=chosen)
        here, computing = f"{chosen} weights", nullcontext()
        used = "torch's own"
    else:
        handle = loading.load_as_trained(folder, place, chosen)
        here, computing = _precision(chosen), compilation.evaluating(place, chosen)
        used = backends.available_compute(recipe.compute, place).attention
    words = _Computed(
        (here, place.type, f"attention {used}"),
        (inside, where, f"attention {attention}"),
        "inside the run",
    )
    return _Opened(handle, computing, words)


def _precision(dtype: str) -> str:
    """What a run's `dtype` means: trained weights are in float32 in any case."""
    return dtype if dtype == "float32" else f"{dtype} autocast"


def _open_model(name: str | Path, device: str | None, dtype: str | None) -> _Opened:
    """A model that is no run's, its weights in one type."""
    handle = loading.load(name, device=device, dtype=dtype)
    here = str(handle.model.dtype).removeprefix("torch.")
    stored = _stored(Path(handle.folder)) or here
    return _Opened(handle, nullcontext(), _Computed((here,), (stored,), "the folder's weights"))


def _stored(folder: Path) -> str | None:
    """The type that config.json says the weights have."""
    if not (folder / "config.json").is_file():
        return None
    config = hub.read_json(folder / "config.json")
    return config.get("dtype") or config.get("torch_dtype")


def _note(file: Path, names: Sequence[str], differs: str) -> None:
    """Says in `result.json` of these evaluations how they were computed otherwise than inside the
    run; nothing, where they were not."""
    found = json.loads(file.read_text(encoding="utf-8"))
    for name in names:
        found.pop(f"{name}/computed", None)
        found |= {f"{name}/computed": differs} if differs else {}
    write_json(file, found, indent=1)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _type_of(name: str, in_run: Mapping[str, EvalConfig]) -> str:
    """Returns the type of a task. Raises ConfigError if there is none of that name."""
    if name in in_run:
        return in_run[name].type
    if name in published_sets.TASKS:
        return published_sets.TASKS[name].type
    if name in published_sets.USER_TASKS:
        return name.partition("-")[0]
    raise ConfigError(published_sets.no_such(name, in_run))


def _options_of(name: str, types: set[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options for an evaluation of type `name` among tasks of these `types`.

    Each type takes its own keys. A key that none of them has goes to all, which refuse it.
    """
    some = set[str]().union(*map(eval_keys, types))
    return {k: v for k, v in fields.items() if k in eval_keys(name) or k not in some}


def _published_set(
    name: str,
    root: Path,
    dataset_root: str | None,
    languages: Sequence[str],
    split: str,
    fields: dict[str, Any],
) -> dict[str, Job]:
    task = published_sets.TASKS[name]
    folder = root / task.root
    if dataset_root is not None:
        folder = Path(dataset_root.format(dataset=task.dataset, dataset_cleaned=task.dataset))
    found = published_sets.configs(name, folder, languages=languages, split=split, **fields)
    chosen = languages or task.languages[:1]
    return {
        key: Job(config, task.dataset, language)
        for (key, config), language in zip(found.items(), chosen, strict=True)
    }


def _own(name: str, languages: Sequence[str], split: str, fields: dict[str, Any]) -> Job:
    if fields.get("annotations") is None:
        raise ConfigError(f"{name} needs --annotations: {published_sets.USER_TASKS[name]}")
    annotations = Path(fields["annotations"])
    images = annotations if annotations.is_dir() else annotations.parent
    type_name = name.partition("-")[0]
    defaults = {"images": images, "split": split}
    given = {key: value for key, value in defaults.items() if key in eval_keys(type_name)}
    given |= {**fields, "type": type_name}
    language = languages[0] if languages else "en"
    return Job(eval_config(**given), annotations.stem, language)


def _identity(named: Path, handle: Any, computed: _Computed) -> str:
    """A word for exactly these weights in this precision: names, sizes and times of their files."""
    folders = {named, Path(handle.folder)}
    files = {file for folder in folders for kind in _WEIGHTS for file in folder.glob(kind)}
    if loading.is_run(named):
        step = checkpoint.steps(named / "checkpoints")[-1]
        files |= {*(named / "checkpoints" / f"{step:06d}").rglob("*")}
    states = sorted((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return blake2b(repr((states, computed.here)).encode(), digest_size=8).hexdigest()


def _benchmark_lines(job: Job, values: dict[str, float], pretrained: str) -> list[dict[str, Any]]:
    """CLIP_benchmark's result lines: one for each mode, and for each re-ranked one."""
    if not isinstance(job.config, RetrievalEval | ClassifyEval):
        return []
    kind = "retrieval" if job.config.type == "retrieval" else "classification"
    found = []
    for mode in job.config.modes:
        for prefix, task in (
            (mode, f"zeroshot_{kind}"),
            (f"{mode}_itm", f"zeroshot_{kind}_with_itm"),
        ):
            metrics = {
                name.removeprefix(f"{prefix}_"): value
                for name, value in values.items()
                if name.startswith(f"{prefix}_")
                and not name.endswith("mean_recall")
                and name.startswith(f"{mode}_itm_") == prefix.endswith("_itm")
            }
            if metrics:
                found.append(
                    {
                        "dataset": job.dataset,
                        "model": f"internvl_{mode}_{kind}_hf",
                        "pretrained": pretrained,
                        "task": task,
                        "metrics": metrics,
                        "language": job.language,
                    }
                )
    return found


def _append(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_captions(folder: Path, name: str, job: Job) -> None:
    """The original's results file: [{image_id, caption}] in DATASET_yymmddHHMMSS.json."""
    rows = (folder / "result" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [
        {"image_id": row["image_id"], "caption": row["answer"]}
        for row in map(json.loads, rows)
        if "answer" in row  # the others say what was left out
    ]
    file = folder / f"{job.dataset}_{datetime.now():%y%m%d%H%M%S}.json"
    file.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def _caption_line(
    job: Job, config: CaptionEval, values: dict[str, float], handle: Any, model: str
) -> list[Any]:
    """The original's result line: [dataset, prompt, average length, metrics] for InternVL-G,
    [checkpoint, dataset, average length, metrics] for chat models."""
    metrics = {theirs: values[ours] for ours, theirs in _CAPTION_METRICS.items() if ours in values}
    heads = {
        "chat": [model, job.dataset],
        "dual": [job.dataset, config.prompt or handle.caption_prompt],
    }
    return [*heads[handle.family], values["average_length"], metrics]


def published(model: str | Path, name: str) -> float | None:
    """The published value of a metric that `run` returned as `name`, on the same scale, or None.

    Only for a released model as it is: by hub id, or by a folder of the same name.
    """
    if loading.is_run(Path(model)):
        return None
    try:
        released = zoo.find(str(model))
    except UnknownModel:
        return None
    evaluation, _, metric = name.partition("/")
    task, language = _task_of(evaluation)
    percent = released.family == "dual"
    mode = "g" if percent else "chat"
    if metric[:2] in ("c_", "g_") and "_itm_" not in metric:
        mode, metric = metric[0], metric[2:]
        for theirs, ours in _METRICS.items():
            metric = metric.replace(theirs, ours)
    for score in zoo.scores(released.name):
        if (score.task, score.metric, score.mode) != (task, metric, mode) or score.recipe:
            continue
        if score.language == language:
            return score.value / 100 if percent and metric != "average_length" else score.value
    return None


def _task_of(evaluation: str) -> tuple[str, str]:
    """(task, language) as zoo/ has them."""
    for name in ("retrieval-flickr30k", "retrieval-coco"):
        if evaluation == f"{name}-cn":
            return name, "zh"
    if evaluation.startswith("retrieval-xtd-"):
        return "retrieval-xtd", evaluation.removeprefix("retrieval-xtd-")
    return evaluation, "en"


def render(
    metrics: dict[str, float],
    model: str | Path = "",
    counts: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
    """A table of metrics, one line each, and beside each what was published for it.

    Args:
        model: whose published values; empty for none.
        counts: of `Measured`. A published value stands only beside an evaluation of as many
            images and texts as the whole published set has; others get a note.
    """
    width = max(map(len, metrics), default=0)
    rows, notes, compared = [], dict[str, None](), False
    for name, value in metrics.items():
        row = f"{name:{width}}  {value:8.4f}"
        known = published(model, name) if model and counts is not None else None
        if known is not None and counts is not None:
            evaluation = name.partition("/")[0]
            note = _partial(evaluation, counts[evaluation])
            if note:
                notes[note] = None
            else:
                row, compared = f"{row}  {known:9.4f}", True
        rows.append(row)
    head = [f"{'':{width}}  measured  published"] if compared else []
    return "\n".join([*head, *rows, *notes])


def _partial(evaluation: str, counts: Mapping[str, int]) -> str:
    """How the set that was measured on differs from the whole published one; empty if not."""
    task = published_sets.published_set(evaluation)
    if task is None:
        return ""
    whole = f"{task.num_images:,} images and {task.num_texts:,} texts"
    here = " and ".join(f"{number:,} {what}" for what, number in counts.items())
    if here == whole:
        return ""
    return f"{evaluation}: published values are for {whole}; this set has {here}"
