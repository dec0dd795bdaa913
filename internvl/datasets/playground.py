"""Prepares the `playground/` tree of InternVL-Chat-V1-2's SFT data: nine files, 23 folders."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.datasets import convert
from internvl.datasets import download as fetch
from internvl.datasets.checklist import Missing, Tree, filled
from internvl.errors import DataError
from internvl.files import complete_folder, write_lines
from internvl.log import Progress

# Empty for files whose paths name the data set's folder themselves.
SFT_FOLDERS: dict[str, str] = {
    "sharegpt4v_instruct_gpt4-vision_cap100k": "",
    "llava_instruct_150k_zh": "coco",
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k": "",
    "dvqa_train_200k": "dvqa",
    "chartqa_train_18k": "chartqa",
    "ai2d_train_12k": "ai2d",
    "docvqa_train_10k": "docvqa",
    "geoqa+": "geoqa+",
    "synthdog_en": "synthdog-en",
}
"""Annotation file -> the folder below `playground/data` that its images' paths start from."""

SYNTHDOG_PROMPT = "Read all the text in the image."
"""Prompt of conversations made from parquet; our choice, the official file has its own."""

_HUB = "https://huggingface.co/OpenGVLab/InternVL/resolve/main/"
_DRIVE = "Google Drive "

SFT_REPOSITORY = "OpenGVLab/InternVL-Chat-V1-2-SFT-Data"
"""The data set as one snapshot of the hub."""
SFT_ANNOTATIONS = _HUB + "playground.zip"

_CHARTQA = "https://huggingface.co/datasets/ahmed-masry/ChartQA/resolve/main/ChartQA%20Dataset.zip"
_DOCVQA = "https://datasets.cvc.uab.es/rrc/DocVQA/"
_VG = "https://cs.stanford.edu/people/rak248/VG_100K_2/"
_AI2D = _DRIVE + "1dqqa3MnrxMXaU_K9JA6C83je32ibwdOY"
_WEB = _DRIVE + "folder 1tCUQ-sq6vdshZVkF0ZeF3K4eztkXJgax (academic use)"
_OCR_VQA = "folder 1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_ (a download script; save every file as .jpg)"
_SYNTHDOG = _HUB + "synthdog-en-images.zip"
SFT_IMAGES: dict[str, str] = {
    "ai2d/abc_images": _AI2D,
    "ai2d/images": _AI2D,
    "chartqa/train": _CHARTQA,
    "chartqa/val": _CHARTQA,
    "chartqa/test": _CHARTQA,
    "coco/train2017": "http://images.cocodataset.org/zips/train2017.zip",
    "docvqa/train": _DOCVQA + "train.tar.gz",
    "docvqa/val": _DOCVQA + "val.tar.gz",
    "docvqa/test": _DOCVQA + "test.tar.gz",
    "dvqa/images": _DRIVE + "1iKH2lTi1-QxtNUVRxTUWFvUvRHq6HAsZ",
    "gqa/images": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
    "llava/llava_pretrain/images": (
        "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip"
    ),
    "ocr_vqa/images": _DRIVE + _OCR_VQA,
    "sam/images": _DRIVE + "1dKumdOKSXtV7lIXdrG7jsIK_z2vZv2gs (9K images of 000000-000050.tar)",
    "share_textvqa/images": _WEB,
    "synthdog-en/images": _SYNTHDOG,
    "textvqa/train_images": "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    "vg/VG_100K": _VG + "images.zip",
    "vg/VG_100K_2": _VG + "images2.zip",
    "web-celebrity/images": _WEB,
    "web-landmark/images": _WEB,
    "wikiart/images": _WEB,
    "geoqa+/images": _HUB + "geoqa%2B_images.zip",
}
"""Folder below `playground/data` -> where its images come from."""


def sft(tree: Tree) -> Iterator[Path]:
    """Checks the nine files and their images; writes the meta file of them all."""
    base = _playground(tree.root)
    annotations = base / "opensource"
    _annotations(base, tree.download)
    # Before the annotations, so that images of an absent folder are not looked for one by one.
    for folder, address in SFT_IMAGES.items():
        archive = base / "data" / f"{folder.partition('/')[0]}.zip"
        tree.has_images(base / "data" / folder, address, [archive])
    absent = {missing.path for missing in tree.missing}
    meta: dict[str, dict[str, Any]] = {}
    # Every file that is missing is listed, not only the first.
    for name, folder in SFT_FOLDERS.items():
        path = annotations / f"{name}.jsonl"
        if not path.is_file():
            tree.missing.append(Missing(path, SFT_ANNOTATIONS))
            continue
        images = base / "data" / folder
        num_samples = _check_file(tree, path, images, absent)
        meta[name] = {
            "root": f"{images}/",
            "annotation": str(path),
            # The keys of the original's meta files, which its own training reads as well.
            "data_augment": False,
            "repeat_time": 1,
            "length": num_samples,
        }
        yield path
    tree.counts["samples in all"] = sum(entry["length"] for entry in meta.values())
    # A meta file of some of them would train another mixture without a word.
    if len(meta) == len(SFT_FOLDERS):
        target = base / "internvl_1_2_finetune.json"
        write_lines(target, [json.dumps(meta, indent=2, ensure_ascii=False)])
        yield target


def _playground(root: Path) -> Path:
    """Returns the folder with `opensource/` and `data/`, of the tree or of a hub snapshot."""
    # A snapshot may be the root itself, or lie there under the repository's name.
    name = SFT_REPOSITORY.partition("/")[2]
    for base in (root / "playground", root, root / name, root / "playground" / name):
        if (base / "opensource").is_dir():
            return base
    return root / "playground"


def _annotations(base: Path, download: bool) -> None:
    """Unpacks missing annotation files; with `download`, fetches the hub's if there are none."""
    folder = base / "opensource"
    names = [f"{name}.jsonl" for name in SFT_FOLDERS]
    archives = [base / "playground.zip", folder / "playground.zip", base.parent / "playground.zip"]
    archive = next(filter(Path.is_file, archives), None)
    if all((folder / name).is_file() for name in names):
        return
    # Only if there is nothing yet: the snapshot holds the images too.
    if archive is None and download and not folder.is_dir():
        fetch.fetch_snapshot(SFT_REPOSITORY, base)
        return
    if archive is None and download:
        archive = fetch.fetch(SFT_ANNOTATIONS, archives[0])
    if archive is not None:
        fetch.unpack_files(archive, names, folder)


def _check_file(tree: Tree, path: Path, images: Path, absent: set[Path]) -> int:
    """Counts the samples of an annotation file and looks for their images.

    Args:
        absent: folders known to be missing, whose images are not looked for.
    """
    # A set: several conversations are about one image.
    names: set[str] = set()
    num_samples = 0
    with Progress(f"samples of {path.name}") as progress:
        for line_number, row in convert.read_jsonl(path):
            num_samples += 1
            progress.update()
            try:
                names.update(convert.images_of(row))
            except DataError as error:
                raise DataError(f"{path} line {line_number}: {error}") from None
    tree.expect(path, SFT_ANNOTATIONS, samples=num_samples)
    present = [name for name in names if not absent & set((images / name).parents)]
    tree.check_images(images, present, f"the addresses of its folders, or {SFT_REPOSITORY} (hub)")
    return num_samples


def synthdog(tree: Tree) -> Iterator[Path]:
    """Prepares SynthDoG-EN: images and conversations of its parquet files, or converted images."""
    folder = _playground(tree.root) / "data/synthdog-en"
    images, chat = folder / "images", folder / "synthdog_en_parquet.jsonl"
    # Parquet comes from the hub's data set, converted images from the zip of the release.
    files = convert.parquet_files(folder)
    if files and not filled(images):
        lines: list[str] = []
        with complete_folder(images, shared=True) as temporary, Progress("images") as progress:
            for row_index, row in enumerate(convert.parquet_rows(files)):
                try:
                    saved = convert.save_images(row, temporary, f"{row_index:07d}")
                    lines.append(_synthdog_line(row_index, saved))
                except DataError as error:
                    raise DataError(f"{folder}: {error}; fetch it again") from None
                progress.update()
        # After the images, so that no line names an image that is not there.
        write_lines(chat, lines)
    if tree.has_images(images, _SYNTHDOG):
        tree.counts["images"] = sum(1 for _ in images.iterdir())
    if chat.is_file():
        yield chat


def _synthdog_line(row_index: int, row: dict[str, Any]) -> str:
    try:
        text = json.loads(row["ground_truth"])["gt_parse"]["text_sequence"]
        image = row["image"]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"row {row_index} is not SynthDoG's: expected an image and `ground_truth` with "
            f"gt_parse.text_sequence, found columns {', '.join(row)}"
        ) from None
    return next(convert.chat_lines([(image, text)], SYNTHDOG_PROMPT))
