"""PEFT adapter folders, read so that the model computes what plain `peft` computes.

PEFT decides: its own matching rules choose layers, ranks and alphas, under the names that the file
was written with; its own layers compute them. What is done here is translation: the file's names
become the model's, and a configuration that names each layer is handed to PEFT. What only replaces
weights of the base (`modules_to_save`, biases, trained tokens, embeddings) is written into it.
"""

import dataclasses
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import __version__ as peft_version
from peft import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from internvl.models import hub, keys
from internvl.models.hub import LazyTensor, ModelFolderError

logger = logging.getLogger(__name__)

ADAPTER = "default"
"""The name of the one adapter a model has at a time."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"

EMBEDDINGS, HEAD = "model.language_model.embed_tokens", "lm_head"
"""The two matrices that may be one (tied)."""

_MERGE = "merge it with peft (merge_and_unload) and use the merged model"
_REFUSED = {
    "layer_replication": "repeats layers of its base, which then is no InternVL model any more; "
    "train an adapter without it",
    "megatron_config": "is for the layers of Megatron-LM; set it to null if the adapter sits on "
    "plain linear layers",
    "alora_invocation_tokens": "switches the adapter on at a certain place of the text, which is "
    "not computed here and cannot be merged; use the adapter through peft, or train one without it",
    "arrow_config": "routes each token among several adapters, which cannot be merged; combine "
    "them with peft's add_weighted_adapter, and load the result",
    "use_qalora": "is for a base quantized by GPTQ, whose inputs it pools; train an adapter "
    "without it",
}
"""Settings that are not computed here: field -> why, and the remedy."""
_HEADS_OF_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_TRAINING_ONLY = ("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "merge_weights", "enable_lora")
"""Keys that other trainers or older versions of PEFT write and that `peft` does not read."""
_CHANGES_BASE = ("pissa", "olora", "loftq")
"""Initialisations that PEFT repeats at loading, and that take a part out of the base."""
_VARIANTS = ("velora_config", "monteclora_config", "kasa_config", "use_bdlora")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and no model (a `config.json` alone is no model)."""
    return (folder / CONFIG_FILE).is_file() and not _has_model(folder)


def is_beside_model(folder: Path) -> bool:
    """Whether a model folder also holds adapters, which then belong to it, as in transformers."""
    return (folder / CONFIG_FILE).is_file() and _has_model(folder)


def _has_model(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    names = ("model.safetensors", "pytorch_model.bin")
    known = [folder / f"{name}{end}" for name in names for end in ("", ".index.json")]
    shards = (file for file in folder.glob("*.safetensors") if file.name != WEIGHTS_FILE)
    return any(file.is_file() for file in known) or any(True for _ in shards)


def check_complete(folder: Path) -> None:
    """Raises ModelFolderError for the weights of an adapter without its configuration."""
    for name in (WEIGHTS_FILE, _PICKLED_FILE):
        if (folder / name).is_file() and not (folder / CONFIG_FILE).is_file():
            raise ModelFolderError(
                f"{folder / CONFIG_FILE}: missing beside {name}; copy the adapter folder again"
            )


def base_of(folder: Path) -> Path:
    """The folder of the model that an adapter folder belongs to (itself an adapter's, perhaps).

    Raises:
        ModelFolderError: no base is named, or it is not there.
    """
    file = folder / CONFIG_FILE
    config = hub.read_json(file)
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelFolderError(
            f"{file}: names no base_model_name_or_path; set it to the model the adapters were "
            "trained on"
        )
    if not Path(base).expanduser().exists() and config.get("revision") not in (None, "main"):
        raise ModelFolderError(
            f"{file}: revision = {config['revision']!r} of the base is not fetched here; download "
            "it into a folder and set base_model_name_or_path to that"
        )
    if Path(base).suffix == ".pth" and Path(base).is_file():
        return Path(base)
    try:
        found = hub.find_folder(base)
    except ModelFolderError as error:
        raise ModelFolderError(
            f"{file}: its base model is not there ({error}); set base_model_name_or_path to the "
            "folder of that model"
        ) from error
    if found.resolve() == folder.resolve():
        raise ModelFolderError(
            f"{file}: base_model_name_or_path is this folder, which has no model; set it to the "
            "model the adapters were trained on"
        )
    return found


def read_settings(folder: Path) -> PeftLoraConfig:
    """`adapter_config.json` as PEFT's configuration.

    A key that PEFT does not know is named in the log and has no effect, as in PEFT itself.

    Raises:
        ModelFolderError: no LoRA, or a setting that is not computed here, by name.
    """
    file = folder / CONFIG_FILE
    tree = hub.read_json(file)
    if tree.get("peft_type") != "LORA":
        raise ModelFolderError(
            f"{file}: peft_type = {tree.get('peft_type')!r}; only LoRA adapters are read here, so "
            + _MERGE
        )
    fields = {field.name for field in dataclasses.fields(PeftLoraConfig)}
    _check_unknown(file, {key: value for key, value in tree.items() if key not in fields})
    for key, reason in _REFUSED.items():
        if tree.get(key):
            raise ModelFolderError(f"{file}: {key} = {tree[key]!r} {reason}")
    _check_values(file, tree)
    with _foreign_errors(file):
        return PeftLoraConfig(**{key: value for key, value in tree.items() if key in fields})


def _check_unknown(file: Path, unknown: Mapping[str, Any]) -> None:
    for key, value in unknown.items():
        if key.startswith("use_") and value:
            # A switch that is on and that this PEFT does not know surely changes the function.
            raise ModelFolderError(
                f"{file}: {key} = {value!r} is not known to peft {peft_version}; install the peft "
                "that wrote this folder and merge it there, or remove the key if it is about "
                "training alone"
            )
        if value not in (None, False, [], {}) and key not in _TRAINING_ONLY:
            logger.warning(
                "%s: %s is not known to peft %s and has no effect", file, key, peft_version
            )


def _check_values(file: Path, tree: Mapping[str, Any]) -> None:
    """Raises ModelFolderError for values of known settings that are not computed here."""
    init = tree.get("init_lora_weights", True)
    if str(init).lower().startswith("corda"):
        raise ModelFolderError(
            f"{file}: init_lora_weights = {init!r} changed the base by statistics that no adapter "
            "folder holds; save it through peft's path_initial_model_for_weight_conversion, which "
            "makes plain LoRA of it"
        )
    if tree.get("task_type") in _HEADS_OF_TASKS:
        raise ModelFolderError(
            f"{file}: task_type = {tree['task_type']!r} has a head of its own, which a chat model "
            "has not; use the adapter through peft"
        )
    if tree.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ModelFolderError(f"{file}: bias = {tree['bias']!r}; it is none, all or lora_only")
    if not tree.get("target_modules") and not tree.get("target_parameters"):
        raise ModelFolderError(
            f"{file}: names no target_modules; copy the adapter folder again, or set it to the "
            "layers that the adapters sit on"
        )


@contextmanager
def _foreign_errors(file: Path) -> Iterator[None]:
    """PEFT's exceptions as a sentence, its warnings as lines of the log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except ModelFolderError:
            raise
        # What PEFT makes of a setting is its own: it raises ValueError, TypeError, KeyError,
        # re.error, ImportError and others.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelFolderError(
                f"{file}: peft {peft_version} cannot use it ({reason}); correct the setting, or "
                "save the adapter again"
            ) from error
    for warning in caught:
        logger.warning("%s: %s", file, str(warning.message).strip().splitlines()[0])


def read_tensors(folder: Path) -> tuple[Path, dict[str, LazyTensor]]:
    """(file, tensors by their names in it); safetensors first, as PEFT does.

    Raises:
        ModelFolderError: no such file, or one that is damaged or empty.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file() and (folder / _PICKLED_FILE).is_file():
        file = folder / _PICKLED_FILE
        tensors = {name: _in_memory(tensor) for name, tensor in _unpickled(file).items()}
    elif not file.is_file():
        raise ModelFolderError(f"{file}: missing; copy the adapter folder again")
    else:
        tensors = dict(hub.open_tensors(file))
    if not tensors:
        raise ModelFolderError(f"{file}: holds no tensors; copy the adapter folder again")
    return file, tensors


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        # Not mapped as a model's files are: adapters are small, and old files cannot be mapped.
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    # Whatever torch's unpickler makes of a damaged or foreign file.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFolderError(
            f"{file}: not a plain file of tensors ({reason}); copy the adapter folder again, or "
            "save it as safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelFolderError(
            f"{file}: not a plain dict of tensors; save the adapter again with save_pretrained"
        )
    return {str(name): tensor for name, tensor in loaded.items()}


def _in_memory(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: of an adapter (`rest`), or of the base's `parameter`."""

    stored: str
    """Its name in the file."""
    tensor: LazyTensor
    module: str
    """The layer it belongs to, by the file's names, without wrappers."""
    rest: str = ""
    """`lora_A.weight`, …; empty for the base's own."""
    nesting: str = ""
    """`.base_layer` once for each adapter that an adapted parameter lies under."""
    leaf: str = ""
    """The base's parameter in `module`, or `TOKENS`."""
    adapter: str | None = None
    """The adapter's name, where the tensor's name holds it, as `model.state_dict()` writes it."""


TOKENS = "trainable_tokens_delta"
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_OF_ADAPTER = re.compile(
    r"(?P<module>.+?)(?P<nesting>(?:\.base_layer)*)\.(?P<part>lora_[A-Za-z_]+)(?:\.(?P<rest>.+))?"
)
_OF_TOKENS = re.compile(
    rf"(?P<module>.+?)\.token_adapter\.{TOKENS}(?:\.(?P<adapter>[^.]+))?(?:\.weight)?"
)
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
_UNUSED = (".original_module.", ".trainable_tokens_original", ".token_indices")


def parse(stored: str, tensor: LazyTensor) -> Entry | None:
    """What a tensor's name says; None for a copy that no adapter uses."""
    name = re.sub(r"^(module\.)+", "", _without_wrappers(stored))
    name = re.sub(r"(^|\.)(base_model\.model\.)+", r"\1", name)
    if any(word in name for word in _UNUSED):
        return None
    if match := _OF_TOKENS.fullmatch(name):
        return Entry(stored, tensor, match["module"], leaf=TOKENS, adapter=match["adapter"])
    if match := _OF_ADAPTER.fullmatch(name):
        rest, adapter = _split_adapter(match["part"], match["rest"])
        return Entry(
            stored, tensor, match["module"], rest=rest, nesting=match["nesting"], adapter=adapter
        )
    adapter = None
    if match := _SAVED.fullmatch(name):
        name, adapter = f"{match['module']}.{match['rest']}", match["adapter"]
    name = name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
    module, _, leaf = name.rpartition(".")
    return Entry(stored, tensor, module, leaf=leaf, adapter=adapter)


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _split_adapter(part: str, rest: str | None) -> tuple[str, str | None]:
    """(the name a PEFT folder has, the adapter's name where there was one)."""
    words = rest.split(".") if rest else []
    if part in ("lora_A", "lora_B"):
        return f"{part}.{words[-1] if words else 'weight'}", words[0] if len(words) == 2 else None
    if part == "lora_monteclora_sampler":
        return f"{part}.{rest}", None
    named = [word for word in words if word != "weight"]
    return part, named[0] if named else None


@dataclass(frozen=True)
class Naming:
    """The model's modules and parameters by the names that one kind of file has for them."""

    modules: Mapping[str, tuple[str, ...]]
    """Several of ours where theirs is fused."""
    parameters: Mapping[str, tuple[tuple[str, ...], keys.Change]]

    def knows(self, entry: Entry) -> bool:
        if entry.rest or entry.leaf == TOKENS:
            return entry.module in self.modules
        return f"{entry.module}.{entry.leaf}" in self.parameters

    def ours(self, entry: Entry) -> tuple[str, ...]:
        if entry.rest or entry.leaf == TOKENS:
            return self.modules[entry.module]
        return self.parameters[f"{entry.module}.{entry.leaf}"][0]


_SAME = keys.Rename()
_Value = TypeVar("_Value")
_LANGUAGE = "model.language_model."


def _namings(model: Any) -> Iterator[Naming]:
    """Every way to name this model's weights, the model's own first."""
    modules = [name for name, _ in model.named_modules() if name]
    parameters = list(model.state_dict())
    yield _renamed(modules, parameters, lambda name: name)
    # transformers before 4.52, whose names the -hf releases keep
    yield _renamed(modules, parameters, keys.ours_to_hf)
    # the language model trained alone, with its head and without
    yield _renamed(modules, parameters, _alone("model."))
    yield _renamed(modules, parameters, _alone(""))
    official = _official(model.config, parameters)
    yield official
    for tower in ("language_model.", "vision_model.", "qllama."):
        yield Naming(_below(official.modules, tower), _below(official.parameters, tower))


def _alone(prefix: str) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        if name.startswith(_LANGUAGE):
            return prefix + name.removeprefix(_LANGUAGE)
        return name if prefix and name.startswith("lm_head.") else None

    return rename


def _renamed(
    modules: Iterable[str], parameters: Iterable[str], rename: Callable[[str], str | None]
) -> Naming:
    # Rules are prefixes that end in a dot, so that a module is renamed as what lies in it.
    theirs = ((rename(f"{name}."), name) for name in modules)
    named = ((rename(name), name) for name in parameters)
    return Naming(
        {name.removesuffix("."): (ours,) for name, ours in theirs if name},
        {name: ((ours,), _SAME) for name, ours in named if name},
    )


def _official(config: Any, parameters: Iterable[str]) -> Naming:
    modules: dict[str, tuple[str, ...]] = {}
    named: dict[str, tuple[tuple[str, ...], keys.Change]] = {}
    for group in keys.groups(config, parameters):
        if len(group.official) > 1:
            continue  # experts, each a layer of its own there and all one tensor here
        official = group.official[0]
        named[official] = (group.ours, group.change)
        if official.endswith(".weight"):
            modules[official.removesuffix(".weight")] = tuple(
                name.removesuffix(".weight") for name in group.ours
            )
    return Naming(modules, named)


def _below(names: Mapping[str, _Value], prefix: str) -> dict[str, _Value]:
    return {n.removeprefix(prefix): v for n, v in names.items() if n.startswith(prefix)}


def choose_naming(model: Any, file: Path, entries: list[Entry]) -> Naming:
    """The names that the file has been written with.

    Raises:
        ModelFolderError: layers this model does not have, or names that mean several layers.
    """
    candidates = list(_namings(model))
    fitting = [n for n in candidates if all(n.knows(entry) for entry in entries)]
    if not fitting:
        closest = max(candidates, key=lambda n: sum(n.knows(entry) for entry in entries))
        unknown = [entry.stored for entry in entries if not closest.knows(entry)]
        raise ModelFolderError(
            f"{file}: {unknown[0]} is for a layer that this model does not have "
            f"({len(unknown)} of {len(entries)} tensors); these adapters are of another model"
        )
    for other in fitting[1:]:
        for entry in entries:
            if other.ours(entry) != fitting[0].ours(entry):
                raise ModelFolderError(
                    f"{file}: {entry.stored} can be {fitting[0].ours(entry)[0]} or "
                    f"{other.ours(entry)[0]}; save the adapter again from the whole model"
                )
    return fitting[0]


@dataclass(frozen=True)
class Replaced:
    """Values for a parameter of the base, or for some `rows` of it."""

    name: str
    stored: str
    read: Callable[[], Tensor]
    rows: list[int] | None
    alone: bool
    """Whether the matrix tied with it keeps its own values."""


@dataclass(frozen=True)
class Resolved:
    """What an adapter folder means for one model."""

    file: Path
    settings: PeftLoraConfig
    """Names every layer in full, by the model's names."""
    tensors: Mapping[str, tuple[str, Callable[[], Tensor]]]
    """By the names of PEFT's state: (the name in the file, values)."""
    replaced: list[Replaced]


def resolve(model: Any, folder: Path) -> Resolved:
    """An adapter folder in terms of `model`, which is not changed.

    Raises:
        ModelFolderError: what is wrong with the folder, or does not fit the model.
    """
    settings = read_settings(folder)
    file, stored = read_tensors(folder)
    entries = [entry for name, t in stored.items() if (entry := parse(name, t)) is not None]
    named = sorted({entry.adapter for entry in entries if entry.adapter is not None})
    if len(named) > 1:
        raise ModelFolderError(
            f"{file}: holds {len(named)} adapters ({', '.join(named)}); save the one you want with "
            "save_pretrained(selected_adapters=[NAME])"
        )
    naming = choose_naming(model, file, entries)
    with _foreign_errors(folder / CONFIG_FILE):
        layers = _Layers(model, settings, naming, file)
        layers.check(entries)
        return Resolved(
            file,
            layers.translated(entries),
            dict(layers.tensors(entries)),
            list(layers.replaced(entries)),
        )


class _Layers:
    """PEFT's settings asked about a model under the file's names."""

    def __init__(self, model: Any, settings: PeftLoraConfig, naming: Naming, file: Path) -> None:
        self.model, self.settings, self.naming, self.file = model, settings, naming, file
        self.own_names = all(ours == (theirs,) for theirs, ours in naming.modules.items())
        if str(settings.target_modules).lower() == "all-linear":
            self.settings = replace(settings, target_modules=self._linear())
        self.parameters = {
            ours: theirs
            for theirs, (names, _) in naming.parameters.items()
            if self._is_target_parameter(theirs)
            for ours in names
        }
        """Adapted parameters (`target_parameters`) by our name."""
        self.saved = list(settings.modules_to_save or ())

    def _linear(self) -> list[str]:
        """What `all-linear` stands for: PEFT leaves out the output matrix alone."""
        head = self.model.get_output_embeddings()
        modules = {name: self.model.get_submodule(name) for name in self._layers()}
        return [
            theirs
            for theirs, ours in self.naming.modules.items()
            if all(isinstance(modules[n], nn.Linear) and modules[n] is not head for n in ours)
        ]

    def _layers(self) -> list[str]:
        return [name for names in self.naming.modules.values() for name in names]

    def _is_target_parameter(self, theirs: str) -> bool:
        return any(
            theirs == target or theirs.endswith(f".{target}")
            for target in self.settings.target_parameters or ()
        )

    def targeted(self, theirs: str, *, by_ours: bool = False) -> bool:
        """Whether PEFT puts an adapter on the module."""
        names = self.naming.modules[theirs] if by_ours else (theirs,)
        return all(bool(check_target_module_exists(self.settings, name)) for name in names)

    def check(self, entries: list[Entry]) -> None:
        """Every layer that the settings name has tensors, and the other way round."""
        adapted = {e.module: e for e in entries if e.rest and not self._of_parameter(e)}
        by_ours = not self.own_names and not all(map(self.targeted, adapted))
        for module, entry in adapted.items():
            if not self.targeted(module, by_ours=by_ours) and not self._is_tied(module):
                raise ModelFolderError(
                    f"{self.file}: {entry.stored} is for a layer that {CONFIG_FILE} does not "
                    f"name (target_modules = {_short(self.settings.target_modules)}); the two "
                    "files are not of one adapter"
                )
        parts = {_part(self.naming.modules[module][0]) for module in adapted}
        left_out: set[str] = set()
        for theirs, ours in self.naming.modules.items():
            if theirs in adapted or not _takes_adapter(self.model.get_submodule(ours[0])):
                continue
            if not self.targeted(theirs, by_ours=by_ours):
                continue
            if _part(ours[0]) in parts or not adapted:
                raise ModelFolderError(
                    f"{self.file}: has no tensors for {theirs}, which {CONFIG_FILE} names "
                    f"(target_modules = {_short(self.settings.target_modules)}); copy the adapter "
                    "folder again"
                )
            left_out.add(_part(ours[0]))
        # A part that the file leaves out as a whole was not trained: in PEFT its B is zero.
        for part in sorted(left_out):
            logger.warning("%s: has no adapters for %s", self.file, part)
        self._check_replaced(entries, adapted)

    def _check_replaced(self, entries: list[Entry], adapted: Iterable[str]) -> None:
        """Every weight that the settings say is saved is in the file."""
        there = {f"{entry.module}.{entry.leaf}" for entry in entries if entry.leaf}
        biases = {f"{module}.bias" for module in adapted}
        for theirs in self.naming.parameters:
            bias = self.settings.bias
            wanted = self._is_saved(theirs)
            wanted |= bias == "all" and theirs.endswith(".bias")
            wanted |= bias == "lora_only" and theirs in biases
            if wanted and theirs not in there:
                raise ModelFolderError(
                    f"{self.file}: {theirs} is missing, which {CONFIG_FILE} says is saved "
                    "(modules_to_save, bias); copy the adapter folder again"
                )
        for layer in self.tokens():
            if f"{layer}.{TOKENS}" not in there:
                raise ModelFolderError(
                    f"{self.file}: {layer}.token_adapter.{TOKENS} is missing, which {CONFIG_FILE} "
                    "names (trainable_token_indices); copy the adapter folder again"
                )

    def _of_parameter(self, entry: Entry) -> bool:
        ours = self.naming.modules[entry.module][0]
        return any(name.rpartition(".")[0] == ours for name in self.parameters)

    def _is_tied(self, module: str) -> bool:
        """Whether the output matrix follows the embeddings' adapter (`ensure_weight_tying`)."""
        return self.settings.ensure_weight_tying and self.naming.modules[module] == (HEAD,)

    def _is_saved(self, theirs: str) -> bool:
        words = theirs.split(".")
        above = [".".join(words[:count]) for count in range(1, len(words))]
        return any(module.endswith(target) for module in above for target in self.saved)

    def tokens(self) -> dict[str, list[int]]:
        """Layer by the file's name -> rows that were trained (`trainable_token_indices`)."""
        chosen = self.settings.trainable_token_indices
        if not chosen:
            return {}
        ours = {names[0]: theirs for theirs, names in self.naming.modules.items()}
        if not isinstance(chosen, dict):
            return {ours[EMBEDDINGS]: list(chosen)}
        return {
            theirs: list(rows)
            for target, rows in chosen.items()
            for theirs in (ours[n] for n in (EMBEDDINGS, HEAD) if n in ours)
            if theirs.endswith(target) and not self._follows_embeddings(ours, theirs, chosen)
        }

    def _follows_embeddings(
        self, ours: dict[str, str], theirs: str, chosen: dict[str, list[int]]
    ) -> bool:
        """Whether PEFT stores the rows of a tied output matrix with the embeddings alone."""
        if theirs != ours.get(HEAD) or not is_tied(self.model):
            return False
        rows = [chosen[t] for t in chosen if ours[EMBEDDINGS].endswith(t) or theirs.endswith(t)]
        return len(rows) > 1 and all(row == rows[0] for row in rows)

    def translated(self, entries: list[Entry]) -> PeftLoraConfig:
        """The settings with every layer by its name in the model."""
        self._check_fused(entries)
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        names = [
            (e.module, ours)
            for e in entries
            if e.rest and not self._of_parameter(e)
            for ours in self.naming.modules[e.module]
        ]
        names += [(theirs, ours) for ours, theirs in self.parameters.items()]
        for theirs, ours in names:
            ranks[ours] = self._looked_up(self.settings.rank_pattern, theirs, ours, "r")
            alphas[ours] = self._looked_up(self.settings.alpha_pattern, theirs, ours, "lora_alpha")
        layers = [ours for _, ours in names if ours not in self.parameters]
        init = self.settings.init_lora_weights
        changes_base = str(init).lower().startswith(_CHANGES_BASE)
        return replace(
            replace_targets(self.settings, layers),
            # The values come from the file: drawing others first would only take time.
            init_lora_weights=init if changes_base or init == "mica" else False,
            target_parameters=list(self.parameters) or None,
            rank_pattern=_patterns(ranks, self.settings.r),
            alpha_pattern=_patterns(alphas, self.settings.lora_alpha),
        )

    def _looked_up(
        self, patterns: dict[str, Any] | None, theirs: str, ours: str, default: str
    ) -> Any:
        for name in (theirs, ours):
            key = get_pattern_key((patterns or {}).keys(), name)
            if key in (patterns or {}):
                return (patterns or {})[key]
        return getattr(self.settings, default)

    def _check_fused(self, entries: list[Entry]) -> None:
        """Raises ModelFolderError for what cannot be split where q, k and v were one layer."""
        fused = [e for e in entries if e.rest and len(self.naming.modules[e.module]) > 1]
        renamed = [
            e
            for e in entries
            if e.rest
            and self.naming.modules[e.module][0].rpartition(".")[2] != e.module.rpartition(".")[2]
        ]
        init = self.settings.init_lora_weights
        hindrances = [name for name in _VARIANTS if getattr(self.settings, name)]
        if str(init).lower().startswith((*_CHANGES_BASE, "mica")):
            hindrances.append("init_lora_weights")
        if hindrances and (fused or (renamed and self.settings.use_bdlora)):
            entry = (fused or renamed)[0]
            raise ModelFolderError(
                f"{self.file}: {entry.stored} is a layer of several here, for which "
                f"{hindrances[0]} cannot be taken apart; {_MERGE}"
            )

    def tensors(
        self, entries: list[Entry]
    ) -> Iterator[tuple[str, tuple[str, Callable[[], Tensor]]]]:
        """Of the adapters, by the names of PEFT's state for this model."""
        for entry in entries:
            if not entry.rest:
                continue
            names = self.naming.modules[entry.module]
            change = self.naming.parameters.get(f"{entry.module}.weight", ((), _SAME))[1]
            for index, ours in enumerate(names):
                read = entry.tensor.read
                if len(names) > 1 and not entry.rest.startswith("lora_A"):
                    read = _part_of(change, entry.tensor, index)
                yield f"{ours}{entry.nesting}.{entry.rest}", (entry.stored, read)

    def replaced(self, entries: list[Entry]) -> Iterator[Replaced]:
        """Weights of the base that the file has values for."""
        tokens = self.tokens()
        for entry in entries:
            if entry.leaf == TOKENS:
                name = f"{self.naming.modules[entry.module][0]}.weight"
                rows = tokens.get(entry.module)
                if rows is None:
                    raise ModelFolderError(
                        f"{self.file}: {entry.stored} holds rows of tokens, and {CONFIG_FILE} "
                        "does not say which (trainable_token_indices); copy both files again"
                    )
                yield Replaced(
                    name, entry.stored, entry.tensor.read, rows, self._alone(name, tokens)
                )
            elif entry.leaf:
                theirs = f"{entry.module}.{entry.leaf}"
                names, change = self.naming.parameters[theirs]
                alone = self._is_saved(theirs) and not self.settings.ensure_weight_tying
                for index, name in enumerate(names):
                    read = _part_of(change, entry.tensor, index)
                    yield Replaced(name, entry.stored, read, None, alone)

    def _alone(self, name: str, tokens: dict[str, list[int]]) -> bool:
        """Rows of the embeddings are those of the tied output matrix; not the other way round."""
        return name == f"{HEAD}.weight" or len(tokens) > 1


def replace_targets(settings: PeftLoraConfig, layers: list[str]) -> PeftLoraConfig:
    """Settings for exactly these layers, given by full names, and for nothing else."""
    return replace(
        settings,
        target_modules="|".join(map(re.escape, dict.fromkeys(layers))) or "(?!)",
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        trainable_token_indices=None,
        target_parameters=None,
        ensure_weight_tying=False,
        bias="none",
    )


def _patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """One pattern for each value that is not the default: PEFT tries all on each layer."""
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != default:
            names.setdefault(value, []).append(re.escape(name))
    return {"|".join(group): value for value, group in names.items()}


def _part_of(change: keys.Change, tensor: LazyTensor, index: int) -> Callable[[], Tensor]:
    return lambda: change.to_ours([tensor.read()])[index]


def _takes_adapter(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)


def _part(name: str) -> str:
    """The part of the model a module belongs to: `model.vision_tower`, `lm_head`, …"""
    return ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])


def _short(value: Any) -> str:
    text = str(sorted(value) if isinstance(value, set) else value)
    return text if len(text) < 80 else f"{text[:77]}…"


def is_tied(model: Any) -> bool:
    """Whether the output matrix is the embeddings' own."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None:
        return False
    return _base(head).weight is _base(embeddings).weight


def _base(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _untie(model: Any) -> None:
    """Gives the output matrix values of its own, for an adapter that is on one of the two."""
    head = model.get_output_embeddings()
    weight = head.weight
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False


def apply(model: Any, resolved: Resolved) -> None:
    """Puts the adapters onto `model` and their values into them.

    Raises:
        ModelFolderError: tensors that do not fit; the model is then of no use.
    """
    layers = resolved.settings
    touched = {name.rpartition(".lora_")[0] for name in resolved.tensors}
    touched |= {r.name.removesuffix(".weight") for r in resolved.replaced if r.alone}
    tied = is_tied(model)
    if tied and touched & {EMBEDDINGS, HEAD}:
        init = layers.init_lora_weights
        if HEAD in touched and (layers.kasa_config or str(init).startswith(_CHANGES_BASE)):
            raise ModelFolderError(
                f"{resolved.file}: lm_head is tied with the embeddings here, and init_lora_weights "
                f"= {init!r} or kasa_config would change both; {_MERGE}"
            )
        _untie(model)
    with _foreign_errors(resolved.file.parent / CONFIG_FILE):
        inject_adapter_in_model(layers, model)
        # In float32 whatever the base has, as PeftModel.from_pretrained leaves them.
        cast_adapter_dtype(model, ADAPTER)
        _check_repeatable(model, resolved)
        _fill(model, resolved)
    for item in resolved.replaced:
        names = [item.name]
        if tied and not item.alone and item.name in (f"{EMBEDDINGS}.weight", f"{HEAD}.weight"):
            names = [f"{EMBEDDINGS}.weight", f"{HEAD}.weight"]
        for name in names:
            _replace(model, replace(item, name=name), resolved.file)


def _fill(model: Any, resolved: Resolved) -> None:
    """Every tensor of the file into PEFT's layers, each exactly once."""
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    for name, values in state.items():
        if name not in resolved.tensors:
            raise ModelFolderError(
                f"{resolved.file}: {name} is missing, and its layer has adapters; copy the adapter "
                "folder again"
            )
        stored, read = resolved.tensors[name]
        tensor = read()
        if tensor.shape != values.shape:
            raise ModelFolderError(
                f"{resolved.file}: {stored} is {tuple(tensor.shape)}, and {tuple(values.shape)} is "
                f"needed by this model and the ranks of {CONFIG_FILE}; these adapters are of "
                "another model, or the two files are not of one adapter"
            )
        with torch.no_grad():
            values.copy_(tensor)
    for name, (stored, _) in resolved.tensors.items():
        if name not in state:
            raise ModelFolderError(
                f"{resolved.file}: {stored} has no place with the settings of {CONFIG_FILE}; the "
                "two files are not of one adapter"
            )


def _check_repeatable(model: Any, resolved: Resolved) -> None:
    """Refuses an initialisation that takes something else out of the base each time it is drawn."""
    init = str(resolved.settings.init_lora_weights)
    if "_niter_" not in init:
        return
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer.get_base_layer(), nn.Embedding):
            base, first = layer.get_base_layer(), layer.get_delta_weight(ADAPTER)
            rest = base.weight.detach().clone()
            base.weight.data = rest + first.to(rest)
            layer.pissa_init(ADAPTER, init)
            drift = (base.weight - rest).abs().max() / rest.abs().max()
            base.weight.data = rest
            if drift > 1e-6:
                raise ModelFolderError(
                    f"{resolved.file.parent / CONFIG_FILE}: init_lora_weights = {init!r} takes "
                    f"another part out of the base each time it is drawn ({name} moves by "
                    f"{float(drift):.0e}), so that peft itself does not load what was trained; "
                    "save it through peft's path_initial_model_for_weight_conversion"
                )


def _replace(model: Any, item: Replaced, file: Path) -> None:
    path, _, leaf = item.name.rpartition(".")
    target = getattr(_base(model.get_submodule(path)), leaf)
    tensor = item.read()
    if not target.is_floating_point() or type(target).__name__ in ("Params4bit", "Int8Params"):
        raise ModelFolderError(
            f"{file}: {item.stored} replaces a weight that is quantized; load without quantize"
        )
    place = target.data if item.rows is None else target.data[: len(item.rows)]
    if tensor.shape != place.shape or (item.rows and max(item.rows) >= len(target)):
        raise ModelFolderError(
            f"{file}: {item.stored} is {tuple(tensor.shape)}, and {tuple(place.shape)} is needed "
            f"by this model (its weight is {tuple(target.shape)}); these adapters are of another "
            "model, or of one with another vocabulary"
        )
    if item.rows is None:
        target.data.copy_(tensor)
    else:
        index = torch.tensor(item.rows, device=target.device)
        target.data.index_copy_(0, index, tensor.to(target))
