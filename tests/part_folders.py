"""A tiny InternViT, language model with tokenizer, and projector, each as a release of its own."""

import json
import shutil

import torch
from chat_folders import GOLDEN, golden_folder
from safetensors.torch import load_file, save_file

from internvl.data.tokenizers import SPECIAL_TOKENS


def split(tmp_path, case="chat_qwen2", tokenizer="qwen2", rows=600, whole=None):
    """The golden model's (or `whole`'s) tower, language model and projector as releases."""
    if whole is None:
        whole = golden_folder(case, "v2.sel-1", tmp_path / "whole")
    tensors = load_file(whole / "model.safetensors")
    config = json.loads((whole / "config.json").read_text())
    vision, language = tmp_path / "vision", tmp_path / "language"
    for folder, prefix, part in (
        (vision, "vision_model.", "vision_config"),
        (language, "language_model.", "llm_config"),
    ):
        folder.mkdir()
        own = {
            n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)
        }
        for name in own:
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                own[name] = own[name][:rows].clone()
        save_file(own, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config[part]))
    for file in (GOLDEN / "label_masks" / f"tokenizer_{tokenizer}").iterdir():
        shutil.copy(file, language)
    if tokenizer == "qwen2":
        _forget_added_tokens(language)
    mlp = {n.removeprefix("mlp1."): t for n, t in tensors.items() if n.startswith("mlp1.")}
    torch.save(mlp, tmp_path / "projector.pth")
    return vision, language, tmp_path / "projector.pth", tensors


def _forget_added_tokens(folder):
    """A plain language model's tokenizer: without the nine tokens of a chat model."""
    full = json.loads((folder / "tokenizer.json").read_text())
    full["added_tokens"] = [t for t in full["added_tokens"] if t["content"] not in SPECIAL_TOKENS]
    (folder / "tokenizer.json").write_text(json.dumps(full))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["additional_special_tokens"]
    config["added_tokens_decoder"] = {
        number: entry
        for number, entry in config["added_tokens_decoder"].items()
        if entry["content"] not in SPECIAL_TOKENS
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").unlink()
