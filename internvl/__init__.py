"""Train, evaluate and ship the InternVL vision-language models.

Names are resolved when they are first used, so importing the package is instant.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "load": ("internvl.inference.load", "load"),
    "Chat": ("internvl.inference.load", "Chat"),
    "Request": ("internvl.inference.generate", "Request"),
    "Recipe": ("internvl.config", "Recipe"),
    "load_recipe": ("internvl.config.recipes", "load_recipe"),
}
_MODULES = ("train", "evaluate", "export", "check", "data", "models", "zoo", "doctor")

__all__ = ["__version__", *_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _MODULES:
        return importlib.import_module(f"internvl.{name}")
    raise AttributeError(f"module 'internvl' has no attribute {name!r}")
