"""Prepares published data sets: downloads in `data/` and `playground/` to annotation files.

    prepared = prepare.run("coco-caption", Path("."))
    for missing in prepared.missing: ...    # path and URL of a file to fetch

Counts are checked against the published ones, and every image is looked for. Nothing is fetched
unless `download` is set; files of a previous call are overwritten.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl.data import captions
from internvl.data.json_rows import read_json
from internvl.datasets import convert, labelled, mmpr, playground, tasks
from internvl.datasets import download as fetch
from internvl.datasets.checklist import Missing, Tree
from internvl.datasets.published import COCO, FLICKR, KARPATHY, NOCAPS, NOCAPS_IMAGES, OPENGVLAB
from internvl.errors import ConfigError, DataError, UserError
from internvl.files import write_lines

NAMES: dict[str, str] = {
    "coco-caption": "COCO captions, Karpathy split: 566,747 to train on, 5,000 images to test",
    "flickr30k": "Flickr30K captions, Karpathy split: train, validation, test",
    "flickr30k-cn": "Flickr30K-CN, the same images with Chinese captions: train, test",
    "mmpr": "MMPR v1.2, v1.1 or v1.0: preference pairs for objective mpo",
    "nocaps": "NoCaps validation, 4,500 images with new objects, to test",
    "sft-v1.2": "InternVL-Chat-V1-2 SFT: nine annotation files, 1,267,819 conversations",
    "synthdog": "SynthDoG-EN parquet to images and conversations",
}
"""Data set -> its description."""

CHINESE_PROMPT = "请用一句话描述这张图片。"
"""Our choice: the originals have no Chinese prompt for captions."""


@dataclass(frozen=True)
class Prepared:
    """Result of `run`."""

    name: str
    files: tuple[Path, ...]
    """Annotation files that are ready."""
    counts: dict[str, int]
    """Counts of the files, such as {"coco_karpathy_test.json images": 5000}."""
    missing: tuple[Missing, ...]
    """Missing files and folders."""

    @property
    def ready(self) -> bool:
        """True if nothing is missing."""
        return not self.missing


def run(name: str, root: Path, *, download: bool = False) -> Prepared:
    """Prepares the data set `name`.

    Args:
        name: one of NAMES, or that of a benchmark or labelled set.
        root: folder that holds `data/` and `playground/`, usually the working directory; for
            sft-v1.2 the hub's snapshot (with `opensource/` and `data/`) will do as well.
        download: fetch files whose URL a program can fetch.

    Raises:
        UserError: no such data set; DataError, which is one: a file is not in its form or does
            not hold the published number of samples, or a download failed.
    """
    is_benchmark = name in tasks.tasks()
    entry = None if is_benchmark or name in _STEPS else labelled.find(name)
    if name not in _STEPS and not is_benchmark and entry is None:
        near = difflib.get_close_matches(name, [*NAMES, *labelled.entries(), *tasks.tasks()], n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(NAMES)}"
        raise UserError(
            f"there is no data set {name!r} to prepare; {hint}, or a benchmark of "
            "`internvl evaluate --help`"
        )
    tree = Tree(root, download)
    # Exhausted before the counts are read: the generator fills `tree` while it runs.
    if entry is not None:
        files = tuple(_labelled(tree, entry))
    else:
        files = tuple(_benchmark(tree, name) if is_benchmark else _STEPS[name](tree))
    return Prepared(name, files, tree.counts, tuple(tree.missing))


def _coco_caption(tree: Tree) -> Iterator[Path]:
    folder = tree.root / "data/coco"
    # A list, not a generator: both folders are looked up, so that both are reported if missing.
    there = [tree.has_images(folder / n, f"{COCO}{n}.zip") for n in ("train2014", "val2014")]
    listed: set[str] = set()
    train = folder / "annotations/coco_karpathy_train_567k.jsonl"
    if _coco_train(tree, train):
        lines = [_images(train, line_number, row) for line_number, row in convert.read_jsonl(train)]
        tree.expect(train, f"{OPENGVLAB}coco_karpathy_train_567k.zip", captions=len(lines))
        listed.update(image for images in lines for image in images)
        yield train
    # Train and test share their two image folders, so all images are looked for at once below.
    test = _coco_test(tree, folder / "annotations")
    if test:
        listed.update(image for image, _ in convert.read_coco(test))
        yield test
    # An absent folder is reported as one, not as thousands of images.
    if all(there):
        tree.check_images(folder, listed, f"{COCO}{{train2014,val2014}}.zip")


def _coco_train(tree: Tree, train: Path) -> bool:
    """True if the official file exists, after unpacking or converting Karpathy's list."""
    archive, karpathy = train.with_suffix(".zip"), train.with_name("coco_karpathy_train.json")
    if train.is_file():
        return True
    if not archive.is_file() and karpathy.is_file():
        pairs = convert.read_captions(karpathy, "karpathy")
        tree.expect(karpathy, "the address it came from", captions=len(pairs))
        write_lines(train, convert.chat_lines(pairs))
        return True
    if not tree.has_file(archive, f"{OPENGVLAB}{archive.name}"):
        return False
    # The zip may hold the file below a folder.
    fetch.unpack_files(archive, [train.name], train.parent)
    if not train.is_file():
        raise DataError(f"{archive} holds no {train.name}; remove it and fetch it again")
    return True


def _coco_test(tree: Tree, folder: Path) -> Path | None:
    """Merges the test images with their references into one file for evaluations."""
    # Two files: the list names the images, the references have captions by id only.
    listed, references = folder / "coco_karpathy_test.json", folder / "coco_karpathy_test_gt.json"
    there = [tree.has_file(path, f"{OPENGVLAB}{path.name}") for path in (listed, references)]
    if not all(there):
        return None
    merged = captions.read_whole(references, "coco", images=listed)
    tree.expect(listed, f"{OPENGVLAB}{listed.name}", images=len(merged.images))
    tree.expect(references, f"{OPENGVLAB}{references.name}", captions=len(merged.texts))
    target = folder / "coco_karpathy_test_captions.json"
    rows = [{"id": image.id, "file_name": image.name} for image in merged.images]
    ids = {image.id for image in merged.images}
    # The rows as they are published, with their ids.
    annotations = [r for r in read_json(references)["annotations"] if r["image_id"] in ids]
    write_lines(target, [convert.to_json({"images": rows, "annotations": annotations})])
    return target


def _images(path: Path, line_number: int, row: dict[str, Any]) -> list[str]:
    try:
        return convert.images_of(row)
    except DataError as error:
        raise DataError(f"{path} line {line_number}: {error}") from None


def _flickr30k(tree: Tree) -> Iterator[Path]:
    folder = tree.root / "data/flickr30k"
    train = _flickr(tree, "flickr30k_train_karpathy.txt", KARPATHY)
    val = _flickr(tree, "flickr30k_val_karpathy.txt", KARPATHY)
    # Not read here: retrieval evaluates on this text, captioning on the JSON below.
    tree.has_file(folder / "flickr30k_test_karpathy.txt", f"{KARPATHY}flickr30k_test_karpathy.txt")
    test = folder / "flickr30k_test_karpathy.json"
    if train:
        yield _as_chat(folder / "flickr30k_train_karpathy.jsonl", train, convert.CAPTION_PROMPT)
    if val:
        yield _as_coco(folder / "flickr30k_val_karpathy_captions.json", val)
    references: list[convert.Caption] = []
    if tree.has_file(test, f"{OPENGVLAB}{test.name}"):
        references = _below("Images", convert.read_coco(test))
        tree.expect(test, f"{OPENGVLAB}{test.name}", **_counts(references))
        yield _as_coco(folder / "flickr30k_test_karpathy_captions.json", references)
    _flickr_images(tree, [*train, *val, *references])


def _flickr30k_cn(tree: Tree) -> Iterator[Path]:
    folder = tree.root / "data/flickr30k"
    train = _flickr(tree, "flickr30k_cn_train.txt", OPENGVLAB)
    test = _flickr(tree, "flickr30k_cn_test.txt", OPENGVLAB)
    if train:
        yield _as_chat(folder / "flickr30k_cn_train.jsonl", train, CHINESE_PROMPT)
    if test:
        yield _as_coco(folder / "flickr30k_cn_test_captions.json", test)
    _flickr_images(tree, [*train, *test])


def _flickr(tree: Tree, name: str, address: str) -> list[convert.Caption]:
    """Reads the captions of a Flickr text, image paths from data/flickr30k; none if missing."""
    path = tree.root / "data/flickr30k" / name
    if not tree.has_file(path, address + name):
        return []
    pairs = _below("Images", convert.read_flickr(path))
    tree.expect(path, address + name, **_counts(pairs))
    return pairs


def _flickr_images(tree: Tree, captions: Sequence[convert.Caption]) -> None:
    folder = tree.root / "data/flickr30k"
    # `Images`, as in the archive that the authors send on request.
    if tree.has_images(folder / "Images", FLICKR):
        tree.check_images(folder, (image for image, _ in captions), FLICKR)


def _nocaps(tree: Tree) -> Iterator[Path]:
    folder = tree.root / "data/nocaps"
    annotations = folder / "nocaps_val_4500_captions.json"
    address = NOCAPS_IMAGES
    there = tree.has_images(folder / "images", address)
    if not tree.has_file(annotations, NOCAPS):
        return
    pairs = _below("images", convert.read_coco(annotations))
    tree.expect(annotations, NOCAPS, **_counts(pairs))
    yield _as_coco(folder / "nocaps_val_captions.json", pairs)
    if there:
        tree.check_images(folder, (image for image, _ in pairs), address)


def _below(folder: str, captions: Iterable[convert.Caption]) -> list[convert.Caption]:
    """Replaces the folder of all image paths by `folder`."""
    # Some files name images with a folder of their own, others without one.
    return [(f"{folder}/{Path(image).name}", caption) for image, caption in captions]


def _counts(captions: Sequence[convert.Caption]) -> dict[str, int]:
    return {"images": len({image for image, _ in captions}), "captions": len(captions)}


def _as_chat(target: Path, captions: Iterable[convert.Caption], prompt: str) -> Path:
    write_lines(target, convert.chat_lines(captions, prompt))
    return target


def _as_coco(target: Path, captions: Iterable[convert.Caption]) -> Path:
    write_lines(target, [convert.to_json(convert.coco_form(captions))])
    return target


_STEPS: dict[str, Callable[[Tree], Iterator[Path]]] = {
    "coco-caption": _coco_caption,
    "flickr30k": _flickr30k,
    "flickr30k-cn": _flickr30k_cn,
    "mmpr": mmpr.prepare,
    "nocaps": _nocaps,
    "sft-v1.2": playground.sft,
    "synthdog": playground.synthdog,
}


def _benchmark(tree: Tree, name: str) -> Iterator[Path]:
    """Fetches or lists the files of a key's data sets; yields those that exist."""
    entries = {
        dataset.name: dataset
        for key in tasks.tasks()[name].keys or (name,)
        if key in tasks.tasks()
        for dataset in tasks.tasks()[key].sets.values()
    }
    for entry in entries.values():
        places = tasks.Places(tree.root / "data", entry)
        for role, file in entry.files.items():
            path = places.file(role)
            if path.exists() or _fetched(tree, path, file.address):
                yield path
        for folder in entry.folders:
            tree.has_images(places.path(folder.path), folder.address)


def _labelled(tree: Tree, entry: labelled.Entry) -> Iterator[Path]:
    """Counts the test images of a labelled set; fetches its shards if it is not there."""
    data = tree.root / "data"
    folder = labelled.folder_of(entry, data)
    try:
        rows = labelled.read(entry, folder)
    except ConfigError as error:
        if not tree.download:
            tree.missing.append(Missing(folder, entry.address, str(error).partition(": from ")[0]))
            tree.missing.append(Missing(data / f"wds_{entry.name}", entry.shards, "or as shards"))
            return
        fetch.fetch_snapshot(f"clip-benchmark/wds_{entry.name}", data / f"wds_{entry.name}")
        rows = labelled.read(entry, labelled.folder_of(entry, data))
    tree.counts[f"{entry.name} images"] = len(rows.images)
    tree.counts[f"{entry.name} classes"] = len(rows.classes)
    yield labelled.folder_of(entry, data)


def _fetched(tree: Tree, path: Path, address: str) -> bool:
    """True if a missing file was fetched; lists it otherwise."""
    # Other addresses are pages, folders of a hub, or forms to fill in.
    fetchable = address.startswith("http") and " " not in address and path.suffix
    if tree.download and fetchable and address.endswith(fetch.ARCHIVES):
        archive = path.parent / address.rpartition("/")[2]
        if not archive.is_file():
            fetch.fetch(address, archive)
        fetch.unpack_files(archive, [path.name], path.parent)
    elif fetchable and Path(address).suffix == path.suffix:
        return tree.has_file(path, address)
    if not path.exists():
        tree.missing.append(Missing(path, address))
    return path.exists()
