"""The folders of a data set while it is prepared: what is there, counted, or missing."""

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
    """A file or folder that is not there, or not whole."""

    path: Path
    """Where it belongs."""
    address: str
    """Where to fetch it from."""
    note: str = ""
    """What else there is to know, such as how many images lack."""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.path}{note}: from {self.address}"


class Tree:
    """What a preparation found under a root folder so far."""

    def __init__(self, root: Path, download: bool) -> None:
        self.root = root
        self.download = download
        self.counts: dict[str, int] = {}
        self.missing: list[Missing] = []

    def has_file(self, path: Path, address: str) -> bool:
        """Whether a file is there, now or after fetching it."""
        if not path.is_file() and self.download:
            fetch.fetch(address, path)
        if not path.is_file():
            self.missing.append(Missing(path, address))
        return path.is_file()

    def has_images(self, folder: Path, address: str, archives: Sequence[Path] = ()) -> bool:
        """Whether a folder holds something, now or after unpacking (or fetching) its archive.

        Args:
            archives: further archives that may hold a folder of this name.
        """
        if filled(folder):
            return True
        own = folder.parent / _file_name(address)
        if self.download and _fetchable(address) and not own.is_file():
            fetch.fetch(address, own)
        beside = [folder.with_name(folder.name + ending) for ending in fetch.ARCHIVES]
        for archive in filter(Path.is_file, [own, *beside, *archives]):
            if fetch.unpack(archive, folder, whole=archive not in archives):
                return True
        self.missing.append(Missing(folder, address))
        return False

    def expect(self, path: Path, address: str, **found: int) -> None:
        """Notes what a file holds. Raises DataError where that is not what was published."""
        for what, number in found.items():
            wanted = EXPECTED.get(path.name, {}).get(what, number)
            if number != wanted:
                raise DataError(
                    f"{path} holds {number:,} {what}, expected {wanted:,}: it was cut off or is "
                    f"another version; remove it and fetch it again from {address}"
                )
            self.counts[f"{path.name} {what}"] = number

    def check_images(self, folder: Path, names: Iterable[str], address: str) -> None:
        """Looks for every image; those that lack become one entry of `missing`."""
        wanted = set(names)
        lacking = []
        with Progress("images looked for", total=len(wanted)) as progress:
            for name in wanted:
                progress.update()
                if not os.path.exists(_inside(folder, name)):
                    lacking.append(name)
        self.counts["images"] = self.counts.get("images", 0) + len(wanted)
        if lacking:
            some = ", ".join(sorted(lacking)[:_NAMES_SHOWN])
            note = f"{len(lacking):,} of {len(wanted):,} images lack: {some}"
            note += ", …" if len(lacking) > _NAMES_SHOWN else ""
            self.missing.append(Missing(folder, address, note))


def filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _fetchable(address: str) -> bool:
    """Whether an address is a file that a program can fetch."""
    return address.startswith("http") and _file_name(address).endswith(fetch.ARCHIVES)


def _file_name(address: str) -> str:
    return address.rpartition("/")[2].replace("%20", " ").replace("%2B", "+")


def _inside(folder: Path, name: str) -> str:
    try:
        return join_inside(folder, name)
    except BadImage as error:
        raise DataError(str(error)) from None
