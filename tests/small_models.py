"""Chat models of the released architectures, a few narrow blocks of each part, random weights."""

import torch

from internvl import zoo
from internvl.compute import placement
from internvl.config import LoraConfig
from internvl.models import configs
from internvl.models.adapters import lora
from internvl.models.chat import model as chat_model

VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"intermediate_size": 128, "image_size": 56}
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500}
TEXT |= {"num_key_value_heads": 2, "intermediate_size": 160}


def small_config(name, vision=None, text=None):
    """The configuration of a released model, shrunk; `vision` and `text` overrule sizes."""
    official = zoo.official_config(zoo.find(name))
    text = official["llm_config"] | TEXT | (text or {})
    if "head_dim" in text:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    if text["architectures"][0].startswith("Phi3"):
        text |= {"num_key_value_heads": text["num_attention_heads"], "pad_token_id": 2}
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        factors = [1.0] * half
        text["rope_scaling"] = {"type": "su", "short_factor": factors, "long_factor": factors}
    if "num_experts" in text:
        text["moe_intermediate_size"] = 16
    vision = official["vision_config"] | VISION | (vision or {})
    official |= {"vision_config": vision, "llm_config": text}
    return configs.from_official(official | {"force_image_size": vision["image_size"]}, 3)


def small_model(
    name, train, rank, *, on=("language_model",), dropout=0.0, dtype="float32", sizes=None
):
    """A model as training has it: `train` of its parts, adapters of `rank` on `on`."""
    config = small_config(name, **(sizes or {}))
    model = chat_model.ChatModel._from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    )
    lora.select_trainable(model, train)
    if rank:
        lora.attach(model, LoraConfig(rank=rank, dropout=dropout, on=on))
    return placement.to_device(model, torch.device("cpu"), dtype).train()
