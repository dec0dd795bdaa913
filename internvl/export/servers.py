"""Commands that serve an exported folder: this package's, vLLM's, LMDeploy's, transformers'.

Which models each serves is what its own tables say (vLLM's registry, LMDeploy's supported models,
transformers' classes); nothing of them is run here.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl.inference.families import FAMILIES
from internvl.models import configs, hub


@dataclass(frozen=True)
class Folder:
    """What decides whether a server takes a folder."""

    path: Path
    format: str
    """hf or official."""
    config: Any
    family: str

    @property
    def name(self) -> str:
        """Quoted path."""
        return shlex.quote(str(self.path))

    @property
    def served_name(self) -> str:
        """Quoted name that clients ask for."""
        return shlex.quote(self.path.resolve().name)

    @property
    def longest(self) -> int:
        """Tokens of a conversation."""
        # Servers refuse more than the language model's own length.
        return min(8192, int(self.config.text_config.max_position_embeddings))

    @property
    def language(self) -> str:
        """Official architecture of a chat model's language model."""
        # Not the configuration's own word: hf names both InternLM2 and Llama "llama".
        return configs.language_model(self.config)


@dataclass(frozen=True)
class Served:
    """A server: its command, or why it does not take a folder."""

    command: Callable[[Folder], str]
    refusal: Callable[[Folder], str | None]


_EMBEDS = "it embeds and ranks, which only internvl serves"


def _internvl(folder: Folder) -> str:
    return f"internvl serve {folder.name} --name {folder.served_name}"


def _vllm(folder: Folder) -> str:
    # The official layout's classes are Python files beside the weights.
    code = " --trust-remote-code" if folder.format == "official" else ""
    return (
        f"vllm serve {folder.name} --served-model-name {folder.served_name} "
        f"--max-model-len {folder.longest} --limit-mm-per-prompt '{{\"image\":4}}'{code}"
    )


def _lmdeploy(folder: Folder) -> str:
    # Its faster engine reads the official layout alone.
    turbomind = folder.format == "official" and folder.language in _TURBOMIND
    backend = "turbomind" if turbomind else "pytorch"
    return (
        f"lmdeploy serve api_server {folder.name} --backend {backend} --server-port 23333 "
        f"--model-name {folder.served_name} --session-len {folder.longest}"
    )


def _transformers(folder: Folder) -> str:
    return f"transformers serve {folder.name} --port 8000"


def _no_refusal(folder: Folder) -> None:
    return None


def _chat_alone(folder: Folder) -> str | None:
    return None if folder.family == "chat" else _EMBEDS


def _hf_alone(folder: Folder) -> str | None:
    if folder.family != "chat":
        return _EMBEDS
    return "it takes --format hf" if folder.format == "official" else None


_TURBOMIND = ("InternLM2ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Language models of LMDeploy's TurboMind engine; its PyTorch engine takes the others."""

SERVERS: dict[str, Served] = {
    "internvl": Served(_internvl, _no_refusal),
    "vllm": Served(_vllm, _chat_alone),
    "lmdeploy": Served(_lmdeploy, _chat_alone),
    "transformers": Served(_transformers, _hf_alone),
}


def describe(path: Path, format: str) -> Folder:
    """Reads what decides which servers take an exported folder."""
    files = hub.open_folder(path)
    # Read back from what was written: that is what a server sees.
    return Folder(path, format, FAMILIES[files.family].read_config(files), files.family)


def lines(folder: Folder) -> list[str]:
    """Returns a line for each server: its command, or why it does not serve the folder."""
    shown = []
    for name, server in SERVERS.items():
        reason = server.refusal(folder)
        shown.append(f"# {name}: {reason}" if reason else server.command(folder))
    return shown
