"""Where the models are that a run or adapter folder builds on, so that a moved folder finds them.

`base.json` in the folder holds a `Place` for each: its path, the same relative to the folder, the
step if it is a run, and a digest that tells its weights from others'. Imports no torch.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from logging import getLogger
from pathlib import Path
from typing import Any

from internvl.errors import ModelFolderError, UserError
from internvl.files import read_object, write_json

logger = getLogger(__name__)

FILE = "base.json"
Replacements = str | Path | Sequence[str | Path] | None
"""Models in place of bases that are missing, nearest first."""
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pth", "*.distcp")
_SAMPLES, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class Place:
    """Where a base model was when a run or adapter folder was written."""

    name: str
    """As the recipe names it."""
    path: str
    """Absolute path."""
    relative: str
    """Path from the folder of `base.json`."""
    step: int | None = None
    """Step of the checkpoint that was used, if the base is a run."""
    digest: str = ""
    """`digest` of its weights."""


@dataclass(frozen=True)
class Located:
    """A base model that was looked up; a hub id has no path."""

    path: Path
    step: int | None = None


class Search:
    """Looks up the base models of one folder, and of its bases' bases.

    Args:
        replacements: folders or ids in place of the bases that are missing, nearest first.
        remedy: advice if a base is missing and none is left.
    """

    def __init__(
        self,
        replacements: Replacements = None,
        remedy: str = "put it back, or name its folder with --base DIR (base=DIR in Python)",
    ) -> None:
        self.remedy = remedy
        if isinstance(replacements, str | Path):
            replacements = [replacements]
        self._left = list(replacements or ())

    def locate(
        self, folder: Path, key: str, name: str, candidates: Sequence[Path] = ()
    ) -> Located | None:
        """Returns the place of a base of `folder`; None if it may be a hub id.

        Args:
            key: what `folder` uses it as, such as "id".
            name: as `folder` names it.
            candidates: more places, best first, for a folder without a record of this base.

        Raises:
            ModelFolderError: it was on this disk, and is no more.
        """
        record = read(folder).get(key)
        # A recipe that was edited since names another model.
        record = record if record is not None and record.name == name else None
        recorded = [] if record is None else [*_beside(folder, record.relative), Path(record.path)]
        # By where they lead: mostly they are all one, whose weights need reading only once.
        real: dict[Path, Path] = {}
        for path in filter(is_model, (*recorded, *candidates)):
            real.setdefault(path.resolve(), path)
        paths = list(real.values())
        step = None if record is None else record.step
        if paths:
            path = paths[0] if record is None else _same_weights(paths, record, folder)
            named = Path(name).expanduser()
            # As the user knows it, which messages repeat.
            return Located(named if named.exists() and named.samefile(path) else path, step)
        if self._left:
            replacement = Path(self._left.pop(0)).expanduser()
            logger.info("%s: takes %s in place of its base %s", folder, replacement, name)
            if record is not None and replacement.exists():
                _same_weights([replacement], record, folder)
            return Located(replacement, step)
        if record is None:
            return None
        raise ModelFolderError(
            f"{folder}: its base model {name} is not there (looked for it at {record.path} and, "
            f"from this folder, at {record.relative}); {self.remedy}"
        )

    def check_used(self, name: str | Path) -> None:
        """Raises UserError if a replacement was not needed."""
        if self._left:
            raise UserError(
                f"base {self._left[0]}: no base of {name} is missing; leave it out"
                " (to use another base, change what the folder names)"
            )


def read(folder: Path) -> dict[str, Place]:
    """Reads `base.json` of a run or adapter folder: key -> place; empty without one.

    Raises:
        ModelFolderError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    tree = read_object(file)
    try:
        return {key: _place(value) for key, value in tree.items()}
    except TypeError:
        raise ModelFolderError(
            f"{file}: is damaged; remove it, and the base is looked up by its name alone"
        ) from None


def _place(tree: Any) -> Place:
    record = Place(**tree)
    texts = (record.name, record.path, record.relative, record.digest)
    is_step = record.step is None or (isinstance(record.step, int) and record.step >= 0)
    if not is_step or not all(isinstance(text, str) for text in texts):
        raise TypeError
    return record


def write(folder: Path, places: Mapping[str, Place]) -> None:
    """Writes `base.json`, with every relative path from `folder`; nothing without places."""
    if not places:
        return
    folder.mkdir(parents=True, exist_ok=True)
    earlier, tree = read(folder), {}
    for key, record in places.items():
        relative = os.path.relpath(record.path, folder.resolve())
        before = earlier.get(key, record)
        # A run that is resumed keeps what it began with, which may have been replaced since.
        is_same = (before.name, before.step) == (record.name, record.step)
        weights = before.digest if is_same else record.digest
        tree[key] = asdict(replace(record, relative=relative, digest=weights))
    write_json(folder / FILE, tree, indent=1)


def new_place(name: str, path: Path, step: int | None = None) -> Place:
    """Returns the place of a base that is at `path` now; see `write` for its relative path."""
    # Links are followed: what they point to may outlive them, and `relative` must start there too.
    real = path.expanduser().resolve()
    return Place(name, str(real), "", step, digest(real, step))


def is_model(path: Path) -> bool:
    """True if a path is a model, an adapter, a run, one of its checkpoints, or a .pth file."""
    if path.suffix == ".pth":
        return path.is_file()
    names = ("config.json", "adapter_config.json", "recipe.yaml", "state.json")
    return any((path / name).is_file() for name in names) or any(path.glob("*.pth"))


def moved(name: str, before: Path, folder: Path) -> Iterator[Path]:
    """Yields where a base may be after a run was moved from `before` to `folder` with it."""
    base = Path(name).expanduser()
    # Only two paths from one origin, which is not recorded, say where one is from the other.
    if base.is_absolute() == before.is_absolute():
        yield from _beside(folder, os.path.relpath(base, before))


def _beside(folder: Path, relative: str) -> Iterator[Path]:
    # As the path is written, and as the disk has it: one of them may lead through a link.
    for origin in dict.fromkeys((Path(os.path.abspath(folder)), folder.resolve())):
        yield Path(os.path.normpath(origin / relative))


def _same_weights(paths: Sequence[Path], record: Place, folder: Path) -> Path:
    """Returns the first path with the recorded weights; else the first, with a warning."""
    for path in paths:
        # Empty for a checkpoint that was removed, which has its own error.
        if digest(path, record.step) in (record.digest, ""):
            return path
    logger.warning(
        "%s: the weights in %s are not those of the base that it was trained on, %s, so its "
        "answers may be wrong; unless they are the same in another format, put those back",
        folder,
        paths[0],
        record.path,
    )
    return paths[0]


def digest(path: Path, step: int | None = None) -> str:
    """Returns a hash of samples of the weights in a file or folder, or of a run's checkpoint.

    Empty if there are no weights.
    """
    checkpoint = path / f"checkpoints/{step:06d}" if step is not None else path
    path = checkpoint if checkpoint.is_dir() else path
    patterns = _WEIGHT_PATTERNS
    files = [path] if path.is_file() else sorted(f for p in patterns for f in path.glob(p))
    if not files:
        return ""
    hashed = blake2b(digest_size=8)
    for file in files:
        size = file.stat().st_size
        hashed.update(size.to_bytes(8, "little"))
        # Samples only: a model may have hundreds of gigabytes.
        with file.open("rb") as opened:
            for sample in range(_SAMPLES):
                opened.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                hashed.update(opened.read(_SAMPLE_BYTES))
    return hashed.hexdigest()
