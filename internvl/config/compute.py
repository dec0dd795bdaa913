"""`compute:` speed and memory of a step."""

from dataclasses import dataclass
from typing import Literal

from internvl.config.types import STRICT, Positive


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is worked out: its speed and memory. Results are the same up to rounding."""

    __pydantic_config__ = STRICT
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
