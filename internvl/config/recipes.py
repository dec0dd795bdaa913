"""Reads recipes from YAML, checks them, writes them back. Imports no torch.

    recipe = load_recipe("recipes/my.yaml", ["optim.lr=1e-5"])

All problems of a recipe are reported in one error.
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
from internvl.config.parallel import ParallelConfig
from internvl.config.problems import headed, sentences
from internvl.config.recipe import Recipe
from internvl.config.training import GuardConfig
from internvl.config.types import Tower
from internvl.errors import ConfigError, UserError
from internvl.files import other_format

_SHOWN = 100  # characters of an override in a message
_SAVED = "recipe.yaml"
_EXAMPLE = "internvl2_2b_lora"
_RUN_HAS = (".lock", "checkpoints", "finished.json")
"""What training writes to a run folder; one of these tells it from a recipe's folder."""
_EITHER = (("epochs", "steps"), ("global_batch", "global_batch_rows"))
"""Keys of which a recipe has one of each pair."""
_BOOL = "tag:yaml.org,2002:bool"


class _RepeatedKey(UserError):
    """A key is in a mapping twice; PyYAML would silently keep the last value."""

    def __init__(self, key: str, first: int, second: int) -> None:
        # Equal for a mapping in braces on one line.
        where = f"lines {first} and {second}" if first != second else f"line {first}"
        super().__init__(f"the key {key!r} is there twice ({where}); keep one")


class _Loader(yaml.SafeLoader):
    """Reads true and false as booleans, as YAML 1.2 does, and refuses repeated keys."""

    # YAML 1.1, which PyYAML reads, has on, off, yes and no too: `model.lora.on` would be `True`.
    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML declares it without ClassVar)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL or first in "tTfF"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Composes a mapping; raises _RepeatedKey for a key that is in it twice."""
        # Before construction, which expands `<<`: a key may replace one that was merged in.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            # With its tag: 1 and "1" are two keys.
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _RepeatedKey(key.value, lines[name], line)
            lines[name] = line
        return node


def load_recipe(path: str | Path, overrides: Sequence[str] | str = ()) -> Recipe:
    """Reads a recipe from a YAML file, a run folder, or the package's recipe of that name.

    Relative paths in a recipe start from the working directory, as on the command line. The `run`
    of a run folder's recipe is that folder, wherever it was moved.

    Args:
        overrides: "key=value" each: a dotted key and a YAML value.

    Raises:
        ConfigError: file missing or not YAML, unknown key, wrong type or value; all at once.
    """
    run = _run_folder(path)
    text = text_of(path)
    try:
        tree = _parse_yaml(text)
    # Before ValueError, its base class: such a file is YAML.
    except _RepeatedKey as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not YAML: {error}; write it as those in `recipes/` are"
        ) from None
    # YAML allows a file that is empty or one long text.
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys; write `key: value` lines, as `recipes/` has them")
    _check_no_meta(path, tree)
    if run is not None:
        tree["run"] = str(run)
    return resolve(tree, overrides, name=str(path))


def text_of(path: str | Path) -> str:
    """Reads the text of a recipe: a YAML file, a run's or the package's. Raises ConfigError."""
    run = _run_folder(path)
    return _read_text(path if run is None else run / _SAVED)


def _check_no_meta(path: str | Path, tree: dict[str, Any]) -> None:
    """Raises ConfigError for a meta file, the original's list of data sets."""
    if tree and all(isinstance(entry, dict) and "annotation" in entry for entry in tree.values()):
        raise ConfigError(
            f"{path} is a list of data sets, no recipe; write `data: {{meta: {path}}}` in one, or "
            f"add to the command of another: `internvl train internvl2_2b_lora 'data.sources=[]' "
            f"data.meta={path}`"
        )


def _run_folder(path: str | Path) -> Path | None:
    """Returns the path if it is a run folder, None if it is no folder. Raises ConfigError."""
    folder = Path(path).expanduser()
    if not _is_folder(folder):
        return None
    if not (folder / _SAVED).is_file():
        raise ConfigError(
            f"{path} is a folder and no run, for it has no {_SAVED}; name a recipe (a YAML file) "
            "or the folder of a run"
        )
    # A recipe of somebody's in a folder of other files; training would fill that folder.
    if not any((folder / name).exists() for name in _RUN_HAS):
        raise ConfigError(
            f"{path} is no run yet, for only a recipe is in it; name that: {folder / _SAVED}"
        )
    return folder


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (
        OSError,
        ValueError,
    ):  # a null byte, or a name that is too long: `_read_text` reports it
        return False


def _read_text(path: str | Path) -> str:
    """Reads a recipe's text, UTF-8 with or without a byte-order mark. Raises ConfigError."""
    try:
        file = released.locate(path)
        content = file.read_bytes()
    except FileNotFoundError:
        near = released.nearest(path)
        is_file = Path(path).suffix in (".yaml", ".yml")
        copied = f"`internvl check {_EXAMPLE} --copy {path if is_file else 'mine.yaml'}`"
        hint = f"did you mean {near}?" if near else f"{copied} writes an example to edit"
        noun = "recipe" if is_file else "recipe or run"
        raise ConfigError(f"there is no {noun} {path}; {hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ConfigError(f"cannot read the recipe {path}: {error}; check the path") from None
    if file.suffix == ".sh":
        raise ConfigError(
            f"{path} is a script, no recipe; `internvl compat shell {path}` runs it as one"
        )
    # Before decoding: a UTF-16 file would be reported as bad UTF-8, a web page as bad YAML.
    actual_format = other_format(content)
    if actual_format is not None:
        raise ConfigError(f"cannot read the recipe {path}: it is {actual_format}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 ({error.reason} at byte {error.start})"
        raise ConfigError(f"cannot read the recipe {path}: {reason}; save it as UTF-8") from None


def _parse_yaml(text: str) -> Any:
    """Parses YAML. Raises ValueError with one line that says why and where it is invalid."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _RepeatedKey:
        raise
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # PyYAML does not wrap what Python raises for an impossible date, number or key.
    except (ValueError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"a value cannot be read ({error})") from None


def resolve(
    tree: dict[str, Any], overrides: Sequence[str] | str = (), *, name: str = "recipe"
) -> Recipe:
    """Returns a checked recipe from nested dictionaries. Raises ConfigError with every problem."""
    tree = copy.deepcopy(tree)  # overrides are set in place
    problems = list(_apply_overrides(tree, overrides))
    # On the raw tree: if any other key is invalid, there is no recipe to look at.
    problems += _start_problems(tree.get("model"))
    _unset_image_defaults(tree.get("data"))
    recipe = None
    try:
        recipe = _with_complete_tiles(_adapter().validate_python(tree))
    except ValidationError as error:
        problems += sentences(error, Recipe)
    if recipe is not None:
        problems += _truth_values(tree, to_tree(recipe))
        problems += _contradictions(recipe)
    if problems or recipe is None:
        raise ConfigError(headed(name, problems))
    return recipe


def _truth_values(tree: Any, resolved: Any, path: str = "") -> Iterator[str]:
    """Yields a problem for each true or false that was read as a number."""
    # pydantic reads true as 1; its strict mode would refuse texts for paths as well.
    if isinstance(tree, bool) and isinstance(resolved, int | float) and resolved is not tree:
        yield f"{path}: must be a number, not {str(tree).lower()}"
    if isinstance(tree, dict) and isinstance(resolved, dict):
        for key, value in tree.items():
            yield from _truth_values(value, resolved.get(key), f"{path}.{key}".lstrip("."))
    if isinstance(tree, list) and isinstance(resolved, list):
        for index, (value, read) in enumerate(zip(tree, resolved, strict=False)):
            yield from _truth_values(value, read, f"{path}.{index}")


def _start_problems(model: Any) -> Iterator[str]:
    """Yields problems of the choice between `model.id` and a model from parts."""
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
"""Keys that a model from parts must have -> a description of their value."""


def _unset_image_defaults(data: Any) -> None:
    """Replaces DataConfig's defaults for images by null, which takes the checkpoint's values."""
    # Not the fields' own defaults: a DataConfig made in Python may have no checkpoint.
    if isinstance(data, dict):
        # Also for `tiles:` without a value, which YAML reads as null.
        if data.get("tiles") is None:
            data["tiles"] = {}
        data.setdefault("normalize", None)
        data.setdefault("exif", None)


def _with_complete_tiles(recipe: Recipe) -> Recipe:
    """Returns the recipe with its tiles as TilesConfig if all of their fields are set."""
    tiles = recipe.data.tiles
    if isinstance(tiles, TilesConfig) or tiles.unset:
        return recipe
    # `data.tiling` goes by the class; pydantic validated the declared one, TilesChoice.
    complete = TilesConfig(**vars(tiles))
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tiles=complete))


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """Returns the resolved recipe as nested dictionaries that `resolve` reads to an equal one."""
    # json: YAML has no paths and tuples.
    return _adapter().dump_python(recipe, mode="json")


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    # Building one takes 30 ms, and a plan resolves a dozen recipes.
    return TypeAdapter(Recipe)


def to_yaml(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML that `load_recipe` reads to an equal one."""
    # Unsorted: the sections keep the order in which people write and read them.
    return yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True)


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str] | str) -> Iterator[str]:
    """Sets every override in `tree`; yields a problem for each that cannot be set."""
    # A single text would be read letter by letter.
    overrides = [overrides] if isinstance(overrides, str) else overrides
    replaced = {override.partition("=")[0] for override in overrides}
    for pair in _EITHER:
        for key, other in (pair, pair[::-1]):
            # The file's own choice is replaced: `steps=10` needs no `epochs=null` with it.
            if key in replaced and other not in replaced and tree.get(other) is not None:
                tree[other] = None
    for override in overrides:
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
                # A section that is missing, or written without keys (`optim:`).
                if node.get(parent) is None:
                    node[parent] = {}
                node = node[parent]
            else:
                node = None
        if not isinstance(node, dict):
            yield f"{key}: there is no section {'.'.join(parents)} to set a key in"
            continue
        try:
            node[last] = _parse_yaml(value)
        except _RepeatedKey as error:
            yield f"{key}: {error}"
        except ValueError:
            node[last] = value  # a text that needs no quotes here, such as "Question: why?"


def _contradictions(recipe: Recipe) -> list[str]:
    """Lists the problems of values that are valid alone and not together."""
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
    # All or none: `weight` is a share of the whole, and without it `repeat` sets the amount.
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
        evaluations = ", ".join(recipe.evals) or "none"
        problems.append(
            f"checkpoint.best: {best!r} is no metric of an evaluation, such as val/loss; "
            f"known evaluations: {evaluations}"
        )
    if recipe.stop.patience is not None and best is None:
        problems.append("stop.patience: name the metric that should improve in checkpoint.best")
    problems += _model_contradictions(recipe.model)
    if recipe.compute.float8:
        problems += _float8_contradictions(recipe)
    problems += _parallel_contradictions(recipe)
    return problems


def _parallel_contradictions(recipe: Recipe) -> list[str]:
    problems = recipe.parallel.problems()
    shard = recipe.parallel.shard
    if shard == "none":
        return problems
    if recipe.model.quantize is not None:
        problems.append(
            f"parallel.shard: model.quantize packs weights in blocks that {shard} would cut; "
            "remove model.quantize, for shards take less memory anyway, or set parallel.shard: none"
        )
    if recipe.compute.float8:
        problems.append(
            f"parallel.shard: compute.float8 keeps products' weights apart from those that {shard} "
            "cuts; set compute.float8: false or parallel.shard: none"
        )
    if recipe.optim.offload:
        problems.append(
            "optim.offload: shards have an offload of their own; set parallel.offload: cpu instead"
        )
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
    # A checkpoint saves a position in the data; both would change which samples it stands for.
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
    adapted: tuple[Tower, ...] = () if model.lora is None else model.lora.on
    for tower in sorted({*model.parts} & {*adapted}):
        problems.append(f"model.lora.on: {tower} is also in model.train; choose one")
    if model.train_last_vision_blocks and "vision_tower" in (*model.parts, *adapted):
        problems.append(
            "model.train_last_vision_blocks: the whole vision_tower is in model.train or "
            "model.lora.on already; choose one"
        )
    if model.quantize is not None:
        # The projector is not quantized, so it can train.
        quantized = {*model.parts} - {"multi_modal_projector"}
        if model.lora is None or quantized or model.train_last_vision_blocks:
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


# They decide speed, memory, logs and when a run stops or skips; losses differ by rounding only.
_CHANGEABLE_ON_RESUME = (
    "data.workers",
    "data.changed",
    "data.row_tokens",
    "objective.micro_batch",
    "objective.kept_micro_batches",
    "log_every",
    "watchdog_s",
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
    *(f"parallel.{key.name}" for key in dataclasses.fields(ParallelConfig)),
    # float8 rounds by percents: a run that switched would be two experiments.
    *(f"compute.{k.name}" for k in dataclasses.fields(ComputeConfig) if k.name != "float8"),
)


def _is_changeable(key: str, recipe: Recipe) -> bool:
    # The length of a row decides which samples a step has if it is counted in rows.
    if key == "data.row_tokens" and recipe.global_batch_rows is not None:
        return False
    # A guard of an evaluation ends a run earlier or later; it changes no step.
    return key in _CHANGEABLE_ON_RESUME or (key.startswith("evals.") and ".guard" in key)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Lists the sentences of `changes`."""
    return [*changes(old, new).values()]


def changes(old: Recipe, new: Recipe) -> dict[str, str]:
    """Returns the dotted keys that make two recipes compute different results -> a sentence with
    both values."""

    def flatten(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
        # An empty mapping is a value: it would be no key at all.
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                yield from flatten(value, f"{path}.{key}" if path else key)
        else:
            yield path, tree

    before = dict(flatten(to_tree(old), ""))
    after = dict(flatten(to_tree(new), ""))
    keys = [key for key in {**before, **after} if not _is_changeable(key, new)]
    return {
        key: f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in keys
        if before.get(key) != after.get(key)
    }
