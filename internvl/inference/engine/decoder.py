"""The two passes of the language model: packed prompts into slots, and one token of every slot."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internvl.inference.engine.attention import ENGINE, register, row_mask
from internvl.inference.engine.cache import Decoded, Prefilled, SlotCache
from internvl.models import kernels
from internvl.models.attention import decoding
from internvl.models.attention.packed import BLOCK

REACH = 256
"""Step of the positions that decoding attends to: one captured graph for each multiple."""


@dataclass(frozen=True)
class Placed:
    """A prompt and the slot that it is prefilled into."""

    input_ids: Tensor
    """int64 (T,), on the CPU."""
    visual: Tensor | None
    """Visual tokens (V, D) for its placeholders, on the device."""
    slot: int


class Decoder:
    """Runs the layers of a chat model's language model over a `SlotCache`.

    Not thread-safe. The model stays as it is: names, weights and hooks, and outside of a pass its
    own attention implementation.
    """

    def __init__(self, model: Any, *, compiled: bool = False) -> None:
        """With `compiled`, layers are compiled for each shape that they meet, some 10 s each."""
        register()
        self.compiled = compiled
        self.run_layer: Any = _run_layer
        if compiled:
            # A function of the layer rather than each layer: all of them share its code.
            self.run_layer = torch.compile(_run_layer, dynamic=False)
        self.model = model
        self.text = model.model.language_model
        self.config = model.config.text_config
        self.image_token_id = model.config.image_token_id
        self.cache: SlotCache | None = None
        self.graphs: dict[int, Any] = {}
        """Captured decoding passes by reach; they hold the addresses of `cache`."""

    def allocate(self, slots: int, length: int, dtype: torch.dtype) -> None:
        """Replaces the cache by an empty one of `slots` slots of `length` tokens.

        Raises:
            torch.OutOfMemoryError: the device does not hold it.
        """
        # Before the new one exists: together they may not fit.
        self.cache = None
        self.graphs.clear()
        device = self.model.device
        self.cache = SlotCache(slots=slots, length=length, dtype=dtype, device=device, **self.shape)
        positions = torch.arange(length, device=device)[None]
        like = torch.zeros(1, 1, self.config.hidden_size, dtype=dtype, device=device)
        cos, sin = self.text.rotary_emb(like, position_ids=positions)
        self.cos, self.sin = cos[0], sin[0]
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self.positions = torch.zeros(slots, dtype=torch.long, device=device)
        self.rows = torch.arange(slots, device=device)

    @property
    def _has_kernel(self) -> bool:
        return decoding.supported(self.model.device, self.shape["width"])

    @property
    def shape(self) -> dict[str, int]:
        """Layers, key heads and head size, as `SlotCache` takes them."""
        config = self.config
        width = getattr(config, "head_dim", None)
        return {
            "layers": config.num_hidden_layers,
            "heads": config.num_key_value_heads,
            "width": width or config.hidden_size // config.num_attention_heads,
        }

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Placed]) -> Tensor:
        """Runs prompts as one packed row; returns logits after each, float32 (prompts, V)."""
        assert self.cache is not None
        device = self.model.device
        lengths = [len(prompt.input_ids) for prompt in prompts]
        total = sum(lengths)
        padded = _padded(total, device)
        # All index tensors in one transfer: many small ones would each wait for the GPU.
        layout = torch.zeros(4, padded, dtype=torch.long)
        ids, document, slots, positions = layout
        # A document of its own, whose keys go to nobody's slot.
        document[total:], slots[total:] = len(prompts), self.cache.slots
        positions[total:] = torch.arange(padded - total) % self.cache.length
        starts = [0]
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            span = slice(starts[-1], starts[-1] + length)
            ids[span], document[span], slots[span] = prompt.input_ids, index, prompt.slot
            positions[span] = torch.arange(length)
            starts.append(span.stop)
        ends = torch.tensor(starts[1:]) - 1
        if padded > total:
            starts.append(padded)
        ids, document, slots, positions = layout.to(device, non_blocking=True)
        embeds = self.text.embed_tokens(ids)
        visual = [prompt.visual for prompt in prompts if prompt.visual is not None]
        if visual:
            features = torch.cat(visual).to(embeds.dtype)
            # The size is known from the tiles; plain nonzero would synchronize with the GPU.
            places = torch.nonzero_static(ids == self.image_token_id, size=len(features))
            embeds = embeds.index_copy(0, places.squeeze(1), features)
        first = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
        # One prompt alone is plain causal attention.
        mask = None if len(starts) == 2 else row_mask(document, embeds.dtype, first)
        last = ends.to(device, non_blocking=True)
        # After the last attention the ends alone are of use.
        with kernels.select_positions(self.text.layers, last) as selected:
            hidden = self._run(
                embeds[None],
                mask,
                positions[None],
                lambda keys, values: Prefilled(keys, values, slots, positions),
            )
        return self._logits(hidden[0] if selected else hidden[0, last])

    def place(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Sets the token and position of every slot for the next `decode`."""
        state = torch.tensor([tokens, positions]).to(self.tokens.device, non_blocking=True)
        self.tokens.copy_(state[0])
        self.positions.copy_(state[1])

    @torch.no_grad()
    def decode(self, longest: int) -> Tensor:
        """Runs the token of every slot at its position; returns logits, float32 (slots, V).

        `tokens` and `positions` say which; slots without a request run along unread.

        Args:
            longest: the largest position of a request, plus 1.
        """
        assert self.cache is not None
        # The kernel reads what each slot has; other attention all that the longest one has.
        reach = self.cache.length
        if not self._has_kernel:
            reach = min(math.ceil(longest / REACH) * REACH, reach)
        if self.model.device.type != "cuda":
            return self._decode(reach)
        if reach not in self.graphs:
            self.graphs[reach] = self._capture(reach)
        graph, logits = self.graphs[reach]
        graph.replay()
        return logits

    def _decode(self, reach: int) -> Tensor:
        mask = self.positions
        if not self._has_kernel:
            seen = torch.arange(reach, device=self.positions.device) <= self.positions[:, None]
            mask = seen[:, None, None]
        embeds = self.text.embed_tokens(self.tokens)[:, None]
        hidden = self._run(
            embeds,
            mask,
            self.positions[:, None],
            lambda keys, values: Decoded(keys, values, self.rows, self.positions, reach),
        )
        return self._logits(hidden[:, 0])

    def _capture(self, reach: int) -> tuple[Any, Tensor]:
        """Captures `_decode` as a CUDA graph; returns it and the tensor its logits are in."""
        # Replayed later, the warm-up's writes of this token come again with the same values.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._decode(reach)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._decode(reach)
        return graph, logits

    def _run(self, hidden: Tensor, mask: Any, positions: Tensor, cache_of: Any) -> Tensor:
        """Runs layers and norm over (B, T, D); `cache_of` makes a layer's cache."""
        assert self.cache is not None
        # Looked up in tables: the model's own rotary embedding reads positions on the host.
        rotary = self.cos[positions], self.sin[positions]
        with self._attention():
            for index, layer in enumerate(self.text.layers):
                cache = cache_of(*self.cache.layer(index))
                # The last block may return another number of positions for every row.
                is_last = index == len(self.text.layers) - 1 and hidden.shape[1] > 1
                run_layer = _run_layer if is_last else self.run_layer
                hidden = run_layer(layer, hidden, mask, positions, cache, rotary)
        return self.text.norm(hidden)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Sets the engine's attention for one pass."""
        before = self.config._attn_implementation
        self.config._attn_implementation = ENGINE
        try:
            yield
        finally:
            self.config._attn_implementation = before

    def _logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> float32 (N, V)."""
        return self.model.lm_head(hidden).float()


def _run_layer(
    layer: nn.Module,
    hidden: Tensor,
    mask: Any,
    positions: Tensor,
    cache: Prefilled | Decoded,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Runs one layer: (B, T, D) -> (B, T, D)."""
    return layer(
        hidden,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        position_embeddings=rotary,
    )


def _padded(total: int, device: torch.device) -> int:
    """Returns the length that a row of `total` tokens is padded to."""
    if device.type != "cuda":
        return total
    # Few lengths, since kernels are built for each: powers of two in four steps.
    step = max(BLOCK, 2 ** (max(1, total - 1).bit_length() - 3))
    return math.ceil(total / step) * step
