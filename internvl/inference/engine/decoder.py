"""The two passes of the language model: packed prompts into slots, and next tokens of every slot.

A slot gets one token at a time, or one for each beam of its search.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internvl.inference.engine.attention import (
    ENGINE,
    padded,
    register,
    row_kernel,
    row_mask,
    takes_any_length,
)
from internvl.inference.engine.beams import Beams
from internvl.inference.engine.cache import Decoded, Prefilled, SlotCache
from internvl.inference.settings import Settings
from internvl.models import kernels
from internvl.models.attention import decoding

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


class Snapshot:
    """Tokens on their way from the device; the host waits where it reads them."""

    def __init__(self, tokens: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if not tokens.is_cuda:
            self.tokens = tokens.clone()
            return
        self.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self.tokens.copy_(tokens, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def read(self) -> Tensor:
        """Returns the tokens, on the CPU."""
        if self.event is not None:
            self.event.synchronize()
        return self.tokens


class Decoder:
    """Runs the layers of a chat model's language model over a `SlotCache`.

    Not thread-safe. The model stays as it is: names, weights and hooks, and outside of a pass its
    own attention implementation.
    """

    def __init__(
        self, model: Any, *, compiled: bool = False, num_beams: int = 1, end_id: int = -1
    ) -> None:
        """With `compiled`, layers are compiled, once for prompts and once for single tokens.

        Args:
            num_beams: beams of every slot's search; 1: none, the caller chooses tokens.
            end_id: the token that ends a text of the search.
        """
        register()
        self.num_beams = num_beams
        self.end_id = end_id
        self.compiled = compiled
        self.model = model
        self.text = model.model.language_model
        self.config = model.config.text_config
        self.cache: SlotCache | None = None
        self.beams: Beams | None = None
        self.graphs: dict[int | None, Any] = {}
        """Captured decoding passes by reach; they hold the addresses of `cache`."""
        self.head: Tensor | None = aligned_head(model.lm_head) if compiled else None
        """The output matrix with rows of zeros below it; None: the model's is used."""

    def allocate(self, slots: int, length: int, dtype: torch.dtype) -> None:
        """Replaces the cache by an empty one of `slots` slots of `length` tokens.

        Raises:
            torch.OutOfMemoryError: the device does not hold it.
        """
        if self.graphs:
            torch.cuda.synchronize()  # they may still run
        # Before the new one exists: together they may not fit.
        self.cache = None
        self.graphs.clear()
        device = self.model.device
        self.cache = SlotCache(
            slots=slots, length=length, dtype=dtype, devices=self._layer_devices(), **self.shape
        )
        if self.num_beams > 1:
            self.beams = Beams(slots, length, self.num_beams, self.end_id, device)
        self._prepare(length, dtype)
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        """The last token of every slot, whose keys are not in the cache yet."""
        self.positions = torch.zeros(slots, dtype=torch.long, device=device)
        self.rows = torch.arange(slots, device=device)[:, None]

    def _prepare(self, length: int, dtype: torch.dtype) -> None:
        """Makes what the passes need beside the cache."""
        device = self.model.device
        positions = torch.arange(length, device=device)[None]
        like = torch.zeros(1, 1, self.config.hidden_size, dtype=dtype, device=device)
        cos, sin = self.text.rotary_emb(like, position_ids=positions)
        self.cos, self.sin = cos[0], sin[0]
        self.row_kernel = row_kernel(device, dtype, self.shape["width"])
        self.any_length = self.compiled and takes_any_length(self.row_kernel)
        self.read_layer, self.read_last, self.write_layer = _read, _read_last, _write
        if self.compiled:
            # Functions of the layer rather than each layer: all of them share the code.
            dynamic = None if self.any_length else False
            self.read_layer = torch.compile(_read, dynamic=dynamic)
            self.read_last = torch.compile(_read_last, dynamic=dynamic)
            self.write_layer = torch.compile(_write, dynamic=dynamic)

    def _layer_devices(self) -> list[torch.device]:
        """Returns the device of every layer's keys, or one for all of them."""
        return [self.model.device]

    def _captures(self) -> bool:
        """True if decoding is replayed as a captured graph."""
        return self.model.device.type == "cuda"

    @property
    def _has_kernel(self) -> bool:
        # Each beam sees keys of its own, which the kernel of one token does not mask.
        return self.num_beams == 1 and decoding.supported(self.model.device, self.shape["width"])

    def prefill_bytes(self, tokens: int, item: int) -> int:
        """Bytes of a prefill's widest moment, without its logits; `item` is the dtype's size."""
        # States in and out, gate and up of one layer.
        return tokens * (8 * self.config.hidden_size + 3 * self.config.intermediate_size) * item

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
        """Runs prompts as one packed row; returns logits after each, float32 (prompts, V).

        The likeliest token after each prompt is in `tokens` then.
        """
        assert self.cache is not None
        device = self.model.device
        lengths = [len(prompt.input_ids) for prompt in prompts]
        total = sum(lengths)
        size = padded(self.row_kernel, total)
        # All index tensors in one transfer: many small ones would each wait for the GPU.
        layout = torch.zeros(4, size, dtype=torch.long)
        ids, document, slots, positions = layout
        # A document of its own, whose keys go to nobody's slot.
        document[total:], slots[total:] = len(prompts), self.cache.slots
        positions[total:] = torch.arange(size - total) % self.cache.length
        starts = [0]
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            span = slice(starts[-1], starts[-1] + length)
            ids[span], document[span], slots[span] = prompt.input_ids, index, prompt.slot
            positions[span] = torch.arange(length)
            starts.append(span.stop)
        # A lone end twice: compiled code takes a single one for another shape.
        ends = starts[1:] * 2 if self.any_length and len(prompts) == 1 else starts[1:]
        last = to_device(torch.tensor(ends) - 1, device)
        if size > total:
            starts.append(size)
        ids, document, slots, positions = to_device(layout, device)
        embeds = self.text.embed_tokens(ids)
        visual = [prompt.visual for prompt in prompts if prompt.visual is not None]
        if visual:
            features = torch.cat(visual).to(embeds.dtype)
            # The size is known from the tiles; plain nonzero would synchronize with the GPU.
            placeholders = ids == self.model.config.image_token_id
            places = torch.nonzero_static(placeholders, size=len(features))
            embeds = embeds.index_copy(0, places.squeeze(1), features)
        first = to_device(torch.tensor(starts, dtype=torch.int32), device)
        self._any_size(first, 0)
        longest = max(*lengths, size - total)
        mask = row_mask(self.row_kernel, document, embeds.dtype, first, longest)
        for entries in (slots, positions, last):
            self._any_size(entries, 0)
        hidden = self._run(
            embeds[None],
            mask,
            positions[None],
            lambda keys, values: Prefilled(keys, values, slots, positions),
            last,
        )
        logits = self._logits(hidden[0])
        self.tokens.index_copy_(0, slots[last], logits.argmax(-1))
        return logits[: len(prompts)]

    def place(self, positions: Sequence[int]) -> None:
        """Sets the position of every slot's token for the next `decode`."""
        state = torch.tensor(positions)
        self.positions.copy_(_pinned(state, self.tokens.device), non_blocking=True)

    def begin(
        self,
        slots: Sequence[int],
        prompts: Sequence[int],
        settings: Sequence[Settings],
        logits: Tensor,
    ) -> None:
        """Begins searches in slots after their prefill; see `Beams.begin`."""
        assert self.beams is not None
        rows = to_device(torch.tensor(slots), logits.device)
        self.beams.begin(rows, prompts, settings, logits)

    def snapshot(self) -> "Snapshot":
        """Returns `tokens`, int64 (slots,), or the searches' outcomes, (slots, 1 + T), as they are
        once what has been begun is done."""
        return Snapshot(self.tokens if self.beams is None else self.beams.outcome())

    @torch.no_grad()
    def decode(self, longest: int) -> Tensor:
        """Runs the token of every slot at its position; returns logits, float32 (slots, V).

        `tokens` and `positions` say which, and the likeliest next ones are in `tokens` then. With
        beams, `beams` says which, and every search is a token further; logits are (slots, K, V).
        Slots without a request run along unread.

        Args:
            longest: the largest place of a request's keys, plus 1.
        """
        assert self.cache is not None
        # The kernel reads what each slot has; other attention all that the longest one has.
        reach = None
        if not self._has_kernel:
            reach = min(math.ceil(longest / REACH) * REACH, self.cache.length)
        if not self._captures():
            return self._decode(reach)
        if reach not in self.graphs:
            self.graphs[reach] = self._capture(reach)
        graph, logits = self.graphs[reach]
        graph.replay()
        return logits

    def _decode(self, reach: int | None) -> Tensor:
        beams = self.beams
        if beams is None:
            tokens, positions = self.tokens[:, None], self.positions[:, None]
            cells, mask = positions, self.positions
            if reach is not None:
                seen = torch.arange(reach, device=mask.device) <= positions
                mask = seen[:, None, None]
        else:
            tokens, positions, cells = beams.tokens, beams.positions, beams.cells
            mask = beams.seen[:, None, :, :reach]
        hidden = self._run(
            self.text.embed_tokens(tokens),
            mask,
            positions,
            lambda keys, values: Decoded(keys, values, self.rows, cells, reach),
        )
        if beams is None:
            logits = self._logits(hidden[:, 0])
            self.tokens.copy_(logits.argmax(-1))
            return logits
        logits = self._logits(hidden)
        beams.advance(logits)
        return logits

    def _capture(self, reach: int | None) -> tuple[Any, Tensor]:
        """Captures `_decode` as a CUDA graph; returns it and the tensor its logits are in."""
        # Replayed later, the warm-up's writes of this token come again with the same values.
        before, beams = self.tokens.clone(), self.beams
        searches = None if beams is None else beams.saved()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._decode(reach)
                self.tokens.copy_(before)
                if beams is not None and searches is not None:
                    beams.restore(searches)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        capturing = _capture_stream(torch.cuda.current_device())
        # Other threads pin the tiles that they read meanwhile, which "global" takes for an error.
        with torch.cuda.graph(graph, stream=capturing, capture_error_mode="thread_local"):
            logits = self._decode(reach)
        return graph, logits

    def _run(
        self,
        hidden: Tensor,
        mask: Any,
        positions: Tensor,
        cache_of: Any,
        last: Tensor | None = None,
    ) -> Tensor:
        """Runs layers and norm over (B, T, D); `cache_of` makes a layer's cache.

        Args:
            last: int64 (N,), the positions that are returned, (1, N, D); None: all of them.
        """
        assert self.cache is not None
        # Looked up in tables: the model's own rotary embedding reads positions on the host.
        rotary = self.cos[positions], self.sin[positions]
        layers = self.text.layers
        with self._attention():
            for index, layer in enumerate(layers):
                keys, values = self.cache.layer(index)
                for memory in (keys, values):
                    self._any_size(memory, 0)
                    self._any_size(memory, 2)
                cache = cache_of(keys, values)
                if last is None:
                    hidden = self.write_layer(layer, hidden, mask, positions, cache, rotary)
                    continue
                for states in (hidden, *rotary, positions):
                    self._any_size(states, 1)
                if layer is layers[-1] and isinstance(layer, kernels.SelectiveBlock):
                    # After the last attention the ends alone are of use.
                    hidden = self.read_last(layer, hidden, mask, positions, cache, rotary, last)
                else:
                    hidden = self.read_layer(layer, hidden, mask, positions, cache, rotary)
        if last is not None and hidden.shape[1] != len(last):
            hidden = hidden.index_select(1, last)
        return self.text.norm(hidden)

    def _any_size(self, tensor: Tensor, dim: int) -> None:
        """Says that compiled code must take any size of this dimension."""
        # Not `dynamic=True`: sizes that never change would be unknown to the kernels too.
        if self.any_length:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)

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
        """(…, D) -> float32 (…, V)."""
        if self.head is None:
            return self.model.lm_head(hidden).float()
        return F.linear(hidden, self.head)[..., : len(self.model.lm_head.weight)].float()


@functools.cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """Returns the stream of a GPU that graphs are captured on; torch's is of the first GPU used."""
    return torch.cuda.Stream(index)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which a GPU is the current one: graphs, streams and events belong to that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_ALIGNED = 16
"""Fast matrix products take sides of a multiple of it."""


def aligned_head(head: nn.Module) -> Tensor | None:
    """Returns an output matrix with rows of zeros that make their number even; None if it is.

    With an odd vocabulary the product of a decoding step took six times as long on an H200.
    """
    # By exact type: a subclass computes something else, and adapters are modules beside it.
    if type(head) is not nn.Linear or head.bias is not None or len(head.weight) % _ALIGNED == 0:
        return None
    if head.weight.device.type == "cuda" and not torch.is_autocast_enabled("cuda"):
        return F.pad(head.weight.detach(), (0, 0, 0, -len(head.weight) % _ALIGNED))
    return None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to the device; the host does not wait for a GPU."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _read(
    layer: nn.Module,
    hidden: Tensor,
    mask: Any,
    positions: Tensor,
    cache: Prefilled,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Runs one layer over a row of prompts: (1, T, D) -> (1, T, D)."""
    return layer(hidden, **_arguments(mask, positions, cache, rotary))


def _read_last(
    layer: kernels.SelectiveBlock,
    hidden: Tensor,
    mask: Any,
    positions: Tensor,
    cache: Prefilled,
    rotary: tuple[Tensor, Tensor],
    last: Tensor,
) -> Tensor:
    """Runs the last layer over a row of prompts: (1, T, D) -> (1, N, D), at positions `last`."""
    return kernels.run_selected(layer, hidden, last, **_arguments(mask, positions, cache, rotary))


def _write(
    layer: nn.Module,
    hidden: Tensor,
    mask: Tensor,
    positions: Tensor,
    cache: Decoded,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Runs one layer over the next tokens of every slot: (B, K, D) -> (B, K, D)."""
    return layer(hidden, **_arguments(mask, positions, cache, rotary))


def _arguments(
    mask: Any, positions: Tensor, cache: Prefilled | Decoded, rotary: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    return {
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache,
        "use_cache": True,
        "position_embeddings": rotary,
    }
