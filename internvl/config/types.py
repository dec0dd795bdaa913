"""Types and tables that several sections share."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
MOST_TILES = 1_000
"""Largest `max` of tiles per image: listing the grids of many more would take hours."""
TileCount = Annotated[int, Field(gt=0, le=MOST_TILES)]


Fraction = Annotated[float, Field(ge=0, le=1)]

Tower = Literal["vision_tower", "language_model"]
"""Parts that adapters can be attached to."""

Part = Literal[
    "vision_tower",
    "multi_modal_projector",
    "language_model",
    "queries",
    "heads",
    "text_projection",
    "image_pool",
    "query_pool",
    "itm_head",
    "logit_scale",
    "lm_head",
]
"""Chat models have the first three; InternVL-14B has all but the projector."""


def _from_home(path: Path) -> Path:
    """Replaces a leading `~` by the home folder, which a shell does in words, not in YAML."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home folder {path.parts[0]}; write the whole path") from None


def _text_from_home(path: str | Path) -> str | Path:
    # As it is otherwise: a Path would make one slash of the two in s3://bucket.
    return str(_from_home(Path(path))) if str(path).startswith("~") else path


UserPath = Annotated[Path, AfterValidator(_from_home)]
"""A path as a user writes it: `~` would make a folder of that name in the working folder."""
UserFolder = Annotated[str | Path, AfterValidator(_text_from_home)]
"""The same, or an address."""

# Forbid: pydantic would drop a misspelled key, and the run would train with the default.
# No .inf or .nan: they would be told as a loss that is not finite, and samples be blamed.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Triple = tuple[float, float, float]

STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Name -> mean and standard deviation per channel (R, G, B), of pixels from 0 to 1. Original:
`train/constants.py`."""
