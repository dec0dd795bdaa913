"""`evals:` what is measured during and after training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from internvl.config.problems import sentence
from internvl.config.types import STRICT, Positive
from internvl.errors import ConfigError


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
    """One evaluation during and after training."""

    __pydantic_config__ = STRICT
    type: Literal["caption", "loss", "retrieval", "classify"] = "caption"
    """caption: generate a text for every image and compare it with the references; loss: the mean
    loss over the supervised tokens of held-out samples; retrieval:
    recall@k from texts to images and back; classify: the class of every image, zero-shot. The
    last two are for InternVL-14B."""
    annotations: Path
    """caption, retrieval: images with their captions in any form of data/captions.py, usually COCO
    JSON. loss: chat JSONL, or with `prompt` captions. classify: a folder with a folder of images
    for each class."""
    images: Path = Path(".")
    """Folder that image paths start from. Not for classify."""
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

    prompt: str | None = None
    """caption, loss: the question; a chat model gets `<image>` before it. null: the original's, and
    for loss, that `annotations` are conversations."""
    max_tokens: Positive = 8192
    """loss: longest sample, as `data.max_tokens`."""
    tokenize: Literal["ptb", "characters", "words"] = "ptb"
    """caption: what the n-gram scores count: PTB tokens (English), characters (Chinese), words."""
    metrics: Literal["all", "exact"] = "all"
    """caption: exact is only the share of exact answers, which needs no Java and takes no time."""
    max_new_tokens: Positive = 30
    """caption: longest answer, in tokens."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """caption: shortest answer, in tokens."""
    num_beams: Positive | None = None
    """caption: width of the beam search. null: the original's, 5 for InternVL-14B and 1, which is
    greedy, for chat models."""
    pictures: Path | None = None
    """caption: Karpathy's list of the images, where `annotations` has only their ids."""
    flat: bool = False
    """caption: images lie directly in `images`, whatever folder their names have."""

    form: Literal[
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
    ] = "auto"
    """retrieval: how `annotations` is written; auto goes by name and content."""
    split: str = "test"
    """retrieval: which images of a Karpathy file with a `split` field."""
    clean: bool = False
    """retrieval: clean captions as the original does for Flickr30K and COCO."""
    modes: tuple[Literal["c", "g"], ...] = ("c", "g")
    """retrieval, classify: InternVL-C, InternVL-G, or both."""
    recall_k: tuple[Positive, ...] = (1, 5, 10)
    """retrieval: a hit is a positive among the first k."""
    rerank: Annotated[int, Field(ge=0)] = 0
    """retrieval: also sort the first so many of every query by the model's match score (ITM)."""
    train: Path | None = None
    """retrieval: images with captions that were trained on; those of the test must not be there.
    The image paths of both start from `images`."""

    classes: Path | None = None
    """classify: JSON of class names, in the order of the sorted folders, or by folder; null: the
    folders' own names."""
    templates: Path | None = None
    """classify: JSON list of texts with `{c}` where the class goes; null: the class alone."""
    key: str | None = None
    """classify: which entry of `classes` and `templates` is meant, where they hold several data
    sets, as CLIP_benchmark's do."""


def eval_config(**keys: Any) -> EvalConfig:
    """One evaluation outside a recipe. Raises ConfigError with every wrong value."""
    try:
        config = TypeAdapter(EvalConfig).validate_python(keys)
    except ValidationError as error:
        raise ConfigError("\n".join(map(sentence, error.errors()))) from None
    if config.min_new_tokens > config.max_new_tokens:
        raise ConfigError(
            f"min_new_tokens: {config.min_new_tokens}, larger than max_new_tokens, "
            f"{config.max_new_tokens}"
        )
    return config
