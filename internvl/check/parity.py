"""The same samples through training, our inference, and an export in plain `transformers`.

What a model is trained on and what it is asked must be rendered alike, here and by whoever serves
it: a newline more, another tile or another rounding costs answers and shows nowhere. Each sample
goes through all paths; what differs is named.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import InternVLProcessor, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration

from internvl import export
from internvl.config import Recipe
from internvl.config.recipes import resolve
from internvl.data.chat import IMAGE_CONTEXT
from internvl.data.images import STATISTICS
from internvl.data.messages import IMAGE_MARK
from internvl.data.records import PackedBatch, Sample
from internvl.data.sampler import UnitRef
from internvl.data.sources import Source, open_sources
from internvl.errors import BadSample, UserError, counted
from internvl.files import write_lines
from internvl.inference import generate, requests
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.opened import open_model
from internvl.models import configs
from internvl.models.vision import normalize_tiles
from internvl.objectives.packed_loss import summed_loss
from internvl.objectives.sft import Sft

_PIXELS = 1e-4
"""Largest difference of a normalized pixel: rounding of the last bit of a float32."""
_LOGPROB = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of the first token's log-probability, by dtype of the weights."""
_OTHERS = ("vllm", "lmdeploy")


@dataclass(frozen=True)
class Rendering:
    """What one path makes of a sample."""

    input_ids: list[int]
    """Up to the first token of the answer."""
    pixels: Tensor | None
    """Normalized tiles, float32 (N, 3, S, S)."""
    logprob: float
    """Log-probability of the token that inference finds likeliest at the answer's start."""


@dataclass(frozen=True)
class Comparison:
    """A path beside inference, on one sample."""

    sample: str
    path: str
    differences: list[str]

    def render(self) -> str:
        """One line; indented below it what differs."""
        if not self.differences:
            return f"{self.sample}: {self.path}: the same"
        return "\n  ".join([f"{self.sample}: {self.path}:", *self.differences])


@dataclass(frozen=True)
class Parity:
    """All comparisons, and what could not be compared."""

    comparisons: list[Comparison]
    left_out: list[str]

    @property
    def num_different(self) -> int:
        return sum(bool(comparison.differences) for comparison in self.comparisons)

    def render(self) -> str:
        """Lines for the terminal, the verdict last."""
        lines = [comparison.render() for comparison in self.comparisons]
        # Said, for silence would be taken for agreement.
        lines += [f"not compared: {sentence}" for sentence in self.left_out]
        pairs = counted(len(self.comparisons), "comparison")
        verdict = f"{pairs}, {self.num_different or 'none'} of them different"
        return "\n".join([*lines, verdict])


def run(
    name: str | Path,
    *,
    annotations: Path | None = None,
    images: str | Path = ".",
    max_samples: int = 8,
    device: str | None = None,
) -> Parity:
    """Renders samples through every path and compares each with our inference.

    Args:
        name: a chat model: folder, hub id, adapter or run.
        annotations: a chat JSONL file as training reads it; None draws samples of its own.
        images: the folder that image paths of the file are relative to.
        max_samples: the first of the file.
        device: by default the GPU, if there is one.

    Raises:
        UserError: not a chat model, or a sample that training refuses.
    """
    opened = open_model(name)
    chat = loading.load(opened, device=device).as_chat("check --parity")
    # Paths are files on purpose: training and exports are checked as they read them.
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if annotations is None:
            annotations, images = _draw(folder), folder
        recipe = _recipe(name, chat, annotations, images, folder)
        (source,) = open_sources(recipe.data)
        count = min(len(source), max_samples)
        samples = [_sample(source, index) for index in range(count)]
        asked = [_by_inference(chat, sample) for sample in samples]
        paths: dict[str, Any] = {"training": _Training(chat, recipe, source)}
        left_out = [f"{other} is not installed" for other in _OTHERS if find_spec(other) is None]
        left_out += [f"{other}: not yet" for other in _OTHERS if find_spec(other) is not None]
        if configs.chat_settings(chat.model.config)["ps_version"] == "v1":
            left_out.append("plain transformers has no class for pixel shuffle v1")
        else:
            paths["plain transformers"] = _Exported(chat, folder / "hf")
        allowed = _LOGPROB[chat.model.dtype]
        comparisons = []
        for path, render in paths.items():
            for index, (sample, (ours, token)) in enumerate(zip(samples, asked, strict=True)):
                # A temporary folder says nothing to a reader.
                label = sample.name.removeprefix(f"{folder}/")
                try:
                    rendering = render(index, sample, token)
                except _NotComparable as error:
                    left_out.append(f"{label}: {path}: {error}")
                    continue
                differences = list(_differences(chat, ours, rendering, allowed))
                comparisons.append(Comparison(label, path, differences))
    return Parity(comparisons, left_out)


class _NotComparable(UserError):
    """A path cannot take a sample; the message says why."""


def _recipe(
    name: str | Path, chat: Chat, annotations: Path, images: str | Path, folder: Path
) -> Recipe:
    """Returns a recipe that trains on the samples as the model's own settings say."""
    # Limits that refuse nothing: a sample that is too long for a run can still be compared.
    most = chat.model.config.text_config.max_position_embeddings
    source = {"name": "parity", "annotations": str(annotations), "images": str(images)}
    recipe = resolve(
        {
            "model": {"id": str(name)},
            "data": {"sources": [source], "max_tokens": most, "max_tiles": 10_000},
            "run": str(folder / "run"),
            "global_batch": 1,
            "steps": 1,
        }
    )
    return loading.complete(recipe).recipe


def _sample(source: Source, index: int) -> Sample:
    """Returns a sample of the file.

    Raises:
        BadSample: training refuses it.
    """
    (sample,) = source.samples([index])
    if isinstance(sample, BadSample):
        raise sample
    return sample


def _question(sample: Sample) -> list[Any]:
    """Returns the turns of a sample up to its first answer."""
    # The first alone: at later answers training has seen the earlier ones, as inference has.
    roles = [message.role for message in sample.messages]
    return list(sample.messages[: roles.index("assistant")])


def _media(sample: Sample) -> tuple[int, int]:
    """Returns how many images and videos the turns of `_question` have."""
    text = "".join(message.content for message in _question(sample))
    return text.count(IMAGE_MARK), text.count("<video>")


def _by_inference(chat: Chat, sample: Sample) -> tuple[Rendering, int]:
    """Renders a sample as a request; returns the likeliest first token too."""
    num_images, num_videos = _media(sample)
    request = requests.Request(
        _question(sample), list(sample.images[:num_images]), list(sample.videos[:num_videos])
    )
    settings = configs.chat_settings(chat.model.config)
    image_settings = {key: settings[key] for key in ("exif", "normalize")}
    prompt = requests.encode(request, chat.encoder, chat.tiles, sample.name, **image_settings)
    pixels = None
    if prompt.tiles is not None:
        pixels = generate.normalized(prompt.tiles, STATISTICS[settings["normalize"]])
    logprobs = _logprobs(chat.model, torch.from_numpy(prompt.input_ids), pixels)
    token = int(logprobs.argmax())
    return Rendering(prompt.input_ids.tolist(), pixels, float(logprobs[token])), token


@torch.no_grad()
def _logprobs(model: Any, input_ids: Tensor, pixels: Tensor | None) -> Tensor:
    """Returns the log-probabilities of the next token, float32 (V,)."""
    output = model(
        input_ids=input_ids[None].to(model.device),
        pixel_values=None if pixels is None else pixels.to(model.device, model.dtype),
    )
    return output.logits[0, -1].float().log_softmax(-1)


class _Training:
    """A sample as a packed row of training."""

    def __init__(self, chat: Chat, recipe: Recipe, source: Source) -> None:
        self.chat = chat
        self.objective = Sft(recipe.objective, recipe.data, chat.encoder)  # type: ignore[arg-type]
        self.reader = self.objective.reader([source], recipe.seed)
        self.statistics = recipe.data.statistics

    def __call__(self, index: int, sample: Sample, token: int) -> Rendering:
        read = self.reader[UnitRef(0, (index,), 0)]
        for bad in read.bad:
            raise bad
        (row,) = self.objective.batches(read.units)
        # The token that predicts the first supervised one ends the prompt.
        first = int(row.loss_positions.min())
        pixels = row.pixel_values
        if pixels is not None:
            pixels = normalize_tiles(pixels, torch.float32, *STATISTICS[self.statistics])
        return Rendering(row.input_ids[0, : first + 1].tolist(), pixels, self._score(row, token))

    @torch.no_grad()
    def _score(self, row: PackedBatch, token: int) -> float:
        """Returns the log-probability of `token` at the first supervised position."""
        asked = replace(
            row,
            loss_positions=row.loss_positions.min()[None],
            targets=torch.tensor([token]),
            loss_weights=torch.ones(1),
        )
        loss = summed_loss(self.chat.model, asked.to(self.chat.device), self.statistics)
        return -float(loss)


class _Processor(InternVLProcessor):
    """transformers' processor, whose video part cannot be made without torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Returns the argument's class unchecked."""
        return type(argument)


class _Exported:
    """A sample through the exported folder, with `transformers`' classes alone."""

    def __init__(self, chat: Chat, folder: Path) -> None:
        # Not verified: that would compare logits, which is what this does.
        export.run(chat, folder, verify=False)
        self.model = InternVLForConditionalGeneration.from_pretrained(
            folder, dtype=chat.model.dtype, device_map={"": str(chat.device)}
        ).eval()
        settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        self.processor = _Processor(
            GotOcr2ImageProcessorPil.from_pretrained(folder),
            PreTrainedTokenizerFast.from_pretrained(folder),
            video_processor=None,
            image_seq_length=settings["image_seq_length"],
            chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        )

    def __call__(self, index: int, sample: Sample, token: int) -> Rendering:
        num_images, num_videos = _media(sample)
        if num_videos:
            raise _NotComparable("videos are not compared yet")
        # As a text, not in parts: a template puts a newline after an image that is a part.
        messages = [
            {"role": message.role, "content": message.content.replace(IMAGE_MARK, IMAGE_CONTEXT)}
            for message in _question(sample)
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [Image.open(_path(image)).convert("RGB") for image in sample.images[:num_images]]
        inputs = self.processor(images=images or None, text=[text], return_tensors="pt")
        ids, pixels = inputs["input_ids"][0], inputs.get("pixel_values")
        logprob = float(_logprobs(self.model, ids, pixels)[token])
        return Rendering(ids.tolist(), pixels, logprob)


def _path(image: Any) -> Path:
    if not isinstance(image, str | Path):
        raise _NotComparable("images inside an annotation file are not compared yet")
    return Path(image)


def _differences(chat: Chat, ours: Rendering, theirs: Rendering, allowed: float) -> Iterator[str]:
    """Yields what a path renders otherwise than inference."""
    if ours.input_ids != theirs.input_ids:
        yield _first_difference(chat, ours.input_ids, theirs.input_ids)
    # Shapes first: arrays of different shapes have no difference.
    shapes = [None if r.pixels is None else tuple(r.pixels.shape) for r in (ours, theirs)]
    if shapes[0] != shapes[1]:
        yield f"tiles {shapes[1] or 'none'}, of inference {shapes[0] or 'none'}"
    elif ours.pixels is not None and theirs.pixels is not None:
        largest = float((ours.pixels.cpu() - theirs.pixels.cpu()).abs().max())
        if largest > _PIXELS:
            yield f"pixels differ by up to {largest:.2g}"
    difference = abs(ours.logprob - theirs.logprob)
    if not difference <= allowed:  # also if it is no number
        yield f"log-probability of the first token {theirs.logprob:.4f}, not {ours.logprob:.4f}"


def _first_difference(chat: Chat, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Describes where two prompts part, in text."""
    pairs = enumerate(zip_longest(ours, theirs))
    start = next(index for index, (a, b) in pairs if a != b)
    texts = [
        chat.encoder.tokenizer.decode(ids[max(0, start - 4) : start + 8]) for ids in (theirs, ours)
    ]
    return (
        f"{counted(len(theirs), 'token')}, of inference {len(ours)}; they part at token {start}: "
        f"{texts[0]!r}, of inference {texts[1]!r}"
    )


def _draw(folder: Path) -> Path:
    """Writes a chat JSONL file of every shape of question, with drawn images; returns it."""
    sides = {"wide": (640, 360), "tall": (300, 500), "small": (120, 90)}
    rng = np.random.default_rng(0)
    for name, (width, height) in sides.items():
        # Soft shapes: noise would hide a resize of another kind behind its own.
        rough = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC).save(
            folder / f"{name}.png"
        )
    rows: list[tuple[list[str], list[tuple[str, str]]]] = [
        (["wide"], [("human", "<image>\nDescribe the image."), ("gpt", "A scene.")]),
        (["tall"], [("human", "Look: <image>\nWhat is it?"), ("gpt", "A scene.")]),
        (["small"], [("system", "Be brief."), ("human", "<image>\n这是什么？"), ("gpt", "图。")]),
        (
            ["wide", "tall"],
            [("human", "Image-1: <image>\nImage-2: <image>\nCompare."), ("gpt", "Alike.")],
        ),
        ([], [("human", "Hello, who are you?"), ("gpt", "A model.")]),
    ]
    lines = []
    for names, turns in rows:
        row: dict[str, Any] = {
            "conversations": [{"from": who, "value": value} for who, value in turns]
        }
        if names:
            files = [f"{name}.png" for name in names]
            row["image"] = files[0] if len(files) == 1 else files
        lines.append(json.dumps(row, ensure_ascii=False))
    write_lines(folder / "samples.jsonl", lines)
    return folder / "samples.jsonl"
