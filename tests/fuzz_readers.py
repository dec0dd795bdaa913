"""What a fuzz test damages: a small good input of every reader, and how each is read.

A reader returns the problems that it lists (bad samples of a source, say); what it raises is the
rest. `inner` names functions below it: an error planted in any of them must be seen.
"""

import functools
import io
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import chat_folders
import dual_folders
import numpy as np
import torch
import yaml
from data_files import chat_line, model_folder, picture, write_lines
from PIL import Image

from internvl import evals, export, log
from internvl.config import (
    DataConfig,
    LossEval,
    SourceConfig,
    TilesConfig,
    VideoConfig,
    eval_config,
)
from internvl.config.recipes import load_recipe
from internvl.data.chat import ChatEncoder
from internvl.data.pair_reader import PairReader
from internvl.data.pairs import CaptionEncoder
from internvl.data.sampler import SampleOrder, UnitRef
from internvl.data.sources import open_source, source_configs
from internvl.data.templates import template
from internvl.data.tokenizers import load_tokenizer
from internvl.datasets import checklist, convert, prepare
from internvl.datasets import download as fetch
from internvl.inference import dual, generate
from internvl.inference import load as loading
from internvl.models.adapters import lora
from internvl.objectives.sft import Sft
from internvl.training import checkpoint, early_stopping, length, run_folder

Problems = Sequence[Exception]
TILES = TilesConfig(size=28, max=2)


@dataclass(frozen=True)
class Reader:
    """One way into the package for bytes that somebody else wrote."""

    name: str
    seed: Callable[[Path], object]
    """Writes a small good input into a folder."""
    read: Callable[[Path], Problems]
    """Reads it: raises, or returns the problems that it lists."""
    inner: tuple[str, ...]
    """Dotted names below it; `NAME:KEY` is an entry of a table."""
    cost: int = 1
    """About how many times as long as the cheapest it takes: it gets as many fewer inputs."""
    damaged: str = "*"
    """Which files of the input are damaged."""
    extra: tuple[str, ...] = ()
    """Files below the shared test data (globs) that stand in for a damaged one."""


# Training data


@functools.cache
def chat_encoder() -> ChatEncoder:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-tokenizer-"))
    chat_folders.add_tokenizer(folder, "qwen2")
    tokenizer = load_tokenizer(folder)
    shutil.rmtree(folder)
    return ChatEncoder(tokenizer, template("internvl2_5"), 1)


@functools.cache
def caption_encoder() -> CaptionEncoder:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-tokenizer-"))
    dual_folders.small_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    shutil.rmtree(folder)
    assert tokenizer is not None
    return CaptionEncoder(tokenizer)


def read_chats(configs: Sequence[SourceConfig]) -> Problems:
    """As a run does: opened, ordered, decoded, encoded and packed; all bad samples."""
    data = DataConfig(
        sources=tuple(configs),
        tiles=TILES,
        max_tiles=8,
        max_tokens=512,
        video=VideoConfig(min_frames=2, max_frames=2),
    )
    objective = Sft(mock.Mock(loss_normalization="global", weighting="token"), data, chat_encoder())
    files = [open_source(config) for config in configs]
    SampleOrder(files, share_prefix=True, seed=0)
    reader = objective.reader(files, 0)
    bad: list[Exception] = []
    for number, file in enumerate(files):
        reads = [reader[UnitRef(number, (line,), 0, line)] for line in range(len(file))]
        bad += [one for read in reads for one in read.bad]
        units = [unit for read in reads for unit in read.units]
        if units:
            objective.batches(units)
    return bad


def read_training_pairs(configs: Sequence[SourceConfig]) -> Problems:
    files = [open_source(config) for config in configs]
    reader = PairReader(files, caption_encoder(), 28, seed=0, written=True)
    reads = [
        reader[UnitRef(n, (line,), 0, line)]
        for n, file in enumerate(files)
        for line in range(len(file))
    ]
    return [one for read in reads for one in read.bad]


def source(folder: Path, file: str, kind: str, **keys: Any) -> SourceConfig:
    return SourceConfig(
        name="data", type=kind, annotations=folder / file, images=str(folder), **keys
    )


def chats(file: str, kind: str = "chat", **keys: Any) -> Callable[[Path], Problems]:
    return lambda folder: read_chats([source(folder, file, kind, **keys)])


def training_pairs(file: str, kind: str = "pairs") -> Callable[[Path], Problems]:
    return lambda folder: read_training_pairs([source(folder, file, kind)])


def two_images(folder: Path) -> None:
    picture(folder / "a.png", (40, 30))
    picture(folder / "b.jpg", (30, 40), quality=80)


def seed_chat(folder: Path) -> None:
    two_images(folder)
    rows = [
        chat_line("<image>\nWhat is it?", "A gradient.", "Sure?", "Yes.", id=1, image="a.png"),
        chat_line("One <image> two <image>", "Two.", image=["a.png", "b.jpg"], width=[40, 30]),
        chat_line("No image", "Text alone, 中文 🙂.", id="x"),
    ]
    write_lines(folder / "train.jsonl", rows)


def seed_openai(folder: Path) -> None:
    two_images(folder)
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    plain = [{"role": "user", "content": "<image> Q"}, {"role": "assistant", "content": "A"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}]},
        {"messages": [{"role": "system", "content": "S"}, *plain], "images": ["b.jpg"]},
    ]
    write_lines(folder / "train.jsonl", rows)


def seed_chat_pairs(folder: Path) -> None:
    two_images(folder)
    rows = [chat_line("<image>\nQ", f"Text {name}", image=name) for name in ("a.png", "b.jpg")]
    write_lines(folder / "train.jsonl", rows)


def seed_preference(folder: Path) -> None:
    two_images(folder)
    row = {"question": "<image>\nQ", "chosen": "good", "rejected": "bad", "image": "a.png"}
    write_lines(folder / "train.jsonl", [row, row | {"chosen": "better"}])


def coco_tree() -> dict[str, Any]:
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.jpg"}]
    texts = ((1, "a red gradient"), (1, "red to gray"), (2, "a tall gradient"))
    rows = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(texts)]
    return {"images": images, "annotations": rows}


def write_text(folder: Path, name: str, text: str) -> None:
    two_images(folder)
    (folder / name).write_text(text, encoding="utf-8")


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: write_text(folder, name, content)


seed_coco = text("captions.json", json.dumps(coco_tree()))
seed_csv = text("captions.csv", "image,caption\na.png,red, then gray\nb.jpg,a tall one\n")
seed_pair_csv = text("pairs.csv", 'image,caption\na.png,"red, then gray"\nb.jpg,a tall one\n')
seed_token = text("pairs.token", "a.png#0\tred to gray\na.png#1\tred\nb.jpg#0\ta tall one\n")
seed_jsonl = text(
    "pairs.jsonl",
    '{"image": "a.png", "caption": "red to gray"}\n'
    '{"image": "b.jpg", "captions": ["tall", "a tall one"]}\n',
)
KARPATHY = {
    "images": [
        {"filename": "a.png", "split": "test", "sentences": [{"raw": "red to gray"}]},
        {"filename": "b.jpg", "split": "test", "sentences": [{"raw": "tall"}, {"raw": "high"}]},
        {"filename": "a.png", "split": "train", "sentences": [{"raw": "red to gray"}]},
        {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "a tall one"}]},
    ],
    "dataset": "small",
}
seed_karpathy = text("karpathy.json", json.dumps(KARPATHY))
seed_lavis = text(
    "lavis.json",
    json.dumps([{"image": "a.png", "caption": ["red"]}, {"image": "b.jpg", "caption": "tall"}]),
)


def seed_flickr(folder: Path) -> None:
    picture(folder / "a.jpg", (40, 30))
    picture(folder / "b.jpg", (30, 40))
    lines = "image,caption\na.jpg,red, then gray\na.jpg,red\nb.jpg,a tall one\n"
    (folder / "flickr.txt").write_text(lines, encoding="utf-8")


def seed_xtd(folder: Path) -> None:
    two_images(folder)
    (folder / "test_image_names.txt").write_text("a.png\nb.jpg\n", encoding="utf-8")
    (folder / "test_1kcaptions_en.txt").write_text("red to gray\na tall one\n", encoding="utf-8")


def seed_folder(folder: Path) -> None:
    two_images(folder / "pairs")
    (folder / "pairs" / "a.txt").write_text("red to gray\nred\n", encoding="utf-8")
    (folder / "pairs" / "b.txt").write_text("a tall one\n", encoding="utf-8")


def encoded_image(size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def seed_chat_tar(folder: Path) -> None:
    row = json.dumps(chat_line("<image>\nQ", "A")).encode()
    members = {"0.png": encoded_image(), "0.json": row, "1.png": encoded_image((30, 30))}
    write_tar(folder / "shards" / "000.tar", members | {"1.json": row})


def seed_pair_tar(folder: Path) -> None:
    members = {"0.png": encoded_image(), "0.txt": b"red to gray\n", "1.png": encoded_image((9, 9))}
    write_tar(folder / "shards" / "000.tar", members | {"1.json": b'{"caption": "a tall one"}'})


def table() -> Any:
    import pyarrow

    turns = chat_line("<image>\nQ", "A")["conversations"]
    images = [{"bytes": encoded_image(), "path": None}, {"bytes": encoded_image((9, 9))}]
    return pyarrow.table({"conversations": [turns, turns], "image": images, "id": [0, 1]})


def seed_parquet(folder: Path) -> None:
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(), folder / "rows.parquet")


def seed_arrow(folder: Path) -> None:
    import pyarrow

    rows = table()
    for name, kind in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        file = folder / name / "rows.arrow"
        file.parent.mkdir(parents=True)
        with pyarrow.OSFile(str(file), "wb") as sink, kind(sink, rows.schema) as writer:
            writer.write_table(rows)


def seed_meta(folder: Path) -> None:
    seed_chat(folder)
    entry = {"root": ".", "annotation": "train.jsonl", "data_augment": False, "repeat_time": 1}
    entry |= {"length": 3, "max_dynamic_patch": 2}
    (folder / "meta.json").write_text(json.dumps({"chat": entry, "again": {**entry, "length": 3}}))


def read_meta(folder: Path) -> Problems:
    """Its relative paths are from the working directory; here they are put below the input."""
    configs = source_configs(DataConfig(meta=folder / "meta.json"))
    placed = [
        replace(c, annotations=folder / c.annotations, images=str(folder / str(c.images)))
        for c in configs
    ]
    return read_chats(placed)


# Images and videos

IMAGE_FORMS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpg": {"quality": 80},
    "webp": {},
    "gif": {},
    "bmp": {},
    "tiff": {},
    "avif": {},
    "ico": {},
    "tga": {},
    "dds": {},
    "sgi": {},
    "pcx": {},
    "ppm": {},
    "jp2": {},
}


@functools.cache
def image_forms() -> tuple[str, ...]:
    """Those that Pillow can write here."""
    Image.init()
    known = {
        ending.removeprefix(".") for ending, kind in Image.EXTENSION.items() if kind in Image.SAVE
    }
    return tuple(form for form in IMAGE_FORMS if form in known)


def seed_images(folder: Path) -> None:
    for form in image_forms():
        picture(folder / f"i.{form}", (24, 16), **IMAGE_FORMS[form])
    Image.linear_gradient("L").resize((20, 10)).convert("I;16").save(folder / "gray16.png")
    Image.linear_gradient("L").resize((20, 10)).convert("P").save(folder / "palette.png")


def one_by_one(folder: Path, read: Callable[[Path], object]) -> Problems:
    """Problems of every file; what else is raised goes on."""
    problems: list[Exception] = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            read(file)
        except ValueError as error:
            if not user_facing(error):
                raise
            problems.append(error)
    return problems


def user_facing(error: BaseException) -> bool:
    from internvl.errors import BadImage, UserError

    return isinstance(error, UserError | BadImage)


def only_damaged(folder: Path) -> list[Path]:
    """The file of a case that is no link into the seed; all of an undamaged input."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [p for p in files if not p.is_symlink()] or files


def read_images(folder: Path) -> Problems:
    """As an annotation line names them."""
    lines = [
        chat_line("<image>\nQ", "A", image=str(file.relative_to(folder)))
        for file in only_damaged(folder)
    ]
    write_lines(folder / "train.jsonl", lines)
    return read_chats([source(folder, "train.jsonl", "chat")])


def read_request(folder: Path) -> Problems:
    """As a person names them in a chat."""
    return one_by_one_of(
        only_damaged(folder),
        lambda file: generate.encode(
            generate.Request([{"role": "user", "content": "Q"}], [str(file)]),
            chat_encoder(),
            TILES,
        ),
    )


def one_by_one_of(files: Sequence[Path], read: Callable[[Path], object]) -> Problems:
    problems: list[Exception] = []
    for file in files:
        try:
            read(file)
        except ValueError as error:
            if not user_facing(error):
                raise
            problems.append(error)
    return problems


def read_embedded(folder: Path) -> Problems:
    """As InternVL-14B reads them."""
    return one_by_one_of(
        only_damaged(folder),
        lambda file: [*dual._prefetch_pixels([str(file)], 1, 28, False)],
    )


def seed_videos(folder: Path) -> None:
    import av

    folder.mkdir(parents=True, exist_ok=True)
    for name, codec in (("v.mp4", "mpeg4"), ("v.mkv", "mpeg4"), ("v.avi", "mjpeg")):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=5)
            stream.width, stream.height = 32, 32
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for number in range(6):
                gray = np.full((32, 32, 3), 30 * number, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(gray)))
            container.mux(stream.encode())
    frames = [Image.new("RGB", (16, 16), (40 * n, 0, 0)) for n in range(4)]
    frames[0].save(folder / "v.gif", save_all=True, append_images=frames[1:], duration=200)


def seed_frames(folder: Path) -> None:
    for number in range(3):
        picture(folder / "frames" / f"frame_{number}.jpg", (24, 16))


def read_videos(folder: Path) -> Problems:
    lines = [
        chat_line("<video>\nQ", "A", video=str(file.relative_to(folder)))
        for file in only_damaged(folder)
    ]
    write_lines(folder / "train.jsonl", lines)
    return read_chats([source(folder, "train.jsonl", "chat")])


def read_frame_folder(folder: Path) -> Problems:
    write_lines(folder / "train.jsonl", [chat_line("<video>\nQ", "A", video="frames/")])
    return read_chats([source(folder, "train.jsonl", "chat")])


# Evaluations


def evaluation(kind: str, file: str, **keys: Any) -> Callable[[Path], Problems]:
    def read(folder: Path) -> Problems:
        names = {"classes", "templates", "train", "image_list"}
        given = {k: folder / v if k in names else v for k, v in keys.items()}
        annotations = folder / file
        if kind != "classify":
            given.setdefault("images", annotations if annotations.is_dir() else folder)
        if kind == "retrieval":
            given["recall_k"] = (1,)
        config = eval_config(type=kind, annotations=annotations, **given)
        evaluator = evals.EVALS[kind](config)
        evaluator.images()
        evaluator.counts()
        return []

    return read


def read_loss(folder: Path) -> Problems:
    config = LossEval(annotations=folder / "train.jsonl", images=str(folder))
    evaluator = evals.EVALS["loss"](config)
    data = DataConfig(tiles=TILES, max_tokens=512, max_tiles=8)
    read = evaluator._reader(data, chat_encoder())  # type: ignore[attr-defined]
    chunks = evaluator.chunks()  # type: ignore[attr-defined]
    return [bad for chunk in chunks for bad in read(chunk).bad]


def seed_classes(folder: Path) -> None:
    picture(folder / "sets" / "cat" / "a.png", (12, 12))
    picture(folder / "sets" / "dog" / "b.jpg", (12, 12))
    classes = {"pets": ["a cat", "a dog"]}
    (folder / "classes.json").write_text(json.dumps(classes))
    (folder / "templates.json").write_text(json.dumps({"pets": ["a photo of {c}", "{c}"]}))


def seed_leaks(folder: Path) -> None:
    seed_coco(folder)
    picture(folder / "c.png", (20, 20))
    (folder / "train.csv").write_text("image,caption\nc.png,another\n", encoding="utf-8")


def seed_published(folder: Path) -> None:
    """A list of images beside references, as COCO's Karpathy test set has."""
    seed_coco(folder)
    picture(folder / "x_1.png", (20, 20))
    picture(folder / "x_2.png", (20, 20))
    rows = [{"image": "x_1.png"}, {"image": "x_2.png"}]
    (folder / "images.json").write_text(json.dumps(rows))


# Recipes


def recipe_tree(folder: Path) -> dict[str, Any]:
    return {
        "model": {"id": "start", "train": ["multi_modal_projector"], "lora": {"rank": 4}},
        "data": {
            "sources": [{"name": "a", "annotations": "a.jsonl", "images": ".", "repeat": 1.5}],
            "tiles": {"size": 64, "max": 1, "thumbnail": False},
            "video": {"min_frames": 2, "max_frames": 4},
            "workers": 0,
        },
        "objective": {"name": "sft", "weights": {"sft": 1.0}},
        "optim": {"lr": 1e-3, "betas": [0.9, 0.98]},
        "checkpoint": {"every": 5, "keep": 2, "best": "val/loss"},
        "guard": {"action": "stop"},
        "evals": {"val": {"type": "loss", "annotations": "val.jsonl", "images": ".", "every": 5}},
        "run": "run",
        "global_batch": 8,
        "steps": 12,
    }


def seed_recipe(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(folder), sort_keys=False))


def seed_overrides(folder: Path) -> None:
    seed_recipe(folder)
    lines = ("optim.lr=1e-5", "data.sources.0.images=/x", "model.lora=null", "evals.val.every=3")
    (folder / "overrides.txt").write_text("\n".join(lines) + "\n")


def read_recipe(folder: Path) -> Problems:
    load_recipe(folder / "recipe.yaml")
    return []


def read_overrides(folder: Path) -> Problems:
    file = folder / "overrides.txt"
    lines = file.read_bytes()[:4096].decode("utf-8", "surrogateescape") if file.is_file() else ""
    load_recipe(folder / "recipe.yaml", lines.splitlines())
    return []


# Model folders


def describe(folder: Path) -> Problems:
    loading.describe(folder / "model")
    return []


def load_model(folder: Path) -> Problems:
    loading.load(folder / "model", device="cpu")
    return []


def load_model_file(folder: Path) -> Problems:
    loading.load(folder / "model" / "internvl_c.pth", device="cpu")
    return []


def load_adapter(folder: Path) -> Problems:
    loading.load(folder / "adapter", device="cpu")
    return []


def read_tokenizer(folder: Path) -> Problems:
    tokenizer = load_tokenizer(folder / "model")
    if tokenizer is not None:
        tokenizer("One <image> two, 中文")
    return []


def seed_official(folder: Path) -> None:
    model_folder(folder / "model")


def seed_shards(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = model_folder(folder / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002": names[::2], "model-00002-of-00002": names[1::2]}
    where = {name: f"{part}.safetensors" for part, held in parts.items() for name in held}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, model / f"{part}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def seed_hf(folder: Path) -> None:
    official = model_folder(folder / "official")
    export.run(official, folder / "model", "hf")
    shutil.rmtree(official)


def seed_dual(folder: Path) -> None:
    dual_folders.small_tokenizer(dual_folders.dual_folder(folder / "model"))


def seed_pth(folder: Path) -> None:
    dual_folders.pth_file(folder / "model")


def seed_adapter(folder: Path) -> None:
    from internvl.config import LoraConfig

    model = loading.load(model_folder(folder / "model"), device="cpu").model
    lora.attach(model, LoraConfig(rank=2))
    settings = {"template": "internvl2_5", "force_image_size": 56, "use_thumbnail": True}
    lora.save_adapter(model, folder / "adapter", folder / "model", settings=settings)


def seed_sentencepiece(folder: Path) -> None:
    (folder / "model").mkdir(parents=True)
    chat_folders.add_tokenizer(folder / "model", "internlm2")


def seed_tokenizer(folder: Path) -> None:
    (folder / "model").mkdir(parents=True)
    chat_folders.add_tokenizer(folder / "model", "qwen2")


def seed_vocabulary(folder: Path) -> None:
    seed_tokenizer(folder)
    (folder / "model" / "tokenizer.json").unlink()


# Conversion and preparation


def conversion(kind: str, file: str) -> Callable[[Path], Problems]:
    def read(folder: Path) -> Problems:
        with tempfile.TemporaryDirectory(prefix="fuzz-out-") as out:
            convert.run(kind, folder / file, Path(out) / "made")
        return []

    return read


def seed_boxes(folder: Path) -> None:
    turns = "Where is <box>[[10, 20, 300, 400]]</box>?", "At [0.1, 0.2, 0.3, 0.4]."
    write_lines(folder / "boxes.jsonl", [chat_line(*turns, id=n) for n in range(2)])


def preparation(name: str) -> Callable[[Path], Problems]:
    def read(folder: Path) -> Problems:
        refuse = mock.Mock(side_effect=AssertionError("the network was used"))
        with (
            mock.patch.object(checklist, "EXPECTED", {}),
            mock.patch.object(fetch, "fetch", refuse),
            mock.patch.object(fetch, "fetch_snapshot", refuse),
        ):
            prepare.run(name, folder)
        return []

    return read


def seed_flickr30k(folder: Path) -> None:
    base = folder / "data/flickr30k"
    picture(base / "Images" / "1.jpg", (9, 9))
    for name in ("train", "val", "test"):
        text_ = "image,caption\n1.jpg,a thing\n"
        (base / f"flickr30k_{name}_karpathy.txt").write_text(text_, encoding="utf-8")
    captions = {
        "images": [{"id": 1, "image": "1.jpg"}],
        "annotations": [{"image_id": 1, "id": 1, "caption": "a thing"}],
    }
    (base / "flickr30k_test_karpathy.json").write_text(json.dumps(captions))


def seed_flickr30k_cn(folder: Path) -> None:
    base = folder / "data/flickr30k"
    picture(base / "Images" / "1.jpg", (9, 9))
    for name in ("train", "test"):
        text_ = "image,caption\n1.jpg,一个东西\n"
        (base / f"flickr30k_cn_{name}.txt").write_text(text_, encoding="utf-8")


def zipped(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def seed_nocaps(folder: Path) -> None:
    base = folder / "data/nocaps"
    zipped(base / "images.zip", {"images/1.jpg": encoded_image()})
    captions = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "id": 1, "caption": "a thing"}],
    }
    (base / "nocaps_val_4500_captions.json").write_text(json.dumps(captions))


def seed_coco_caption(folder: Path) -> None:
    base = folder / "data/coco"
    picture(base / "train2014" / "COCO_train2014_000000000009.jpg", (9, 9))
    picture(base / "val2014" / "COCO_val2014_000000000042.jpg", (9, 9))
    line = json.dumps(
        chat_line("<image>\nQ", "A", image="train2014/COCO_train2014_000000000009.jpg")
    )
    notes = base / "annotations"
    zipped(
        notes / "coco_karpathy_train_567k.zip",
        {"coco_karpathy_train_567k.jsonl": line.encode() + b"\n"},
    )
    rows = [{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["a"]}]
    (notes / "coco_karpathy_test.json").write_text(json.dumps(rows))
    references = {
        "images": [{"id": 42}],
        "annotations": [{"image_id": 42, "caption": "a thing", "id": 1}],
    }
    (notes / "coco_karpathy_test_gt.json").write_text(json.dumps(references))


def seed_synthdog(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    base = folder / "playground/data/synthdog-en"
    base.mkdir(parents=True)
    truth = json.dumps({"gt_parse": {"text_sequence": "some words"}})
    images = [{"bytes": encoded_image(), "path": "0.png"}]
    rows = pyarrow.table({"image": images, "ground_truth": [truth]})
    parquet.write_table(rows, base / "train.parquet")


def read_sft(folder: Path) -> Problems:
    """One annotation file of the nine; the others and their folders of images lack."""
    from internvl.datasets import playground

    here = checklist.Tree(folder, download=False)
    with mock.patch.object(checklist, "EXPECTED", {}):
        list(playground.sft(here))
    return []


def seed_sft(folder: Path) -> None:
    base = folder / "playground"
    write_lines(
        base / "opensource" / "ai2d_train_12k.jsonl",
        [chat_line("<image>\nQ", "A", image="1.png", id=n) for n in range(2)],
    )
    picture(base / "data" / "ai2d" / "1.png", (9, 9))


# Run folders


def small_training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def seed_run(folder: Path) -> None:
    run = folder / "run"
    model, optimizer = small_training()
    guard = {"losses": [1.0], "norms": [1.0], "num_skipped": 0}
    state = {"num_bad": 0, "guard": guard}
    checkpoint.save(run / "checkpoints", 5, model, optimizer, state, keep=2)
    rows = log.StepLog(run, "metrics.jsonl")
    for step in (1, 2):
        rows.append({"step": step, "loss": 0.5, "lr": float("nan")})
    (run / "evals").mkdir()
    for step in (0, 5):
        values = {"val/loss": 1.5, "val/exact": 0.25}
        (run / "evals" / f"{step:06d}.json").write_text(json.dumps(values))
    (run / "endings.json").write_text(json.dumps({"endings": [{"step": 3, "samples": 20}]}))
    tree_ = recipe_tree(folder) | {"run": str(run)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree_, sort_keys=False))


def read_run(folder: Path) -> Problems:
    """What a run reads when it goes on."""
    from internvl.training.spikes import Guard

    run = folder / "run"
    given = seed_copy("run") / "run" / "recipe.yaml"
    recipe = replace(load_recipe(given), run=run)
    with run_folder.owned(recipe):
        length.finished(run)
        length.endings(run)
        model, optimizer = small_training()
        for step in checkpoint.steps(run / "checkpoints"):
            state = checkpoint.load(run / "checkpoints", step, model, optimizer)
            checkpoint.whole_number(state, "num_bad")
            Guard(recipe.guard).restore(state.get("guard"))
        rows = log.StepLog(run, "metrics.jsonl")
        rows.truncate_after(1)
        found = early_stopping.history(run / "evals", 5)
        early_stopping.judge(recipe, found, 5)
        evals.measured(run / "evals", 5)
    return []


_SEEDS: dict[str, Path] = {}


def seed_copy(name: str) -> Path:
    """The undamaged input of a reader, made once in a process."""
    if name not in _SEEDS:
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        READERS[name].seed(folder)
        _SEEDS[name] = folder
    return _SEEDS[name]


def remove_seeds() -> None:
    """Removes what `seed_copy` made."""
    while _SEEDS:
        shutil.rmtree(_SEEDS.popitem()[1], ignore_errors=True)


_SOURCES = "internvl.data.sources"
_FORMATS = "internvl.data.formats"
_PAIRS = "internvl.data.pair_files"
_CAPTIONS = "internvl.data.captions"
_HUB = "internvl.models.hub"
_TENSORS = "internvl.models.tensors"
_READ_IMAGE = "internvl.data.images._to_rgb"
_ROW = f"{_SOURCES}.parse_row"

_TABLE = (
    Reader(
        "chat",
        seed_chat,
        chats("train.jsonl"),
        (f"{_FORMATS}.chat", _ROW, "internvl.data.chat.ChatEncoder.encode"),
        extra=("cases/*/train*.json*", "data/broken/chat_bad_lines.jsonl"),
    ),
    Reader("chat-messages", seed_openai, chats("train.jsonl"), (f"{_FORMATS}.from_openai",)),
    Reader(
        "chat-pairs", seed_chat_pairs, training_pairs("train.jsonl", "chat"), (f"{_FORMATS}.chat",)
    ),
    Reader(
        "preference",
        seed_preference,
        chats("train.jsonl", "preference"),
        (f"{_FORMATS}.preference",),
    ),
    Reader(
        "source-coco",
        seed_coco,
        chats("captions.json", "coco-captions", prompt="Q"),
        (f"{_FORMATS}.caption", f"{_SOURCES}.convert_once"),
        extra=("cases/*/*.json",),
    ),
    Reader(
        "source-captions",
        seed_csv,
        chats("captions.csv", "captions", prompt="Q"),
        (f"{_CAPTIONS}.read",),
        extra=("data/broken/captions*.txt",),
    ),
    Reader(
        "source-parquet",
        seed_parquet,
        chats("rows.parquet", "parquet"),
        (f"{_FORMATS}.table_row", "internvl.data.tables._as_arrow"),
        cost=3,
    ),
    Reader(
        "source-arrow-stream",
        seed_arrow,
        chats("stream", "parquet"),
        ("internvl.data.tables._map",),
        damaged="stream/*",
        cost=2,
    ),
    Reader(
        "source-arrow-file",
        seed_arrow,
        chats("file", "parquet"),
        ("internvl.data.tables._map",),
        damaged="file/*",
        cost=2,
    ),
    Reader(
        "source-tar",
        seed_chat_tar,
        chats("shards", "webdataset"),
        ("internvl.data.tars._add_member", f"{_FORMATS}.shard_row"),
    ),
    Reader(
        "source-tar-pairs",
        seed_pair_tar,
        training_pairs("shards"),
        ("internvl.data.tars._add_member",),
    ),
    Reader(
        "source-jsonl-pairs",
        seed_jsonl,
        training_pairs("pairs.jsonl"),
        (f"{_CAPTIONS}.read_json_lines",),
        extra=("cases/*/pairs.jsonl",),
    ),
    Reader(
        "source-csv-pairs",
        seed_pair_csv,
        training_pairs("pairs.csv"),
        (f"{_CAPTIONS}.lines.read_csv",),
        extra=("data/broken/captions*.txt",),
    ),
    Reader(
        "source-token",
        seed_token,
        training_pairs("pairs.token"),
        (f"{_CAPTIONS}.read_lines",),
        extra=("data/broken/captions*.txt",),
    ),
    Reader(
        "source-flickr",
        seed_flickr,
        training_pairs("flickr.txt", "flickr_format"),
        (f"{_CAPTIONS}.FORMS:flickr",),
    ),
    Reader(
        "source-karpathy",
        seed_karpathy,
        training_pairs("karpathy.json", "coco_format"),
        (f"{_CAPTIONS}.FORMS:karpathy",),
        extra=("cases/*/*.json",),
    ),
    Reader(
        "source-coco-pairs",
        seed_coco,
        training_pairs("captions.json"),
        (f"{_CAPTIONS}.read_coco",),
        extra=("cases/*/*.json",),
    ),
    Reader(
        "meta",
        seed_meta,
        read_meta,
        (f"{_SOURCES}._meta_problems", f"{_SOURCES}._from_meta"),
        damaged="*.json*",
        extra=("cases/*/meta.json",),
    ),
    Reader(
        "images",
        seed_images,
        read_images,
        (_READ_IMAGE, "internvl.data.loader.read_rgb"),
        extra=(
            "data/broken/*.*g*",
            "data/broken/no_extension",
            "cases/damaged-avif/*.*",
            "data/broken/*.webp",
        ),
    ),
    Reader(
        "request-images",
        seed_images,
        read_request,
        (_READ_IMAGE,),
        extra=("data/broken/*.*g*", "cases/damaged-avif/*.*"),
    ),
    Reader(
        "embedded-images",
        seed_images,
        read_embedded,
        (_READ_IMAGE,),
        extra=("data/broken/*.*g*", "cases/damaged-avif/*.*"),
    ),
    Reader(
        "videos",
        seed_videos,
        read_videos,
        ("internvl.data.video._decoded_frames", "internvl.data.loader.read_frames"),
        cost=3,
        extra=("cases/*/*.mp4",),
    ),
    Reader(
        "frame-folder",
        seed_frames,
        read_frame_folder,
        ("internvl.data.video._folder_frames", "internvl.data.loader.read_frames"),
    ),
    Reader(
        "eval-caption",
        seed_coco,
        evaluation("caption", "captions.json"),
        ("internvl.data.captions.read",),
        extra=("cases/*/*.json",),
    ),
    Reader(
        "eval-published",
        seed_published,
        evaluation("caption", "captions.json", image_list="images.json"),
        ("internvl.data.captions.read",),
        damaged="*.json",
    ),
    Reader(
        "eval-loss",
        seed_chat,
        read_loss,
        (f"{_FORMATS}.chat", _ROW),
        extra=("cases/*/train*.json*", "data/broken/chat_bad_lines.jsonl"),
    ),
    Reader(
        "eval-classify",
        seed_classes,
        evaluation(
            "classify", "sets", classes="classes.json", templates="templates.json", key="pets"
        ),
        ("internvl.evals.classify.Classify._entry",),
    ),
    *(
        Reader(
            f"eval-{form}",
            seed,
            evaluation("retrieval", file, form=form),
            (f"{_CAPTIONS}.FORMS:{form}", f"{_PAIRS}._pairs_of"),
            extra=extra,
        )
        for form, seed, file, extra in (
            ("flickr", seed_flickr, "flickr.txt", ()),
            ("token", seed_token, "pairs.token", ("data/broken/captions*.txt",)),
            ("coco", seed_coco, "captions.json", ("cases/*/*.json",)),
            ("karpathy", seed_karpathy, "karpathy.json", ("cases/*/*.json",)),
            ("xtd", seed_xtd, "test_1kcaptions_en.txt", ()),
            ("csv", seed_pair_csv, "pairs.csv", ()),
            ("jsonl", seed_jsonl, "pairs.jsonl", ("cases/*/pairs.jsonl",)),
            ("folder", seed_folder, "pairs", ()),
            ("webdataset", seed_pair_tar, "shards", ()),
        )
    ),
    Reader(
        "eval-lavis",
        seed_lavis,
        evaluation("retrieval", "lavis.json"),
        (f"{_CAPTIONS}.json_entries.read_entries", f"{_CAPTIONS}.form_of"),
    ),
    Reader(
        "eval-leaks",
        seed_leaks,
        evaluation("retrieval", "captions.json", train="train.csv"),
        (f"{_CAPTIONS}.split_any", "internvl.evals.retrieval.leaks"),
    ),
    Reader(
        "recipe",
        seed_recipe,
        read_recipe,
        (
            "internvl.config.recipes.resolve",
            "internvl.config.recipes._contradictions",
            "internvl.config.recipes._start_problems",
        ),
    ),
    Reader(
        "overrides",
        seed_overrides,
        read_overrides,
        ("internvl.config.recipes._apply_overrides",),
        damaged="overrides.txt",
    ),
    Reader(
        "model-description",
        seed_official,
        describe,
        (f"{_HUB}.read_json", "internvl.inference.families.tiling"),
        damaged="model/*.json",
        cost=2,
    ),
    Reader(
        "model-official",
        seed_official,
        load_model,
        (f"{_TENSORS}.open_tensors", f"{_HUB}.weight_files"),
        damaged="model/[cm]*.*[js]*",
        cost=8,
    ),
    Reader(
        "model-shards",
        seed_shards,
        load_model,
        (f"{_HUB}.weight_files",),
        damaged="model/model*",
        cost=8,
    ),
    Reader(
        "model-hf",
        seed_hf,
        load_model,
        (f"{_TENSORS}.open_tensors",),
        damaged="model/[cmp]*.*[js]*",
        cost=8,
    ),
    Reader("model-dual", seed_dual, load_model, (f"{_TENSORS}.open_tensors",), cost=8),
    Reader(
        "model-pth",
        seed_pth,
        load_model_file,
        (f"{_TENSORS}.load_pickled",),
        damaged="model/*.pth",
        cost=8,
    ),
    Reader(
        "adapter",
        seed_adapter,
        load_adapter,
        ("internvl.models.adapters.folder.base_of", "internvl.models.adapters.layers._fill"),
        damaged="adapter/*",
        cost=10,
    ),
    Reader(
        "tokenizer-json",
        seed_tokenizer,
        read_tokenizer,
        ("internvl.data.tokenizers.check_files",),
        cost=2,
    ),
    Reader(
        "tokenizer-vocabulary",
        seed_vocabulary,
        read_tokenizer,
        ("internvl.data.tokenizers.check_files",),
        cost=2,
    ),
    Reader(
        "tokenizer-sentencepiece",
        seed_sentencepiece,
        read_tokenizer,
        ("internvl.data.tokenizers._load_sentencepiece", "internvl.data.tokenizers._added_tokens"),
        cost=4,
    ),
    Reader(
        "convert-boxes-to-1000",
        seed_boxes,
        conversion("boxes-to-1000", "boxes.jsonl"),
        ("internvl.datasets.convert.read_jsonl", "internvl.datasets.convert._turns"),
    ),
    Reader(
        "convert-boxes-to-unit",
        seed_boxes,
        conversion("boxes-to-unit", "boxes.jsonl"),
        ("internvl.datasets.convert.read_jsonl",),
    ),
    Reader(
        "convert-coco",
        seed_coco,
        conversion("captions", "captions.json"),
        ("internvl.datasets.convert.read_captions",),
        damaged="*.json",
        extra=("cases/*/*.json",),
    ),
    Reader(
        "convert-flickr",
        seed_flickr,
        conversion("captions", "flickr.txt"),
        ("internvl.datasets.convert.read_captions",),
        damaged="*.txt",
        extra=("data/broken/captions*.txt",),
    ),
    Reader(
        "convert-parquet",
        seed_parquet,
        conversion("parquet", "rows.parquet"),
        ("internvl.datasets.convert.parquet_rows", "internvl.datasets.convert.save_images"),
        cost=2,
    ),
    Reader(
        "prepare-flickr30k",
        seed_flickr30k,
        preparation("flickr30k"),
        ("internvl.datasets.convert.read_flickr", "internvl.datasets.convert.read_coco"),
    ),
    Reader(
        "prepare-flickr30k-cn",
        seed_flickr30k_cn,
        preparation("flickr30k-cn"),
        ("internvl.datasets.convert.read_flickr",),
    ),
    Reader(
        "prepare-nocaps",
        seed_nocaps,
        preparation("nocaps"),
        ("internvl.datasets.download._extract", "internvl.datasets.convert.read_coco"),
    ),
    Reader(
        "prepare-coco",
        seed_coco_caption,
        preparation("coco-caption"),
        ("internvl.datasets.download._extract", "internvl.datasets.prepare._images"),
    ),
    Reader(
        "prepare-synthdog",
        seed_synthdog,
        preparation("synthdog"),
        ("internvl.datasets.playground._synthdog_line",),
        cost=2,
    ),
    Reader("prepare-sft", seed_sft, read_sft, ("internvl.datasets.playground._check_file",)),
    Reader(
        "run",
        seed_run,
        read_run,
        (
            "internvl.training.checkpoint.load",
            "internvl.log.StepLog._parse",
            "internvl.training.early_stopping.history",
            "internvl.config.recipes.changes",
        ),
        cost=2,
    ),
)
READERS: dict[str, Reader] = {reader.name: reader for reader in _TABLE}
"""By name, as `python tests/fuzz.py READER SEED` takes it."""
