"""`evals:` what is measured during and after training, a section for each `type`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from internvl.config.problems import sentences
from internvl.config.types import STRICT, Positive, UserPath
from internvl.config.unions import OneOf, members, name_of
from internvl.errors import ConfigError

CaptionForm = Literal[
    "auto",
    "flickr",
    "token",
    "coco",
    "karpathy",
    "xtd",
    "csv",
    "jsonl",
    "folder",
    "webdataset",
]


@dataclass(frozen=True, kw_only=True)
class EvalGuardConfig:
    """How much worse than before the first step a metric may get, against forgetting."""

    __pydantic_config__ = STRICT
    metric: str
    """A metric of this evaluation, such as CIDEr or loss."""
    max_worsening: Annotated[float, Field(gt=0)] = 0.1
    """Largest decrease of a score, or increase of a loss, as a share of the first value."""
    action: Literal["stop", "warn"] = "stop"
    """stop: end the run after a last checkpoint; warn: log a warning and continue."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation during and after training. Each type is a subclass with keys of its own."""

    __pydantic_config__ = STRICT
    in_training: ClassVar[tuple[str, ...]] = ("every", "before", "guard")
    """Keys that only a training run uses: when to evaluate, and what to do then."""

    type: str
    annotations: UserPath
    """File or folder of what is measured."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    before: bool = False
    """Also evaluate before the first step."""
    guard: EvalGuardConfig | None = None
    """How much worse this may get than before the first step, where it is then measured too."""
    limit: Positive | None = None
    """Measure only this many images (or samples), the first ones."""
    batch_size: Positive = 16
    """Images or texts in one call of the model."""
    on_bad_sample: Literal["raise", "skip_broken", "skip", "keep"] = "raise"
    """What to do about broken and missing images, captions that are not text or name an image that
    is not listed, images without captions, repeated ids, and images that were trained on. raise:
    stop with an error that names all; skip_broken: leave image files out that cannot be decoded,
    and list them, but stop for anything else; skip: leave all of them out and list them; keep: only
    list them, if the rest can be measured with them. `internvl evaluate` takes skip_broken for what
    is no evaluation of a recipe."""

    @property
    def files(self) -> tuple[Path | None, ...]:
        """Files and folders that the evaluation reads, except images; None for unset keys."""
        return (self.annotations,)

    def in_run(self, start: str | None) -> "EvalConfig":
        """Returns the evaluation as a run does it.

        Args:
            start: the model that the run started from, by hub id or folder.
        """
        return self

    def problems(self) -> Iterator[str]:
        """Yields "key: reason" for values that are fine alone and wrong together."""
        yield from ()  # makes it a generator; most types have no such keys


@dataclass(frozen=True, kw_only=True)
class CaptionEval(EvalConfig):
    """Generates a text for every image and compares it with the references."""

    type: Literal["caption"] = "caption"
    # Declared again for its docstring, which `evaluate --help` prints for each type.
    annotations: UserPath
    """Images with their captions in any caption format, usually COCO JSON."""
    images: UserPath = Path(".")
    """Folder that image paths are relative to."""
    # null here and in `num_beams`: which default holds is known only once the model is loaded.
    prompt: str | None = None
    """The question; a chat model gets `<image>` before it. null: the original's."""
    tokenize: Literal["ptb", "characters", "words"] = "ptb"
    """Units of the n-gram scores: PTB tokens (English), characters (Chinese), or words."""
    metrics: Literal["all", "without-meteor", "exact"] = "all"
    """without-meteor: all but METEOR, which takes 9 s of CPU time to start. exact: only the share
    of exact answers, which takes no time and needs no Java."""
    # The original's length. Only the published tasks set its minimum of 8: the answers of other
    # files may be one word.
    max_new_tokens: Positive = 30
    """Longest answer, in tokens."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Shortest answer, in tokens."""
    num_beams: Positive | None = None
    """Width of the beam search. null: the original's, 5 for InternVL-14B and 1 (greedy) for chat
    models."""
    tiles: str | int | None = None
    """Most tiles of an image for a chat model: a number, `one`, or `checkpoint` for the model's.
    null: the model's."""
    # Not `images`, which is the folder.
    image_list: UserPath | None = None
    """Karpathy's list of the image names, if `annotations` has only their ids."""
    flat: bool = False
    """Images lie directly in `images`, whatever folder their names have."""
    form: CaptionForm = "auto"
    """Format of `annotations`; auto recognizes it by file name and content."""
    split: str = "test"
    """Images to measure in a Karpathy file, by its `split` field."""

    @property
    def files(self) -> tuple[Path | None, ...]:
        """See `EvalConfig.files`."""
        return (self.annotations, self.image_list)

    def problems(self) -> Iterator[str]:
        """See `EvalConfig.problems`."""
        # Here and not only at generation: a run would otherwise stop at its first evaluation.
        if self.min_new_tokens > self.max_new_tokens:
            yield (
                f"min_new_tokens: {self.min_new_tokens}, larger than max_new_tokens, "
                f"{self.max_new_tokens}"
            )
        yield from _tiles_problems(self.tiles)


@dataclass(frozen=True, kw_only=True)
class LossEval(EvalConfig):
    """The mean loss over the supervised tokens of held-out samples, for chat models."""

    type: Literal["loss"] = "loss"
    annotations: UserPath
    """Chat JSONL, or captions if `prompt` is set."""
    images: UserPath = Path(".")
    """Folder that image paths are relative to."""
    prompt: str | None = None
    """The question before each caption; null: `annotations` are conversations."""
    max_tokens: Positive = 8192
    """Longest sample, as `data.max_tokens`."""


@dataclass(frozen=True, kw_only=True)
class PreferenceEval(EvalConfig):
    """Accuracy and margin of rewards on held-out preference pairs, for chat models."""

    type: Literal["preference"] = "preference"
    annotations: UserPath
    """Pairs, as a source of type preference."""
    images: UserPath = Path(".")
    """Folder that image paths are relative to."""
    max_tokens: Positive = 8192
    """Longest question with an answer, as `data.max_tokens`."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of the margin, as `objective.beta`."""
    reference: str | None = None
    """Model that rewards are relative to, by hub id or folder, read once. null: the model itself
    with its adapters off; in a run without adapters the model that it started from; else none, and
    rewards are log-probabilities."""

    def in_run(self, start: str | None) -> "PreferenceEval":
        """See `EvalConfig.in_run`."""
        return self if self.reference is not None else replace(self, reference=start)


@dataclass(frozen=True, kw_only=True)
class RetrievalEval(EvalConfig):
    """Recall@k from texts to images and back, for InternVL-14B."""

    type: Literal["retrieval"] = "retrieval"
    annotations: UserPath
    """Images with their captions in any caption format, usually COCO JSON."""
    images: UserPath = Path(".")
    """Folder that image paths are relative to."""
    form: CaptionForm = "auto"
    """Format of `annotations`; auto recognizes it by file name and content."""
    split: str = "test"
    """Images to measure in a Karpathy file, by its `split` field."""
    # Off by default: XTD's published values, for one, are of captions that were not cleaned.
    clean: bool = False
    """Clean captions as the original does for Flickr30K and COCO."""
    modes: tuple[Literal["c", "g"], ...] = ("c", "g")
    """c: InternVL-C; g: InternVL-G; or both."""
    recall_k: tuple[Positive, ...] = (1, 5, 10)
    """Values of k: a query counts if a correct candidate is among its first k."""
    rerank: Annotated[int, Field(ge=0)] = 0
    """Also re-rank the first candidates of every query, this many, by the matching score (ITM)."""
    train: UserPath | None = None
    """Images with captions that were trained on, none of which may be measured. Image paths of
    both are relative to `images`."""

    @property
    def files(self) -> tuple[Path | None, ...]:
        """See `EvalConfig.files`."""
        return (self.annotations, self.train)


@dataclass(frozen=True, kw_only=True)
class ClassifyEval(EvalConfig):
    """Zero-shot classification of images, for InternVL-14B."""

    type: Literal["classify"] = "classify"
    annotations: UserPath
    """A folder with one folder of images per class; with `set`, the folder of that set."""
    set: str | None = None
    """Published set, such as imagenet1k or cifar10, in its published layout or as CLIP_benchmark's
    webdataset shards; its class names and prompts hold unless `classes` or `templates` give others.
    null: folders of images."""
    language: str = "en"
    """Language of the class names and prompts of `set`: en, and for ImageNet cn, jp, ar, it."""
    split: str = "test"
    """Split of `set` that is measured."""
    method: Literal["zero-shot", "probe"] = "zero-shot"
    """zero-shot: the class with the nearest texts; probe: a linear layer that is trained on the
    features of the training split of `set`, as CLIP_benchmark's linear probe."""
    shots: Positive | None = None
    """Images of each class that a probe is trained on; null: all."""
    probe_epochs: Positive = 10
    """Passes over the training images."""
    probe_lr: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate of a probe, which falls to 0 by a cosine."""
    probe_seed: int = 0
    """Seed of its first weights and of the order of its batches."""
    modes: tuple[Literal["c", "g"], ...] = ("c", "g")
    """c: InternVL-C; g: InternVL-G; or both."""
    classes: UserPath | None = None
    """JSON of class names, in the order of the sorted folders, or by folder; null: the names of the
    folders."""
    templates: UserPath | None = None
    """JSON list of texts with `{c}` in place of the class; null: the class name alone."""
    key: str | None = None
    """Entry of `classes` and `templates` to use if they hold several data sets, as CLIP_benchmark's
    files do."""

    @property
    def files(self) -> tuple[Path | None, ...]:
        """See `EvalConfig.files`."""
        return (self.annotations, self.classes, self.templates)

    def problems(self) -> Iterator[str]:
        """See `EvalConfig.problems`."""
        if self.method == "probe" and self.set is None:
            yield "method: probe learns from the training split of `set`; name a set"


@dataclass(frozen=True, kw_only=True)
class JudgedEval(EvalConfig):
    """An evaluation of a chat model's answers, which a judge may rate."""

    tiles: str | int | None = None
    """Most tiles of an image: a number, `one`, or `checkpoint` for the model's own. null: those of
    the published scores, one for models that do not tile."""
    num_beams: Positive = 1
    """Width of the beam search; 1 is greedy."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy."""
    judge: str | None = None
    """Base address of an OpenAI-compatible server that rates free answers, such as
    http://localhost:8000/v1; its key is read from INTERNVL_JUDGE_KEY or OPENAI_API_KEY. null: free
    answers are only written."""
    judge_model: str | None = None
    """Name of the judge's model; null: the original's."""

    def problems(self) -> Iterator[str]:
        """See `EvalConfig.problems`."""
        yield from _tiles_problems(self.tiles)


@dataclass(frozen=True, kw_only=True)
class BenchmarkEval(JudgedEval):
    """A published benchmark under the original's name, for chat models."""

    type: Literal["benchmark"] = "benchmark"
    task: str
    """Name of the benchmark, such as vqa-chartqa-test; `internvl evaluate --help` lists them."""
    annotations: UserPath = Path("data")
    """Folder of the published sets; paths beside `data/` are relative to its parent."""
    corrected: bool = False
    """Also score with the original's mistakes mended; these metrics begin with corrected_."""
    cot: bool = False
    """Ask for reasoning before the answer, where the original can."""
    subtask: str | None = None
    """Subtask of MME-RealWorld; null: Autonomous_Driving."""
    segments: Positive | None = None
    """Frames of a video; null: the original's, 16 for MVBench."""
    total_tiles: Positive = 64
    """Most tiles of all pages of a question of MP-DocVQA."""
    checkpoint: str = ""
    """Name of the model in the original's result files; empty: its folder."""


@dataclass(frozen=True, kw_only=True)
class QaEval(JudgedEval):
    """Held-out conversations: every answer is generated and compared with the file's."""

    type: Literal["qa"] = "qa"
    annotations: UserPath
    """Chat JSONL as training reads it: several turns, several images, or a video. `answers` of a
    line are further reference answers, `category` groups the scores."""
    images: UserPath = Path(".")
    """Folder that image paths are relative to."""
    metric: Literal[
        "auto", "exact", "soft", "anls", "number", "boxes", "yes-no", "choice", "judge"
    ] = "auto"
    """auto: chosen for every question by its reference answer. exact: equal without case; soft:
    VQA's agreement with several answers; anls: edit distance; number; boxes: IoU of 0.5; yes-no;
    choice: a letter among the options of the question; judge: see `judge`."""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """Largest relative error of a right number, such as 0.05."""
    max_new_tokens: Positive = 256
    """Longest answer, in tokens."""
    frames: Positive = 8
    """Frames of a video."""


EvalSection = Annotated[
    CaptionEval | LossEval | RetrievalEval | ClassifyEval | PreferenceEval | BenchmarkEval | QaEval,
    OneOf("type"),
]
"""Every evaluator; a new one is one more member. A section without `type` is of the first."""


_NO_OPTION = (
    *("type", "split", "task", "checkpoint", "set", "language"),
    *EvalConfig.in_training,
)
"""Keys of a section that the command line gives otherwise, or that only a recipe has."""


def eval_keys(name: str) -> set[str]:
    """Returns the keys of a type of evaluation."""
    sections = {name_of(section, "type"): section for section in members(EvalSection)}
    return {field.name for field in fields(sections[name])}


def eval_options() -> dict[str, list[type[EvalConfig]]]:
    """Returns the options of `internvl evaluate` that are keys of a section: key -> the sections
    that have it."""
    options: dict[str, list[type[EvalConfig]]] = {}
    for section in members(EvalSection):
        for field in fields(section):
            # The tasks decide `type` and `task`; `split` is also of published sets.
            if field.name not in _NO_OPTION:
                options.setdefault(field.name, []).append(section)
    return options


def eval_config(**keys: Any) -> EvalSection:
    """Returns one evaluation outside a recipe. Raises ConfigError with every wrong value."""
    try:
        section = _section_adapter().validate_python(keys)
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error, EvalSection))) from None
    # After validation: `problems` compares values, which must have their types for it.
    problems = list(section.problems())
    if problems:
        raise ConfigError("\n".join(problems))
    return section


@cache
def _section_adapter() -> TypeAdapter[EvalSection]:
    # Not at import: to build it takes 10 ms, and few processes make a section outside a recipe.
    return TypeAdapter(EvalSection)


def _tiles_problems(tiles: int | str | None) -> Iterator[str]:
    """Yields the problem of `tiles`, if it has one."""
    # A command line's number is text.
    is_count = str(tiles).isdigit() and int(str(tiles)) > 0
    if not is_count and tiles not in (None, "one", "checkpoint"):
        yield f"tiles: {tiles!r} is neither a number from 1 on, nor one, nor checkpoint"
