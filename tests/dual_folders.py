"""Small InternVL-14B checkpoints for tests: the golden one, and its file of InternVL-C alone."""

import json
import shutil
from pathlib import Path

import torch
from chat_folders import GOLDEN
from safetensors.torch import load_file

DUAL = GOLDEN / "internvl_14b_cg"
_PTH = {
    "patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "pos_embed": "vision_model.embeddings.position_embedding",
    "cls_token": "vision_model.embeddings.class_embedding",
    "blocks.": "vision_model.encoder.layers.",
    "transformer.": "qllama.model.",
}


def dual_folder(to: Path, **overrides: object) -> Path:
    """The golden case as the checkpoint folder its README describes."""
    config = json.loads((DUAL / "case.json").read_text())["config"] | {"model_type": "internvl"}
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_text(json.dumps(config | overrides))
    shutil.copy(DUAL / "weights.safetensors", to / "model.safetensors")
    return to


def dual_golden() -> dict[str, torch.Tensor]:
    return load_file(DUAL / "tensors.safetensors")


def pth_file(to: Path) -> Path:
    """The same weights as InternVL-C's own file names them, beside a configuration."""
    folder = dual_folder(to)
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "cross_attn" in name and name.startswith("qllama."):
            continue
        if name.startswith(("query_tokens", "clip_projector2", "itm_head", "qllama.lm_head")):
            continue
        for pth, official in _PTH.items():
            if name.startswith(official):
                name = pth + name[len(official) :]
                break
        if name.endswith((".ls1", ".ls2")):
            name += ".gamma"
        stored[name] = tensor
    (folder / "model.safetensors").unlink()
    torch.save(stored, folder / "internvl_c.pth")
    return folder / "internvl_c.pth"
