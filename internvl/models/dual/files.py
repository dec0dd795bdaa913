"""InternVL-14B from its files: the official layout, and InternVL-C's own `.pth`.

Original: `clip_benchmark/clip_benchmark/models/internvl_huggingface/` and `internvl_c_pytorch/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.errors import ModelFolderError
from internvl.models import config_checks, hub, keys
from internvl.models import weights as model_weights
from internvl.models.dual import configs as dual_configs
from internvl.models.dual.configs import DualConfig
from internvl.models.dual.model import DualModel
from internvl.models.hub import ModelFolder
from internvl.models.tensors import LazyTensor, open_tensors, without_values
from internvl.models.vision import set_drop_path


@dataclass(frozen=True)
class InternVLC(ModelFolder):
    """InternVL-C's `.pth` weights, with the configuration of the released model."""

    file: Path
    """The `.pth` file."""

    @property
    def weights(self) -> list[Path]:
        """The `.pth` file."""
        return [self.file]

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Lazy tensors by InternVL-14B's official names."""
        return {keys.pth_to_official(name): t for name, t in open_tensors(self.file)}


def open_pth(file: Path, config: dict[str, Any]) -> InternVLC:
    """Opens InternVL-C's `.pth`; a `config.json` in the same folder replaces `config`.

    Raises:
        ModelFolderError: no such file.
    """
    if not file.is_file():
        raise ModelFolderError(f"{file}: no such file; check the path")
    # The released file comes alone; a config.json next to it is taken to describe it.
    config_file = file.parent / "config.json"
    if config_file.is_file():
        config = hub.read_json(config_file)
    return InternVLC(file.parent, config, file)


def read_config(source: ModelFolder, image_size: int | None = None) -> DualConfig:
    """Reads the configuration of an InternVL-14B checkpoint.

    Args:
        image_size: another side (S) of the images, px.

    Raises:
        ModelFolderError: not InternVL-14B.
    """
    if source.family != "dual":
        raise ModelFolderError(f"{source.folder}: this is a chat model, not InternVL-14B")
    official = source.config | ({"force_image_size": image_size} if image_size else {})
    file = source.folder / "config.json"
    config_checks.check_dual(file, official)
    with config_checks.building(file):
        # The `.pth` has neither QLLaMA's queries nor its cross-attention.
        return dual_configs.from_official(official, queries=not isinstance(source, InternVLC))


def fit_tensors(config: DualConfig, source: ModelFolder) -> dict[str, LazyTensor]:
    """Maps the checkpoint's tensors to the model's names and checks their shapes.

    Unexpected tensors are logged, not refused.

    Raises:
        ModelFolderError: missing weights, or other shapes than the config's.
    """
    file = source.folder / "config.json"
    config_checks.check_quantization(file, source.config, source.tensors)
    with config_checks.building(file):
        expected = empty_model(config).state_dict()
        # Adapters are attached and merged once the base weights are loaded.
        base = keys.split_adapters(source.tensors).base
        renamed = keys.official_to_ours(config, expected, base)
    # The fine-tuned releases hold some tensors that nobody documents.
    model_weights.check_names(source.folder, renamed, log_unexpected=True)
    return model_weights.check_shapes(source.folder, expected, renamed.tensors)


def empty_model(config: DualConfig) -> DualModel:
    """The model without data (meta device): names and shapes at no cost."""
    with torch.device("meta"):
        return DualModel(config)


def load_model(
    source: ModelFolder,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    drop_path: float = 0.0,
    attention: str = "sdpa",
    device_map: str | dict[str, Any] | None = None,
    values: bool = True,
) -> DualModel:
    """InternVL-14B, in evaluation mode; adapters that the checkpoint carries are merged.

    Tensors are read one at a time, shard by shard.

    Args:
        image_size: another side of the images in px; the position embeddings are resized to it.
        drop_path: stochastic depth of the vision tower's last block, in training.
        attention: `transformers`' attention implementation.
        device_map: "auto" spreads the model over all GPUs (`device` is then not used).
        values: False for zeros that take no memory instead of the weights.

    Raises:
        ModelFolderError: what is missing or damaged, by name, and what to do.
    """
    config = read_config(source, image_size)
    tensors = fit_tensors(config, source)
    if not values:
        tensors = {name: without_values(tensor, dtype) for name, tensor in tensors.items()}
    # No name but lazy tensors: transformers opens no file itself and holds one tensor at a time.
    model = DualModel.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        attn_implementation=attention,
        device_map=device_map or model_weights.one_device(device),
    )
    if drop_path:
        set_drop_path(model, drop_path)
    if keys.has_adapters(source.tensors):
        # Here: PEFT takes half a second, and the released model has no adapters.
        from internvl.models.adapters import lora

        lora.load_official(model, _adapters(config, source), source.folder)
        lora.merge(model)  # inference then needs no further matrix products
    return model


def _adapters(config: DualConfig, source: ModelFolder) -> Mapping[str, Tensor]:
    names = empty_model(config).state_dict()
    return keys.adapters_to_ours(config, names, keys.split_adapters(source.tensors).adapters)
