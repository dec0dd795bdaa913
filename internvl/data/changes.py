"""The content that a run began with, and what of it was changed since: data.json of a run folder.

Images and videos are not looked at: reading all of them would take as long as an epoch.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internvl.config import EvalConfig, Recipe
from internvl.data.index import digests_of
from internvl.data.sampler import Earlier
from internvl.data.sources import Content, Source, meta_entries
from internvl.errors import DataError
from internvl.files import first_line

FILE = "data.json"


@dataclass(frozen=True)
class Noted:
    """What a run's data were."""

    sources: dict[str, Content]
    """By the name of the source."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Entries of the meta file, without the paths of their annotations."""
    evals: dict[str, str] = field(default_factory=dict)
    """Digest of every file of the evaluations."""
    earlier: tuple[Earlier, ...] = ()
    """How much the sources held before they grew, oldest first."""


def note(recipe: Recipe, files: Sequence[Source]) -> Noted:
    """What the sources and the meta file hold now; evaluations are left out."""
    entries = {} if recipe.data.meta is None else meta_entries(recipe.data.meta)
    meta = {
        name: {key: value for key, value in entry.items() if key != "annotation"}
        for name, entry in entries.items()
    }
    return Noted({file.config.name: file.content() for file in files}, meta)


def of_evals(evals: dict[str, EvalConfig]) -> dict[str, str]:
    """Digest of every file that the evaluations read, but their images."""
    files = (
        path
        for spec in evals.values()
        for path in (spec.annotations, spec.pictures, spec.train, spec.classes, spec.templates)
        if path is not None
    )
    return {str(path): _digest(path) for path in files if path.exists()}


def of_evals_changed(before: Noted, evals: dict[str, EvalConfig]) -> list[str]:
    """The files of the evaluations that are not as they were."""
    now = of_evals(evals)
    return [path for path, digest in before.evals.items() if now.get(path) != digest]


def _digest(path: Path) -> str:
    """Of a file its content, of a folder or a tar names and sizes."""
    if path.is_file() and path.suffix != ".tar":
        return digests_of(path)[1]
    below = sorted(path.rglob("*")) if path.is_dir() else [path]
    listed = [(str(p.relative_to(path)), p.stat().st_size) for p in below if p.is_file()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def read(folder: Path) -> Noted | None:
    """What was noted in a run folder; None in one of a version that noted nothing.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Noted(
            {name: Content(**content) for name, content in tree["sources"].items()},
            tree["meta"],
            tree["evals"],
            tuple(Earlier(e["until"], tuple(e["samples"])) for e in tree["earlier"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "it is not what a run writes there"
        if isinstance(error, OSError | ValueError):
            reason = first_line(error)
        raise DataError(
            f"cannot read {path} ({reason}); remove it to go on without knowing whether the data "
            "are those the run began with"
        ) from None


def write(folder: Path, noted: Noted) -> None:
    """Writes what was noted, whole or not at all."""
    partial = folder / f".{FILE}.partial"
    text = json.dumps(asdict(noted), ensure_ascii=False, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / FILE)


def of_meta(before: Noted, after: Noted) -> Iterator[str]:
    """What of the meta file is not as it was, but for where its annotations lie."""
    for name in {**before.meta, **after.meta}:
        old, new = before.meta.get(name), after.meta.get(name)
        if old is None or new is None:
            yield f"{name} was {'not ' if old is None else ''}there, is {'not ' * (new is None)}now"
            continue
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                yield f"{name}.{key} was {old.get(key)!r}, is {new.get(key)!r}"


def of_sources(before: Noted, files: Sequence[Source]) -> dict[str, bool]:
    """A sentence for every source whose content changed, and whether it only grew at its end."""
    found: dict[str, bool] = {}
    for file in files:
        old, new = before.sources.get(file.config.name), file.content()
        if old is None or (old.samples, old.digest) == (new.samples, new.digest):
            continue
        same_start = file.begins_with(old)
        if same_start and new.samples == old.samples:
            continue  # noted in another way by an older version
        grew = same_start and new.samples > old.samples
        how = f"had {old.samples:,} samples, has {new.samples:,}"
        if new.samples == old.samples:
            how = f"has {old.samples:,} samples as before, but of other content"
        elif grew:
            how += "; the first ones are as they were"
        elif new.samples > old.samples:
            how += ", and the first ones are not as they were"
        found[f"{file.config.annotations} {how}"] = grew
    return found
