"""Runs `internvl demo`: small models trained, exported and shown on one page.

    prepare   images and their names, as ordinary annotation files    (datasets/openmoji.py)
    start     a small InternVL-Chat with fresh weights, as a model folder
    train     the ordinary loop on an ordinary recipe, evaluated before, during and after
    export    a folder that plain transformers loads; its answers are compared with ours
    find      the same with a small InternVL-14B and pairs of images and names (retrieval.py)
    report    report.html                                                   (page.py)
    serve     its pages to talk and to search, if they are asked for        (serving.py)

Everything between start and report is the normal path; only the models are small.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    PreTrainedTokenizerFast,
)

from internvl import dist, export, report
from internvl.config import CaptionEval, Recipe, recipes
from internvl.data.templates import template
from internvl.datasets import openmoji
from internvl.demo import page as pages
from internvl.demo import ranks, retrieval, serving
from internvl.demo.page import LANGUAGES, Reloaded, Timing
from internvl.demo.retrieval import MUON, RetrievalSize
from internvl.errors import UserError
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.generate import Request
from internvl.models import configs
from internvl.models.chat.model import ChatModel, tokens_per_tile

PIXELS = 64
TEMPLATE = "internvl2_5"
TOKENIZE = {"en": "ptb", "zh": "characters", "ko": "words"}
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"),
    *("<ref>", "</ref>", "<box>", "</box>"),
)


@dataclass(frozen=True)
class DemoSize:
    """Amount of data and training of the demo."""

    epochs: float
    limit_families: int | None
    """Families of images; None takes all."""
    eval_limit: int | None
    """Held-out images per language; None takes all."""
    retrieval: RetrievalSize


FULL = DemoSize(epochs=8, limit_families=None, eval_limit=None, retrieval=RetrievalSize(steps=100))
SHORT = DemoSize(
    epochs=3,
    limit_families=40,
    eval_limit=12,
    retrieval=RetrievalSize(steps=20, eval_limit=12),
)


def run(folder: Path, *, short: bool = False, port: int = serving.PORT) -> Path:
    """Runs the whole demo in `folder`; returns the report's path. A second call resumes.

    All ranks of a process group train, and rank 0 does the rest.

    Args:
        port: where `serving.serve` will have its pages, which the report links.

    Raises:
        UserError: packages are missing, or an exported model does not answer as ours does.
    """
    dist.init_from_env("cpu")
    ranks.keep_kernels()
    if dist.is_main():
        _run(folder, SHORT if short else FULL, port)
    else:
        ranks.train_together(folder / _RECIPE)
        ranks.train_together(folder / _RETRIEVAL / retrieval.RECIPE)
    return folder / _PAGE


_RECIPE, _RETRIEVAL, _PAGE = "recipe.yaml", "retrieval", "report.html"


def _run(folder: Path, size: DemoSize, port: int) -> None:
    """Does all of the demo that is not training, and trains with the other ranks."""
    timing = Timing()
    data = timing.measure(
        "drawing the images",
        lambda: openmoji.prepare(pixels=PIXELS, limit_families=size.limit_families),
    )
    # Every step leaves a folder, by which a second call knows that it is done.
    start, exported = folder / "start", folder / "model"
    if not (start / "config.json").exists():
        timing.measure("making a small model", lambda: start_model(data, start))
    # The recipe is a file, for the other ranks and for a user who goes on from it.
    recipe = make_recipe(data, start, folder / "run", size)
    file = folder / _RECIPE
    file.write_text(recipes.to_yaml(recipe), encoding="utf-8")
    timing.measure("training and evaluating", lambda: ranks.train_together(file))
    if not exported.exists():
        timing.measure("exporting", lambda: export.run(recipe.run, exported))
    checked = timing.measure(
        "reloading in plain transformers", lambda: compare_reloaded(recipe, exported)
    )
    searching = retrieval.run(
        folder / _RETRIEVAL, data, exported, size.retrieval, recipe.dtype, timing
    )
    chat, commands = pages.read_run(recipe), _commands(folder, recipe, data)
    page = pages.make_page(chat, data, timing, checked, searching, commands, _served(folder, port))
    report.write(page, folder / _PAGE)


@dataclass(frozen=True)
class ChatSize:
    """Widths and depths of a small InternVL-Chat with one tile per image, 4 heads in all blocks."""

    pixels: int
    patch: int
    vision_width: int
    vision_blocks: int
    language_width: int
    language_blocks: int


CHAT_SIZE = ChatSize(PIXELS, 8, 128, 3, 128, 3)
"""1.5 million parameters."""


def start_model(data: Path, folder: Path, size: ChatSize = CHAT_SIZE) -> None:
    """Writes the model that training starts from; its tokenizer is trained on the image names."""
    prompts = list(openmoji.PROMPTS.values())
    create_model(folder, train_tokenizer(_names(data / "train.jsonl"), prompts), size)


def create_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, size: ChatSize = CHAT_SIZE, seed: int = 0
) -> None:
    """Writes a fresh small InternVL-Chat as a model folder in the hf layout."""
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config={
            "hidden_size": size.vision_width,
            "num_hidden_layers": size.vision_blocks,
            "num_attention_heads": 4,
            "intermediate_size": 4 * size.vision_width,
            "image_size": size.pixels,
            "patch_size": size.patch,
            "attention_bias": True,
            # The released 0.1 suits a trained tower; a fresh small one learns faster with 1.
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": size.language_width,
            "num_hidden_layers": size.language_blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 3 * size.language_width,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            # The tokenizer has none, as Qwen2's.
            "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        # Pixel shuffle makes one visual token of 2 x 2 patches.
        image_seq_length=(size.pixels // size.patch // 2) ** 2,
        tie_word_embeddings=True,
    )
    # Keys of the original's config.json that transformers' configuration does not have.
    config.internvl = {
        "template": TEMPLATE,
        "system_message": "",
        "dynamic_image_size": False,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 1,
        "use_thumbnail": False,
    }
    model = ChatModel(config)
    # transformers starts the position table at zero, which a trained tower overwrites anyway.
    nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.02)
    settings = configs.chat_settings(config)
    export.run(
        Chat(
            model=model.eval(),
            tokenizer=tokenizer,
            template=template(TEMPLATE),
            tiles=loading.tiling(settings, size.pixels),
            system_message="",
            folder=folder,
        ),
        folder,
    )


def train_tokenizer(
    texts: Sequence[str], prompts: Sequence[str], vocab_size: int = 1000
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with the special tokens of InternVL-Chat."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    frame = ["system\n", "user\n", "assistant\n", *prompts]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # All 256 bytes, so that any text can be encoded, not only the one of training.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The words around every text count as often as frequent words do, so they become few tokens.
    core.train_from_iterator([*texts, *frame * 50], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def make_recipe(data: Path, start: Path, run_folder: Path, size: DemoSize) -> Recipe:
    """Builds the demo's recipe: full fine-tuning of all parts, three languages at once."""

    def held_out(split: str, language: str, **when: Any) -> dict[str, Any]:
        return {
            "annotations": data / f"{split}_{language}.json",
            "images": data,
            "prompt": openmoji.PROMPTS[language],
            "tokenize": TOKENIZE[language],
            "max_new_tokens": 24,
            "batch_size": 64,
            **when,
        }

    evals = {
        f"test-{lang}": held_out(
            "test",
            lang,
            before=True,
            # The page shows no METEOR, which would start Java twice.
            metrics="without-meteor",
            limit=size.eval_limit,
        )
        for lang in LANGUAGES
    }
    evals |= {
        f"validation-{lang}": held_out(
            # Exact match alone: METEOR starts Java, which may not be installed.
            "validation",
            lang,
            every=100,
            metrics="exact",
            limit=size.eval_limit or 100,
        )
        for lang in LANGUAGES
    }
    return recipes.resolve(
        {
            "model": {
                "id": str(start),
                "train": ["vision_tower", "multi_modal_projector", "language_model"],
            },
            "data": {
                "sources": [
                    {"name": "openmoji", "annotations": data / "train.jsonl", "images": data}
                ],
                # The images are drawn at the size of a tile, so one tile holds all of them.
                "tiles": {"size": PIXELS, "max": 1, "thumbnail": False},
                "max_tokens": 512,
                # Half a step's samples, one process's share, fit one row.
                "row_tokens": 2048,
                "workers": 1,
            },
            "optim": MUON | {"lr": 6e-3, "decay_ratio": 0.6},
            "evals": evals,
            "run": run_folder,
            "global_batch": 128,
            "epochs": size.epochs,
            "dtype": cpu_dtype(),
            "device": "cpu",
            "threads": 1,  # in each of the two ranks
            "compute": {"attention": "eager"},
        },
        name="the demo's recipe",
    )


def cpu_dtype() -> str:
    """Returns bfloat16 if the processor multiplies it natively, else float32."""
    # Emulated bfloat16 is slower than float32.
    native = torch.cpu.is_available() and torch.backends.mkldnn.is_available()
    fast = native and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


@torch.no_grad()
def compare_reloaded(recipe: Recipe, exported: Path, images: int = 12) -> Reloaded:
    """Compares the export, loaded with transformers' own classes, with the trained run.

    Raises:
        UserError: logits differ, or an answer does.
    """
    spec = recipe.evals["test-en"]
    assert isinstance(spec, CaptionEval), "the demo's recipe makes it one"
    tree = json.loads(spec.annotations.read_text(encoding="utf-8"))
    paths = [spec.images / row["file_name"] for row in tree["images"][:images]]
    chat = loading.load(recipe.run, device="cpu", dtype="float32").as_chat("the demo")
    model = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    # Not AutoImageProcessor: it takes the fast one, which needs torchvision.
    processor = GotOcr2ImageProcessorPil.from_pretrained(exported)
    tokens = "<IMG_CONTEXT>" * tokens_per_tile(model.config, PIXELS)
    worst, same = 0.0, 0
    for path in paths:
        messages = [{"role": "user", "content": f"<IMG_CONTEXT>\n{spec.prompt}"}]
        # The exported template, so that the comparison covers it.
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = text.replace("<IMG_CONTEXT>", f"<img>{tokens}</img>")
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with Image.open(path) as image:
            pixels = processor(images=[image.convert("RGB")], return_tensors="pt").pixel_values
        theirs = model(input_ids=ids, pixel_values=pixels).logits
        ours = chat.model(input_ids=ids, pixel_values=pixels).logits
        worst = max(worst, float((theirs - ours).abs().max()))
        produced = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=spec.max_new_tokens,
            do_sample=False,
        )
        answer = tokenizer.decode(produced[0, ids.shape[1] :], skip_special_tokens=True).strip()
        request = Request([{"role": "user", "content": spec.prompt}], [path])
        same += answer == chat.answer([request], max_new_tokens=spec.max_new_tokens)[0]
    # float32 on two implementations: sums in another order.
    if worst > 1e-3 or same != len(paths):
        raise UserError(
            f"{exported}: plain transformers gives other logits (by up to {worst:.1e}) or other "
            f"answers ({len(paths) - same} of {len(paths)}) than the model that was trained"
        )
    return Reloaded(len(paths), worst, same)


def _commands(folder: Path, recipe: Recipe, data: Path) -> list[str]:
    image = next(iter(sorted((data / "images").iterdir())))
    return [
        f"internvl chat {folder / 'model'} --image {image} --prompt '{openmoji.PROMPTS['en']}'",
        f"internvl check {folder / 'recipe.yaml'}",
        f"internvl train {folder / 'recipe.yaml'} run={folder / 'again'} optim.lr=1e-3",
        f"internvl export {recipe.run} --to {folder / 'official'} --format official",
        f"internvl evaluate {folder / 'retrieval' / 'model'} retrieval-folder "
        f"--annotations {data / 'test_en.json'} --clean",
        f"tensorboard --logdir {recipe.run / 'tensorboard'}",
    ]


def _served(folder: Path, port: int) -> report.Text:
    chat, search = serving.addresses(port)
    again = f"internvl demo --to {folder} --serve"
    again += f" --port {port}" if port != serving.PORT else ""
    return report.Text(
        title="Talk to it, search with it",
        paragraphs=[
            f"Talk to the chat model, with images: {chat}",
            f"Search all images by words or by an image: {search}",
            "Both pages are there while the first command runs (a finished demo trains nothing "
            "again), or while the other two do.",
        ],
        commands=[again, *serving.commands(folder, port)],
    )


def _names(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["conversations"][-1]["value"] for line in lines]
