"""Names of the tensors of an adapter folder, of any version and trainer, as the model's own.

A file is written under one naming: that of transformers of today or before 4.52, of the language
model alone, or the official one, each perhaps with wrappers of PEFT and of compilation in between.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from internvl.errors import ModelFolderError
from internvl.models import keys
from internvl.models.tensors import LazyTensor


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
    """Parses a tensor's name; None for a copy that no adapter uses."""
    name = re.sub(r"^(module\.)+", "", _without_wrappers(stored))
    name = re.sub(r"(^|\.)(base_model\.model\.)+", r"\1", name)
    # Originals of what was trained, and indices that the configuration holds as well.
    if any(word in name for word in _UNUSED):
        return None
    if match := _OF_TOKENS.fullmatch(name):
        return Entry(stored, tensor, match["module"], leaf=TOKENS, adapter=match["adapter"])
    if match := _OF_ADAPTER.fullmatch(name):
        rest, adapter = _split_adapter(match["part"], match["rest"])
        return Entry(
            stored, tensor, match["module"], rest=rest, nesting=match["nesting"], adapter=adapter
        )
    # From here on a weight of the base: `modules_to_save`, a bias, tied embeddings.
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


def _split_adapter(prefix: str, rest: str | None) -> tuple[str, str | None]:
    """Returns (the name in a PEFT folder, the adapter's name or None)."""
    words = rest.split(".") if rest else []
    if prefix in ("lora_A", "lora_B"):
        leaf = words[-1] if words else "weight"
        return f"{prefix}.{leaf}", words[0] if len(words) == 2 else None
    if prefix == "lora_monteclora_sampler":
        return f"{prefix}.{rest}", None
    named = [word for word in words if word != "weight"]
    return prefix, named[0] if named else None


@dataclass(frozen=True)
class Naming:
    """The model's modules and parameters by the names that one file layout has for them."""

    modules: Mapping[str, tuple[str, ...]]
    """Several of ours if theirs is one fused layer."""
    parameters: Mapping[str, tuple[tuple[str, ...], keys.Change]]

    def knows(self, entry: Entry) -> bool:
        if entry.rest or entry.leaf == TOKENS:
            return entry.module in self.modules
        return f"{entry.module}.{entry.leaf}" in self.parameters

    def ours(self, entry: Entry) -> tuple[str, ...]:
        if entry.rest or entry.leaf == TOKENS:
            return self.modules[entry.module]
        return self.parameters[f"{entry.module}.{entry.leaf}"][0]


SAME = keys.Rename()
_Value = TypeVar("_Value")
_LANGUAGE = "model.language_model."


def _namings(model: Any) -> Iterator[Naming]:
    """Yields every naming of this model's weights, the model's own first."""
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
        {name: ((ours,), SAME) for name, ours in named if name},
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
    """Returns the naming that the file was written under.

    Raises:
        ModelFolderError: layers this model does not have, or names that mean several layers.
    """
    candidates = list(_namings(model))
    fitting = [n for n in candidates if all(n.knows(entry) for entry in entries)]
    if not fitting:
        closest = max(candidates, key=lambda n: sum(n.knows(entry) for entry in entries))
        # Of the nearest naming, so that the message names a layer and not a prefix.
        unknown = [entry.stored for entry in entries if not closest.knows(entry)]
        raise ModelFolderError(
            f"{file}: {unknown[0]} is for a layer that this model does not have "
            f"({len(unknown)} of {len(entries)} tensors); these adapters are of another model"
        )
    # Several fit if a file has few tensors; that is harmless unless they mean different layers.
    for other in fitting[1:]:
        for entry in entries:
            if other.ours(entry) != fitting[0].ours(entry):
                raise ModelFolderError(
                    f"{file}: {entry.stored} can be {fitting[0].ours(entry)[0]} or "
                    f"{other.ours(entry)[0]}; save the adapter again from the whole model"
                )
    return fitting[0]
