"""What the benchmarks train: released shapes with random weights, and images and texts drawn to
the statistics of COCO captions and of an instruction-tuning mixture, written as JPEG and JSONL.

Nothing is downloaded. `coco_stats.json` counts the image sizes and caption lengths of COCO
val2017; 1.15 tokens stand for a word.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from internvl import zoo
from internvl.config import LoraConfig, TilesConfig
from internvl.data.templates import template
from internvl.data.tiles import choose_grid
from internvl.inference.chat import Chat
from internvl.models import configs
from internvl.models.adapters import lora
from internvl.models.chat import model as chat_model

STATS = Path(__file__).with_name("coco_stats.json")
WORDS = 4000
PROMPT = 32
"""Tokens of a caption sample that are neither image nor answer."""

DOCUMENTS = (
    (1240, 1754),
    (1700, 2200),
    (1654, 2339),
    (800, 600),
    (1920, 1080),
    (1024, 768),
    (850, 1100),
)
"""Sizes of pages and screens, (width, height) in px."""


@dataclass(frozen=True)
class Drawn:
    """One sample to be written: an image's size (or none), and tokens of question and answer."""

    size: tuple[int, int] | None
    question: int
    answer: int
    max_tiles: int = 6


def coco(seed: int) -> Iterator[Drawn]:
    """Caption samples: about 6.43 tiles and 13 supervised tokens on average."""
    stats = json.loads(STATS.read_text())
    rng = random.Random(seed)
    sizes, size_weights = [tuple(row[:2]) for row in stats["sizes"]], [r[2] for r in stats["sizes"]]
    words, word_weights = zip(*stats["caption_words"], strict=True)
    while True:
        size = rng.choices(sizes, size_weights)[0]
        answer = round(1.15 * rng.choices(words, word_weights)[0]) + 1
        yield Drawn(size, PROMPT, answer)


def mixture(seed: int, max_tokens: int = 4096) -> Iterator[Drawn]:
    """Instruction tuning, 200 to 4,096 tokens: 15 % text, 50 % photos, 25 % documents of up to 12
    tiles, 10 % photos with long conversations; 60 % of the text is supervised."""
    rng, photos = random.Random(seed), coco(seed + 1)
    while True:
        kind, photo = rng.random(), next(photos)
        if kind < 0.15:
            size, text = None, rng.lognormvariate(6.3, 0.7)
        elif kind < 0.65:
            size, text = photo.size, rng.lognormvariate(5.2, 0.6)
        elif kind < 0.90:
            size, text = rng.choice(DOCUMENTS), rng.lognormvariate(5.3, 0.7)
        else:
            size, text = photo.size, rng.lognormvariate(6.8, 0.4)
        most = 12 if size in DOCUMENTS else 6
        tokens = max(60 if size else 200, int(text))
        tokens = min(tokens, max_tokens - 256 * num_tiles(size, most))
        answer = max(1, int(0.6 * tokens))
        yield Drawn(size, max(1, tokens - answer), answer, most)


def num_tiles(size: tuple[int, int] | None, most: int) -> int:
    """Tiles of an image, the thumbnail included."""
    if size is None:
        return 0
    columns, rows = choose_grid(*size, min_tiles=1, max_tiles=most, tile_size=448)
    return columns * rows + (columns * rows > 1)


def write(
    folder: Path, samples: Sequence[Drawn], encoder: Any, *, captions: int = 1
) -> list[dict[str, Any]]:
    """Images and annotation files below `folder`; the recipe's `data.sources`.

    Args:
        captions: samples of each image, with the same question and answers of their own.
    """
    rng = random.Random(0)
    fixed = _fixed_tokens(encoder)
    lines: dict[int, list[str]] = {}
    made: dict[tuple[tuple[int, int], int], str] = {}
    for number, sample in enumerate(samples):
        question = some_words(rng, max(1, sample.question - fixed))
        for _ in range(captions):
            turns = [("human", question), ("gpt", some_words(rng, max(1, sample.answer - 1)))]
            line: dict[str, Any] = {}
            if sample.size is not None:
                # A handful of files of each size: decoding and resizing are the same work.
                key = (sample.size, number if captions > 1 else number % 4)
                if key not in made:
                    made[key] = f"{len(made):05d}.jpg"
                    picture(sample.size, len(made)).save(folder / made[key], quality=90)
                line["image"] = made[key]
                turns[0] = ("human", "<image>\n" + question)
            line["conversations"] = [{"from": who, "value": text} for who, text in turns]
            lines.setdefault(sample.max_tiles, []).append(json.dumps(line))
    sources = []
    for most, rows in lines.items():
        (folder / f"tiles{most}.jsonl").write_text("\n".join(rows) + "\n")
        source = {"name": f"tiles{most}", "annotations": str(folder / f"tiles{most}.jsonl")}
        sources.append(source | {"images": str(folder), "max_tiles": most})
    return sources


def some_words(rng: random.Random, tokens: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(tokens))


def _fixed_tokens(encoder: Any) -> int:
    """Tokens of a sample that are neither tile nor word of the question or answer, one end less."""
    from internvl.data.records import Message, Sample

    messages = (Message("user", "<image>\nw1"), Message("assistant", "w2"))
    example = encoder.encode(Sample("probe", messages, ("x",)), (1,))
    return len(example.input_ids) - encoder.tokens_per_tile - 3


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Soft shapes with some grain: a JPEG of about the size of a photo's."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-9, 10, soft.shape, dtype=np.int16)
    return Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))


def random_chat(
    name: str,
    device: torch.device,
    *,
    rank: int | None,
    dropout: float = 0.0,
    tiny: bool = False,
    head_width: int = 16,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Chat:
    """The released model `name` with random weights made on the device, and a tokenizer of words.

    Args:
        rank: of LoRA on the language model; None trains projector and language model themselves.
        dropout: of the adapters.
        tiny: two narrow layers of each part instead of the real sizes.
        head_width: of a tiny model's attention; the kernels of FlashAttention 4 take 64 and 128.
        prepare: what to do with the model before adapters go on it.
    """
    official = zoo.official_config(zoo.find(name))
    if tiny:
        official = _shrunk(official, head_width)
    tokenizer = _tokenizer(official["llm_config"]["vocab_size"])
    config = configs.from_official(official, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    with torch.device(device):
        model = chat_model.ChatModel._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    if prepare is not None:
        prepare(model)
    lora.select_trainable(model, () if rank else ("multi_modal_projector", "language_model"))
    if rank:
        lora.attach(model, LoraConfig(rank=rank, dropout=dropout))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zeros would run faster than trained factors
                torch.nn.init.normal_(parameter, std=0.01)
    size = config.vision_config.image_size[0]
    tiles = TilesConfig(size=size, max=6)
    chosen = template(official["template"])
    return Chat(model, tokenizer, chosen, tiles, None, Path(name))


def _shrunk(official: dict[str, Any], head_width: int) -> dict[str, Any]:
    width = 4 * head_width
    vision = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"intermediate_size": 2 * width, "image_size": 56}
    text = {"hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "intermediate_size": 2 * width, "vocab_size": 5000}
    return official | {
        "vision_config": official["vision_config"] | vision,
        "llm_config": official["llm_config"] | text,
        "force_image_size": 56,
    }


def _tokenizer(vocab_size: int, words: int = WORDS) -> PreTrainedTokenizerFast:
    """One token for each word `w0` … and for the marks of an image; anything else is unknown."""
    special = ("<unk>", "</s>", "<img>", "</img>", "<IMG_CONTEXT>")
    vocabulary = {token: vocab_size - len(special) + n for n, token in enumerate(special)}
    vocabulary |= {f"w{n}": n for n in range(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=list(special[2:]),
    )


def matmul_tflops(device: torch.device) -> float:
    """Rate of an 8192³ product of random bfloat16 matrices (256³ without a GPU)."""
    import time

    on_gpu = device.type == "cuda"
    side, repeats = (8192, 20) if on_gpu else (256, 3)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        a @ b
    wait()
    return 2 * side**3 * repeats / (time.perf_counter() - started) / 1e12
