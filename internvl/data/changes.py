"""Fingerprints of a run's data (data.json of its folder) and what has changed since.

Images and videos are not read: that would take as long as an epoch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internvl.config import EvalConfig, Recipe
from internvl.data.index import digests_of
from internvl.data.sampler import Earlier
from internvl.data.sources import Content, Source, meta_entries
from internvl.errors import DataError
from internvl.files import first_line, write_text

FILE = "data.json"


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of the data of a run."""

    sources: dict[str, Content]
    """Source name -> content."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Meta-file entries without their annotation paths."""
    evals: dict[str, str] = field(default_factory=dict)
    """Evaluation file -> digest."""
    earlier: tuple[Earlier, ...] = ()
    """Sizes of the sources before they grew, oldest first."""


def take_fingerprints(recipe: Recipe, files: Sequence[Source]) -> Fingerprints:
    """Fingerprints sources and meta file as they are now; evaluations are left out."""
    entries = {} if recipe.data.meta is None else meta_entries(recipe.data.meta)
    # Annotation paths may change when a data set moves; the content decides.
    meta = {
        name: {key: value for key, value in entry.items() if key != "annotation"}
        for name, entry in entries.items()
    }
    return Fingerprints({file.config.name: file.content() for file in files}, meta)


def eval_digests(evals: Mapping[str, EvalConfig]) -> dict[str, str]:
    """Returns the digest of every file that the evaluations read, except images."""
    files = (path for spec in evals.values() for path in spec.files if path is not None)
    return {str(path): _digest(path) for path in files if path.exists()}


def changed_evals(before: Fingerprints, evals: Mapping[str, EvalConfig]) -> list[str]:
    """Lists the evaluation files that have changed or are missing."""
    # A missing file has no digest now, so it differs from any earlier one.
    current = eval_digests(evals)
    return [path for path, digest in before.evals.items() if current.get(path) != digest]


def _digest(path: Path) -> str:
    """Returns the digest of a file's content, or of names and sizes for a folder or tar."""
    # A tar holds images: as with folders, reading all of them would take too long.
    if path.is_file() and path.suffix != ".tar":
        return digests_of(path)[1]
    below = sorted(path.rglob("*")) if path.is_dir() else [path]
    listed = [(str(p.relative_to(path)), p.stat().st_size) for p in below if p.is_file()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def read(folder: Path) -> Fingerprints | None:
    """Reads the fingerprints in a run folder; None if an older version wrote none.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Fingerprints(
            {name: Content(**content) for name, content in tree["sources"].items()},
            tree["meta"],
            tree["evals"],
            tuple(Earlier(e["until"], tuple(e["samples"])) for e in tree["earlier"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Valid JSON of another shape raises KeyError and the like, whose text explains nothing.
        reason = "it is not what a run writes there"
        if isinstance(error, OSError | ValueError):
            reason = first_line(error)
        raise DataError(
            f"cannot read {path} ({reason}); remove it to go on without knowing whether the data "
            "are those the run began with"
        ) from None


def write(folder: Path, fingerprints: Fingerprints) -> None:
    """Writes the fingerprints atomically."""
    text = json.dumps(asdict(fingerprints), ensure_ascii=False, indent=1)
    write_text(folder / FILE, text + "\n")


def meta_changes(before: Fingerprints, after: Fingerprints) -> Iterator[str]:
    """Yields the changes of the meta file, except annotation paths."""
    for name in {**before.meta, **after.meta}:
        old, new = before.meta.get(name), after.meta.get(name)
        if old is None or new is None:
            yield f"{name} was {'not ' if old is None else ''}there, is {'not ' * (new is None)}now"
            continue
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                yield f"{name}.{key} was {old.get(key)!r}, is {new.get(key)!r}"


def source_changes(before: Fingerprints, files: Sequence[Source]) -> dict[str, bool]:
    """Maps a sentence for every changed source to whether it only grew at its end."""
    changed: dict[str, bool] = {}
    for file in files:
        old, new = before.sources.get(file.config.name), file.content()
        if old is None or (old.samples, old.digest) == (new.samples, new.digest):
            continue
        # The start is digested again: growth keeps the order of samples, anything else breaks it.
        same_start = file.begins_with(old)
        if same_start and new.samples == old.samples:
            continue  # an older version computed the digest in another way
        grew = same_start and new.samples > old.samples
        change = f"had {old.samples:,} samples, has {new.samples:,}"
        if new.samples == old.samples:
            change = f"has {old.samples:,} samples as before, but of other content"
        elif grew:
            change += "; the first ones are as they were"
        elif new.samples > old.samples:
            change += ", and the first ones are not as they were"
        changed[f"{file.config.annotations} {change}"] = grew
    return changed
