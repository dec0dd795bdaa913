"""Recipes: YAML files to checked trees and back. Imports no torch.

    recipe = load_recipe("recipes/my.yaml", ["optim.lr=1e-5"])

Everything that is wrong with a recipe is said at once.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from internvl.config import released
from internvl.config.compute import ComputeConfig
from internvl.config.data import TilesConfig
from internvl.config.model import START_KEYS, ModelConfig
from internvl.config.problems import sentences
from internvl.config.recipe import Recipe
from internvl.config.training import GuardConfig
from internvl.config.types import Tower
from internvl.errors import ConfigError, UserError
from internvl.files import other_format

_SHOWN = 100  # characters of an override in a message
_BOOL = "tag:yaml.org,2002:bool"


class _RepeatedKey(UserError):
    """A mapping names a key twice, of which YAML's reader would keep the last alone."""

    def __init__(self, key: str, first: int, second: int) -> None:
        where = f"lines {first} and {second}" if first != second else f"line {first}"
        super().__init__(f"the key {key!r} is there twice ({where}); keep one")


class _Loader(yaml.SafeLoader):
    """Booleans of YAML 1.2, true and false alone: the key `on` is a word."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's way)
        first: [(tag, pattern) for tag, pattern in found if tag != _BOOL or first in "tTfF"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written, each key once; what `<<` adds is not there yet."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _RepeatedKey(key.value, lines[name], line)
            lines[name] = line
        return node


def load_recipe(path: str | Path, overrides: Sequence[str] | str = ()) -> Recipe:
    """Reads the recipe in a YAML file, or the package's of that name, with `key=value` overrides
    (dotted keys, YAML values).

    Relative paths in a recipe start from the working directory, as on the command line.

    Raises:
        ConfigError: file missing or not YAML, unknown key, wrong type or value; all at once.
    """
    text = _text(path)
    try:
        tree = _parsed(text)
    except _RepeatedKey as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not YAML: {error}; write it as those in `recipes/` are"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys; write `key: value` lines, as `recipes/` has them")
    return resolve(tree, overrides, name=str(path))


def _text(path: str | Path) -> str:
    """The text of a recipe, in UTF-8 with or without a byte-order mark. Raises ConfigError."""
    try:
        content = released.locate(path).read_bytes()
    except FileNotFoundError:
        near = released.nearest(path)
        hint = f"did you mean {near}?" if near else "see `recipes/` for examples"
        raise ConfigError(f"there is no recipe {path}; {hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ConfigError(f"cannot read the recipe {path}: {error}; check the path") from None
    meaning = other_format(content)
    if meaning is not None:
        raise ConfigError(f"cannot read the recipe {path}: it is {meaning}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"it is not UTF-8 ({error.reason} at byte {error.start})"
        raise ConfigError(f"cannot read the recipe {path}: {what}; save it as UTF-8") from None


def _parsed(text: str) -> Any:
    """What YAML says. Raises ValueError with one line on why it is none, and where."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _RepeatedKey:
        raise
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # PyYAML's makers of dates, numbers and keys let Python's own errors through.
    except (ValueError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"a value cannot be read ({error})") from None


def resolve(
    tree: dict[str, Any], overrides: Sequence[str] | str = (), *, name: str = "recipe"
) -> Recipe:
    """A checked recipe from nested dictionaries. Raises ConfigError with every problem found."""
    tree = copy.deepcopy(tree)
    problems = list(_apply(tree, overrides))
    problems += _start_problems(tree.get("model"))
    _leave_open(tree.get("data"))
    recipe = None
    try:
        recipe = _closed(_adapter().validate_python(tree))
    except ValidationError as error:
        problems += sentences(error, Recipe)
    if recipe is not None:
        problems += _contradictions(recipe)
    if problems or recipe is None:
        raise ConfigError("\n".join([f"{name}: {len(problems)} problem(s)", *problems]))
    return recipe


def _start_problems(model: Any) -> Iterator[str]:
    """Yields what is wrong with the choice between `model.id` and parts."""
    if not isinstance(model, dict):
        return
    stated = [key for key in START_KEYS if model.get(key) is not None]
    if model.get("id") is not None:
        if stated:
            yield (
                f"model.id, model.{stated[0]}: a model by its id, or one from parts; remove one of "
                "the two"
            )
    elif not stated:
        yield "model.id: missing; name a model, or its parts in model.vision and model.language"
    else:
        for key, meaning in _PARTS.items():
            if model.get(key) is None:
                yield f"model.{key}: missing; a model from parts needs {meaning}"


_PARTS = {
    "vision": "the folder or hub id of an InternViT",
    "language": "the folder or hub id of a language model",
    "template": "a conversation template, such as Hermes-2",
}
"""Keys without which there is no model from parts, and what each names."""


def _leave_open(data: Any) -> None:
    """What a recipe does not say of images is its checkpoint's; a `DataConfig` made in Python has
    plain defaults instead, for it may have no checkpoint."""
    if isinstance(data, dict):
        if data.get("tiles") is None:
            data["tiles"] = {}
        data.setdefault("normalize", None)
        data.setdefault("exif", None)


def _closed(recipe: Recipe) -> Recipe:
    """The same recipe, its tiles as TilesConfig where it leaves none of them open."""
    tiles = recipe.data.tiles
    if isinstance(tiles, TilesConfig) or tiles.open:
        return recipe
    complete = TilesConfig(**vars(tiles))
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tiles=complete))


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested dictionaries that `resolve` reads back to an equal one."""
    return _adapter().dump_python(recipe, mode="json")


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    # Building one takes 30 ms, and a plan resolves a dozen recipes.
    return TypeAdapter(Recipe)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True)


def _apply(tree: dict[str, Any], overrides: Sequence[str] | str) -> Iterator[str]:
    """Sets every override in `tree`; yields what cannot be set."""
    for override in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            shown = override if len(override) < _SHOWN else f"{override[:_SHOWN]}…"
            yield f"{shown!r} is not an override: write key=value, such as optim.lr=1e-5"
            continue
        *parents, last = key.split(".")
        node: Any = tree
        for parent in parents:
            if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
                node = node[int(parent)]
            elif isinstance(node, dict):
                if node.get(parent) is None:
                    node[parent] = {}
                node = node[parent]
            else:
                node = None
        if not isinstance(node, dict):
            yield f"{key}: there is no section {'.'.join(parents)} to set a key in"
            continue
        try:
            node[last] = _parsed(value)
        except _RepeatedKey as error:
            yield f"{key}: {error}"
        except ValueError:
            node[last] = value


def _contradictions(recipe: Recipe) -> list[str]:
    """Values that are fine alone and wrong together."""
    problems = []
    if (recipe.epochs is None) == (recipe.steps is None):
        problems.append("epochs, steps: give exactly one of the two")
    problems += _batch_contradictions(recipe)
    if not recipe.data.sources and recipe.data.meta is None:
        problems.append("data.sources: no source; give one, or data.meta")
    if recipe.data.row_tokens is not None and recipe.data.row_tokens < recipe.data.max_tokens:
        problems.append("data.row_tokens: smaller than data.max_tokens; a row takes any sample")
    if recipe.data.allow_overflow and (
        recipe.data.packing != "official" or recipe.data.share_prefix
    ):
        problems.append(
            "data.allow_overflow: only with data.packing: official and data.share_prefix: false"
        )
    tiles = recipe.data.tiles
    if tiles.max is not None and tiles.min is not None and tiles.min > tiles.max:
        problems.append("data.tiles.min: larger than data.tiles.max")
    if tiles.pad_square and tiles.max is not None and tiles.max > 1:
        problems.append("data.tiles.pad_square: only with data.tiles.max: 1, as in the original")
    for name, evaluation in recipe.evals.items():
        problems += [f"evals.{name}.{problem}" for problem in evaluation.problems()]
    if recipe.data.video.min_frames > recipe.data.video.max_frames:
        problems.append("data.video.min_frames: larger than data.video.max_frames")
    weighted = [source.weight is not None for source in recipe.data.sources]
    if any(weighted) and (not all(weighted) or recipe.data.meta is not None):
        problems.append("data.sources: give every source a weight, or none; data.meta has none")
    names = [source.name for source in recipe.data.sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"data.sources: two sources are called {name!r}; names must differ")
    problems += recipe.objective.problems(recipe)
    if recipe.optim.schedule == "as_shipped" and recipe.optim.min_lr_ratio:
        problems.append("optim.min_lr_ratio: the schedule as_shipped ends at 0")
    if recipe.optim.offload and recipe.optim.name != "adamw":
        problems.append("optim.offload: only with optim.name: adamw; choose one of the two")
    best = recipe.checkpoint.best
    if best is not None and best.partition("/")[0] not in recipe.evals:
        known = ", ".join(recipe.evals) or "none"
        problems.append(
            f"checkpoint.best: {best!r} is no metric of an evaluation, such as val/loss; "
            f"known evaluations: {known}"
        )
    if recipe.stop.patience is not None and best is None:
        problems.append("stop.patience: name the metric that should improve in checkpoint.best")
    problems += _model_contradictions(recipe.model)
    if recipe.compute.float8:
        problems += _float8_contradictions(recipe)
    return problems


def _batch_contradictions(recipe: Recipe) -> list[str]:
    if (recipe.global_batch is None) == (recipe.global_batch_rows is None):
        return ["global_batch, global_batch_rows: give exactly one of the two"]
    if recipe.global_batch_rows is None:
        return []
    problems = []
    if recipe.epochs is not None:
        problems.append(
            "epochs: how many steps of global_batch_rows they are shows only when all samples are "
            "packed; give steps"
        )
    # Both would change which samples a position that was saved stands for.
    if recipe.data.changed == "accept":
        problems.append(
            "data.changed: accept is not for global_batch_rows, whose samples wait for a row from "
            "step to step; choose refuse"
        )
    if recipe.data.allow_overflow:
        problems.append(
            "data.allow_overflow: not with global_batch_rows, whose rows hold whole samples"
        )
    return problems


def _model_contradictions(model: ModelConfig) -> list[str]:
    problems = []
    if not model.parts and model.lora is None and not model.train_last_vision_blocks:
        problems.append("model.train: nothing is trained; name a part or set model.lora")
    on: tuple[Tower, ...] = () if model.lora is None else model.lora.on
    for part in sorted({*model.parts} & {*on}):
        problems.append(f"model.lora.on: {part} is also in model.train; choose one")
    if model.train_last_vision_blocks and "vision_tower" in (*model.parts, *on):
        problems.append(
            "model.train_last_vision_blocks: the whole vision_tower is in model.train or "
            "model.lora.on already; choose one"
        )
    if model.quantize is not None:
        full = {*model.parts} - {"multi_modal_projector"}
        if model.lora is None or full or model.train_last_vision_blocks:
            problems.append(
                "model.quantize: quantized weights do not train; set model.lora, and train nothing "
                "else but multi_modal_projector"
            )
    return problems


def _float8_contradictions(recipe: Recipe) -> list[str]:
    problems = []
    if recipe.model.quantize is not None:
        problems.append("compute.float8: model.quantize packs the same weights; choose one")
    if recipe.dtype != "bfloat16":
        problems.append("compute.float8: its products give bfloat16; set dtype: bfloat16")
    return problems


_MAY_CHANGE = (
    "data.workers",
    "data.changed",
    "data.row_tokens",
    "objective.micro_batch",
    "objective.kept_micro_batches",
    "log_every",
    "wandb",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.best",
    "checkpoint.best_is",
    "stop.patience",
    "optim.offload",
    "device",
    "run",
    *(f"guard.{key.name}" for key in dataclasses.fields(GuardConfig)),
    *(f"compute.{k.name}" for k in dataclasses.fields(ComputeConfig) if k.name != "float8"),
)


def _may_change(key: str, recipe: Recipe) -> bool:
    # The length of a row decides which samples a step has if it is counted in rows.
    if key == "data.row_tokens" and recipe.global_batch_rows is not None:
        return False
    return key in _MAY_CHANGE or (key.startswith("evals.") and ".guard" in key)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Dotted keys whose values differ between two recipes and change what a run computes."""

    def flat(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                yield from flat(value, f"{path}.{key}" if path else key)
        else:
            yield path, tree

    adapter = _adapter()
    before = dict(flat(adapter.dump_python(old, mode="json"), ""))
    after = dict(flat(adapter.dump_python(new, mode="json"), ""))
    keys = [key for key in {**before, **after} if not _may_change(key, new)]
    return [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in keys
        if before.get(key) != after.get(key)
    ]
