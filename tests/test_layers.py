"""Imports point down. Files are read with `ast`; nothing is imported.

A part is a module or folder directly under internvl/, or a dotted one that the table names by
itself because it stands higher or lower than its folder. It may import parts of lower levels only.
Inside a folder siblings may import each other, except that members of `objectives/` and of `evals/`
never import their siblings: adding one is adding one file, and deleting one breaks no other.
Imports for type checkers only count as well, and so do imports inside functions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "internvl"

LEVELS = {
    11: ("__main__", "__init__"),
    10: ("cli",),
    9: ("demo", "compat"),
    8: ("check", "launch", "serve"),
    7: ("train", "evaluate"),
    6: ("training.run", "evals.pairing"),
    5: ("evals", "plan", "export", "search"),
    4: ("inference", "objectives", "report.results"),
    3: ("datasets", "compute", "parallel", "training"),
    2: ("data", "models", "report"),
    1: ("config", "zoo", "log", "dist"),
    0: ("files", "launch.launchers"),
    -1: ("errors",),
}
"""Part -> level."""
LEVEL_OF = {part: level for level, parts in LEVELS.items() for part in parts}

# Folders that are open sets, with what their members may share.
OPEN_SETS: dict[str, tuple[str, ...]] = {
    "objectives": (
        "packed",
        "packed_loss",
        "pair_losses",
        "passes",
        "reference",
        "run_start",
        "stateless",
    ),
    "evals": (
        *(
            "answers",
            "asking",
            "features",
            "probe",
            "held_out",
            "judges",
            "metrics",
            "scores",
            "scoring",
        ),
        "sharing",
    ),
}

# Rooms inside a folder that know nothing of each other.
APART = (("models", "chat", "dual"),)

# What is imported inside its folder alone, and by one file outside if one is named.
PRIVATE = {
    ("models", "kernels"): None,
    ("models", "adapters", "fused_lora"): ("compute", "kernels"),
}


FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: tuple[str, ...]) -> str:
    """The part a dotted name below the package belongs to; a lazy public name is __init__'s."""
    names = (".".join(module[:length]) for length in range(len(module), 0, -1))
    return next((name for name in names if name in LEVEL_OF), "__init__")


def imported(tree: ast.Module) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, dotted name below internvl) of everything of ours that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *rest = name.split(".")
            if root == "internvl":
                yield node.lineno, tuple(rest)


def problems(file: Path, source: str) -> list[str]:
    """What is wrong with the imports of a file, given by its path below the package."""
    parts = file.with_suffix("").parts
    if parts[0] not in LEVEL_OF:
        return [f"{file}: not in the table of levels (tests/test_layers.py)"]
    part = part_of(parts)
    found = []
    for line, target in imported(ast.parse(source)):
        if _private(parts, target):
            found.append(f"{file}:{line}: imports internvl.{'.'.join(target)}, which is private")
            continue
        other = part_of(target)
        if LEVEL_OF[other] < LEVEL_OF[part]:
            continue
        in_folder = other == part and len(parts) > 1
        if in_folder and not _forbidden_sibling(parts, target) and not _apart(parts, target):
            continue
        found.append(f"{file}:{line}: imports internvl.{'.'.join(target)}")
    return found


def _forbidden_sibling(parts: tuple[str, ...], target: tuple[str, ...]) -> bool:
    """Whether a member of an open set imports another member."""
    folder, member = parts[0], parts[1]
    if folder not in OPEN_SETS or member == "__init__":
        return False
    sibling = target[1] if len(target) > 1 else "__init__"
    return sibling not in (member, *OPEN_SETS[folder])


def _apart(parts: tuple[str, ...], target: tuple[str, ...]) -> bool:
    """Whether a file of one model family imports the other's."""
    return any(
        parts[:2] == (folder, one) and target[:2] == (folder, other)
        for folder, *pair in APART
        for one, other in (pair, pair[::-1])
    )


def _private(parts: tuple[str, ...], target: tuple[str, ...]) -> bool:
    """Whether a file imports what only its folder, and one file elsewhere, may import."""
    for name, reader in PRIVATE.items():
        is_folder = (PACKAGE / Path(*name)).is_dir()
        folder = name if is_folder else name[:-1]
        inside = parts[: len(folder)] == folder
        deeper = len(target) > len(name) and _is_module(target[: len(name) + 1])
        member = target[: len(name)] == name and (deeper or not is_folder)
        if member and not inside and parts != reader:
            return True
    return False


def _is_module(target: tuple[str, ...]) -> bool:
    path = PACKAGE / Path(*target)
    return path.is_dir() or path.with_suffix(".py").exists()


def test_no_part_stands_twice_in_the_table() -> None:
    assert len(LEVEL_OF) == sum(len(parts) for parts in LEVELS.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    assert problems(file.relative_to(PACKAGE), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("train.py", "from internvl import dist, objectives"),
        ("train.py", "from internvl.training.run import saving"),
        ("dist.py", "from internvl.launch import launchers"),
        ("training/run/saving.py", "from internvl.training import checkpoint"),
        ("train.py", "import torch\nfrom internvl.models.chat.model import ChatModel"),
        ("models/chat/model.py", "from internvl.models import keys"),
        ("data/chat.py", "from internvl.data import records"),
        ("data/chat.py", "from internvl.data.records import Sample"),
        ("objectives/__init__.py", "from internvl.objectives import sft"),
        ("evals/caption.py", "from internvl.evals import metrics"),
        ("evals/caption.py", "from internvl.evals.metrics import bleu"),
        ("__main__.py", "from internvl.cli import main"),
        ("export/__init__.py", "from internvl.models import kernels"),
        ("plan/flops.py", "from internvl.models.kernels import supports_last_mlp"),
        ("models/kernels/__init__.py", "from internvl.models.kernels import gelu"),
        ("compute/kernels.py", "from internvl.models.adapters import fused_lora"),
        ("models/adapters/lora.py", "from internvl.models.adapters import fused_lora"),
    ],
)
def test_allowed(file: str, source: str) -> None:
    assert problems(Path(file), source) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("log.py", "from internvl import dist"),  # same level
        ("train.py", "from internvl import evaluate"),
        ("train.py", "from internvl import cli"),  # upwards
        ("train.py", "import internvl"),
        ("train.py", "from internvl import load"),  # a lazy name of the package
        ("data/chat.py", "from internvl.models import keys"),
        ("models/keys.py", "def f():\n    from internvl.data.records import Batch"),
        ("models/keys.py", "if TYPE_CHECKING:\n    import internvl.data.records"),
        ("objectives/mpo.py", "from internvl.objectives import sft"),
        ("objectives/mpo.py", "from internvl.objectives.sft import loss"),
        ("objectives/mpo.py", "from internvl.evals import metrics"),
        ("evals/caption.py", "from internvl.evals import vqa"),
        ("models/chat/model.py", "from internvl.models.dual import qllama"),
        ("models/dual/files.py", "from internvl.models.chat.model import ChatModel"),
        ("models/chat/model.py", "from internvl.models.kernels import gelu"),
        ("plan/flops.py", "from internvl.models.kernels.float8 import E4M3"),
        ("training/checkpoint.py", "from internvl.models.adapters import fused_lora"),
        ("train.py", "from internvl.models.adapters.fused_lora import fuse"),
        ("training/checkpoint.py", "from internvl.training.run.state import TrainState"),
        ("training/run/saving.py", "from internvl import train"),
        ("launch/launchers.py", "from internvl.launch import options"),
        ("evals/__init__.py", "from internvl.evals.pairing import forms"),
        ("helpers.py", ""),  # unknown file
    ],
)
def test_refused(file: str, source: str) -> None:
    assert len(problems(Path(file), source)) == 1


def test_relative_imports_are_refused() -> None:
    with pytest.raises(AssertionError, match="line 1: a relative import"):
        problems(Path("train.py"), "from . import dist")
