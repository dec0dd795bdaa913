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
from internvl.models.hub import LazyTensor


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


SAME = keys.Rename()
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
