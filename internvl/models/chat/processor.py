"""Image settings of an -hf folder, read from its processor files; used if config.json has no
`internvl` section.

transformers' own names are read as the official keys that `internvl` would have held. What its
processor does with a value is done here too, or the value is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from internvl.config.types import STATISTICS
from internvl.errors import ModelFolderError
from internvl.files import FolderReader
from internvl.models import config_checks, configs

_INSIDE = "image_processor"
"""The section of processor_config.json that transformers 5 writes in place of a file of its own."""

_COUNTS = {"min_patches": "min_dynamic_patch", "max_patches": "max_dynamic_patch"}
"""transformers' name -> the official key."""


@dataclass(frozen=True)
class ImageSettings:
    """Image settings that a processor file states."""

    file: str
    """Name of the processor file."""
    values: dict[str, Any]
    """Official key -> value, of the keys that the file holds."""


def read_images(reader: FolderReader) -> ImageSettings:
    """The image settings of an -hf folder, empty where it has no processor.

    `crop_to_patches` has no effect, as in transformers: InternVLProcessor always sets it, and the
    released folders hold false while their images become tiles.

    Raises:
        ModelFolderError: a damaged file, or a value that is wrong or not computed here.
    """
    file, section, values = _of_images(reader)
    # transformers writes null for what its class does not say.
    values = {key: value for key, value in values.items() if value is not None}
    config_checks.check_processor(file, section, values)
    settings = {official: values[key] for key, official in _COUNTS.items() if key in values}
    fewest, most = (
        (key, values.get(key, configs.HF_CHAT[official])) for key, official in _COUNTS.items()
    )
    config_checks.check_counts(file, section, fewest, most)
    if "size" in values:
        size = values["size"]  # transformers takes a number as well as {"height", "width"}
        settings["force_image_size"] = size["height"] if isinstance(size, dict) else size
    if "image_mean" in values or "image_std" in values:
        settings["normalize"] = _normalize(file, section, values)
    return ImageSettings(file.name, settings)


def _of_images(reader: FolderReader) -> tuple[Path, str, dict[str, Any]]:
    """(file, section, content): first processor_config.json's section, as in transformers."""
    whole, alone = "processor_config.json", "preprocessor_config.json"
    inside = reader.object(whole).get(_INSIDE)
    if inside is None:
        return reader.folder / alone, "", reader.object(alone)
    file = reader.folder / whole
    config_checks.check_section(file, _INSIDE, inside)
    return file, _INSIDE, inside


def _normalize(file: Path, section: str, values: Mapping[str, Any]) -> str:
    """Key of STATISTICS with the file's mean and deviation; ImageNet's replace a missing one."""
    usual = STATISTICS["imagenet"]
    stated = (values.get("image_mean", usual[0]), values.get("image_std", usual[1]))
    # One number is for every channel.
    triples = [list(v) if isinstance(v, list | tuple) else [v] * 3 for v in stated]
    for name, statistics in STATISTICS.items():
        if all(_equal(a, b) for a, b in zip(triples, statistics, strict=True)):
            return name
    prefix = f"{section}." if section else ""
    raise ModelFolderError(
        f"{file}: {prefix}image_mean {triples[0]} and {prefix}image_std {triples[1]} are "
        f"none of {', '.join(STATISTICS)}, which are all that is computed here; set them to those "
        "that the model was trained with"
    )


def _equal(first: list[float], second: tuple[float, ...]) -> bool:
    # Files may hold the constants rounded to float32.
    return all(isclose(a, b, abs_tol=1e-5) for a, b in zip(first, second, strict=True))
