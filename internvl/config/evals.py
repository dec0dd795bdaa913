"""`evals:` what is measured during and after training, a section for each `type`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from internvl.config.problems import sentences
from internvl.config.types import STRICT, Positive
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
    """How much worse an evaluation may get than it was before the first step: what a model knows
    already and should not forget."""

    __pydantic_config__ = STRICT
    metric: str
    """A metric of this evaluation, such as CIDEr or loss."""
    max_worsening: Annotated[float, Field(gt=0)] = 0.1
    """Share of the first value that may be lost; for a loss, that may be added."""
    action: Literal["stop", "warn"] = "stop"
    """stop ends the run, with its last checkpoint; warn says so and goes on."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation during and after training. Each type is a subclass with keys of its own."""

    __pydantic_config__ = STRICT
    in_training: ClassVar[tuple[str, ...]] = ("every", "before", "guard")
    """Keys that say when a run evaluates, and what it does then."""

    type: str
    annotations: Path
    """What is measured on."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    before: bool = False
    """Also evaluate before the first step."""
    guard: EvalGuardConfig | None = None
    """How much worse this may get than before the first step, where it is then measured too."""
    limit: Positive | None = None
    """Only the first images, for a quick look."""
    batch_size: Positive = 16
    """Images, or texts, that the model sees at once."""
    on_bad_sample: Literal["raise", "skip", "keep"] = "raise"
    """What broken and missing images, captions that are no text or of no listed image, images
    without captions, repeated ids and leaks lead to. raise: an error that names them all; skip:
    they are left out and listed; keep: listed only, where the rest can be measured with them."""

    @property
    def files(self) -> tuple[Path | None, ...]:
        """Files and folders that the evaluation reads, but images; None for what is not set."""
        return (self.annotations,)

    def problems(self) -> Iterator[str]:
        """Yields "key: reason" for values that are fine alone and wrong together."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class CaptionEval(EvalConfig):
    """Generates a text for every image and compares it with the references."""

    type: Literal["caption"] = "caption"
    annotations: Path
    """Images with their captions in any form of data/captions.py, usually COCO JSON."""
    images: Path = Path(".")
    """Folder that image paths start from."""
    prompt: str | None = None
    """The question; a chat model gets `<image>` before it. null: the original's."""
    tokenize: Literal["ptb", "characters", "words"] = "ptb"
    """What the n-gram scores count: PTB tokens (English), characters (Chinese), words."""
    metrics: Literal["all", "exact"] = "all"
    """exact is only the share of exact answers, which needs no Java and takes no time."""
    max_new_tokens: Positive = 30
    """Longest answer, in tokens."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Shortest answer, in tokens."""
    num_beams: Positive | None = None
    """Width of the beam search. null: the original's, 5 for InternVL-14B and 1, which is greedy,
    for chat models."""
    pictures: Path | None = None
    """Karpathy's list of the images, where `annotations` has only their ids."""
    flat: bool = False
    """Images lie directly in `images`, whatever folder their names have."""
    form: CaptionForm = "auto"
    """How `annotations` is written; auto goes by name and content."""
    split: str = "test"
    """Which images of a Karpathy file with a `split` field."""

    @property
    def files(self) -> tuple[Path | None, ...]:
        """See `EvalConfig.files`."""
        return (self.annotations, self.pictures)

    def problems(self) -> Iterator[str]:
        """See `EvalConfig.problems`."""
        if self.min_new_tokens > self.max_new_tokens:
            yield (
                f"min_new_tokens: {self.min_new_tokens}, larger than max_new_tokens, "
                f"{self.max_new_tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class LossEval(EvalConfig):
    """The mean loss over the supervised tokens of held-out samples, for chat models."""

    type: Literal["loss"] = "loss"
    annotations: Path
    """Chat JSONL, or with `prompt` captions."""
    images: Path = Path(".")
    """Folder that image paths start from."""
    prompt: str | None = None
    """The question before each caption; null: `annotations` are conversations."""
    max_tokens: Positive = 8192
    """Longest sample, as `data.max_tokens`."""


@dataclass(frozen=True, kw_only=True)
class RetrievalEval(EvalConfig):
    """Recall@k from texts to images and back, for InternVL-14B."""

    type: Literal["retrieval"] = "retrieval"
    annotations: Path
    """Images with their captions in any form of data/captions.py, usually COCO JSON."""
    images: Path = Path(".")
    """Folder that image paths start from."""
    form: CaptionForm = "auto"
    """How `annotations` is written; auto goes by name and content."""
    split: str = "test"
    """Which images of a Karpathy file with a `split` field."""
    clean: bool = False
    """Clean captions as the original does for Flickr30K and COCO."""
    modes: tuple[Literal["c", "g"], ...] = ("c", "g")
    """InternVL-C, InternVL-G, or both."""
    recall_k: tuple[Positive, ...] = (1, 5, 10)
    """A hit is a positive among the first k."""
    rerank: Annotated[int, Field(ge=0)] = 0
    """Also sort the first so many of every query by the model's match score (ITM)."""
    train: Path | None = None
    """Images with captions that were trained on; those of the test must not be there. The image
    paths of both start from `images`."""

    @property
    def files(self) -> tuple[Path | None, ...]:
        """See `EvalConfig.files`."""
        return (self.annotations, self.train)


@dataclass(frozen=True, kw_only=True)
class ClassifyEval(EvalConfig):
    """The class of every image, zero-shot, for InternVL-14B."""

    type: Literal["classify"] = "classify"
    annotations: Path
    """A folder with a folder of images for each class."""
    modes: tuple[Literal["c", "g"], ...] = ("c", "g")
    """InternVL-C, InternVL-G, or both."""
    classes: Path | None = None
    """JSON of class names, in the order of the sorted folders, or by folder; null: the folders' own
    names."""
    templates: Path | None = None
    """JSON list of texts with `{c}` where the class goes; null: the class alone."""
    key: str | None = None
    """Which entry of `classes` and `templates` is meant, where they hold several data sets, as
    CLIP_benchmark's do."""

    @property
    def files(self) -> tuple[Path | None, ...]:
        """See `EvalConfig.files`."""
        return (self.annotations, self.classes, self.templates)


EvalSection = Annotated[CaptionEval | LossEval | RetrievalEval | ClassifyEval, OneOf("type")]
"""Every evaluator; a new one is one more member. The first is what a section without `type` is."""


def eval_keys(name: str) -> set[str]:
    """Returns the keys of a type of evaluation."""
    sections = {name_of(section, "type"): section for section in members(EvalSection)}
    return {field.name for field in fields(sections[name])}


def eval_options() -> dict[str, list[type[EvalConfig]]]:
    """Returns the keys that may be set for one evaluation by hand -> the sections that have each.

    Left out are those that only a run heeds, and `type` and `split`, which the task names.
    """
    options: dict[str, list[type[EvalConfig]]] = {}
    for section in members(EvalSection):
        for field in fields(section):
            if field.name not in ("type", "split", *EvalConfig.in_training):
                options.setdefault(field.name, []).append(section)
    return options


def eval_config(**keys: Any) -> EvalSection:
    """Returns one evaluation outside a recipe. Raises ConfigError with every wrong value."""
    try:
        section: EvalSection = TypeAdapter(EvalSection).validate_python(keys)
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error, EvalSection))) from None
    problems = list(section.problems())
    if problems:
        raise ConfigError("\n".join(problems))
    return section
