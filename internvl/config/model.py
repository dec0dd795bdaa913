"""`model:` what is loaded, what trains, adapters."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from internvl.config.types import STRICT, Fraction, Part, Positive, Tower


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (PEFT). The parts they sit on are frozen otherwise."""

    __pydantic_config__ = STRICT
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

    __pydantic_config__ = STRICT
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
