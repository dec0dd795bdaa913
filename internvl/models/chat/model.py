"""The chat model: `transformers`' InternVL plus what training needs of its forward."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLModel
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast

from internvl.errors import ModelFolderError, UserError
from internvl.models import config_checks, configs, hub, kernels, keys, units
from internvl.models import weights as model_weights
from internvl.models.chat import processor
from internvl.models.hub import ModelFolder
from internvl.models.tensors import LazyTensor, without_values
from internvl.models.units import Unit
from internvl.models.vision import is_random, set_drop_path

IMAGE_TOKEN = "<IMG_CONTEXT>"
"""The placeholder: each of its positions takes one visual token."""


@dataclass(frozen=True)
class Supervision:
    """What a packed row is trained on: `positions[m]` predicts `targets[m]`.

    positions, targets: int64 (M,); weights: float32 (M,). Positions may repeat.
    """

    positions: Tensor
    targets: Tensor
    weights: Tensor
    segments: Tensor | None = None
    """int64 (M,): the sum that each target adds to, 0 … num_segments - 1; None: one sum of all."""
    num_segments: int = 0


class ColumnMajorModel(InternVLModel):
    """Pixel shuffle v1 (Chat 1.1, 1.2): each tile's grid of visual tokens is transposed."""

    def pixel_shuffle(self, vision_features: Tensor, scale_factor: float = 0.5) -> Tensor:
        """(N, G, G, D) patches -> (N, G r, G r, D / r²), columns first."""
        return super().pixel_shuffle(vision_features, scale_factor).transpose(1, 2).contiguous()


class ChatModel(InternVLForConditionalGeneration):
    """`InternVLForConditionalGeneration` whose forward can also return a summed loss.

    Same modules, names and configuration: what it saves, plain `transformers` loads (pixel
    shuffle v1 excepted, which `transformers` does not have).
    """

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__(config)
        if configs.chat_settings(config)["ps_version"] == "v1":
            # The class of the inner model decides the shuffle, so it is built once more.
            self.model = ColumnMajorModel(config)

    family = "chat"

    loss_chunk = 1024
    """Supervised positions whose logits exist at the same time."""

    runs_head = False
    """Whether a row without targets runs all modules still, its loss at weight 0: ranks that share
    weights wait for one another in each."""
    runs_tower = False
    """The same for the vision tower and the projector in a row without images."""
    is_cut = False
    """Whether ranks share weights; those of the projector are then whole in `forward` alone."""

    def shard_units(self) -> Iterator[Unit]:
        """Yields the modules that shards gather one by one, inner ones first."""
        yield from units.tower_units(self.model.vision_tower)
        yield from units.stack(self.model.language_model.layers)
        # The rest: with the output matrix in it, the chunks of a loss gather nothing.
        yield Unit(self)

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """Yields none: there is no parameter that is too small to gather."""
        return iter(())

    def keep_in_step(self, tower_is_cut: bool) -> None:
        """Makes every row run the modules that other ranks wait for, or reduce gradients of."""
        self.runs_head = self.is_cut = True
        self.runs_tower = tower_is_cut or units.trains(*self._vision())

    def forget_blank_tiles(self) -> None:
        """Removes the gradients of a step without images: zeros, which AdamW would act on."""
        for module in self._vision():
            module.zero_grad(set_to_none=True)

    def _vision(self) -> tuple[nn.Module, nn.Module]:
        return self.model.vision_tower, self.model.multi_modal_projector

    def vision_tokens(self, pixel_values: Tensor) -> Tensor:
        """Encodes normalized tiles (N, 3, S, S) to visual tokens for the text, (N, K, D)."""
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output

    def vision_tokens_of_row(self, pixel_values: Tensor) -> Tensor:
        """Encodes the tiles (N, 3, S, S) of a packed row to its visual tokens, (N K, D)."""
        # Duplicate a lone tile: torch.compile specializes on batch size 1 and would recompile.
        tiles = pixel_values if len(pixel_values) > 1 else pixel_values.repeat(2, 1, 1, 1)
        return self.vision_tokens(tiles)[: len(pixel_values)].flatten(0, 1)

    @property
    def repeats_vision_tokens(self) -> bool:
        """Whether every pass of a step, of other adapters too, gets the same visual tokens."""
        return not (self.is_cut or units.trains(*self._vision()) or is_random(*self._vision()))

    # The parameters are spelled out because `generate` reads them off the signature.
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        supervision: Supervision | None = None,
        visual: Tensor | None = None,
        **kwargs: Any,
    ) -> InternVLCausalLMOutputWithPast:
        """As the parent's; with `supervision`, `loss` is the weighted SUM over its positions, or
        those of its segments, float32 (num_segments,).

        Logits are then computed at those positions only, a chunk at a time, and not returned.
        `input_ids` (1, L) must hold as many placeholders as there are visual tokens. Those may be
        passed, as `vision_tokens_of_row` returns them, in place of `pixel_values`.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if supervision is None:
            if self.runs_tower and pixel_values is None and _begins(inputs):
                embeds = self._with_blank_tile(self.get_input_embeddings()(input_ids))
                inputs |= {"input_ids": None, "inputs_embeds": embeds}
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **inputs)
        # Past the parent's forward, which counts placeholders and so makes the host wait for a GPU.
        assert input_ids is not None
        if self.runs_head and not len(supervision.positions):
            supervision = _unweighted(input_ids, supervision)
        language_model = self.model.language_model
        with kernels.select_positions(language_model.layers, supervision.positions) as selected:
            hidden = language_model(
                inputs_embeds=self._embed(input_ids, pixel_values, visual),
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state[0]
        # The last block may have computed its MLP at these positions alone; then they are (M, D).
        if not selected:
            hidden = hidden.index_select(0, supervision.positions)
        # A sum over thousands of tokens would lose its last digits in bfloat16.
        segments = supervision.segments
        shape = () if segments is None else (supervision.num_segments,)
        loss = hidden.new_zeros(shape, dtype=torch.float32)
        for start in range(0, len(hidden), self.loss_chunk):
            chunk = slice(start, start + self.loss_chunk)
            terms: list[Any] = [hidden[chunk], supervision.targets[chunk]]
            terms.append(supervision.weights[chunk])
            if segments is not None:
                terms += [segments[chunk], supervision.num_segments]
            # Recomputed in backward: float32 logits (M, V) of a whole row would take gigabytes.
            loss = loss + checkpoint(self._chunk_loss, *terms, use_reentrant=False)
        return InternVLCausalLMOutputWithPast(loss=loss)

    def _embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, visual: Tensor | None
    ) -> Tensor:
        """(1, L, D) of a row (1, L): token embeddings, visual tokens at their placeholders."""
        embeds = self.get_input_embeddings()(input_ids)
        if visual is None and pixel_values is None:
            return self._with_blank_tile(embeds) if self.runs_tower else embeds
        if visual is None:
            assert pixel_values is not None
            visual = self.vision_tokens_of_row(pixel_values)
        placeholders = input_ids[0] == self.config.image_token_id
        # The size is known from the tiles; plain nonzero would synchronize with the GPU.
        positions = torch.nonzero_static(placeholders, size=len(visual)).squeeze(1)
        return embeds[0].index_copy(0, positions, visual.to(embeds.dtype))[None]

    def _with_blank_tile(self, embeds: Tensor) -> Tensor:
        """Returns the embeddings (B, L, D) with the visual tokens of a tile added at weight 0."""
        side = self.config.vision_config.image_size[0]
        tiles = embeds.new_zeros(2, 3, side, side, dtype=torch.float32)
        visual = self.vision_tokens(tiles)
        return embeds + 0 * visual.to(embeds.dtype).mean()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """As the parent's, but repeats the tiles of each sample as a block, one block per beam."""
        # The parent repeats tile by tile, which mixes the tiles of an image across its beams.
        if pixel_values is not None and expand_size > 1 and input_ids is not None:
            per_tile = tokens_per_tile(self.config, pixel_values.shape[-1])
            placeholders = (input_ids == self.config.image_token_id).sum(1)
            samples = pixel_values.split((placeholders // per_tile).tolist())
            pixel_values = torch.cat([tiles for tiles in samples for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, kwargs | {"pixel_values": pixel_values}

    def _chunk_loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        segments: Tensor | None = None,
        num_segments: int = 0,
    ) -> Tensor:
        # float32: a softmax over some 100,000 tokens is too coarse in bfloat16.
        losses = F.cross_entropy(self.lm_head(hidden).float(), targets, reduction="none") * weights
        if segments is None:
            return losses.sum()
        # Not `index_add`, whose order of additions differs from run to run on a GPU.
        inside = segments == torch.arange(num_segments, device=segments.device)[:, None]
        return torch.where(inside, losses, 0.0).sum(1)


def _begins(inputs: dict[str, Any]) -> bool:
    """Returns whether inputs of a forward are token ids that nothing precedes."""
    cache = inputs["past_key_values"]
    return inputs["inputs_embeds"] is None and (cache is None or not cache.get_seq_length())


def _unweighted(input_ids: Tensor, empty: Supervision) -> Supervision:
    """Returns one target at weight 0 for a row (1, L), with the segments of `empty`."""
    zero = input_ids.new_zeros(1)
    segments = None if empty.segments is None else zero
    return replace(empty, positions=zero, targets=zero, weights=zero.float(), segments=segments)


def load_model(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    image_token_id: int | None = None,
    image_size: int | None = None,
    drop_path: float = 0.0,
    attention: str = "sdpa",
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
) -> ChatModel:
    """The chat model of a folder, official or hf layout, in evaluation mode.

    Tensors are read one at a time, shard by shard. Adapters that an official checkpoint carries
    (`use_llm_lora`, `use_backbone_lora`) are attached; `lora.merge` takes them in.

    Args:
        image_token_id: id of `<IMG_CONTEXT>`; by default what the folder's files say.
        image_size: another tile side in px; the position embeddings are resized to it.
        drop_path: stochastic depth of the vision tower's last block, in training.
        attention: `transformers`' attention implementation.
        device_map: "auto" spreads the model over all GPUs (`device` is then not used).
        quantize: "8bit" or "4bit" through bitsandbytes, which is made for a GPU.

    Raises:
        ModelFolderError: what is missing, unexpected or damaged, by name, and what to do.
    """
    source = hub.open_folder(folder)
    config = read_config(source, image_token_id, image_size)
    return materialize(
        config,
        source,
        device=device,
        dtype=dtype,
        drop_path=drop_path,
        attention=attention,
        device_map=device_map,
        quantize=quantize,
    )


def materialize(
    config: InternVLConfig,
    source: ModelFolder,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    drop_path: float = 0.0,
    attention: str = "sdpa",
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    values: bool = True,
) -> ChatModel:
    """The model of `config` with the weights of `source`; arguments as `load_model`'s.

    Args:
        values: False for zeros that take no memory instead of the weights.
    """
    tensors = fit_tensors(config, source)
    if not values:
        tensors = {name: without_values(tensor, dtype) for name, tensor in tensors.items()}
    # No name but lazy tensors: transformers opens no file itself and holds one tensor at a time.
    model = ChatModel.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        attn_implementation=_attention(config, attention),
        device_map=device_map or model_weights.one_device(device),
        quantization_config=_quantization(quantize, dtype),
    )
    if drop_path:
        set_drop_path(model, drop_path)
    # The hf layout has no names for adapters inside a checkpoint; the official releases do.
    if source.layout == "official" and keys.has_adapters(source.tensors):
        # Here: PEFT takes half a second, and few models have adapters.
        from internvl.models.adapters import lora

        adapters = keys.split_adapters(source.tensors).adapters
        state = keys.adapters_to_ours(config, empty_model(config).state_dict(), adapters)
        lora.load_official(model, state, source.folder)
    return model


def _attention(config: InternVLConfig, backend: str) -> str | dict[str, str]:
    """Resolves the attention backend per sub-model; GPT-OSS falls back from sdpa to eager."""
    # No fused kernel of torch computes GPT-OSS's attention sinks.
    if configs.language_model(config) == "GptOssForCausalLM" and backend == "sdpa":
        return {"text_config": "eager", "vision_config": backend}
    return backend


def read_config(
    source: ModelFolder, image_token_id: int | None = None, image_size: int | None = None
) -> InternVLConfig:
    """The configuration of a chat checkpoint of either layout, as `transformers`' class.

    Raises:
        ModelFolderError: not a chat model, unknown language model, or no image token.
    """
    if source.family != "chat":
        raise ModelFolderError(f"{source.folder}: this is InternVL-14B, not a chat model")
    file = source.folder / "config.json"
    config_checks.check_chat(file, source.config)
    if source.layout == "hf":
        with config_checks.building(file):
            config = InternVLConfig(**config_checks.without_quantization(source.config))
        config.image_token_id = config.image_token_id if image_token_id is None else image_token_id
        if source.config.get("internvl") is None:
            # Written by transformers alone: tiling and normalization are in its processor's files.
            image_settings = processor.read_images(source.reader)
            config.internvl = configs.chat_settings(config) | image_settings.values
    else:
        placeholder = _image_token_id(source, image_token_id)
        with config_checks.building(file):
            config = configs.from_official(source.config, placeholder)
    settings = configs.chat_settings(config)
    _check_settings(file, source, config, settings)
    side = image_size or settings["force_image_size"]
    # As in the original, force_image_size overrides the side in vision_config.
    if side:
        config.internvl = settings | {"force_image_size": side}
        config.vision_config.image_size = (side, side)
        config.image_seq_length = tokens_per_tile(config, side)
    return config


def _check_settings(
    file: Path, source: ModelFolder, config: InternVLConfig, settings: dict[str, Any]
) -> None:
    """Raises ModelFolderError for values that contradict other values or their defaults."""
    # After defaults are filled in: a count that is left out can contradict the one that is set.
    hf = source.layout == "hf"
    keys_of_tiles = ("min_dynamic_patch", "max_dynamic_patch")
    fewest, most = ((key, settings[key]) for key in keys_of_tiles)
    config_checks.check_counts(file, "internvl" if hf else "", fewest, most)
    block, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    key = "vision_feature_layer" if hf else "select_layer"
    config_checks.check_block(file, key, block, layers)


def _image_token_id(source: ModelFolder, explicit: int | None) -> int:
    """`explicit`, or the id of `<IMG_CONTEXT>` in the tokenizer files."""
    if explicit is not None:
        return explicit
    token_id = hub.special_token_id(source.folder, IMAGE_TOKEN)
    if token_id is None:
        raise ModelFolderError(
            f"{source.folder}: no tokenizer file names {IMAGE_TOKEN}; copy the release's tokenizer "
            "files there, or pass image_token_id"
        )
    return token_id


def fit_tensors(config: InternVLConfig, source: ModelFolder) -> dict[str, LazyTensor]:
    """The checkpoint's tensors under the model's names, checked against its shapes.

    `config.tie_word_embeddings` is set to whether the file has no output matrix of its own.

    Raises:
        ModelFolderError: missing or unexpected weights, or other shapes than the config's.
    """
    file = source.folder / "config.json"
    config_checks.check_quantization(file, source.config, source.tensors)
    with config_checks.building(file):
        expected = empty_model(config).state_dict()
        if source.layout == "hf":
            renamed = keys.hf_to_model(config, expected, source.tensors)
        else:
            base = keys.split_adapters(source.tensors).base
            renamed = keys.official_to_ours(config, expected, base)
    config.tie_word_embeddings = "lm_head.weight" not in renamed.tensors and _may_tie(source)
    # A tied checkpoint stores no output matrix, under whichever name the layout has for it.
    if config.tie_word_embeddings:
        heads = {"lm_head.weight", "language_model.lm_head.weight", "language_model.output.weight"}
        renamed = replace(renamed, missing=[n for n in renamed.missing if n not in heads])
    model_weights.check_names(source.folder, renamed)
    return model_weights.check_shapes(source.folder, expected, renamed.tensors)


def empty_model(config: InternVLConfig) -> ChatModel:
    """The model without data (meta device): names and shapes at no cost."""
    with torch.device("meta"):
        return ChatModel(config)


def _may_tie(source: ModelFolder) -> bool:
    """True if a checkpoint without an output matrix is complete."""
    language = source.config.get("llm_config") or source.config["text_config"]
    # transformers ties by default and leaves the key out; the original never ties unasked.
    by_default = source.layout == "hf"
    tied = source.config.get("tie_word_embeddings", by_default)
    return bool(tied or language.get("tie_word_embeddings", False))


def _quantization(quantize: str | None, dtype: torch.dtype) -> Any:
    """bitsandbytes settings; the output matrix and the projector stay as they are."""
    if quantize is None:
        return None
    if quantize not in ("8bit", "4bit"):
        raise UserError(f'quantize is "8bit", "4bit" or None, not {quantize!r}')
    if find_spec("bitsandbytes") is None:
        raise UserError(f"quantize={quantize!r} needs bitsandbytes: pip install 'internvl[quant]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_8bit=quantize == "8bit",
        load_in_4bit=quantize == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "model.multi_modal_projector"],
    )


def tokens_per_tile(config: InternVLConfig, tile_size: int) -> int:
    """Visual tokens (K) that a tile of `tile_size` pixels a side becomes.

    Raises:
        UserError: the side is no multiple of the patch side over the downsampling ratio.
    """
    patch = config.vision_config.patch_size[0]
    # The ratio is a float (0.5); patches of 14 give steps of exactly 28.
    step = round(patch / config.downsample_ratio)
    if tile_size % step:
        raise UserError(
            f"data.tiles.size = {tile_size} does not fit this model: a tile's side must be a "
            f"multiple of {step} pixels (patches of {patch}, downsampled by "
            f"{config.downsample_ratio})"
        )
    return (tile_size // step) ** 2
