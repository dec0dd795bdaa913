"""The layers of an adapter folder on one model, which then computes what plain `peft` computes.

PEFT decides: its own matching rules choose layers, ranks and alphas, under the names that the file
was written with; its own layers compute them. This file translates: PEFT is given a configuration
that names each layer of the model. Weights that only replace those of the base (`modules_to_save`,
biases, trained tokens, embeddings) are written into it.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from internvl.errors import ModelFolderError
from internvl.models import keys
from internvl.models.adapters.folder import CONFIG_FILE
from internvl.models.adapters.names import SAME, TOKENS, Entry, Naming, choose_naming, parse
from internvl.models.adapters.settings import (
    MERGE_REMEDY,
    foreign_errors,
    read_settings,
    read_tensors,
)
from internvl.models.tensors import LazyTensor

logger = logging.getLogger(__name__)

ADAPTER = "default"
"""The name of the one adapter a model has at a time."""
EMBEDDINGS, HEAD = "model.language_model.embed_tokens", "lm_head"
"""The two matrices that may be one (tied)."""

_CHANGES_BASE = ("pissa", "olora", "loftq")
"""Initialisations that PEFT repeats at loading, and that subtract the adapter from the base."""
_VARIANTS = ("velora_config", "monteclora_config", "kasa_config", "use_bdlora")


@dataclass(frozen=True)
class Replaced:
    """Values for a parameter of the base, or for some `rows` of it."""

    name: str
    stored: str
    read: Callable[[], Tensor]
    rows: list[int] | None
    alone: bool
    """True if the matrix tied with it keeps its own values."""


@dataclass(frozen=True)
class Resolved:
    """An adapter folder in terms of one model."""

    file: Path
    settings: PeftLoraConfig
    """Names every layer in full, by the model's names."""
    tensors: Mapping[str, tuple[str, Callable[[], Tensor]]]
    """By the names of PEFT's state: (the name in the file, values)."""
    replaced: list[Replaced]


def resolve(model: Any, folder: Path) -> Resolved:
    """Translates an adapter folder to the names of `model`, which is not changed.

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
    # PEFT's own matching runs in here, on patterns that a user may have written.
    with foreign_errors(folder / CONFIG_FILE):
        layers = _Layers(model, settings, naming, file)
        layers.check(entries)
        return Resolved(
            file,
            layers.translated(entries),
            dict(layers.tensors(entries)),
            list(layers.replaced(entries)),
        )


class _Layers:
    """PEFT's settings matched against a model under the file's names."""

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
        """Resolves `all-linear`: every linear layer but the output matrix, as in PEFT."""
        head = self.model.get_output_embeddings()
        modules = {name: self.model.get_submodule(name) for name in self._layers()}
        return [
            theirs
            for theirs, ours in self.naming.modules.items()
            # By the file's names, which PEFT matches below.
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
        """True if PEFT puts an adapter on the module."""
        names = self.naming.modules[theirs] if by_ours else (theirs,)
        return all(bool(check_target_module_exists(self.settings, name)) for name in names)

    def check(self, entries: list[Entry]) -> None:
        """Raises ModelFolderError unless layers with tensors and layers of the settings agree."""
        adapted = {e.module: e for e in entries if e.rest and not self._of_parameter(e)}
        # Some folders hold the settings by our names and tensors by the official ones.
        by_ours = not self.own_names and not all(map(self.targeted, adapted))
        for module, entry in adapted.items():
            if not self.targeted(module, by_ours=by_ours) and not self._is_tied(module):
                raise ModelFolderError(
                    f"{self.file}: {entry.stored} is for a layer that {CONFIG_FILE} does not "
                    f"name (target_modules = {_short(self.settings.target_modules)}); the two "
                    "files are not of one adapter"
                )
        sections = {_section(self.naming.modules[module][0]) for module in adapted}
        left_out: set[str] = set()
        for theirs, ours in self.naming.modules.items():
            if theirs in adapted or not _takes_adapter(self.model.get_submodule(ours[0])):
                continue
            if not self.targeted(theirs, by_ours=by_ours):
                continue
            if _section(ours[0]) in sections or not adapted:
                raise ModelFolderError(
                    f"{self.file}: has no tensors for {theirs}, which {CONFIG_FILE} names "
                    f"(target_modules = {_short(self.settings.target_modules)}); copy the adapter "
                    "folder again"
                )
            left_out.add(_section(ours[0]))
        # A section that the file leaves out as a whole was not trained: in PEFT its B is zero.
        for section in sorted(left_out):
            logger.warning("%s: has no adapters for %s", self.file, section)
        self._check_replaced(entries, adapted)

    def _check_replaced(self, entries: list[Entry], adapted: Iterable[str]) -> None:
        """Raises ModelFolderError if the file lacks a weight that the settings say is saved."""
        stored = {f"{entry.module}.{entry.leaf}" for entry in entries if entry.leaf}
        # `lora_only` saves the biases of adapted layers.
        biases = {f"{module}.bias" for module in adapted}
        for theirs in self.naming.parameters:
            bias = self.settings.bias
            is_saved = self._is_saved(theirs)
            is_saved |= bias == "all" and theirs.endswith(".bias")
            is_saved |= bias == "lora_only" and theirs in biases
            if is_saved and theirs not in stored:
                raise ModelFolderError(
                    f"{self.file}: {theirs} is missing, which {CONFIG_FILE} says is saved "
                    "(modules_to_save, bias); copy the adapter folder again"
                )
        for layer in self.tokens():
            if f"{layer}.{TOKENS}" not in stored:
                raise ModelFolderError(
                    f"{self.file}: {layer}.token_adapter.{TOKENS} is missing, which {CONFIG_FILE} "
                    "names (trainable_token_indices); copy the adapter folder again"
                )

    def _of_parameter(self, entry: Entry) -> bool:
        ours = self.naming.modules[entry.module][0]
        return any(name.rpartition(".")[0] == ours for name in self.parameters)

    def _is_tied(self, module: str) -> bool:
        """True if the output matrix follows the embeddings' adapter (`ensure_weight_tying`)."""
        return self.settings.ensure_weight_tying and self.naming.modules[module] == (HEAD,)

    def _is_saved(self, theirs: str) -> bool:
        # A parameter is saved with the module around it, at any depth; PEFT matches by the end.
        words = theirs.split(".")
        above = [".".join(words[:count]) for count in range(1, len(words))]
        return any(module.endswith(target) for module in above for target in self.saved)

    def tokens(self) -> dict[str, list[int]]:
        """Returns layer by the file's name -> trained rows (`trainable_token_indices`)."""
        chosen = self.settings.trainable_token_indices
        if not chosen:
            return {}
        ours = {names[0]: theirs for theirs, names in self.naming.modules.items()}
        if not isinstance(chosen, dict):  # a list is for the embeddings, in PEFT
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
        """True if PEFT stores the rows of a tied output matrix with the embeddings alone."""
        if theirs != ours.get(HEAD) or not is_tied(self.model):
            return False
        rows = [chosen[t] for t in chosen if ours[EMBEDDINGS].endswith(t) or theirs.endswith(t)]
        return len(rows) > 1 and all(row == rows[0] for row in rows)

    def translated(self, entries: list[Entry]) -> PeftLoraConfig:
        """Returns the settings with every layer by its name in the model."""
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
        self._name_unused_patterns(names)
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

    def _name_unused_patterns(self, names: list[tuple[str, str]]) -> None:
        """Warns of patterns that match no layer; PEFT ignores them as well."""
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.settings, field) or {}:
                if not any(
                    get_pattern_key([pattern], n) == pattern for pair in names for n in pair
                ):
                    logger.warning("%s: %s %r is for no layer", self.file, field, pattern)

    def _looked_up(
        self, patterns: dict[str, Any] | None, theirs: str, ours: str, default: str
    ) -> Any:
        # The file's name first: a pattern that fits both was written for it.
        for name in (theirs, ours):
            key = get_pattern_key((patterns or {}).keys(), name)
            if key in (patterns or {}):
                return (patterns or {})[key]
        return getattr(self.settings, default)

    def _check_fused(self, entries: list[Entry]) -> None:
        """Raises ModelFolderError for adapters of fused q, k and v that cannot be split."""
        # B of a fused layer is split by rows, and plain LoRA alone allows that.
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
                f"{hindrances[0]} cannot be taken apart; {MERGE_REMEDY}"
            )

    def tensors(
        self, entries: list[Entry]
    ) -> Iterator[tuple[str, tuple[str, Callable[[], Tensor]]]]:
        """Yields the adapters' tensors by the names of PEFT's state for this model."""
        for entry in entries:
            if not entry.rest:
                continue
            names = self.naming.modules[entry.module]
            change = self.naming.parameters.get(f"{entry.module}.weight", ((), SAME))[1]
            for index, ours in enumerate(names):
                read = entry.tensor.read
                # q, k and v of a fused layer have the whole A each, and their rows of B.
                if len(names) > 1 and not entry.rest.startswith("lora_A"):
                    read = _slice_of(change, entry.tensor, index)
                yield f"{ours}{entry.nesting}.{entry.rest}", (entry.stored, read)

    def replaced(self, entries: list[Entry]) -> Iterator[Replaced]:
        """Yields the weights of the base that the file has values for."""
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
                # A saved copy is untied by PEFT, unless it is told to tie it.
                alone = self._is_saved(theirs) and not self.settings.ensure_weight_tying
                for index, name in enumerate(names):
                    read = _slice_of(change, entry.tensor, index)
                    yield Replaced(name, entry.stored, read, None, alone)

    def _alone(self, name: str, tokens: dict[str, list[int]]) -> bool:
        """True for rows of the output matrix, or if both matrices have rows of their own."""
        # Rows of the embeddings are the tied output matrix's too; not the other way round.
        return name == f"{HEAD}.weight" or len(tokens) > 1


def replace_targets(settings: PeftLoraConfig, layers: list[str]) -> PeftLoraConfig:
    """Returns the settings for exactly these layers, given by full names."""
    # PEFT matches a string as a whole, and a list by the ends of names; (?!) matches nothing.
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
    """Returns one pattern for each value that is not the default."""
    # Not one a layer: PEFT tries every pattern on every layer, which is quadratic.
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != default:
            names.setdefault(value, []).append(re.escape(name))
    return {"|".join(group): value for value, group in names.items()}


def _slice_of(change: keys.Change, tensor: LazyTensor, index: int) -> Callable[[], Tensor]:
    return lambda: change.to_ours([tensor.read()])[index]


def _takes_adapter(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)


def _section(name: str) -> str:
    """Returns the section of the model a module is in: `model.vision_tower`, `lm_head`, …"""
    return ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])


def _short(value: Any) -> str:
    text = str(sorted(value) if isinstance(value, set) else value)
    return text if len(text) < 80 else f"{text[:77]}…"


def is_tied(model: Any) -> bool:
    """True if the output matrix is the embeddings' own tensor."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None:
        return False
    return _base(head).weight is _base(embeddings).weight


def _base(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _untie(model: Any) -> None:
    """Gives the output matrix a tensor of its own, for an adapter on one of the two."""
    head = model.get_output_embeddings()
    weight = head.weight
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    # Or saving would leave the matrix out, and loading would tie it again.
    model.config.tie_word_embeddings = False


def apply(model: Any, resolved: Resolved) -> None:
    """Puts adapters and their values onto `model`.

    Raises:
        ModelFolderError: tensors that do not fit; the model is then of no use.
    """
    layers = resolved.settings
    touched = {name.rpartition(".lora_")[0] for name in resolved.tensors}
    touched |= {r.name.removesuffix(".weight") for r in resolved.replaced if r.alone}
    tied = is_tied(model)  # before an adapter is on one of the two
    if tied and touched & {EMBEDDINGS, HEAD}:
        init = layers.init_lora_weights
        if HEAD in touched and (layers.kasa_config or str(init).startswith(_CHANGES_BASE)):
            raise ModelFolderError(
                f"{resolved.file}: lm_head is tied with the embeddings here, and init_lora_weights "
                f"= {init!r} or kasa_config would change both; {MERGE_REMEDY}"
            )
        _untie(model)
    with foreign_errors(resolved.file.parent / CONFIG_FILE):
        # PEFT uses patterns of adapted parameters, but looks for them among modules alone.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
        # Every bias of `lora_bias` is of one dimension, and wrong shapes are refused below.
        warnings.filterwarnings("ignore", r"Adapter .* LoRA tensor\(s\) have invalid shape")
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
    """Copies every tensor of the file into PEFT's layers, each exactly once."""
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
        _check_finite(resolved.file, stored, tensor)
        # PEFT's state holds the parameters themselves, so this fills the layers.
        with torch.no_grad():
            values.copy_(tensor)
    for name, (stored, _) in resolved.tensors.items():
        if name not in state:
            raise ModelFolderError(
                f"{resolved.file}: {stored} has no place with the settings of {CONFIG_FILE}; the "
                "two files are not of one adapter"
            )


def _check_finite(file: Path, stored: str, tensor: Tensor) -> None:
    """Raises ModelFolderError for NaN or infinity."""
    # `isfinite` has no kernel for floats of 8 bits.
    wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 2 else tensor
    if not bool(torch.isfinite(wide).all()):
        raise ModelFolderError(
            f"{file}: {stored} holds NaN or infinity, so that every answer would; the training "
            "that wrote it diverged: take an earlier checkpoint"
        )


def _check_repeatable(model: Any, resolved: Resolved) -> None:
    """Raises ModelFolderError for an initialisation that differs each time it is drawn."""
    # `pissa_niter_N` is a random approximation of the exact `pissa`.
    init = str(resolved.settings.init_lora_weights)
    if "_niter_" not in init:
        return
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer.get_base_layer(), nn.Embedding):
            # Drawn once more from the same base: a random SVD subtracts something else.
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
    expected = target.shape if item.rows is None else (len(item.rows), *target.shape[1:])
    if tensor.shape != expected or (item.rows and max(item.rows) >= len(target)):
        raise ModelFolderError(
            f"{file}: {item.stored} is {tuple(tensor.shape)}, and {tuple(expected)} is needed "
            f"by this model (its weight is {tuple(target.shape)}); these adapters are of another "
            "model, or of one with another vocabulary"
        )
    _check_finite(file, item.stored, tensor)
    if item.rows is None:
        target.data.copy_(tensor)
    else:
        index = torch.tensor(item.rows, device=target.device)
        target.data.index_copy_(0, index, tensor.to(target))
