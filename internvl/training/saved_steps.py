"""Lists the checkpoints of a run. Imports no torch: a run is checked before that takes seconds."""

from pathlib import Path


def steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    # A checkpoint gets its name when it is complete; until then it begins with a dot.
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())
