"""Where the results of a call are written: the same call writes there again, no other does."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl.files import write_text
from internvl.inference.opened import RunStep

_CALL = "call.json"  # of a folder of results: whose they are


def of_model(model: str | Path) -> Path:
    # Two levels tell exports of several runs apart, and the owners of a hub id.
    path = absolute(model)
    return Path("out/evaluate") / "-".join(name for name in path.parts[-2:] if name != path.anchor)


def of_step(run_step: RunStep) -> Path:
    _, step = run_step.checkpoint
    return run_step.folder / "evals/evaluate" / f"{step:06d}"


def absolute(model: str | Path) -> Path:
    """Returns the path of a folder wherever it is named from; a hub id as it is."""
    path = Path(model).expanduser()
    return path.resolve() if path.exists() else path


def of_call(parent: Path, name: str, call: Mapping[str, Any]) -> Path:
    """Returns the folder of this call of `measure`; creates it with the call in a file.

    A folder `name` of another call, with other options or another model of the same name, is left
    alone: this one's is then `name`-2, `name`-3, …
    """
    text = json.dumps(call, default=str, indent=1, sort_keys=True)
    candidates = (parent / (f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
    folder = next(folder for folder in candidates if _is_free_for(folder, text))
    write_text(folder / _CALL, text)
    return folder


def _is_free_for(folder: Path, call: str) -> bool:
    saved = folder / _CALL
    return not folder.exists() or (saved.exists() and saved.read_text("utf-8") == call)
