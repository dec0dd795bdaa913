"""The one way to give a module of a loaded model another forward pass."""

from typing import TypeVar

from torch import nn

T = TypeVar("T", bound=nn.Module)


def replace_module(model: nn.Module, name: str, cls: type[T]) -> T:
    """Replaces the submodule `name` of `model` by a `cls` with the same contents; returns it.

    Parameters, buffers, children and hooks are the same objects under the same names, and plain
    attributes (`training`, …) have the same values. `cls` is a subclass of the module's class, or
    the class that it was derived from; what else it needs, the caller sets.
    """
    old = model.get_submodule(name)
    # Not `cls(...)`, which would draw random weights and move torch's generator.
    new = cls.__new__(cls)
    # Tables are copied: what is registered on the new module must not appear in the old one.
    new.__dict__ = {k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(old).items()}
    model.set_submodule(name, new)
    return new
