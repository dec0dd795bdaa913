"""What a user holds: `load` turns a folder or hub id into a model, tokenizer and template."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig, PreTrainedTokenizerFast

from internvl import zoo
from internvl.compute import backends, kernels, placement
from internvl.config import ModelConfig, Recipe, TilesConfig
from internvl.config.recipes import load_recipe
from internvl.data.templates import TEMPLATES, Template, template
from internvl.data.tokenizers import add_special_tokens, check_vocabulary, load_tokenizer
from internvl.errors import ModelFolderError, UserError
from internvl.inference import inherited
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.inference.inherited import Completed, tiling
from internvl.models import configs, hub
from internvl.models.adapters import folder as adapter_folder
from internvl.models.adapters import lora
from internvl.models.chat import assemble
from internvl.models.chat import model as chat_model
from internvl.models.dual import files as dual_files
from internvl.models.dual.model import DualModel
from internvl.training import checkpoint

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Description:
    """What a chat folder is, before any weight is read."""

    config: InternVLConfig
    tokenizer: PreTrainedTokenizerFast | None
    template: Template
    tiles: TilesConfig
    system_message: str | None


def load(
    name_or_folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    image_token_id: int | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    drop_path: float = 0.0,
    attention: str = "sdpa",
    image_size: int | None = None,
) -> Any:
    """The model of a folder or hub id, in either layout, of an adapter folder with its base, of a
    run folder at its newest checkpoint, or of InternVL-C's own `.pth` file (or its folder).

    Args:
        device: by default the GPU, if there is one.
        dtype: by default bfloat16 on a GPU, float32 on a CPU.
        image_token_id: id of the placeholder token, for a folder without tokenizer files.
        device_map: "auto" spreads the model over all GPUs.
        quantize: "8bit" or "4bit" through bitsandbytes, which is made for a GPU.
        drop_path: stochastic depth of the vision tower, in training.
        attention: `transformers`' attention implementation.
        image_size: another tile side in px; the position embeddings are resized to it.

    Returns:
        A `Chat`, or for InternVL-14B a `Dual`; which one, only the folder says.

    Raises:
        ModelFolderError: one sentence on what is wrong with the folder, and the remedy.
    """
    place = device_of(device)
    precision = _dtype(dtype, place)
    if is_run(Path(name_or_folder)):
        return _load_run(Path(name_or_folder), place, precision)
    given: dict[str, Any] = {
        "image_token_id": image_token_id,
        "device_map": device_map,
        "quantize": quantize,
        "drop_path": drop_path,
        "attention": attention,
        "image_size": image_size,
    }
    source, adapter = open_files(name_or_folder)
    if adapter is None:
        return _load_files(source, place, precision, **given)
    if adapter == source.folder:
        return _adapted(_load_files(source, place, precision, **given), adapter)
    base = load(adapter_folder.base_of(adapter), device=place, dtype=precision, **given)
    return _adapted(base, adapter)


def _adapted(base: Chat | Dual, folder: Path) -> Chat | Dual:
    """The model with the adapters of a folder; those it has already are merged first."""
    if lora.has_adapters(base.model):
        lora.merge(base.model)
    lora.load_adapter(base.model, folder)
    return base


def _load_files(
    source: hub.ModelFolder,
    place: torch.device,
    precision: torch.dtype,
    *,
    image_token_id: int | None,
    device_map: str | dict[str, Any] | None,
    quantize: str | None,
    drop_path: float,
    attention: str,
    image_size: int | None,
) -> Chat | Dual:
    """The model of opened files; arguments as for `load`."""
    if source.family == "dual":
        if quantize is not None:
            raise UserError(f"quantize={quantize!r}: InternVL-14B is used in bfloat16 or float32")
        dual = dual_files.load_model(
            source,
            device=place,
            dtype=precision,
            image_size=image_size,
            drop_path=drop_path,
            attention=attention,
            device_map=device_map,
        )
        return Dual(dual, _caption_tokenizer(source.folder, dual), source.folder)
    head = describe(source.folder, image_token_id)
    tiles = head.tiles if image_size is None else replace(head.tiles, size=image_size)
    model = chat_model.load_model(
        source.folder,
        device=place,
        dtype=precision,
        image_token_id=head.config.image_token_id,
        image_size=image_size,
        drop_path=drop_path,
        attention=attention,
        device_map=device_map,
        quantize=quantize,
    )
    return Chat(model, head.tokenizer, head.template, tiles, head.system_message, source.folder)


def device_of(device: str | torch.device | None) -> torch.device:
    """The device that is named; by default the GPU, if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def open_files(
    name_or_folder: str | Path, *, above: tuple[Path, ...] = ()
) -> tuple[hub.ModelFolder, Path | None]:
    """(the files of the model, the folder of its adapters or None).

    Adapters beside a model's weights are that model's, as in transformers, whatever base they name.
    The base of an adapter folder may have adapters of its own, or be a run; the files are then
    those of the model below them all.

    Args:
        above: the adapter folders that led here.

    Raises:
        ModelFolderError: no such folder, file or id.
    """
    pth = Path(name_or_folder)
    if pth.suffix != ".pth":
        folder = hub.find_folder(name_or_folder)
        alone = [] if (folder / "config.json").is_file() else list(folder.glob("*.pth"))
        pth = alone[0] if len(alone) == 1 else folder
    if pth.suffix == ".pth":
        released = zoo.official_config(zoo.find("InternVL-14B-224px"))
        return dual_files.open_pth(pth, released), None
    if folder.resolve() in above:
        raise ModelFolderError(
            f"{above[-1] / adapter_folder.CONFIG_FILE}: base_model_name_or_path leads back to "
            f"{folder}; set it to the model the adapters were trained on"
        )
    beneath = (*above, folder.resolve())
    if is_run(folder):
        return open_files(load_recipe(folder / "recipe.yaml").model.id, above=beneath)[0], None
    if adapter_folder.is_adapter(folder):
        return open_files(adapter_folder.base_of(folder), above=beneath)[0], folder
    if not (folder / "config.json").is_file():
        adapter_folder.check_complete(folder)
    return hub.open_folder(folder), folder if adapter_folder.is_beside_model(folder) else None


def _caption_tokenizer(folder: Path, model: DualModel) -> PreTrainedTokenizerFast | None:
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config.text_config.vocab_size, folder)
    return tokenizer


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `train` wrote."""
    return (folder / "recipe.yaml").is_file()


def _load_run(folder: Path, device: torch.device, dtype: torch.dtype) -> Chat | Dual:
    """The model a run started from, with the weights of its newest checkpoint in place.

    Raises:
        ModelFolderError: the run has no checkpoint yet.
    """
    chat = _restored(folder, load_recipe(folder / "recipe.yaml"))
    return replace(chat, model=chat.model.to(device, dtype).eval())


def _restored(folder: Path, recipe: Recipe) -> Chat | Dual:
    """As `for_training` makes it, with the weights of the run's newest checkpoint."""
    # Adapters trained on a quantized base are used and merged on the base as it was released.
    recipe = replace(recipe, model=replace(recipe.model, quantize=None))
    saved = checkpoint.steps(folder / "checkpoints")
    if not saved:
        raise ModelFolderError(f"{folder}: the run has no checkpoint yet; train it first")
    chat = for_training(recipe)
    checkpoint.load_weights(folder / "checkpoints", saved[-1], chat.model)
    return chat


def load_as_trained(folder: Path, device: torch.device, dtype: str) -> Chat | Dual:
    """The model of a run as its own evaluations have it: trained weights in float32, frozen ones in
    `dtype`, the recipe's attention; for use within `parallel.evaluating`.

    The weights under adapters are as released: neither quantized nor in float8.

    Raises:
        ModelFolderError: the run has no checkpoint yet.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    chat = _restored(folder, recipe)
    placement.to_device(chat.model, device, dtype)
    compute = backends.available_compute(replace(recipe.compute, float8=False), device)
    kernels.apply_compute(chat.model, device, compute)
    return replace(chat, model=chat.model.eval())


def for_training(recipe: Recipe) -> Chat | Dual:
    """The model of a recipe, with what trains chosen and adapters attached: on the CPU in float32,
    or quantized where it will train.

    What the recipe says of template, system message and tiles goes into the model's configuration,
    so that an export carries it.

    Raises:
        UserError: a model that does not train here or with this objective, a part it does not have,
            or no bitsandbytes to quantize with.
    """
    if not inherited.is_complete(recipe):
        recipe = complete(recipe).recipe
    quantize = recipe.model.quantize
    loaded = load(
        recipe.model.id,
        device="cpu" if quantize is None or recipe.device == "cpu" else None,
        dtype="float32" if quantize is None else recipe.dtype,
        quantize=quantize,
        drop_path=recipe.model.drop_path,
        image_size=recipe.data.tiling.size,
    )
    check_objective(recipe, isinstance(loaded, Dual))
    _choose_trainable(loaded.model, recipe.model)
    return loaded if isinstance(loaded, Dual) else _with_settings(loaded, recipe)


def complete(recipe: Recipe) -> Completed:
    """The recipe with what it leaves open taken from its run folder, where a run goes on, else from
    its checkpoint; no weight is read.

    Raises:
        ModelFolderError: the checkpoint cannot be used.
        UserError: the objective or the tiles do not fit it; of tiles all in one sentence.
    """
    if is_run(recipe.run):
        saved = _recipe_of(recipe.run)
        if saved.model.id == recipe.model.id:
            return inherited.complete(recipe, inherited.of_run(saved, recipe.run / "recipe.yaml"))
    start = _checkpoint_of(recipe.model.id)
    check_objective(recipe, start.dual)
    return inherited.complete(recipe, start)


def _checkpoint_of(name: str) -> inherited.Checkpoint:
    """What a model or run folder, or a hub id, says of images and conversations."""
    if is_run(Path(name)):
        return inherited.of_run(_recipe_of(Path(name)), Path(name) / "recipe.yaml")
    files, _ = open_files(name)
    return inherited.of_files(files, inherited.named(name, files.folder))


def _recipe_of(run: Path) -> Recipe:
    """The recipe in a run folder, complete: earlier versions left the template open there."""
    recipe = load_recipe(run / "recipe.yaml")
    if inherited.is_complete(recipe):
        return recipe
    return inherited.complete(recipe, _checkpoint_of(recipe.model.id)).recipe


def check_objective(recipe: Recipe, dual: bool) -> None:
    """Raises UserError where the recipe's objective is not for its model: `dual` is InternVL-14B's
    or a chat model's."""
    if recipe.objective.packs != dual:
        return
    fitting = "retrieval or stage2" if dual else "sft"
    raise UserError(
        f"objective.name: {recipe.model.id} does not train with {recipe.objective.name}; choose "
        f"{fitting}, or another model"
    )


def _choose_trainable(model: Any, config: ModelConfig) -> None:
    if lora.has_adapters(model):
        if config.quantize is not None:
            raise UserError(
                f"model.quantize: {config.id} has adapters, which quantized weights cannot take "
                f"in; `internvl merge {config.id} --to FOLDER`, and set model.id to FOLDER"
            )
        lora.merge(model)  # training goes on from what the model computes
    lora.select_trainable(model, config.parts, config.train_last_vision_blocks)
    if config.lora is not None:
        lora.attach(model, config.lora)


def _with_settings(chat: Chat, recipe: Recipe) -> Chat:
    """The chat model as the recipe wants it used."""
    model, data = chat.model, recipe.data
    if configs.language_model(model.config) == "GptOssForCausalLM":
        raise UserError(
            f"{recipe.model.id}: GPT-OSS answers and exports here, but does not train: packed rows "
            "have no sliding windows; choose a model with another language model"
        )
    tiles, chosen = data.tiling, template(data.template) if data.template else chat.template
    system = chat.system_message if data.system_message is None else data.system_message
    model.config.internvl = configs.chat_settings(model.config) | {
        "template": chosen.name,
        # As a release says it: null where the template's own holds.
        "system_message": None if system == chosen.system_message else system,
        "dynamic_image_size": tiles.max > 1,
        "use_thumbnail": tiles.thumbnail,
        "min_dynamic_patch": tiles.min,
        "max_dynamic_patch": tiles.max,
        "pad2square": tiles.pad_square,
        "normalize": data.statistics,
        "exif": data.exif,
    }
    return replace(chat, template=chosen, system_message=system, tiles=tiles)


def describe(folder: Path, image_token_id: int | None = None) -> Description:
    """Configuration, tokenizer, template and tiling of a chat folder; no weight is read.

    Raises:
        ModelFolderError: not a chat model, or tokenizer files of another model.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and image_token_id is None:
        image_token_id = _image_token_id(tokenizer, folder)
    config = chat_model.read_config(hub.open_folder(folder), image_token_id)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.text_config.vocab_size, folder)
    settings = configs.chat_settings(config)
    return Description(
        config=config,
        tokenizer=tokenizer,
        template=_known_template(settings["template"], folder),
        tiles=tiling(settings, config.vision_config.image_size[0]),
        system_message=settings["system_message"],
    )


def build(
    vision: str | Path,
    language: str | Path,
    *,
    template_name: str,
    ps_version: str = "v2",
    select_layer: int = -1,
    projector: Path | None = None,
    tiles: TilesConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
) -> Chat:
    """A chat model from a standalone InternViT and a language model, by folder or hub id.

    The tokens of a chat model are added to the tokenizer and to the embeddings.

    Args:
        template_name: conversation template.
        ps_version: pixel shuffle, "v2" or, as Chat 1.2 has it, "v1".
        select_layer: which block's output of the tower is read, -1 or -4.
        projector: `mlp_projector/*.pth` of a release; None starts a fresh one.
        tiles: tiling and tile size; by default one tile of the tower's own size.

    Raises:
        ModelFolderError: a part is missing or does not fit.
    """
    chosen = template(template_name)
    folders = assemble.Parts(hub.find_folder(vision), hub.find_folder(language), projector)
    tokenizer = load_tokenizer(folders.language)
    if tokenizer is None:
        raise ModelFolderError(f"{folders.language}: has no tokenizer files")
    num_new = add_special_tokens(tokenizer)
    settings = {
        "template": chosen.name,
        "ps_version": ps_version,
        "select_layer": select_layer,
        "dynamic_image_size": tiles is not None and tiles.max > 1,
        "use_thumbnail": tiles is not None and tiles.thumbnail,
        "min_dynamic_patch": 1 if tiles is None else tiles.min,
        "max_dynamic_patch": 1 if tiles is None else tiles.max,
        "force_image_size": None if tiles is None else tiles.size,
    }
    image_token_id = _image_token_id(tokenizer, folders.language)
    place = torch.device(device)
    model = assemble.assemble(
        folders, settings, image_token_id=image_token_id, device=place, dtype=_dtype(dtype, place)
    )
    assemble.resize_vocabulary(model, len(tokenizer), num_new)
    size = model.config.vision_config.image_size[0]
    own = tiles or tiling(configs.chat_settings(model.config), size)
    return Chat(model, tokenizer, chosen, own, None, folders.language)


def _known_template(name: str | None, folder: Path) -> Template:
    if name not in TEMPLATES:
        raise ModelFolderError(
            f"{folder / 'config.json'}: its conversation template {name!r} is not known here; "
            f"known are {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _image_token_id(tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    known = tokenizer.get_vocab()
    if chat_model.IMAGE_TOKEN not in known:
        raise ModelFolderError(
            f"{folder}: its tokenizer has no {chat_model.IMAGE_TOKEN}; this is a language model's, "
            "take the tokenizer files of the chat model's release"
        )
    return known[chat_model.IMAGE_TOKEN]
