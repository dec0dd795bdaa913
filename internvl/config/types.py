"""Types and tables that several sections share."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

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

# Forbid: pydantic would drop a misspelled key, and the run would train with the default.
STRICT = ConfigDict(extra="forbid")

Triple = tuple[float, float, float]

STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Name -> mean and standard deviation per channel (R, G, B), of pixels from 0 to 1. Original:
`train/constants.py`."""
