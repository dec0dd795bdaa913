"""Types and tables that several sections share."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
MOST_TILES = 1_000
"""Of an image: with many more, only to list the grids would take hours."""
TileCount = Annotated[int, Field(gt=0, le=MOST_TILES)]


Fraction = Annotated[float, Field(ge=0, le=1)]


Tower = Literal["vision_tower", "language_model"]


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
"""Of chat models the first three; InternVL-14B has no projector, but all the others."""


STRICT = ConfigDict(extra="forbid")


Triple = tuple[float, float, float]


STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and deviation per channel, of pixels from 0 to 1. Original: `train/constants.py`."""
