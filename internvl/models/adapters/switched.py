"""Several adapters on one base: each row of a pass is computed with the adapter that it chose.

    adapters = [read(model, folder) for folder in folders]
    switch = attach(model, adapters)

The A matrices of a layer's adapters stand below each other and are one product; what belongs to
other adapters than a row's own is zeroed between A and B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internvl.errors import ModelFolderError
from internvl.models.adapters import fused_lora, lora
from internvl.models.adapters import layers as adapter_layers
from internvl.models.adapters.merging import ADAPTER, adapted_layers, unwrapped
from internvl.models.trainable import PARTS


@dataclass(frozen=True)
class Matrices:
    """One layer's adapter: adds scale * B A."""

    a: Tensor
    b: Tensor
    scale: float


def read(model: Any, folder: Path) -> dict[str, Matrices]:
    """Reads an adapter folder as matrices by layer; the model is as before.

    Raises:
        ModelFolderError: a damaged folder, adapters of another model, or such as cannot be chosen
            by row: on the vision tower, other than plain LoRA, or with weights in place of the
            base's.
    """
    merge = "; export it merged (`internvl export`), and serve that model"
    # First, and for its `replaced` alone: loading would write those values into the base.
    resolved = adapter_layers.resolve(model, folder)
    if resolved.replaced:
        raise ModelFolderError(
            f"{folder}: it replaces {resolved.replaced[0].name}, which rows share{merge}"
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    lora.load_adapter(model, folder)
    matrices: dict[str, Matrices] = {}
    refused = ""
    for name, layer in list(adapted_layers(model)):
        plain: Any = layer
        if not name.startswith(PARTS["language_model"]) or not fused_lora.is_plain(layer):
            refused = refused or name
        else:
            weights = (plain.lora_A[ADAPTER].weight, plain.lora_B[ADAPTER].weight)
            a, b = (weight.detach().float() for weight in weights)
            # Without the wrappers of compilation, which the base may get later.
            matrices[unwrapped(name)] = Matrices(a, b, float(plain.scaling[ADAPTER]))
        # Off again at once: the next adapter is read from the same base.
        model.set_submodule(name, layer.get_base_layer())
    vars(model).pop("peft_config", None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if refused:
        raise ModelFolderError(
            f"{folder}: the adapter of {refused} cannot be chosen by row; plain LoRA of the "
            f"language model can{merge}"
        )
    return matrices


class Switch:
    """Says which adapter each row of the next pass is computed with; 0 is the base alone."""

    def __init__(self) -> None:
        self._slots: Tensor | None = None
        self._row = torch.zeros(0, dtype=torch.long)
        self._last = torch.zeros(0, dtype=torch.long)
        self._decoding = False

    def prefill(self, lengths: Sequence[int], adapters: Sequence[int], device: Any) -> None:
        """Chooses for a packed row of prompts: the adapter of each, in order."""
        last = torch.tensor(adapters)
        row = last.repeat_interleave(torch.tensor(lengths))
        self._last, self._row = last.to(device), row.to(device)
        self._decoding = False

    def decode(self, adapters: Sequence[int], device: Any) -> None:
        """Chooses for one token of every slot."""
        chosen = torch.tensor(adapters)
        # In place: a captured graph reads from this very memory.
        if self._slots is None or len(self._slots) != len(adapters):
            self._slots = chosen.to(device)
        else:
            self._slots.copy_(chosen)
        self._decoding = True

    def rows(self, length: int) -> Tensor:
        """Returns the adapter of each row for hidden states (B, length, D): (B, length)."""
        if self._decoding:
            assert self._slots is not None
            return self._slots[:, None]
        # After the last attention only the ends of the prompts are left.
        chosen = self._row if length >= len(self._row) else self._last
        return F.pad(chosen, (0, length - len(chosen)))[None]


class SwitchedLinear(nn.Module):
    """A linear layer with several adapters; base (…, in) -> (…, out)."""

    def __init__(self, base: nn.Module, adapters: Mapping[int, Matrices], switch: Switch) -> None:
        """`adapters` by the index that rows choose them with."""
        super().__init__()
        self.base = base
        self.switch = switch
        device = next(base.parameters()).device
        a = torch.cat([m.a for m in adapters.values()]).to(device)
        b = torch.cat([m.scale * m.b for m in adapters.values()], dim=1).to(device)
        owners = [index for index, m in adapters.items() for _ in range(len(m.a))]
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        self.register_buffer("owners", torch.tensor(owners, device=device), persistent=False)

    def __getattr__(self, name: str) -> Any:
        """Also gives what others read of a linear layer, such as its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, hidden: Tensor) -> Tensor:
        """Computes W x + s B A x, with the adapter of each row."""
        output = self.base(hidden)
        rows = self.switch.rows(hidden.shape[-2])
        # In float32, as PEFT does, whatever the base has.
        inner = F.linear(hidden.to(self.a.dtype), self.a)
        inner = inner * (rows[..., None] == self.owners)
        return output + F.linear(inner, self.b).to(output.dtype)


def attach(model: Any, adapters: Sequence[Mapping[str, Matrices]]) -> Switch:
    """Puts adapters on a model, which rows choose by their index, from 1 on."""
    switch = Switch()
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        matrices = {i: adapter[name] for i, adapter in enumerate(adapters, 1) if name in adapter}
        model.set_submodule(name, SwitchedLinear(model.get_submodule(name), matrices, switch))
    return switch
