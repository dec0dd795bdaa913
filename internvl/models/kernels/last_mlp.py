"""The last decoder block's MLP on supervised positions alone.

After the last attention no token depends on another, and the loss reads only those that predict a
target: of a COCO caption with its image some 12 of 1,700. The MLP is four fifths of a block's
products, so these positions are selected before it, not after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from internvl.models.modules import replace_module


class SelectiveBlock(GradientCheckpointingLayer):
    """A block of norm, attention, norm and MLP that can return some positions only."""

    positions: Tensor | None = None
    """int64 (M,), inside `select_positions`; they may repeat."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # As an argument, so that gradient checkpointing saves it: when the block is recomputed the
        # attribute is None again, or another row's.
        return super().__call__(*args, positions=self.positions, **kwargs)

    def forward(
        self, hidden_states: Tensor, *, positions: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), or (B, M, D) with `positions`."""
        hidden = self.attend(hidden_states, **kwargs)
        if positions is not None:
            hidden = hidden.index_select(1, positions)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def attend(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, L, D): norm, attention and the residual."""
        mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden), **kwargs)
        return hidden + mixed

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles `attend` alone, one graph for each row length."""
        # The MLP sees another number of positions in every step, and few gain nothing from it.
        self.attend = torch.compile(self.attend, *args, **kwargs)  # type: ignore[method-assign]


class SelectiveLlamaBlock(SelectiveBlock, LlamaDecoderLayer):
    """Llama's and InternLM2's."""


class SelectiveQwen2Block(SelectiveBlock, Qwen2DecoderLayer):
    """Qwen2's."""


class SelectiveQwen3Block(SelectiveBlock, Qwen3DecoderLayer):
    """Qwen3's, without experts."""


_SELECTIVE: dict[type[nn.Module], type[SelectiveBlock]] = {
    LlamaDecoderLayer: SelectiveLlamaBlock,
    Qwen2DecoderLayer: SelectiveQwen2Block,
    Qwen3DecoderLayer: SelectiveQwen3Block,
}


def supports(block: nn.Module) -> bool:
    """True if a block can return some positions only, now or once it is enabled."""
    return type(block) in _SELECTIVE or isinstance(block, SelectiveBlock)


def enable(blocks: nn.ModuleList) -> None:
    """Replaces the last block by one that `select_positions` works on, if it is supported."""
    # By exact type: a subclass may compute something else.
    cls = _SELECTIVE.get(type(blocks[-1]))
    if cls is not None:
        replace_module(blocks, str(len(blocks) - 1), cls)


def run_selected(block: SelectiveBlock, hidden: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
    """Runs a block that returns `positions` only, (B, L, D) -> (B, M, D), as an argument.

    Compiled code takes any number of them, where it would be built anew for another attribute.
    """
    return block.forward(hidden, positions=positions, **kwargs)


@contextmanager
def select_positions(blocks: nn.ModuleList, positions: Tensor) -> Iterator[bool]:
    """Inside, the last block returns `positions`, int64 (M,), only; yields False if it cannot."""
    last = blocks[-1]
    if not isinstance(last, SelectiveBlock):
        yield False
        return
    last.positions = positions
    try:
        yield True
    finally:
        last.positions = None
