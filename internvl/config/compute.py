"""`compute:` speed and memory of a step."""

from dataclasses import dataclass
from typing import Literal

from internvl.config.types import STRICT, Positive


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Speed and memory of a step. Except for float8, results are the same up to rounding."""

    __pydantic_config__ = STRICT
    attention: Literal["auto", "dense", "flex", "flash", "eager"] = "auto"
    """flex: FlexAttention, which skips the blocks of a row in which no query sees a key; flash: the
    same with FlashAttention 4's kernels (Hopper, Blackwell; `pip install internvl[flash]`); dense:
    a mask over all pairs of tokens; eager: all attention scores are materialized, on a CPU document
    by document, which is fastest there for a small model and short documents; auto: flash if
    installed, else flex, on a CPU dense. Pairs of InternVL-14B take neither flex nor flash."""
    compile: bool | None = None
    """Compile every block of the model with torch.compile, once for each of the few lengths that
    rows are then padded to (shares of `data.row_tokens`). null: on a GPU."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: the backward pass recomputes nothing, every second block, or every
    block of the parts that gradients pass."""
    offload: bool = False
    """Saved activations wait in CPU memory until the backward pass. With full checkpointing these
    are the inputs of the blocks."""
    loss_chunk: Positive = 1024
    """Supervised positions whose logits exist at the same time; each costs about 16 bytes per token
    of the vocabulary."""
    tf32: bool = False
    """Use TF32 for float32 matrix products on a GPU; bfloat16 products do not change."""
    float8: bool = False
    """Compute the products with frozen weights in a chat model's blocks in float8, forward and
    backward: with `lora` nearly all products. Needs a GPU of compute capability 8.9 (Ada, Hopper)
    or newer, and `dtype: bfloat16`. Rounds more coarsely than the other settings: a product is off
    by about 4 %. Answers and exports use the released weights, which stay unrounded."""
