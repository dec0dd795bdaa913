"""The two passes of QLLaMA: queries and prompt of every image as a row, then the caption's tokens.

Prompts are of about one length, so rows are padded rather than packed. Every pass is a call of the
model's own modules: its weights may be cut over ranks, or lie on several devices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from internvl.inference.engine.cache import Padded
from internvl.inference.engine.decoder import Decoder, Placed, aligned_head, to_device


class QueryDecoder(Decoder):
    """Runs InternVL-14B's QLLaMA over a `SlotCache`.

    The first ids of a prompt are placeholders of the queries, so that its length is that of its
    keys.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        """See `Decoder`; the layers are never compiled."""
        super().__init__(model, **options)
        # The released vocabulary of 49,954 is no multiple of what fast products take.
        if self._captures():
            self.head = aligned_head(model.lm_head)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Placed]) -> Tensor:
        """Runs queries and prompts as padded rows; returns logits after each, float32 (B, V).

        The likeliest token after each prompt is in `tokens` then.
        """
        assert self.cache is not None
        model, device = self.model, self.model.device
        texts = [prompt.input_ids[model.num_queries :] for prompt in prompts]
        sizes = torch.tensor([len(text) for text in texts])
        # A row of its own only where lengths differ: one mask for all takes a faster kernel.
        masked = sizes if sizes.min() < sizes.max() else sizes[:1]
        is_text = torch.arange(int(sizes.max())) < masked[:, None]
        ids = to_device(pad_sequence(texts, batch_first=True), device)
        slots, last = (
            to_device(torch.tensor([prompt.slot for prompt in prompts]), device),
            sizes - 1,
        )
        # Images are of one size, so that they have as many tokens each.
        vision = torch.stack([prompt.visual for prompt in prompts if prompt.visual is not None])
        mask = model.joint_mask("itg", to_device(is_text, device))
        caches = [Padded(*self.cache.layer(index), slots) for index in range(self.shape["layers"])]
        with self._attention():
            _, states = model.joint_states(model.encode_kv(vision), ids, mask, caches)
        rows = torch.arange(len(prompts), device=states.device)
        logits = self._logits(states[rows, to_device(last, states.device)])
        self.tokens.index_copy_(0, slots, logits.argmax(-1))
        return logits

    def prefill_bytes(self, tokens: int, item: int) -> int:
        """See `Decoder.prefill_bytes`; keys and values of the images are there meanwhile."""
        config, vision = self.config, self.model.config.vision_config
        crossed = sum(map(config.has_cross_attention, range(config.num_hidden_layers)))
        side, patch = (size[0] for size in (vision.image_size, vision.patch_size))
        visual_tokens = (side // patch) ** 2 + 1
        image = visual_tokens * (2 * crossed * config.hidden_size + vision.hidden_size) * item
        images = -(-tokens // (config.num_query_tokens + 1))
        return super().prefill_bytes(tokens, item) + images * image

    def _prepare(self, length: int, dtype: torch.dtype) -> None:
        """Makes nothing: the model computes its rotary embeddings."""

    def _run(
        self,
        hidden: Tensor,
        mask: Any,
        positions: Tensor,
        cache_of: Any,
        last: Tensor | None = None,
    ) -> Tensor:
        """See `Decoder._run`."""
        assert self.cache is not None
        caches = [cache_of(*self.cache.layer(index)) for index in range(self.shape["layers"])]
        # Not layer by layer: hooks of the whole gather its norm where ranks share weights.
        with self._attention():
            return self.text(hidden, mask, past_key_values=caches, position_ids=positions)

    def _logits(self, hidden: Tensor) -> Tensor:
        # Beside the searches' state, where the output matrix is on another device.
        return super()._logits(hidden).to(self.model.device)

    def _captures(self) -> bool:
        """False where a pass moves tensors between devices, or gathers weights."""
        is_cut = any(isinstance(module, FSDPModule) for module in self.model.modules())
        return super()._captures() and not is_cut and len(_devices(self.model)) == 1

    def _layer_devices(self) -> list[torch.device]:
        placed, device = getattr(self.model, "hf_device_map", {}), self.model.device
        if len(_devices(self.model)) == 1:
            return [device]
        return [
            _device_of(f"model.language_model.layers.{index}", placed, device)
            for index in range(self.shape["layers"])
        ]


def _devices(model: Any) -> set[Any]:
    """Returns the devices that the model's parts are on."""
    return set(getattr(model, "hf_device_map", {}).values()) or {model.device}


def _device_of(name: str, placed: dict[str, Any], main: torch.device) -> torch.device:
    """Returns the device that a module computes on, from accelerate's map."""
    for prefix, device in placed.items():
        # Weights on the host or the disk are brought to the main device for each use.
        if f"{name}.".startswith(f"{prefix}." if prefix else "") and device not in ("cpu", "disk"):
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return main
