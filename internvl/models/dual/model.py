"""InternVL-14B: vision tower and QLLaMA as one model of images and captions.

Original: `internvl_g/internvl/model/internvl_stage2/modeling_internvl.py`. InternVL-C embeds the
visual tokens, InternVL-G also QLLaMA's query states. There is no single `forward`: each loss and
each use combines other steps of it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import InternVLVisionModel, PreTrainedModel
from transformers import initialization as init

from internvl.models import units
from internvl.models.dual import rms_norm
from internvl.models.dual.configs import DualConfig
from internvl.models.dual.qllama import CrossKV, Mask, QLlamaModel, QueryTokens, attention_mask
from internvl.models.units import Unit

Mode = Literal["c", "g"]


class AttentionPool(nn.Module):
    """Attention pooling: the mean of the hidden states attends to all of them."""

    def __init__(self, width: int, out_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=1e-5) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, out_width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, E)."""
        # Three norms of one input: the original has separate ones for query, key and value.
        q = self._heads(self.q_proj(self.norm_q(hidden.mean(1, keepdim=True))))
        k = self._heads(self.k_proj(self.norm_k(hidden)))
        v = self._heads(self.v_proj(self.norm_v(hidden)))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))

    def _heads(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Towers(nn.Module):
    """Vision tower, language model and queries under the chat model's names."""

    # The same names, so that adapters, stochastic depth and checkpointing serve both families.

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        text = config.text_config
        self.vision_tower = InternVLVisionModel(config.vision_config)
        rms_norm.fuse(self.vision_tower)
        self.language_model = QLlamaModel(text)
        self.query_tokens = QueryTokens(text) if text.num_query_tokens else None


class DualModel(PreTrainedModel):
    """InternVL-14B; without queries in its configuration, InternVL-C alone.

    Shapes: B images, R captions, Q queries, N visual tokens of width W, hidden size D, embedding
    width E. Without queries there are no `query_pool`, `itm_head` and `lm_head`.
    """

    config: DualConfig
    config_class = DualConfig
    base_model_prefix = "model"
    _no_split_modules = ["InternVLVisionLayer", "QLlamaLayer"]  # noqa: RUF012 (transformers' way)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    family = "dual"

    loss_chunk = 1024
    """Supervised caption positions whose logits are in memory at the same time."""

    kept_bytes = 6 * 2**30
    """Bytes of frozen-tower output that a step may keep between its passes (gradient caching)."""

    tower_is_cut = False
    """Whether ranks share the vision tower's weights, and so must all run it or none."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__(config)
        text = config.text_config
        heads, vision_width = config.pool_num_heads, config.vision_config.hidden_size
        self.model = Towers(config)
        self.image_pool = AttentionPool(vision_width, config.embed_dim, heads)
        self.text_projection = nn.Linear(text.hidden_size, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start
        if text.num_query_tokens:
            self.query_pool = AttentionPool(text.hidden_size, config.embed_dim, heads)
            self.itm_head = nn.Linear(text.hidden_size, 2)
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @property
    def num_queries(self) -> int:
        """Q; 0 in a model of InternVL-C alone."""
        return self.config.text_config.num_query_tokens

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initializes like `transformers`, and the queries and projection at random."""
        super()._init_weights(module)
        if isinstance(module, QueryTokens):
            # The original leaves zeros, but equal queries get equal gradients and stay equal.
            init.normal_(module.weight, std=self.config.initializer_range)
        elif module is self:
            init.constant_(self.logit_scale, math.log(1 / 0.07))
            init.normal_(self.text_projection.weight, std=self.text_projection.in_features**-0.5)

    def shard_units(self) -> Iterator[Unit]:
        """Yields the modules that shards gather one by one, inner ones first."""
        yield from units.tower_units(self.model.vision_tower)
        language_model = self.model.language_model
        for unit in units.stack(language_model.layers):
            layer: Any = unit.module
            # Apart from their layer: `encode_kv` runs them before the layers. One by one, since
            # of a group only the last one's output would gather it for the backward pass.
            if layer.cross_attn is not None:
                yield from map(Unit, layer.cross_attn.image_modules)
            yield unit
        yield Unit(language_model.embed_tokens)
        yield Unit(language_model)
        yield from map(Unit, [self.image_pool, self.text_projection])
        if self.num_queries:
            yield Unit(self.query_pool)
        # The first of its methods that a step calls must be one of these.
        yield Unit(self, methods=("vision_tokens", "text_states", "caption_loss"))

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that are too small to gather: queries, matching head and scale."""
        yield self.logit_scale
        if self.model.query_tokens is not None:
            yield from (*self.model.query_tokens.parameters(), *self.itm_head.parameters())

    def keep_in_step(self, tower_is_cut: bool) -> None:
        """Makes every micro-batch run the modules that other ranks wait for."""
        self.tower_is_cut = tower_is_cut

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.embed_tokens

    def vision_tokens(self, pixel_values: Tensor) -> Tensor:
        """Encodes normalized images (B, 3, S, S) to visual tokens (B, N, W), class token first."""
        return self.model.vision_tower(pixel_values=pixel_values).last_hidden_state

    def image_embeds(self, vision: Tensor) -> Tensor:
        """Returns InternVL-C's embeddings (B, E) of visual tokens (B, N, W), not normalized."""
        return self.image_pool(vision)

    def encode_kv(self, vision: Tensor) -> CrossKV:
        """Returns the cross-attention keys and values of visual tokens (B, N, W), for all uses."""
        return self.model.language_model.encode_kv(vision)

    def query_states(self, cross_kv: CrossKV) -> Tensor:
        """Returns the query states of B images without text, (B, Q, D).

        Equal to the query states of `joint_states` under the "itc" mask.
        """
        return self.model.language_model(self._queries(len(cross_kv)), None, cross_kv)

    def query_embeds(self, query_states: Tensor) -> Tensor:
        """Pools query states (B, Q, D) to embeddings (B, E), not normalized."""
        return self.query_pool(query_states)

    def text_states(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Returns the hidden states (R, L, D) of captions alone, int64 (R, L) and their mask."""
        # Equal to the text of `joint_states` under "itc", though positions there begin at Q: rotary
        # attention depends on distances only.
        mask = attention_mask("text", text_mask, 0)
        return self.model.language_model(self._embed(input_ids), mask)

    def text_embeds(self, text_states: Tensor, text_mask: Tensor) -> Tensor:
        """Projects each caption's last state: (R, L, D), mask (R, L) -> (R, E), not normalized."""
        # By the count of true entries, as in the original, not by the last true one.
        last = (text_mask.sum(1) - 1).clamp(min=0).to(text_states.device)
        rows = torch.arange(len(last), device=text_states.device)
        return self.text_projection(text_states[rows, last])

    def joint_mask(self, mask_type: Mask, text_mask: Tensor) -> Tensor:
        """Returns bool (R, 1, Q + L, Q + L) for `joint_states`; rows of several may be joined."""
        return attention_mask(mask_type, text_mask, self.num_queries)

    def joint_states(
        self,
        cross_kv: CrossKV,
        input_ids: Tensor,
        mask: Tensor,
        past_key_values: Sequence[Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs queries and captions together: (query states (R, Q, D), text states (R, L, D)).

        Args:
            cross_kv: of B images.
            input_ids: int64 (R, L), R a multiple of B: row r B + b goes with image b.
            mask: bool (R, 1, Q + L, Q + L), of `joint_mask`.
            past_key_values: see `QLlamaModel.forward`.
        """
        embeds = torch.cat([self._queries(len(input_ids)), self._embed(input_ids)], dim=1)
        states = self.model.language_model(embeds, mask, cross_kv, past_key_values)
        queries, text = states.tensor_split([self.num_queries], dim=1)
        return queries, text

    def itm_logits(self, query_states: Tensor) -> Tensor:
        """Returns logits (R, 2) of (no match, match): the mean over the queries (R, Q, D)."""
        return self.itm_head(query_states).mean(1)

    def caption_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Sums the next-token loss of text states (M, D) with targets (M,): float32 ()."""
        loss = states.new_zeros((), dtype=torch.float32)
        # Logits of a chunk at a time, recomputed in the backward pass: all at once are large.
        for chunk in zip(
            states.split(self.loss_chunk), targets.split(self.loss_chunk), strict=True
        ):
            loss = loss + checkpoint(self._chunk_loss, *chunk, use_reentrant=False)
        return loss

    def _chunk_loss(self, states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(states).float(), targets, reduction="sum")

    def encode_image(self, pixel_values: Tensor, modes: Sequence[Mode]) -> list[Tensor]:
        """Embeds normalized images (B, 3, S, S): float32 (B, E) for each of the modes.

        As the original's `encode_image`: "c" is InternVL-C's embedding, not normalized, "g" the sum
        of its unit vector and that of the queries.
        """
        vision = self.vision_tokens(pixel_values)  # once for all modes
        image = self.image_embeds(vision).float()
        embeddings = {"c": image}
        if "g" in modes:
            queries = (
                # The parts may be on several devices (`device_map`).
                self.query_embeds(self.query_states(self.encode_kv(vision)))
                .float()
                .to(image.device)
            )
            embeddings["g"] = F.normalize(image, dim=-1) + F.normalize(queries, dim=-1)
        return [embeddings[mode] for mode in modes]

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Embeds captions padded with 0, int64 (R, L): float32 (R, E), not normalized."""
        mask = input_ids > 0
        return self.text_embeds(self.text_states(input_ids, mask), mask).float()

    def _queries(self, num_rows: int) -> Tensor:
        assert self.model.query_tokens is not None
        return self.model.query_tokens(num_rows)

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self.get_input_embeddings()(input_ids)
