"""Data sets of InternVL-14B's training entry: its own three, and those that a user has added."""

import ast
from pathlib import Path
from typing import Any

from internvl.errors import ConfigError

_TABLE = "ds_collections"
_FLICKR = "data/flickr30k/Images"
_BUILT_IN: dict[str, dict[str, str]] = {
    "flickr30k_en_train": {
        "root": _FLICKR,
        "annotation": "data/flickr30k/flickr30k_train_karpathy.txt",
    },
    "flickr30k_cn_train": {
        "root": _FLICKR,
        "annotation": "data/flickr30k/flickr30k_cn_train.txt",
    },
    "coco_karpathy_train": {
        "root": "data/coco",
        "annotation": "data/coco/annotations/coco_karpathy_train.json",
    },
}


def find(name: str, entry_file: Path) -> dict[str, Any]:
    """Returns the source of a recipe for a set's name.

    Args:
        entry_file: the entry's Python file; its table of sets is read, not run, if it is here.

    Raises:
        ConfigError: no such set, or a name that tells no format.
    """
    # The file after: its users may have moved the data of a built-in set.
    tables = {**_BUILT_IN, **_edited(entry_file)}
    if name not in tables:
        raise ConfigError(
            f"--dataset_name {name}: no such set; known: {', '.join(tables)}; add yours to "
            f"{_TABLE} in {entry_file}"
        )
    # By a piece of the name, flickr first, as the original does.
    forms = {"flickr": "flickr_format", "coco": "coco_format"}
    form = next((form for piece, form in forms.items() if piece in name), None)
    if form is None:
        raise ConfigError(
            f"--dataset_name {name}: its name must have flickr_format or coco_format in it, which "
            "tells how it is read"
        )
    row = tables[name]
    return {"name": name, "type": form, "annotations": row["annotation"], "images": row["root"]}


def _edited(file: Path) -> dict[str, dict[str, str]]:
    """Returns the table of sets in a Python file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no Python file ({error})") from None
    # Not imported: the file would start a training, or this package once more.
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == _TABLE for target in targets):
            try:
                return dict(ast.literal_eval(node.value))  # type: ignore[attr-defined]
            except (ValueError, TypeError):
                raise ConfigError(
                    f"{file} line {node.lineno}: {_TABLE} is computed; write its texts as they are"
                ) from None
    return {}
