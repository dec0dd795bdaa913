"""Train, evaluate and ship the InternVL vision-language models.

Names are resolved when they are first used, so importing the package is instant.
"""

import importlib
from typing import Any

__version__ = "0.2.0.dev0"

_NAMES: dict[str, tuple[str, str | None]] = {
    "load": ("internvl.inference.load", "load"),
    "Chat": ("internvl.inference.chat", "Chat"),
    "Dual": ("internvl.inference.dual", "Dual"),
    "generate": ("internvl.inference.generate", None),
    "Request": ("internvl.inference.requests", "Request"),
    "Conversation": ("internvl.inference.conversation", "Conversation"),
    "Video": ("internvl.data.records", "Video"),
    "Recipe": ("internvl.config", "Recipe"),
    "load_recipe": ("internvl.config.recipes", "load_recipe"),
    "doctor": ("internvl.compute.doctor", None),
    "pairing": ("internvl.evals.pairing", None),
}
_MODULES = ("train", "evaluate", "export", "check", "data", "models", "zoo", "errors")

__all__ = ["__version__", *_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        module, attribute = _NAMES[name]
        imported = importlib.import_module(module)
        return imported if attribute is None else getattr(imported, attribute)
    if name in _MODULES:
        return importlib.import_module(f"internvl.{name}")
    raise AttributeError(f"module 'internvl' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Python's own list has this file's imports and the submodules that happen to be loaded.
    return sorted(__all__)
