"""Adapter folders that plain PEFT writes for a small model, and what plain PEFT makes of them."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from chat_folders import add_tokenizer, official_folder
from data_files import model_folder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from internvl import export
from internvl.inference import load as loading

IDS = torch.tensor([[5, 9, 17, 33, 65, 120, 44, 3]])
LANGUAGE = (
    r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
)
QKV = ["q_proj", "k_proj", "v_proj"]


def hf_folder(work: Path, *, tied: bool = False, name: str = "qwen2") -> Path:
    """A small model in transformers' layout."""
    official = model_folder(work / "official", name=name)
    if tied:
        config = json.loads((official / "config.json").read_text()) | {"tie_word_embeddings": True}
        config["llm_config"] |= {"tie_word_embeddings": True}
        (official / "config.json").write_text(json.dumps(config))
        state = load_file(official / "model.safetensors")
        del state["language_model.lm_head.weight"]
        save_file(state, official / "model.safetensors")
    return export.run(str(official), work / "hf", "hf")


def experts_folder(work: Path) -> Path:
    """A small mixture of experts in transformers' layout."""
    folder = official_folder("Qwen3MoeForCausalLM", work / "official", template="internvl2_5")
    return export.run(str(add_tokenizer(folder, "qwen2")), work / "hf", "hf")


@lru_cache
def _read(base: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()


def plain(base: Path) -> Any:
    """transformers' own model, to be changed."""
    return copy.deepcopy(_read(base))


def write(base: Path, to: Path, **settings: Any) -> Path:
    """An adapter folder as PEFT writes it, with values that make a difference."""
    chosen = {"r": 4, "lora_alpha": 16, "target_modules": LANGUAGE} | settings
    torch.manual_seed(0)
    with quiet():
        model = get_peft_model(plain(base), LoraConfig(**chosen))
        draw = torch.Generator().manual_seed(1)
        for name, value in model.named_parameters():
            if value.requires_grad or "lora_" in name:
                new = torch.randn(value.shape, generator=draw)
                far = "lora_" in name and settings.get("init_lora_weights") in (None, True)
                # In place: tied adapters are one storage.
                value.data.copy_(
                    0.08 * new if far and "magnitude" not in name else value + 0.02 * new
                )
        model.save_pretrained(to)
    return changed_config(to, base_model_name_or_path=str(base))


def changed_config(folder: Path, **keys: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


def renamed(folder: Path, rename: Any) -> Path:
    """The folder with its tensors under other names."""
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of settings that these tests choose on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """(1, T, V) of a text and of an image before it."""
    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 84, 84, generator=generator)
    image = torch.full((1, config.image_seq_length), config.image_token_id)
    ids = torch.cat([IDS[:, :4], image, IDS[:, 4:]], 1)
    return model(input_ids=ids, pixel_values=pixels).logits.float()


def of_peft(base: Path, folder: Path) -> torch.Tensor:
    """The logits of plain PEFT on transformers' plain model."""
    return logits(with_peft(base, folder))


def with_peft(base: Path, folder: Path) -> Any:
    """transformers' plain model with the adapter as plain PEFT loads it."""
    with quiet():
        return PeftModel.from_pretrained(plain(base), folder).eval()


def loaded(folder: Path) -> Any:
    return loading.load(folder, device="cpu", dtype="float32").model


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
