"""Bytes that a packed row of a chat model saves for its backward pass."""

from internvl.models import kernels
from internvl.plan import flops
from internvl.plan.activations import BLOCK_BACK, LOGITS, SAVED_BY_BLOCKS, Activations
from internvl.plan.load import RECOMPUTED, Load


class ChatActivations(Activations):
    """Bytes that a packed row of a chat model saves."""

    def before(self) -> dict[str, float]:
        """See `Activations`."""
        # A frozen tower is done before the language model saves anything.
        return {"tiles": self.tiles(), "vision tower, forward": self.frozen_tower()}

    def until_language(self) -> dict[str, float]:
        """See `Activations`."""
        tower = self._of_tower(self.waiting_tower())
        return tower | {"language model activations": self.decoder()}

    def passing(self) -> dict[str, float]:
        """See `Activations`."""
        # The logits are gone when the first block is run back: the larger of the two counts.
        return {
            BLOCK_BACK: self.backward(),
            LOGITS: self.logits(self.batch.supervised),
        }

    def in_tower(self) -> dict[str, float]:
        """See `Activations`."""
        return self._of_tower(self.tower()) if self.tower_trains else {}

    def _of_tower(self, tower: float) -> dict[str, float]:
        """Returns what is there as long as the tower's activations are."""
        return {
            "tiles": self.tiles(),
            "cast copies of trained weights": self.casts(),
            "vision tower activations": tower,
        }

    def block(self) -> float:
        """See `Activations`."""
        return self.decoder_block(self.batch.rows.tokens) if flops.trains(self.model) else 0.0

    def tiles(self) -> float:
        """Bytes of normalized pixels in float32, and of the tower's cast of them to bfloat16."""
        return 6.0 * self.batch.tiles * 3 * self.vision.image_size[0] ** 2

    def stored(self, load: Load) -> float:
        """See `Activations`; of the language model alone."""
        row = (len(self.layers) - 1) * self.decoder_block(self.batch.rows.tokens)
        return (row + self.last_block()) * load.computed.rows.tokens / self.batch.rows.tokens

    def waiting(self, load: Load) -> float:
        """See `Activations`; of the language model alone."""
        tokens = load.computed.rows.tokens
        entered = len(self.layers) * tokens * self.dtype_bytes * self.text.hidden_size
        recomputed = RECOMPUTED[self.compute.checkpointing]
        return recomputed * entered + (1 - recomputed) * self.stored(load)

    def frozen_states(self, load: Load, tower_passes: float, language_passes: float) -> float:
        """See `Activations`; of the tower alone, three times if it trains."""
        tokens = load.work.tiles * self.patch_tokens * len(self.tower_layers)
        states = self.dtype_bytes * tokens * self.vision.hidden_size
        return tower_passes * (3 if self.tower_trains else 1) * states

    def decoder(self) -> float:
        """Bytes that the language model's blocks save, and the hidden states around them."""
        tokens, width = self.batch.rows.tokens, self.text.hidden_size
        # Trained embeddings are float32, and so is what blocks add to them.
        residual = self.trained_bytes(self.language_model.embed_tokens.weight.requires_grad)
        cut = kernels.supports_last_mlp(self.layers[-1])
        left = self.batch.supervised if cut else tokens
        around = (tokens * residual + left * (residual + 4.0 + self.dtype_bytes)) * width
        visual = self.batch.tiles * (self.patch_tokens - 1) * self.model.config.downsample_ratio**2
        around += visual * self.dtype_bytes * (width + 4 * self.vision.hidden_size)
        if not flops.trains(self.model):
            return around
        block, count = self.decoder_block(tokens), len(self.layers)
        num_kept = self.num_kept(count, self.model)
        entered = self.entered()
        recomputed = block if num_kept == 0 else 0.0  # one at a time
        if self.compute.offload:
            return around + block + entered
        if num_kept == count or (num_kept and count % 2 == 0):  # the last block is one of them
            around += self.last_block() - block
        return around + num_kept * block + (count - num_kept) * entered + recomputed

    def freed(self) -> float:
        """See `Activations`."""
        if self.compute.offload or not flops.trains(self.language_model):
            return 0.0
        count = len(self.layers)
        num_kept = self.num_kept(count, self.model)
        block = self.decoder_block(self.batch.rows.tokens)
        # The last one is still there.
        return max(0, num_kept - 1) * block + (count - max(1, num_kept)) * self.entered()

    def entered(self) -> float:
        """Bytes of the hidden states that enter a block of the language model."""
        residual = self.trained_bytes(self.language_model.embed_tokens.weight.requires_grad)
        return self.batch.rows.tokens * self.text.hidden_size * residual

    def last_block(self) -> float:
        """Bytes that the last block saves; its MLP may run on supervised positions alone."""
        tokens = self.batch.rows.tokens
        whole = self.decoder_block(tokens)
        if not kernels.supports_last_mlp(self.layers[-1]):
            return whole
        # The cut MLP sees another number of positions in every step, so it is never compiled.
        whole_mlp, cut_mlp = self._mlp_token(self.compiled), self._mlp_token(compiled=False)
        return whole - tokens * whole_mlp + self.batch.supervised * cut_mlp

    def _mlp_token(self, compiled: bool) -> float:
        """Bytes that the last block's second half saves per token."""
        block = self.layers[-1]
        adapters = self.adapters_of(block.mlp)
        saved = SAVED_BY_BLOCKS[self.mode(block, adapters), compiled].last_mlp
        narrow, wide = self.values_per_token(saved, self.inner_width(), self.text.hidden_size, 0)
        narrow += adapters.inputs + adapters.rank
        return self.dtype_bytes * narrow + 4 * wide + adapters.mask_bytes + 4

    def backward(self) -> float:
        """Bytes of the gradients that exist together in the backward pass of a block's MLP."""
        if not flops.trains(self.model):
            return 0.0
        return 3.0 * self.dtype_bytes * self.batch.rows.tokens * self.inner_width()
