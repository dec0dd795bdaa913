"""QLLaMA: a Llama whose first positions are learned queries with cross-attention to an image.

Original: `internvl_g/internvl/model/internvl_stage2/modeling_qllama.py`. Layers, norms and rotary
positions are those of `transformers`' Llama. Every n-th layer adds cross-attention between
self-attention and MLP, on the query positions alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
)

from internvl.models.dual.rms_norm import RMSNorm

Mask = Literal["itc", "itm", "itg", "text"]
KeysValues = tuple[Tensor, Tensor]
"""(keys, values) of B images with N visual tokens, each (B, heads, N, D / heads)."""


@dataclass(frozen=True)
class CrossKV:
    """Cached cross-attention keys and values of a batch of images; no text enters them."""

    tokens: Tensor
    """Visual tokens, (B, N, W)."""
    layers: tuple[KeysValues | None, ...]
    """One per layer, on its device; None for layers without cross-attention."""

    def __len__(self) -> int:
        """B."""
        return len(self.tokens)

    def tensors(self) -> Iterator[Tensor]:
        """Yields the visual tokens, then keys and values layer by layer."""
        yield self.tokens
        for keys_values in self.layers:
            yield from keys_values or ()

    def with_tensors(self, tensors: Iterable[Tensor]) -> "CrossKV":
        """Returns a copy that holds `tensors`, in the order of `self.tensors()`."""
        # One iterator for all: layers without cross-attention consume none.
        others = iter(tensors)
        tokens = next(others)
        return CrossKV(tokens, tuple(kv and (next(others), next(others)) for kv in self.layers))


class QLlamaConfig(LlamaConfig):
    """Llama's configuration with the keys of queries and cross-attention."""

    num_query_tokens: int = 96
    """0: a plain Llama, as in a file of InternVL-C alone."""
    cross_attention_frequency: int = 2
    """Layers 0, n, 2n, … have cross-attention."""
    vision_hidden_size: int = 3200

    def has_cross_attention(self, layer: int) -> bool:
        return self.num_query_tokens > 0 and layer % self.cross_attention_frequency == 0


class CrossAttention(nn.Module):
    """Cross-attention of queries to all visual tokens: no mask, positions, bias or gate.

    `forward` computes keys and values once per image; `attend` uses them for each text.
    """

    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__()
        width, vision_width = config.hidden_size, config.vision_hidden_size
        self.num_heads = config.num_attention_heads
        self.norm1 = RMSNorm(width, eps=config.rms_norm_eps)
        self.norm2 = RMSNorm(vision_width, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(vision_width, width, bias=False)
        self.v_proj = nn.Linear(vision_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    @property
    def image_modules(self) -> tuple[nn.Module, ...]:
        """Modules that `forward` runs, once per image; the others are `attend`'s."""
        return self.norm2, self.k_proj, self.v_proj

    def forward(self, vision: Tensor) -> KeysValues:
        """Projects visual tokens (B, N, W) to keys and values."""
        vision = self.norm2(vision)
        k, v = (
            self._heads(project(vision), vision.shape[:2]).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        return k, v

    def attend(self, queries: Tensor, keys_values: KeysValues) -> Tensor:
        """Cross-attention output (R B, Q, D) of queries (R B, Q, D); row r B + b reads image b."""
        k, v = keys_values
        images, (rows, length, width) = len(k), queries.shape
        q = self._heads(self.q_proj(self.norm1(queries)), (rows // images, images, length))
        # (B, heads, R Q, d): R rows of an image become one longer query, because expanding keys and
        # values to R B rows would copy them in memory.
        q = q.permute(1, 3, 0, 2, 4).flatten(2, 3)
        attended = F.scaled_dot_product_attention(q, k, v)
        blocks = attended.unflatten(2, (rows // images, length)).permute(2, 0, 3, 1, 4)
        return self.o_proj(blocks.reshape(rows, length, width))

    def _heads(self, hidden: Tensor, shape: tuple[int, ...]) -> Tensor:
        return hidden.view(*shape, self.num_heads, -1)


class QLlamaLayer(nn.Module):
    """A Llama layer; every n-th has `cross_attn`."""

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
        keys_values: KeysValues | None,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
    ) -> Tensor:
        """hidden (R B, T, D) -> same shape; with `keys_values` of B images, queries come first."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            is_causal=False,  # the mask already has the causal part; queries see one another
        )
        hidden = hidden + attended
        if self.cross_attn is not None and keys_values is not None:
            queries = hidden[:, : self.num_queries]
            attended = self.cross_attn.attend(queries, keys_values)
            # Padded, not concatenated with the text: torch's analysis of loops does not see that
            # both lengths make up that of `hidden`.
            hidden = hidden + F.pad(attended, (0, 0, 0, hidden.shape[1] - attended.shape[1]))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the layer and, separately, its keys and values."""
        super().compile(*args, **kwargs)
        # `encode_kv` calls `cross_attn` outside of `forward`, whose graph does not reach it.
        if self.cross_attn is not None:
            self.cross_attn.compile(*args, **kwargs)


class QueryTokens(nn.Module):
    """The learned queries, (1, Q, D)."""

    # A module, not a bare parameter: accelerate's off-loading hooks load weights before `forward`.
    def __init__(self, config: QLlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))

    def forward(self, num_rows: int) -> Tensor:
        """Returns the queries of `num_rows` rows, (num_rows, Q, D), without a copy."""
        return self.weight.expand(num_rows, -1, -1)


class QLlamaModel(LlamaPreTrainedModel):
    """Embeddings, layers and final norm; the caller prepends the queries to the text."""

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

    def encode_kv(self, vision: Tensor) -> CrossKV:
        """Projects visual tokens (B, N, W) to the keys and values of all layers."""
        modules: list[Any] = [layer.cross_attn for layer in self.layers]
        layers = tuple(None if module is None else module(vision) for module in modules)
        return CrossKV(vision, layers)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cross_kv: CrossKV | None = None,
        past_key_values: Sequence[Any] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Returns the hidden states after the final norm, (R, T, D).

        Args:
            inputs_embeds: (R, T, D); with `cross_kv` the first Q positions are the queries.
            attention_mask: bool (R, 1, T, keys) from the function `attention_mask`, True where a
                position may attend; None lets every position see all keys.
            cross_kv: of B images; rows come in blocks of B, image by image.
            past_key_values: of every layer, a cache whose `update` takes the keys and values of
                these positions and returns those to attend to.
            position_ids: int64 (R, T) or (1, T); by default 0, 1, …
        """
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        rotary = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden = inputs_embeds
        layers_kv = (None,) * len(self.layers) if cross_kv is None else cross_kv.layers
        caches = (None,) * len(self.layers) if past_key_values is None else past_key_values
        for layer, kv, cache in zip(self.layers, layers_kv, caches, strict=True):
            # Positional: checkpointing binds keyword arguments outside of what it tracks.
            hidden = layer(hidden, kv, attention_mask, rotary, past_key_values=cache)
        return self.norm(hidden)


def attention_mask(mask_type: Mask, text: Tensor, num_queries: int) -> Tensor:
    """Returns which position may attend to which: bool (R, 1, T, T), T = Q + L, or L for "text".

    "itc"  queries and text do not see each other; text is causal
    "itm"  everything sees everything
    "itg"  text is causal and sees the queries, which do not see it; this is also a caption's
    "text" text alone, causal

    Padding is no key of another position.

    Args:
        text: bool or int64 (R, L), nonzero where there is text.
    """
    rows, length = text.shape
    # Built from one square and broadcast: only padding differs among the R rows.
    causal = torch.ones(length, length, dtype=torch.bool, device=text.device).tril()
    if mask_type == "text":
        num_queries, allowed = 0, causal
    else:
        allowed = causal.new_zeros(num_queries + length, num_queries + length)
        allowed[:num_queries, :num_queries] = True
        allowed[:num_queries, num_queries:] = mask_type == "itm"
        allowed[num_queries:, :num_queries] = mask_type != "itc"
        allowed[num_queries:, num_queries:] = True if mask_type == "itm" else causal
    keys = torch.cat([causal.new_ones(rows, num_queries), text.bool()], dim=1)
    # Each position sees itself: softmax over a row without any key would be NaN.
    diagonal = torch.eye(len(allowed), dtype=torch.bool, device=text.device)
    return (allowed & keys[:, None] | diagonal)[:, None]
