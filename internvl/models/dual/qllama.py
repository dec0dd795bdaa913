"""QLLaMA: Llama whose first positions are learned queries that look at an image.

Original: `internvl_g/internvl/model/internvl_stage2/modeling_qllama.py`. Layers, norms and rotary
positions are `transformers`' Llama; ours is the cross-attention, in every n-th layer between
self-attention and MLP and on the query positions alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
)

from internvl.models.dual.rms_norm import RMSNorm

Mask = Literal["itc", "itm", "itg", "text"]
KeysValues = tuple[Tensor, Tensor]
"""Of B images with N visual tokens, each (B, heads, N, D / heads)."""


@dataclass(frozen=True)
class Seen:
    """Images as QLLaMA looks at them, whatever stands beside its queries."""

    tokens: Tensor
    """Visual tokens, (B, N, W)."""
    looks: tuple[KeysValues | None, ...]
    """One for each layer, on its device; None where it does not look."""

    def __len__(self) -> int:
        """B."""
        return len(self.tokens)

    def tensors(self) -> Iterator[Tensor]:
        """All it holds."""
        yield self.tokens
        for look in self.looks:
            yield from look or ()

    def of(self, tensors: Iterable[Tensor]) -> "Seen":
        """The same of other tensors, in the order of `tensors`."""
        others = iter(tensors)
        tokens = next(others)
        return Seen(tokens, tuple(look and (next(others), next(others)) for look in self.looks))


class QLlamaConfig(LlamaConfig):
    """Llama's configuration with the queries'."""

    num_query_tokens: int = 96
    """0: a plain Llama, as in a file that holds InternVL-C alone."""
    cross_attention_frequency: int = 2
    """Layers 0, n, 2n, … look at the image."""
    vision_hidden_size: int = 3200

    def has_cross_attention(self, layer: int) -> bool:
        return self.num_query_tokens > 0 and layer % self.cross_attention_frequency == 0


class CrossAttention(nn.Module):
    """Queries attend to all visual tokens: no mask, no positions, no bias, no gate.

    Called, it makes keys and values, which every use of an image shares; `attend` uses them.
    """

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__()
        width, source = config.hidden_size, config.vision_hidden_size
        self.num_heads = config.num_attention_heads
        self.norm1 = RMSNorm(width, eps=config.rms_norm_eps)
        self.norm2 = RMSNorm(source, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(source, width, bias=False)
        self.v_proj = nn.Linear(source, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, vision: Tensor) -> KeysValues:
        """Visual tokens (B, N, W) -> their keys and values."""
        vision = self.norm2(vision)
        k, v = (
            self._heads(project(vision), vision.shape[:2]).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        return k, v

    def attend(self, queries: Tensor, seen: KeysValues) -> Tensor:
        """queries (R B, Q, D), keys and values of B images -> (R B, Q, D).

        Row r B + b looks at image b. Its R blocks become one longer query, so that no image's
        keys and values are repeated.
        """
        k, v = seen
        images, (rows, length, width) = len(k), queries.shape
        q = self._heads(self.q_proj(self.norm1(queries)), (rows // images, images, length))
        q = q.permute(1, 3, 0, 2, 4).flatten(2, 3)
        attended = F.scaled_dot_product_attention(q, k, v)
        blocks = attended.unflatten(2, (rows // images, length)).permute(2, 0, 3, 1, 4)
        return self.o_proj(blocks.reshape(rows, length, width))

    def _heads(self, hidden: Tensor, shape: tuple[int, ...]) -> Tensor:
        return hidden.view(*shape, self.num_heads, -1)


class QLlamaLayer(GradientCheckpointingLayer):
    """One layer; `cross_attn` is there in every n-th."""

    def __init__(self, config: QLlamaConfig, layer: int) -> None:
        super().__init__()
        self.num_queries = config.num_query_tokens
        self.self_attn = LlamaAttention(config, layer)
        self.cross_attn = CrossAttention(config) if config.has_cross_attention(layer) else None
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        seen: KeysValues | None,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """hidden (R B, T, D) -> the same; with `seen` of B images its first Q are queries."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            is_causal=False,  # the mask says everything
        )
        hidden = hidden + attended
        if self.cross_attn is not None and seen is not None:
            queries, text = hidden.tensor_split([self.num_queries], dim=1)
            queries = queries + self.cross_attn.attend(queries, seen)
            hidden = torch.cat([queries, text], dim=1)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Keys and values are made outside of `forward`, so they are compiled by themselves."""
        super().compile(*args, **kwargs)
        if self.cross_attn is not None:
            self.cross_attn.compile(*args, **kwargs)


class QueryTokens(nn.Module):
    """The learned queries. A module of their own, so that off-loading brings them back in time."""

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))

    def forward(self, num_rows: int) -> Tensor:
        """(num_rows, Q, D)."""
        return self.weight.expand(num_rows, -1, -1)


class QLlamaModel(LlamaPreTrainedModel):
    """Embeddings, layers and the final norm; the queries are handed in with the text."""

    config: QLlamaConfig
    _no_split_modules = ["QLlamaLayer"]  # noqa: RUF012 (transformers' way)

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            QLlamaLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def look(self, vision: Tensor) -> Seen:
        """Visual tokens (B, N, W), for as many calls as look at these images."""
        parts: list[Any] = [layer.cross_attn for layer in self.layers]
        looks = tuple(None if part is None else part(vision) for part in parts)
        return Seen(vision, looks)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        seen: Seen | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            inputs_embeds: (R, T, D); with `seen` the first Q positions are the queries.
            attention_mask: bool (R, 1, T, keys), True where a position may attend, as the
                function of this name makes it; None lets every position see all keys.
            seen: B images; rows come in blocks of B, image by image.
            past_key_values: what earlier positions left; this call's are added to it.
            position_ids: int64 (1, T); by default 0, 1, …

        Returns:
            (R, T, D)
        """
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        rotary = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden = inputs_embeds
        looks = (None,) * len(self.layers) if seen is None else seen.looks
        for layer, look in zip(self.layers, looks, strict=True):
            hidden = layer(hidden, look, attention_mask, rotary, past_key_values=past_key_values)
        return self.norm(hidden)


def attention_mask(kind: Mask, text: Tensor, num_queries: int) -> Tensor:
    """Which position may attend to which: bool (R, 1, T, T), T = Q + L, or L for "text".

    "itc"  queries and text do not see each other; text is causal
    "itm"  everything sees everything
    "itg"  text is causal and sees the queries, which do not see it; this is also a caption's
    "text" text alone, causal

    Padding is never a key of another position; it sees itself, so that no row is without a key.

    Args:
        text: not zero where there is text, (R, L), bool or int64.
    """
    rows, length = text.shape
    causal = torch.ones(length, length, dtype=torch.bool, device=text.device).tril()
    if kind == "text":
        num_queries, allowed = 0, causal
    else:
        allowed = causal.new_zeros(num_queries + length, num_queries + length)
        allowed[:num_queries, :num_queries] = True
        allowed[:num_queries, num_queries:] = kind == "itm"
        allowed[num_queries:, :num_queries] = kind != "itc"
        allowed[num_queries:, num_queries:] = True if kind == "itm" else causal
    keys = torch.cat([causal.new_ones(rows, num_queries), text.bool()], dim=1)
    own = torch.eye(len(allowed), dtype=torch.bool, device=text.device)
    return (allowed & keys[:, None] | own)[:, None]
