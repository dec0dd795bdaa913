"""The last decoder block's MLP on supervised positions alone.

After the last attention every token goes its own way, and the loss reads those alone that predict
a target: of a COCO caption with its image some 12 of 1,700. The MLP is four fifths of a block's
products, so these positions are taken out before it, not after it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class Tail(GradientCheckpointingLayer):
    """A block of norm, attention, norm and MLP that can put out some positions only."""

    positions: Tensor | None = None
    """int64 (M,), while a forward pass is `at` them; they may repeat."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Given here as an argument, and so remembered for what is computed again later.
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
        """(B, L, D) -> (B, L, D): norm, attention and what is added to it."""
        mixed, _ = self.self_attn(hidden_states=self.input_layernorm(hidden), **kwargs)
        return hidden + mixed

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The first half, for each length of a row; few positions gain nothing from the second."""
        self.attend = torch.compile(self.attend, *args, **kwargs)  # type: ignore[method-assign]


class LlamaTail(Tail, LlamaDecoderLayer):
    """Llama's, which InternLM2's is as well."""


class Qwen2Tail(Tail, Qwen2DecoderLayer):
    """Qwen2's."""


class Qwen3Tail(Tail, Qwen3DecoderLayer):
    """Qwen3's, without experts."""


_TAILS: dict[type[nn.Module], type[Tail]] = {
    LlamaDecoderLayer: LlamaTail,
    Qwen2DecoderLayer: Qwen2Tail,
    Qwen3DecoderLayer: Qwen3Tail,
}


def fits(block: nn.Module) -> bool:
    """Whether a block is of a kind that can put out some positions only, or does already."""
    return type(block) in _TAILS or isinstance(block, Tail)


def cut(blocks: Sequence[nn.Module]) -> None:
    """Makes the last block one that `at` can be used with, if it is of a kind that fits.

    Its class is changed in place: weights and their names stay.
    """
    last = blocks[-1]
    last.__class__ = _TAILS.get(type(last), type(last))


@contextmanager
def at(blocks: Sequence[nn.Module], positions: Tensor) -> Iterator[bool]:
    """Inside, the last block puts out `positions`, int64 (M,), only; false if it cannot."""
    last = blocks[-1]
    if not isinstance(last, Tail):
        yield False
        return
    last.positions = positions
    try:
        yield True
    finally:
        last.positions = None
