"""Types that several sections share."""

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
