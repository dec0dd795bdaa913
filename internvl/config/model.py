"""`model:` what is loaded, what trains, adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from internvl.config.types import STRICT, Fraction, Part, Positive, Tower, UserPath


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (PEFT). The parts that have them are frozen otherwise."""

    __pydantic_config__ = STRICT
    rank: Positive
    """Rank of every adapter."""
    # null, not a number: an override of `rank` alone then keeps the ratio of the two.
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale numerator: an adapter adds alpha / rank * B A. Default 2 * rank, as the original."""
    dropout: Fraction = 0.05
    """Dropout on the input of an adapter."""
    on: tuple[Tower, ...] = ("language_model",)
    """Parts whose linear layers get an adapter; in QLLaMA its cross-attention gets none."""


START_KEYS = ("vision", "language", "projector", "ps_version", "select_layer", "template")
"""Keys of a model from parts, which exclude `id`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that a run starts from, and what is trained."""

    __pydantic_config__ = STRICT
    id: str | None = None
    """Hub id or folder, in the official or hf layout. Give this, or `vision`, `language` and
    `template` for a chat model from parts."""
    vision: str | None = None
    """From parts: hub id or folder of an InternViT, or of a chat model whose tower is taken."""
    language: str | None = None
    """From parts: hub id or folder of a causal language model with its tokenizer."""
    projector: UserPath | None = None
    """From parts: the original's `mlp_projector/*.pth`; null: initialized at random from `seed`."""
    template: str | None = None
    """From parts: the conversation template, such as Hermes-2."""
    # null instead of "v2" and -1: with `id` the checkpoint decides, and any value is an error.
    ps_version: Literal["v1", "v2"] | None = None
    """From parts: version of the pixel shuffle; null: v2. Chat 1.1 and 1.2 have v1."""
    select_layer: int | None = None
    """From parts: index of the tower's block whose output is used; null: -1, the last."""
    train: tuple[Part, ...] | None = None
    """Parts whose own weights are trained; everything else is frozen, apart from adapters. null:
    the projector and the language model, or none with `lora`. InternVL-14B's parts: vision_tower;
    language_model, which includes its queries and output matrix (lm_head); queries, with the
    cross-attention; heads, which are text_projection, image_pool, query_pool, itm_head and
    logit_scale, and each of these alone."""
    lora: LoraConfig | None = None
    """Adapters, or null for none. Usually together with `train: []`."""
    train_last_vision_blocks: Annotated[int, Field(ge=0)] = 0
    """Also train this many blocks at the end of the vision tower (original:
    `unfreeze_vit_layers`)."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Keep the frozen linear layers under `lora` in 4 or 8 bits (bitsandbytes, made for a GPU):
    QLoRA. The projector and the output matrix stay as they are."""
    drop_path: Fraction = 0.0
    """Stochastic depth of the vision tower: rate of the last block, linear from 0."""

    @property
    def name(self) -> str:
        """The model in messages: its id, or "InternViT-6B + Yi-34B" for one from parts."""
        if self.id is not None:
            return self.id
        return " + ".join(Path(str(name)).name for name in (self.vision, self.language))

    @property
    def start(self) -> tuple[object, ...]:
        """The values that decide which weights a run starts from."""
        return (self.id, *(getattr(self, key) for key in START_KEYS))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts whose own weights are trained."""
        if self.train is not None:
            return self.train
        # The original's fine-tuning scripts freeze the tower, and with LoRA all but the adapters.
        return () if self.lora else ("multi_modal_projector", "language_model")
