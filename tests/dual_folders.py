"""Small InternVL-14B checkpoints for tests: the golden one, and its file of InternVL-C alone."""

import io
import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from chat_folders import GOLDEN
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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


def small_tokenizer(folder: Path) -> Path:
    """A small SentencePiece model with byte pieces, into a folder; some 320 tokens."""
    words = ["a photo of a red panda", "two cats on the sofa", "summarize : English caption"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


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


def dual_lora_folder(to: Path, *, base_layer: bool = True) -> tuple[Path, dict[str, torch.Tensor]]:
    """The golden case as a LoRA run of the original saves it, and the weights it stands for.

    Args:
        base_layer: peft's newer names; older ones leave the base where it was.
    """
    folder = dual_folder(to, use_backbone_lora=2, use_qllama_lora=3)
    torch.manual_seed(5)
    stored, merged = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        part, _, rest = name.partition(".")
        merged[name] = tensor
        if part not in ("vision_model", "qllama"):
            stored[name] = tensor
            continue
        wrapped = f"{part}.base_model.model.{rest}"
        stem, _, kind = wrapped.rpartition(".")
        if not stem.endswith(_ADAPTED):
            stored[wrapped] = tensor
            continue
        stored[f"{stem}.base_layer.{kind}" if base_layer else wrapped] = tensor
        if kind == "weight":
            rank = 2 if part == "vision_model" else 3
            a, b = torch.randn(rank, tensor.shape[1]) / 9, torch.randn(len(tensor), rank) / 9
            stored[f"{stem}.lora_A.default.weight"] = a
            stored[f"{stem}.lora_B.default.weight"] = b
            merged[name] = tensor + 2 * b @ a
    save_file(stored, folder / "model.safetensors")
    return folder, merged


_ADAPTED = (
    *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
)


def add_small_tokenizer(folder: Path) -> Path:
    """Bytes and a few merges, with the special ids of the Chinese Alpaca's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["an image of something red"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
