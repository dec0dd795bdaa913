"""Lists the checkpoints of a run. Imports no torch: a run is checked before that takes seconds."""

from pathlib import Path

from internvl.launch import launchers

_BEFORE = {
    *(".lock", "recipe.yaml", "train.log", "base.json", "data.json", "tensorboard", "watchdog")
}
"""What a run writes before its first step or evaluation."""


def has_begun(folder: Path) -> bool:
    """True if a run folder holds more than what is written before the first step."""
    names = {entry.name for entry in folder.iterdir() if not launchers.is_of_launch(entry.name)}
    return not names <= _BEFORE


def steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    # A checkpoint gets its name when it is complete; until then it begins with a dot.
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())
