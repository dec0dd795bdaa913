"""InternVL-14B: the vision tower and QLLaMA as one model of images and captions.

Original: `internvl_g/internvl/model/internvl_stage2/modeling_internvl.py`. InternVL-C embeds the
visual tokens, InternVL-G also what QLLaMA's queries make of them. The pieces of the forward pass
are methods of their own, because each use and each loss wants others of them.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, InternVLVisionModel, PreTrainedModel
from transformers import initialization as init

from internvl.models.dual import rms_norm
from internvl.models.dual.beam_search import Search, search
from internvl.models.dual.configs import DualConfig
from internvl.models.dual.qllama import Mask, QLlamaModel, QueryTokens, Seen, attention_mask

Mode = Literal["c", "g"]


class AttentionPool(nn.Module):
    """One embedding from many hidden states: their mean looks at all of them."""

    def __init__(self, width: int, out: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=1e-5) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, out)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, E)."""
        q = self._heads(self.q_proj(self.norm_q(hidden.mean(1, keepdim=True))))
        k = self._heads(self.k_proj(self.norm_k(hidden)))
        v = self._heads(self.v_proj(self.norm_v(hidden)))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))

    def _heads(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Towers(nn.Module):
    """What both families have, under the chat model's names: adapters, stochastic depth and
    checkpointing find it here."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        text = config.text_config
        self.vision_tower = InternVLVisionModel(config.vision_config)
        rms_norm.fuse(self.vision_tower)
        self.language_model = QLlamaModel(text)
        self.query_tokens = QueryTokens(text) if text.num_query_tokens else None


class DualModel(PreTrainedModel):
    """B images, R captions, Q queries, N visual tokens of width W, hidden size D, embeddings E.

    A model of InternVL-C alone (no queries in its configuration) has neither the queries and what
    reads them nor an output matrix.
    """

    config: DualConfig
    config_class = DualConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVLVisionLayer", "QLlamaLayer"]  # noqa: RUF012 (transformers' way)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    family = "dual"

    loss_chunk = 1024
    """Supervised positions of captions whose logits exist at the same time."""

    kept_bytes = 6 * 2**30
    """Most of a frozen tower's output that a step keeps between its passes (gradient caching)."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__(config)
        text = config.text_config
        heads, wide = config.pool_num_heads, config.vision_config.hidden_size
        self.model = Towers(config)
        self.image_pool = AttentionPool(wide, config.embed_dim, heads)
        self.text_projection = nn.Linear(text.hidden_size, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
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
        """As `transformers`; what the original leaves at zero or uninitialized starts random.

        Equal queries would stay equal: nothing but their start tells them apart.
        """
        super()._init_weights(module)
        if isinstance(module, QueryTokens):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif module is self:
            init.constant_(self.logit_scale, math.log(1 / 0.07))
            init.normal_(self.text_projection.weight, std=self.text_projection.in_features**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.language_model.embed_tokens

    # Images

    def vision_tokens(self, pixel_values: Tensor) -> Tensor:
        """Normalized images (B, 3, S, S) -> visual tokens (B, N, W), class token included."""
        return self.model.vision_tower(pixel_values=pixel_values).last_hidden_state

    def image_embeds(self, vision: Tensor) -> Tensor:
        """Visual tokens (B, N, W) -> InternVL-C's embeddings (B, E), not normalized."""
        return self.image_pool(vision)

    def look(self, vision: Tensor) -> Seen:
        """Visual tokens (B, N, W) as QLLaMA looks at them; one look serves all its uses."""
        return self.model.language_model.look(vision)

    def query_states(self, seen: Seen) -> Tensor:
        """What the queries see of B images without a text, (B, Q, D).

        These are also the queries of joint sequences under the "itc" mask.
        """
        return self.model.language_model(self._queries(len(seen)), None, seen)

    def query_embeds(self, query_states: Tensor) -> Tensor:
        """(B, Q, D) -> the queries' embeddings (B, E), not normalized."""
        return self.query_pool(query_states)

    # Captions

    def text_states(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Captions alone, int64 and its mask (R, L) -> hidden states (R, L, D).

        Equal to the text of joint sequences under the "itc" mask: positions are relative.
        """
        mask = attention_mask("text", text_mask, 0)
        return self.model.language_model(self._embed(input_ids), mask)

    def text_embeds(self, text_states: Tensor, text_mask: Tensor) -> Tensor:
        """The caption's last state, projected: (R, L, D), mask (R, L) -> (R, E), not normalized.

        The last one is at the number of true entries less one, as in the original.
        """
        last = (text_mask.sum(1) - 1).clamp(min=0).to(text_states.device)
        rows = torch.arange(len(last), device=text_states.device)
        return self.text_projection(text_states[rows, last])

    # Both

    def joint_mask(self, kind: Mask, text_mask: Tensor) -> Tensor:
        """bool (R, 1, Q + L, Q + L) for `joint_states`; masks of several kinds may be joined."""
        return attention_mask(kind, text_mask, self.num_queries)

    def joint_states(self, seen: Seen, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences of queries and a caption -> (query states (R, Q, D), text states (R, L, D)).

        Args:
            seen: B images.
            input_ids: int64 (R, L), R a multiple of B: row r B + b goes with image b.
            mask: bool (R, 1, Q + L, Q + L), of `joint_mask`.
        """
        embeds = torch.cat([self._queries(len(input_ids)), self._embed(input_ids)], dim=1)
        states = self.model.language_model(embeds, mask, seen)
        queries, text = states.tensor_split([self.num_queries], dim=1)
        return queries, text

    def itm_logits(self, query_states: Tensor) -> Tensor:
        """(R, Q, D) -> (R, 2), no match and match: the mean of the queries' logits."""
        return self.itm_head(query_states).mean(1)

    # In use

    def encode_image(self, pixel_values: Tensor, modes: Sequence[Mode]) -> list[Tensor]:
        """Normalized images (B, 3, S, S) -> (B, E) of each mode, what the original's
        `encode_image` returns: for "c" the embeddings, for "g" the sum of two unit vectors, that of
        "c" and the queries'. The tower runs once.
        """
        vision = self.vision_tokens(pixel_values)
        image = self.image_embeds(vision).float()
        found = {"c": image}
        if "g" in modes:
            queries = (
                self.query_embeds(self.query_states(self.look(vision))).float().to(image.device)
            )
            found["g"] = F.normalize(image, dim=-1) + F.normalize(queries, dim=-1)
        return [found[mode] for mode in modes]

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Captions padded with 0, int64 (R, L) -> (R, E), not normalized."""
        mask = input_ids > 0
        return self.text_embeds(self.text_states(input_ids, mask), mask).float()

    @torch.no_grad()
    def caption(self, pixel_values: Tensor, prompt_ids: Tensor, how: Search) -> Tensor:
        """Tokens after the prompt, int64 (B, at most `max_new_tokens`), filled up with the end.

        Args:
            pixel_values: normalized images (B, 3, S, S).
            prompt_ids: int64 (L,), the same for all images.
        """
        shown = self.look(self.vision_tokens(pixel_values))
        prompt = prompt_ids.to(shown.tokens.device).expand(len(shown), -1)
        read = self.num_queries + prompt.shape[1]
        cache = DynamicCache(config=self.config.text_config)
        embeds = torch.cat([self._queries(len(shown)), self._embed(prompt)], dim=1)
        mask = self.joint_mask("itg", torch.ones_like(prompt[:1]))
        states = self.model.language_model(embeds, mask, shown, cache)

        def step(tokens: Tensor, seen: Tensor) -> Tensor:
            shared = seen.new_ones(*seen.shape[:2], read)
            mask = torch.cat([shared, seen], dim=2)[:, None]
            place = read + seen.shape[2] // seen.shape[1] - 1
            places = torch.full_like(tokens[:1], place)
            states = self.model.language_model(
                self._embed(tokens), mask, past_key_values=cache, position_ids=places
            )
            return self.lm_head(states)

        return search(self.lm_head(states[:, -1]), step, how)

    def _queries(self, num_rows: int) -> Tensor:
        assert self.model.query_tokens is not None
        return self.model.query_tokens(num_rows)

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self.get_input_embeddings()(input_ids)
