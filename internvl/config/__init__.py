"""What a recipe may say: one tree of frozen dataclasses. Imports no torch.

Every number that changes a result is a field here. `config/recipes.py` reads the tree from YAML and checks
it; the resolved one is saved in the run folder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from internvl.errors import ConfigError, UserError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Tower = Literal["vision_tower", "language_model"]
Part = Literal[
    "vision_tower",
    "multi_modal_projector",
    "language_model",
    "queries",
    "heads",
    "text_projection",
    "image_pool",
    "query_pool",
    "itm_head",
    "logit_scale",
    "lm_head",
]
"""Of chat models the first three; InternVL-14B has no projector, but all the others."""

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (PEFT). The parts they sit on are frozen otherwise."""

    __pydantic_config__ = _STRICT
    rank: Positive
    """Rank of every adapter."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale numerator: an adapter adds alpha / rank * B A. Default 2 * rank, as the original."""
    dropout: Fraction = 0.05
    """Dropout on the input of an adapter."""
    on: tuple[Tower, ...] = ("language_model",)
    """Parts whose linear layers get an adapter; of QLLaMA not those of its cross-attention."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model a run starts from and what of it learns."""

    __pydantic_config__ = _STRICT
    id: str
    """Hub id or folder, official or hf layout."""
    train: tuple[Part, ...] | None = None
    """Parts whose own weights are trained; everything else is frozen, adapters come on top. null:
    the projector and the language model, or with `lora` none. InternVL-14B's: vision_tower;
    language_model, its queries and output matrix (lm_head) included; queries, with the
    cross-attention; heads, which are text_projection, image_pool, query_pool, itm_head and
    logit_scale, and each of these alone."""
    lora: LoraConfig | None = None
    """Adapters, or null for none. Usually together with `train: []`."""
    train_last_vision_blocks: Annotated[int, Field(ge=0)] = 0
    """Also train this many blocks at the end of the vision tower (original:
    `unfreeze_vit_layers`)."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Keep the frozen linear layers in 4 or 8 bits (bitsandbytes, made for a GPU) under `lora`:
    QLoRA. The projector and the output matrix stay as they are."""
    drop_path: Fraction = 0.0
    """Stochastic depth of the vision tower: the last block's rate, linear from 0."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts whose own weights are trained."""
        if self.train is not None:
            return self.train
        return () if self.lora else ("multi_modal_projector", "language_model")


@dataclass(frozen=True, kw_only=True)
class TilesChoice:
    """How an image becomes tiles (dynamic resolution): what a recipe says of it. What it leaves
    out, or null, is the checkpoint's own."""

    __pydantic_config__ = _STRICT
    size: Positive | None = None
    """Side of a tile, in pixels. A multiple of twice the patch size. Another one than the
    checkpoint's resizes its position embeddings."""
    min: Positive | None = None
    """Fewest tiles an image may become."""
    max: Positive | None = None
    """Most tiles an image may become, thumbnail not counted; for InternVL-14B always 1."""
    thumbnail: bool | None = None
    """Append the whole image as one more tile where it was cut into several."""
    pad_square: bool | None = None
    """Pad a picture to a square (in the mean colour) instead of stretching it. Only with
    `max: 1`; a source with `augment` ignores it, as the original does."""

    @property
    def open(self) -> tuple[str, ...]:
        """Names of the fields that are left to the checkpoint."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is None)


@dataclass(frozen=True, kw_only=True)
class TilesConfig(TilesChoice):
    """How an image becomes tiles, nothing left open; a recipe's once its checkpoint is known."""

    __pydantic_config__ = _STRICT
    size: Positive = 448
    """Side of a tile, in pixels."""
    min: Positive = 1
    """Fewest tiles an image may become."""
    max: Positive = 12
    """Most tiles an image may become, thumbnail not counted."""
    thumbnail: bool = True
    """Append the whole image as one more tile where it was cut into several."""
    pad_square: bool = False
    """Pad a picture to a square instead of stretching it."""


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Which frames stand for a video. Each becomes one tile."""

    __pydantic_config__ = _STRICT
    min_frames: Positive = 8
    """Fewest frames drawn."""
    max_frames: Positive = 32
    """Most frames drawn; the number is drawn anew every time, whatever the length."""
    sampling: Annotated[str, Field(pattern=r"^(rand|middle|fps[0-9]*\.?[0-9]+)$")] = "rand"
    """rand: one random frame of each of equal parts; middle: the middle one; fps2, fps0.5, …: that
    many frames a second, at most `max_frames`."""
    label: Annotated[str, Field(pattern=r"\{\}")] = "Frame-{}: <image>"
    """The line that stands for a frame; {} is its number, from 1."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One annotation file and the folder its pictures lie in."""

    __pydantic_config__ = _STRICT
    name: str
    """Used in messages and logs. Unique within a recipe."""
    type: Literal[
        "chat",
        "coco-captions",
        "captions",
        "preference",
        "parquet",
        "webdataset",
        "pairs",
        "flickr_format",
        "coco_format",
    ] = "chat"
    """chat: JSONL with `conversations` (official) or `messages` (OpenAI style); coco-captions: COCO
    JSON; captions: any form of data/captions.py, by name and content; preference: JSONL with
    `question, chosen, rejected`; parquet: a Parquet or Arrow file, or a folder of them (Hugging
    Face datasets); webdataset: a tar file or a folder of them; pairs: the same
    forms as captions, and tars; of these flickr_format, `name.jpg,caption` lines, and coco_format,
    a JSON list of `image` and `caption`, are the original's own."""
    annotations: Path
    """The file, or for parquet and webdataset also a folder."""
    images: str | Path = "."
    """Folder (or fsspec address, such as s3://bucket/folder) that image and video paths start
    from; paths may not leave it."""
    repeat: Annotated[float, Field(gt=0)] = 1.0
    """Times an epoch shows this source. Below 1: part of it. Above: whole passes, then a part."""
    part: Literal["first", "random"] = "first"
    """What part of a pass is: its first lines, as in the original, or a random choice by seed."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Relative share of an epoch, instead of `repeat`; all sources or none have one. An epoch keeps
    as many samples as the sources hold together."""
    num_samples: Positive | None = None
    """How many samples the source must hold; another number is an error."""
    prompt: str | None = None
    """The question of a caption source; `<image>` is put before it. For InternVL-14B, what captions
    are written after (itg), by default "English caption:"; the other losses use none."""
    augment: bool = False
    """Degrade every tile by JPEG at a random quality of 75 to 100 (original: `data_augment`)."""
    max_tiles: Positive | None = None
    """Overrides `data.tiles.max` for this source."""
    insert_image_mark: bool = False
    """Put `<image>` (or `<video>`) before the first question of a sample with one picture or video
    and no mark, as the original does; otherwise such a sample is a bad one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """From annotation files to packed rows."""

    __pydantic_config__ = _STRICT
    sources: tuple[SourceConfig, ...] = ()
    """Shuffled together; each is shown `repeat` times an epoch."""
    meta: Path | None = None
    """A meta file of the original (`root, annotation, repeat_time, data_augment, …` of each data
    set); its entries become sources before those above, with `insert_image_mark` as there."""
    tiles: TilesChoice = TilesConfig()
    """How an image becomes tiles. In a recipe, what is left out is the checkpoint's."""
    video: VideoConfig = VideoConfig()
    """How a video becomes images."""
    resize: Literal["pillow", "torch"] = "pillow"
    """pillow: as the original, pixel by pixel. torch: its antialiased uint8 resize, 0.004 of 255
    off on average. Both are compiled where numba is installed (`internvl[fast]`), and then take
    about the same time; without it torch's takes a quarter of Pillow's."""
    normalize: Literal["imagenet", "clip", "siglip"] | None = "imagenet"
    """Mean and deviation that pixels are normalized with. In a recipe, null or nothing takes the
    checkpoint's."""
    exif: Literal["ignore", "apply"] | None = "ignore"
    """ignore: an image is taken as it is stored, as in the original; apply: it is turned as its
    EXIF orientation says, as viewers show it, in training and by the exported model too. Not for
    InternVL-14B. In a recipe, null or nothing takes the checkpoint's."""
    max_tokens: Positive = 8192
    """Longest sample. A longer one loses its end, as in the original, but never part of a picture
    or every answer: then it is a bad sample."""
    row_tokens: Positive | None = None
    """Length of a packed row, at least `max_tokens`; null takes `max_tokens`."""
    max_tiles: Positive = 48
    """Most tiles in a packed row."""
    share_prefix: bool = True
    """Samples of the same picture form one row: the picture once, every answer a branch of it."""
    packing: Literal["best-fit", "official"] = "best-fit"
    """best-fit: the fullest row that still takes a sample, largest samples first; official: the
    original's buffers, in the order of the data."""
    packing_buffers: Positive = 20
    """Open rows of official packing (original: `max_buffer_size`)."""
    allow_overflow: bool = False
    """With official packing: once half of `packing_buffers` are open, a sample that no row takes
    goes into one that it overfills, as in the original. The row is cut at `row_tokens`; what was
    cut off goes on as a row from its next picture on, and text before that is lost, as there."""
    template: str | None = None
    """Conversation template; null takes the checkpoint's own."""
    system_message: str | None = None
    """Replaces the template's system message where a conversation has none; null takes the
    checkpoint's, and where it has none either, the template's."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """raise stops the run; skip leaves the sample out, lists it in bad_samples.jsonl, and stops
    above `max_bad_fraction`."""
    max_bad_fraction: Fraction = 0.01
    """With skip: the run stops when more than this share of the samples seen so far were bad."""
    changed: Literal["refuse", "accept"] = "refuse"
    """What a run does that goes on and finds its annotations changed. refuse: it says which and
    how, and stops. accept: it goes on with them. Where samples were only added at the end, the
    epoch that has begun ends as it would have, each sample once, and the new ones come from the
    next on; otherwise the order is a new one, and samples may come twice or not at all in this
    epoch."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read and encode ahead of training; 0 does it in the training process."""

    @property
    def tiling(self) -> TilesConfig:
        """`tiles` with nothing left open. Raises ValueError before the checkpoint filled them in
        (handles.complete)."""
        if not isinstance(self.tiles, TilesConfig):
            raise ValueError(f"data.tiles: {', '.join(self.tiles.open)} left to the checkpoint")
        return self.tiles

    @property
    def orientation(self) -> Literal["ignore", "apply"]:
        """`exif`. Raises ValueError as `tiling` does."""
        if self.exif is None:
            raise ValueError("data.exif: left to the checkpoint")
        return self.exif

    @property
    def statistics(self) -> str:
        """`normalize`, a key of data.images.STATISTICS. Raises ValueError as `tiling` does."""
        if self.normalize is None:
            raise ValueError("data.normalize: left to the checkpoint")
        return self.normalize


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimized."""

    __pydantic_config__ = _STRICT
    name: Literal["sft", "retrieval", "stage2"] = "sft"
    """sft: next-token loss on the answers. For InternVL-14B, on pairs of a picture and a caption:
    retrieval, contrastive in both branches (itc) and matching (itm), as its fine-tuning; stage2,
    contrastive in the query branch, matching and captioning (itg), as its pre-training."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each term of the loss in the total, 1 where none is given; a term of weight 0 is
    left out."""
    micro_batch: Positive | None = None
    """Pairs that a device encodes at once; null takes its whole share of a step. Fewer need less
    memory and one more forward pass; the loss still compares all pairs of a step."""
    kept_micro_batches: Positive = 1
    """Micro-batches that keep the graph of their features from that first pass and are not encoded
    again; each needs memory for it."""
    label_smoothing: Fraction = 0.0
    """Of the contrastive term of stage2."""
    weighting: Literal["token", "sample", "square"] = "token"
    """Weight of a supervised token in a sample of n: 1, 1 / n or 1 / sqrt(n)."""
    loss_normalization: Literal["global", "micro_batch"] = "global"
    """global: the mean over all supervised tokens of a step, however it is cut; micro_batch: the
    mean of each row's own mean, as the original, which then depends on how samples pack."""

    @property
    def packs(self) -> bool:
        """Whether a batch is a packed row of conversations; otherwise it is pairs."""
        return self.name == "sft"

    def weights_of(self, terms: Sequence[str]) -> dict[str, float]:
        """Weight of every term that counts."""
        all_ = {term: self.weights.get(term, 1.0) for term in terms}
        return {term: weight for term, weight in all_.items() if weight}


TERMS = {"sft": ("sft",), "retrieval": ("itc", "itm"), "stage2": ("itc", "itm", "itg")}
"""The terms of every objective."""


@dataclass(frozen=True, kw_only=True)
class LayerDecayConfig:
    """A learning rate for every layer of InternVL-14B: the peak times rate ** (layers above)."""

    __pydantic_config__ = _STRICT
    vision: Fraction = 1.0
    """Rate of the vision tower; its projector keeps the peak."""
    qllama: Fraction = 1.0
    """Rate of QLLaMA, the queries and the logit scale; norm, output matrix and heads keep the
    peak."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a warm-up and a decay of the learning rate."""

    __pydantic_config__ = _STRICT
    name: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw-8bit keeps the two moments of every matrix in 8 bits with a scale for each 256 of them
    (torchao): 2 instead of 8 bytes for a trained weight."""
    lr: Annotated[float, Field(gt=0)] = 4e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "as_shipped"] = "cosine"
    """cosine: linear warm-up, then a cosine. as_shipped: what the original's InternVL-14B scripts
    really ran, for they name a cosine and their DeepSpeed files a schedule that wins: logarithmic
    warm-up, linear decay, and after the first update one rate for every layer."""
    min_lr_ratio: Fraction = 0.0
    """The cosine ends at this share of the peak."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps with a rising rate (rounded up)."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps with a rising rate, instead of `warmup_ratio`."""
    layer_decay: LayerDecayConfig | None = None
    """Smaller rates for lower layers, for InternVL-14B; null gives every layer the same."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay."""
    decay_vectors: bool = False
    """Decay biases, norms and scales too, as the original does; otherwise matrices only."""
    decay_scalars: bool = False
    """Decay what is a single number too: the logit scale, as the original's InternVL-14B does."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    offload: bool = False
    """The two moments of every weight wait in the CPU's memory: 8 of the 16 bytes of a trained
    weight. They visit the GPU to be updated, so results are the same. Only with adamw."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is worked out: its speed and memory. Results are the same up to rounding."""

    __pydantic_config__ = _STRICT
    attention: Literal["auto", "dense", "flex", "flash", "eager"] = "auto"
    """flex: FlexAttention over the blocks of a row in which anything is seen; flash: the same with
    FlashAttention 4's kernels (Hopper, Blackwell; `pip install internvl[flash]`); dense: a mask
    over all pairs of tokens; eager: the same with all scores written out, on a CPU document by
    document, fastest there for a small model and short documents; auto: flash where it is
    installed, else flex, on a CPU dense. For pairs of InternVL-14B there is neither flex nor flash.
    """
    compile: bool | None = None
    """Compile every block of the model with torch.compile, once for each of the few lengths that
    rows are then padded to (shares of `data.row_tokens`). null: on a GPU."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass instead of kept: nothing, every second block, or
    every block of the parts that train."""
    offload: bool = False
    """What the forward pass keeps for the backward pass waits in the CPU's memory. Together with
    full checkpointing that is the input of every block."""
    loss_chunk: Positive = 1024
    """Supervised positions whose logits exist at the same time; each costs about 16 bytes per token
    of the vocabulary."""
    tf32: bool = False
    """Matrix products of float32 in TF32 on a GPU; those in bfloat16 are not concerned."""
    float8: bool = False
    """Products of a chat model's blocks with frozen weights in float8, forward and backward: with
    `lora` nearly all of them. Needs a GPU of compute capability 8.9 (Ada, Hopper) or newer, and
    `dtype: bfloat16`. Rounds more coarsely than the other settings here, by 4 % of a product; what
    is trained is used and exported on the weights as released."""


@dataclass(frozen=True, kw_only=True)
class EvalGuardConfig:
    """How much worse an evaluation may get than it was before the first step: what a model knows
    already and should not forget."""

    __pydantic_config__ = _STRICT
    metric: str
    """A metric of this evaluation, such as CIDEr or loss."""
    max_worsening: Annotated[float, Field(gt=0)] = 0.1
    """Share of the first value that may be lost; for a loss, that may be added."""
    action: Literal["stop", "warn"] = "stop"
    """stop ends the run, with its last checkpoint; warn says so and goes on."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation during and after training."""

    __pydantic_config__ = _STRICT
    type: Literal["caption", "loss", "retrieval", "classify"] = "caption"
    """caption: generate a text for every picture and compare it with the references; loss: the mean
    loss over the supervised tokens of held-out samples; retrieval:
    recall@k from texts to pictures and back; classify: the class of every picture, zero-shot. The
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
    """Only the first pictures, for a quick look."""
    batch_size: Positive = 16
    """Pictures, or texts, that the model sees at once."""
    on_bad_sample: Literal["raise", "skip", "keep"] = "raise"
    """What broken and missing pictures, captions that are no text or of no listed picture, pictures
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
    """caption: Karpathy's list of the pictures, where `annotations` has only their ids."""
    flat: bool = False
    """caption: pictures lie directly in `images`, whatever folder their names have."""

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
    """retrieval: which pictures of a Karpathy file with a `split` field."""
    clean: bool = False
    """retrieval: clean captions as the original does for Flickr30K and COCO."""
    modes: tuple[Literal["c", "g"], ...] = ("c", "g")
    """retrieval, classify: InternVL-C, InternVL-G, or both."""
    recall_k: tuple[Positive, ...] = (1, 5, 10)
    """retrieval: a hit is a positive among the first k."""
    rerank: Annotated[int, Field(ge=0)] = 0
    """retrieval: also sort the first so many of every query by the model's match score (ITM)."""
    train: Path | None = None
    """retrieval: pictures with captions that were trained on; those of the test must not be there.
    The picture paths of both start from `images`."""

    classes: Path | None = None
    """classify: JSON of class names, in the order of the sorted folders, or by folder; null: the
    folders' own names."""
    templates: Path | None = None
    """classify: JSON list of texts with `{c}` where the class goes; null: the class alone."""
    key: str | None = None
    """classify: which entry of `classes` and `templates` is meant, where they hold several data
    sets, as CLIP_benchmark's do."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What keeps an update from being applied. A loss or gradient that is no number always does."""

    __pydantic_config__ = _STRICT
    loss_spike: Annotated[float, Field(gt=0)] | None = None
    """Robust deviations that a step's loss may lie above the median of the steps before; 10 is a
    cautious choice. null: spikes are let through."""
    grad_spike: Annotated[float, Field(gt=0)] | None = None
    """The same for the norm of the gradient, before it is clipped."""
    window: Annotated[int, Field(ge=8)] = 50
    """Applied steps that a spike is measured against; the first ones of a run are not judged."""
    action: Literal["stop", "skip"] = "stop"
    """stop ends the run and names the samples; skip leaves the update out, lists it in
    skipped_steps.jsonl, and stops above `max_skipped`."""
    max_skipped: Positive = 10
    """With skip: updates of a run that may be left out."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved on the way, for going on after an interruption."""

    __pydantic_config__ = _STRICT
    every: Annotated[int, Field(ge=0)] = 200
    """Steps between checkpoints; 0 saves only at the end or when interrupted."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    best: str | None = None
    """An evaluation's metric, such as val/loss or coco/CIDEr: the step where it is best is kept as
    well, in the folder `best`, which loads, evaluates and exports as the run itself does."""
    best_is: Literal["auto", "min", "max"] = "auto"
    """auto: min for a loss, max for any other metric."""


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When a run ends before its last step."""

    __pydantic_config__ = _STRICT
    patience: Positive | None = None
    """Evaluations in a row without a better `checkpoint.best`; null trains to the end."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    __pydantic_config__ = _STRICT
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()
    evals: dict[str, EvalConfig] = field(default_factory=dict)
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    stop: StopConfig = StopConfig()
    run: Path
    """The run folder. Training on an existing one goes on where it stopped."""
    global_batch: Positive
    """Samples in one optimizer step, over all devices, however they pack."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data. Give this or `steps`."""
    steps: Positive | None = None
    """Optimizer steps. Give this or `epochs`."""
    drop_last: bool = False
    """Leave the last, smaller batch of the run out."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. Trained weights are kept in float32, frozen ones in this type."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    threads: Positive | None = None
    """CPU threads that compute; null leaves the choice to torch. Results on a CPU depend on it in
    their last bits, and small models are often fastest with one."""
    seed: int = 42
    """Of shuffling, dropout and fresh weights."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases that metrics also go to; TensorBoard has them in any case."""

    @property
    def shares_prefix(self) -> bool:
        """Whether samples of the same picture form one unit; pairs are drawn one by one."""
        return self.objective.packs and self.data.share_prefix

    def num_steps(self, num_samples: float) -> int:
        """Optimizer steps of the run over an epoch of `num_samples` samples."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        total = round(num_samples * self.epochs)
        whole, rest = divmod(total, self.global_batch)
        return whole if self.drop_last or rest == 0 else whole + 1

    def num_samples(self, num_samples: float) -> int:
        """Samples that the whole run shows, over an epoch of `num_samples` samples."""
        if self.steps is not None or self.drop_last:
            return self.num_steps(num_samples) * self.global_batch
        assert self.epochs is not None
        return round(num_samples * self.epochs)


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


def sentence(error: Any) -> str:
    """What is wrong with a value, from an entry of pydantic's `errors()`."""
    where = ".".join(str(part) for part in error["loc"] if part != "dataclass")
    if error["type"] == "missing":
        return f"{where}: missing; it has no default"
    # Pydantic names the type it tried as well, where a value may have several.
    where = re.split(r"\.(?=[\w-]+\[)|\.(?:str|int|float|bool)$", where)[0]
    found = error.get("input")
    if error["type"] == "tuple_type":
        remedy = f"write [{found}]" if isinstance(found, str | int | float) else "begin with - or ["
        return f"{where}: must be a list, not {found!r}; {remedy}"
    said = "input should be a path" if error["type"] == "path_type" else error["msg"]
    return f"{where}: {said[0].lower()}{said[1:]}, not {found!r}"
