"""Opens a model folder once: files, adapters, run and tokenizer, before any weight is read.

`open_model` follows adapter and run folders down to the base model. Its result is passed on, so
that no caller opens the same folder again.

Files are refused in a second: torch and transformers, which take several, are imported only where a
tokenizer, a `.pth` file or parts are opened.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl import zoo
from internvl.config import ModelConfig, Recipe, TilesConfig, released
from internvl.config.recipes import load_recipe
from internvl.data.templates import template
from internvl.errors import ModelFolderError, UnknownModel, UserError
from internvl.launch import launchers
from internvl.models import bases, hub
from internvl.models.adapters import folder as adapter_folder
from internvl.models.bases import Located, Place, Replacements, Search
from internvl.training import saved_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth")


@dataclass(frozen=True)
class OpenedModel:
    """An opened model, adapter or run folder with its base models."""

    name: str
    """The folder or hub id that was asked for."""
    files: hub.ModelFolder
    """Files of the base model at the bottom."""
    adapter: Path | None = None
    """Folder of adapters on top, next to the model's own weights or alone."""
    base: "OpenedModel | None" = None
    """The model a run started from or an adapter folder belongs to; None for a model folder."""
    local: Path | None = None
    """Path of `name`: the run's for one of its checkpoints; None for a hub id or parts."""
    run: "RunStep | None" = None
    """The run folder and its checkpoint, if it is one."""
    recipe: Recipe | None = None
    """Recipe of the run, as its folder holds it."""
    parts: ModelConfig | None = None
    """Parts of a model that is assembled from a vision tower and a language model."""
    parts_tokenizer: "PreTrainedTokenizerFast | None" = None
    """Tokenizer of such a model: the language model's with the tokens of a chat model."""

    @property
    def folder(self) -> Path:
        """Folder of the base model's weights."""
        return self.files.folder

    @property
    def step(self) -> int | None:
        """Step of a run's checkpoint. Raises ModelFolderError if it has none."""
        return None if self.run is None else self.run.checkpoint[1]

    def weight_states(self) -> list[tuple[str, int, int]]:
        """Lists (path, size, mtime in ns) of all files that the weights come from, bases last."""
        folders = {self.folder, self.local, self.adapter} - {None}
        files = {f for folder in folders if folder for p in _WEIGHT_FILES for f in folder.glob(p)}
        if self.run is not None:
            checkpoints, step = self.run.checkpoint
            files |= {*(checkpoints / f"{step:06d}").rglob("*")}
        states = sorted((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
        return states if self.base is None else [*states, *self.base.weight_states()]

    def check(self, *, weights: bool = True) -> None:
        """Checks that all of it is there; reads no weight, imports no torch.

        Args:
            weights: whether weights and checkpoints must be there too.

        Raises:
            ModelFolderError: another model than ours, or missing weights or checkpoint.
        """
        if self.base is None:
            self.files.check(weights=weights)
        else:
            self.base.check(weights=weights)
        # The property raises.
        _ = self.step if weights else None

    # Cached: the configuration, the vocabulary check and the encoder all ask for it.
    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast | None":
        """The model's tokenizer; None if the folder has no tokenizer files."""
        # No folder holds it: the language model's own files lack the tokens of a chat model.
        if self.parts_tokenizer is not None:
            return self.parts_tokenizer
        from internvl.data.tokenizers import load_tokenizer

        return load_tokenizer(self.folder) if self.base is None else self.base.tokenizer


@dataclass(frozen=True)
class RunStep:
    """A run folder and the checkpoint that is taken from it."""

    folder: Path
    step: int | None = None
    """Step of the checkpoint; None for the newest."""

    @property
    def checkpoint(self) -> tuple[Path, int]:
        """The folder that holds the checkpoint, and its step.

        Raises:
            ModelFolderError: the run has none, or none of this step.
        """
        saved = saved_steps.steps(self.folder / "checkpoints")
        best = saved_steps.steps(self.folder / "best/checkpoints")
        if self.step is None and not saved:
            raise ModelFolderError(f"{self.folder}: the run has no checkpoint yet; train it first")
        if self.step is None or self.step in saved:
            return self.folder / "checkpoints", saved[-1] if self.step is None else self.step
        # Kept longer than the newest ones.
        if self.step in best:
            return self.folder / "best/checkpoints", self.step
        kept_steps = ", ".join(map(str, sorted({*saved, *best}))) or "none"
        raise ModelFolderError(
            f"{self.folder}: has no checkpoint of step {self.step}; its steps are {kept_steps}"
        )


def find_run(name_or_folder: str | Path, step: int | None = None) -> RunStep | None:
    """Returns the run of a run folder or of one of its checkpoints; None for anything else.

    Args:
        step: step of the checkpoint to take; by default that of the folder, else the newest.

    Raises:
        UserError: a step of what is no run, or another than the folder's.
    """
    folder = Path(name_or_folder).expanduser()
    if is_run(folder):
        return RunStep(folder, step)
    # Resolved: the folder may be named as "." from within.
    above = folder.resolve().parent
    if folder.resolve().name.isdigit() and above.name == "checkpoints" and is_run(above.parent):
        own_step = int(folder.resolve().name)
        if step not in (None, own_step):
            raise UserError(f"step {step}: {folder} is step {own_step}; name one of the two")
        is_plain = folder.parent.name == "checkpoints" and folder.parent.parent.name
        return RunStep(folder.parent.parent if is_plain else above.parent, own_step)
    if step is not None:
        raise UserError(f"step {step}: {folder} is no run; only a run folder has steps")
    return None


def open_model(
    name_or_folder: str | Path,
    *,
    step: int | None = None,
    base: Replacements = None,
) -> OpenedModel:
    """Opens a model, adapter or run folder, a hub id, or InternVL-C's `.pth` (or its folder).

    Adapters next to a model's weights belong to that model, as in transformers, whatever base they
    name. The base of an adapter folder may have adapters of its own, or be a run.

    Args:
        step: step of a run's checkpoint; by default the newest. RUN/checkpoints/STEP is the same.
        base: in place of the base that a run or adapter folder misses; several for a chain that
            misses several, nearest first.

    Raises:
        ModelFolderError: no such folder, file or id.
        UserError: a step of what is no run, or a base that nothing needs.
    """
    search = Search(base)
    opened = _open(name_or_folder, search, step)
    search.check_used(opened.name)
    return opened


def _open(
    name_or_folder: str | Path,
    search: Search,
    step: int | None = None,
    above: tuple[Path, ...] = (),
) -> OpenedModel:
    """As `open_model`; `above` are the adapter and run folders that led here."""
    name, pth = str(name_or_folder), Path(name_or_folder)
    run = find_run(name_or_folder, step)
    if run is not None:
        return _open_run(name, run, search, above)
    if pth.suffix != ".pth":
        folder = hub.find_folder(name_or_folder)
        # InternVL-C was released as one .pth file without a config.json.
        weights = [] if (folder / "config.json").is_file() else list(folder.glob("*.pth"))
        pth = weights[0] if len(weights) == 1 else folder
    if pth.suffix == ".pth":
        from internvl.models.dual import files as dual_files

        released = zoo.official_config(zoo.find("InternVL-14B-224px"))
        return OpenedModel(name, dual_files.open_pth(pth, released), local=pth)
    local = folder if pth.expanduser().exists() else None
    if adapter_folder.is_adapter(folder):
        visited = _visit(folder, above)
        located = adapter_folder.base_of(folder, search)
        base = _open_located(located, search, visited)
        return OpenedModel(name, base.files, adapter=folder, base=base, local=local)
    if not (folder / "config.json").is_file():
        adapter_folder.check_complete(folder)
        _check_begun(folder)
    adapter = folder if adapter_folder.is_beside_model(folder) else None
    return OpenedModel(name, hub.open_folder(folder), adapter, local=local)


def _check_begun(folder: Path) -> None:
    """Raises ModelFolderError for the folder of a Slurm job whose training has written nothing."""
    if (folder / launchers.BATCH_FILE).is_file():
        raise ModelFolderError(
            f"{folder}: its Slurm job has trained nothing yet; `squeue --me` lists jobs that wait, "
            f"and {folder}/slurm-*.out says why one ended"
        )


def _open_run(name: str, run: RunStep, search: Search, above: tuple[Path, ...]) -> OpenedModel:
    visited = _visit(run.folder, above)
    recipe = load_recipe(run.folder / "recipe.yaml")
    # A step that was asked for is checked before minutes of loading its base.
    if run.step is not None:
        _ = run.checkpoint
    # The best step is a run of its own within the run, whose recipe it has.
    is_best = run.folder.name == "best" and is_run(run.folder.parent)
    root = run.folder.parent if is_best else run.folder
    start = _open_start(recipe, run.folder, search, root=root, above=visited)
    return OpenedModel(name, start.files, base=start, local=run.folder, run=run, recipe=recipe)


def _visit(folder: Path, above: tuple[Path, ...]) -> tuple[Path, ...]:
    """Returns `above` and `folder`. Raises ModelFolderError for a cycle, which has no end."""
    if folder.resolve() in above:
        raise ModelFolderError(
            f"{above[-1] / adapter_folder.CONFIG_FILE}: base_model_name_or_path leads back to "
            f"{folder}; set it to the model the adapters were trained on"
        )
    return (*above, folder.resolve())


def _open_located(located: Located, search: Search, above: tuple[Path, ...]) -> OpenedModel:
    # The folder of a checkpoint has its step already; a replacement may be no run.
    step = located.step if is_run(located.path) else None
    if step is not None:
        # Here, and not by `_open`: only here it is known who needs this very step.
        try:
            _ = RunStep(located.path, step).checkpoint
        except ModelFolderError as error:
            raise ModelFolderError(
                f"{above[-1]}: the checkpoint that it was trained on is gone ({error}); put that "
                "back, another one has other weights"
            ) from None
    return _open(located.path, search, step, above)


def open_start(recipe: Recipe) -> OpenedModel:
    """Opens the model that a recipe starts from, by its id or from parts.

    If its run folder exists, the same model as when the run began, wherever that was moved.

    Raises:
        ModelFolderError: as `open_model`; names the part that is missing.
        UserError: unknown conversation template.
    """
    search = Search(remedy="put it back")
    return _open_start(recipe, recipe.run, search, root=recipe.run)


def _open_start(
    recipe: Recipe,
    folder: Path,
    search: Search,
    *,
    root: Path,
    above: tuple[Path, ...] = (),
) -> OpenedModel:
    """Opens a recipe's model, looked up from the run in `folder` whose own folder is `root`."""
    model = recipe.model

    def locate(key: str, name: str) -> Located | None:
        near = list(bases.moved(name, recipe.run, root)) if is_run(folder) else []
        path = Path(name).expanduser()
        # A relative path is the working directory's only if the run's has no such model.
        places = [path, *near] if path.is_absolute() else [*near, path]
        return search.locate(folder, key, name, places)

    if model.id is not None:
        base = locate("id", model.id)
        if base is not None:
            # Under its name in the recipe, which a moved run keeps.
            return replace(_open_located(base, search, above), name=model.id)
        earlier = released.of_run(model.id)
        # Before the hub is asked, where no such name is.
        if earlier is not None and not is_run(folder):
            raise ModelFolderError(
                f"model.id: {model.id} is the run of {earlier}, which was not trained here; "
                f"`internvl train {earlier}` first, or set model.id to another model"
            )
        try:
            return _open(model.id, search, None, above)
        except ModelFolderError as error:
            if not is_run(folder) or Path(model.id).expanduser().exists():
                raise
            raise ModelFolderError(
                f"{folder}: its base model is not there ({error}); {search.remedy}"
            ) from error
    paths: dict[str, Any] = {key: getattr(model, key) for key in _PART_KEYS}
    names = {key: str(name) for key, name in paths.items() if name is not None}
    located_parts = {key: locate(key, name) for key, name in names.items()}
    paths |= {
        key: type(paths[key])(located.path)
        for key, located in located_parts.items()
        if located is not None
    }
    return open_parts(replace(model, **paths), recipe.seed)


_PART_KEYS = ("vision", "language", "projector")
"""Keys of a model from parts that name a file or folder."""


def places(recipe: Recipe, start: OpenedModel) -> dict[str, Place]:
    """Returns the places of a recipe's model or parts as `base.json` holds them; no hub ids."""
    if start.parts is not None:
        paths = {key: getattr(start.parts, key) for key in _PART_KEYS}
        return {
            key: bases.new_place(str(getattr(recipe.model, key)), Path(path))
            for key, path in paths.items()
            if path is not None and Path(path).expanduser().exists()
        }
    if start.local is None:
        return {}
    return {"id": bases.new_place(start.name, start.local, start.step)}


def open_parts(model: ModelConfig, seed: int, tiles: TilesConfig | None = None) -> OpenedModel:
    """Opens the parts of a chat model as one model; no weight is read.

    Args:
        seed: seed of a fresh projector and of new token embeddings.
        tiles: tiling and tile size; by default one tile of the tower's own size.

    Raises:
        ModelFolderError: a part is missing; it is named.
        UserError: unknown conversation template.
    """
    # First: an unknown template costs no download of a part.
    settings = parts_settings(model, tiles)
    vision, language = _part_folders(model)
    from internvl.data.tokenizers import add_special_tokens, load_tokenizer
    from internvl.models.chat import assemble

    folders = assemble.Parts(vision, language, model.projector)
    tokenizer = load_tokenizer(folders.language)
    if tokenizer is None:
        raise ModelFolderError(
            f"{folders.language}: has no tokenizer files; copy those of the release there"
        )
    # Before the files: the tokenizer decides how many rows the embeddings get.
    num_new = add_special_tokens(tokenizer)
    files = assemble.assemble(folders, settings, rows=len(tokenizer), num_new=num_new, seed=seed)
    return OpenedModel(model.name, files, parts=model, parts_tokenizer=tokenizer)


def parts_settings(model: ModelConfig, tiles: TilesConfig | None = None) -> dict[str, Any]:
    """Returns the official keys of a model from parts besides its sections.

    Raises:
        UserError: unknown conversation template.
    """
    return {
        "template": template(str(model.template)).name,
        "ps_version": model.ps_version or "v2",
        "select_layer": -1 if model.select_layer is None else model.select_layer,
        "dynamic_image_size": tiles is not None and tiles.max > 1,
        "use_thumbnail": tiles is not None and tiles.thumbnail,
        "min_dynamic_patch": 1 if tiles is None else tiles.min,
        "max_dynamic_patch": 1 if tiles is None else tiles.max,
        "force_image_size": None if tiles is None else tiles.size,
    }


def check_start(recipe: Recipe, *, weights: bool) -> None:
    """Checks that the model a recipe starts from is there; reads no weight, imports no torch.

    Args:
        weights: whether its weights must be there too.

    Raises:
        ModelFolderError: as `open_start`.
        UserError: a model that does not train here.
    """
    _check_released(recipe.model)
    if recipe.model.id is None:
        _part_folders(recipe.model)
    else:
        open_start(recipe).check(weights=weights)


def check_trains(name: str, architecture: str) -> None:
    """Raises UserError if a chat model with this class of language model does not train here."""
    if architecture == "GptOssForCausalLM":
        raise UserError(
            f"{name}: GPT-OSS answers and exports here, but does not train: packed rows have no "
            "sliding windows; choose a model with another language model"
        )


def _check_released(model: ModelConfig) -> None:
    """Raises UserError for a released model that does not train, before it is downloaded."""
    name = str(model.language if model.id is None else model.id)
    # A folder of a released model's name may hold a changed model.
    if Path(name).expanduser().is_dir():
        return
    try:
        if model.id is None:
            language = zoo.find_language_model(name)
        else:
            language = zoo.LANGUAGE_MODELS[zoo.find(name).language]
    # Others are known by their files only.
    except UnknownModel:
        return
    check_trains(model.name, language.get("architectures", [""])[0])


def _part_folders(model: ModelConfig) -> tuple[Path, Path]:
    """Returns the folders of the vision tower and the language model."""
    return _part_folder("vision", model.vision), _part_folder("language", model.language)


def _part_folder(key: str, name: str | None) -> Path:
    try:
        return hub.find_folder(str(name))
    except ModelFolderError as error:
        # The caller gave two folders: the message must say which of them it is about.
        raise ModelFolderError(f"model.{key}: {error}") from None


def is_run(folder: Path) -> bool:
    """True if `train` wrote the folder."""
    return (folder / "recipe.yaml").is_file()
