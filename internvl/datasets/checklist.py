"""Checks the files and folders of a data set while it is prepared: present, counted, missing."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl.data.images import join_inside
from internvl.datasets import download as fetch
from internvl.errors import BadImage, DataError
from internvl.log import Progress

EXPECTED: dict[str, dict[str, int]] = {
    "coco_karpathy_train_567k.jsonl": {"captions": 566_747},
    "coco_karpathy_train.json": {"captions": 566_747},
    "coco_karpathy_test.json": {"images": 5_000},
    "coco_karpathy_test_gt.json": {"captions": 25_010},
    "flickr30k_train_karpathy.txt": {"captions": 145_000},
    "flickr30k_val_karpathy.txt": {"captions": 5_070},
    "flickr30k_test_karpathy.json": {"images": 1_000, "captions": 5_000},
    "flickr30k_cn_test.txt": {"images": 1_000, "captions": 5_000},
    "nocaps_val_4500_captions.json": {"images": 4_500, "captions": 45_000},
    "sharegpt4v_instruct_gpt4-vision_cap100k.jsonl": {"samples": 102_025},
    "llava_instruct_150k_zh.jsonl": {"samples": 157_712},
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.jsonl": {"samples": 665_058},
    "dvqa_train_200k.jsonl": {"samples": 200_000},
    "chartqa_train_18k.jsonl": {"samples": 18_317},
    "ai2d_train_12k.jsonl": {"samples": 12_413},
    "docvqa_train_10k.jsonl": {"samples": 10_211},
    "geoqa+.jsonl": {"samples": 72_318},
    "synthdog_en.jsonl": {"samples": 29_765},
}
"""File name -> what it must hold, as published."""


_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Missing:
    """A file or folder that is missing or incomplete."""

    path: Path
    """Its path once it is fetched."""
    address: str
    """URL to fetch it from."""
    note: str = ""
    """Details, such as how many images are missing."""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.path}{note}: from {self.address}"


class Tree:
    """Counts and missing files of a data set below a root folder, while it is prepared."""

    def __init__(self, root: Path, download: bool) -> None:
        self.root = root
        self.download = download
        self.counts: dict[str, int] = {}
        self.missing: list[Missing] = []

    def has_file(self, path: Path, address: str) -> bool:
        """True if a file exists, after fetching it if `download` is set."""
        if not path.is_file() and self.download:
            fetch.fetch(address, path)
        if not path.is_file():
            self.missing.append(Missing(path, address))
        return path.is_file()

    def has_images(self, folder: Path, address: str, archives: Sequence[Path] = ()) -> bool:
        """True if a folder is not empty, after unpacking (or fetching) its archive if needed.

        Args:
            archives: further archives that may hold a folder of this name.
        """
        if filled(folder):
            return True
        downloaded = folder.parent / _file_name(address)
        if self.download and _fetchable(address) and not downloaded.is_file():
            fetch.fetch(address, downloaded)
        # Archives that were fetched by hand are often called like their folder.
        same_name = [folder.with_name(folder.name + ending) for ending in fetch.ARCHIVES]
        for archive in filter(Path.is_file, [downloaded, *same_name, *archives]):
            # `archives` hold several folders each, so they are never taken whole.
            if fetch.unpack(archive, folder, whole=archive not in archives):
                return True
        self.missing.append(Missing(folder, address))
        return False

    def expect(self, path: Path, address: str, **counts: int) -> None:
        """Records the counts of a file. Raises DataError if they are not as published."""
        for noun, count in counts.items():
            # A file without published counts is only recorded.
            expected = EXPECTED.get(path.name, {}).get(noun, count)
            if count != expected:
                raise DataError(
                    f"{path} holds {count:,} {noun}, expected {expected:,}: it was cut off or is "
                    f"another version; remove it and fetch it again from {address}"
                )
            self.counts[f"{path.name} {noun}"] = count

    def check_images(self, folder: Path, names: Iterable[str], address: str) -> None:
        """Looks for every image; the absent ones become one entry of `missing`."""
        distinct = set(names)
        absent = []
        with Progress("images looked for", total=len(distinct)) as progress:
            for name in distinct:
                progress.update()
                # Not `Path.exists`: slower, and there are half a million of them.
                if not os.path.exists(_inside(folder, name)):
                    absent.append(name)
        self.counts["images"] = self.counts.get("images", 0) + len(distinct)
        if absent:
            # Sorted: the order of a set differs from run to run.
            some = ", ".join(sorted(absent)[:_NAMES_SHOWN])
            note = f"{len(absent):,} of {len(distinct):,} images are missing: {some}"
            note += ", …" if len(absent) > _NAMES_SHOWN else ""
            self.missing.append(Missing(folder, address, note))


def filled(folder: Path) -> bool:
    """True for a folder that is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def _fetchable(address: str) -> bool:
    """True if a program can fetch this address as a file."""
    # Others are pages, Google Drive ids, or forms to fill in.
    return address.startswith("http") and _file_name(address).endswith(fetch.ARCHIVES)


def _file_name(address: str) -> str:
    return address.rpartition("/")[2].replace("%20", " ").replace("%2B", "+")


def _inside(folder: Path, name: str) -> str:
    try:
        return join_inside(folder, name)
    except BadImage as error:
        raise DataError(str(error)) from None
