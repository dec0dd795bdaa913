"""`objective:` what is minimized, a section for each `name`."""

from typing import Annotated

from internvl.config.objective.base import ObjectiveConfig
from internvl.config.objective.packed import SftConfig
from internvl.config.objective.pairs import PairsConfig, RetrievalConfig, Stage2Config
from internvl.config.objective.preference import MpoConfig
from internvl.config.unions import OneOf, members, name_of

__all__ = [
    "MpoConfig",
    "ObjectiveConfig",
    "ObjectiveSection",
    "PairsConfig",
    "RetrievalConfig",
    "SftConfig",
    "Stage2Config",
    "objective_names",
]

ObjectiveSection = Annotated[SftConfig | RetrievalConfig | Stage2Config | MpoConfig, OneOf("name")]
"""Every objective; a new one is one more member. A recipe without `name` takes the first."""


def objective_names(family: str) -> list[str]:
    """Returns the names of the objectives that models of a family ("chat", "dual") train with."""
    sections = members(ObjectiveSection)
    return [name_of(section, "name") for section in sections if section.family == family]
