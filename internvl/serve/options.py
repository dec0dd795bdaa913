"""What a server is started with. Imports no torch."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from internvl.data.arguments import check_whole
from internvl.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Raises:
        UserError: a limit below 1.
    """

    max_images: int = 16
    """Most images of a request; frames of videos are not counted."""
    max_videos: int = 4
    max_tokens: int = 1024
    """Tokens of an answer whose request does not say."""
    max_length: int = 8192
    """Most tokens of a prompt and its answer together: the length of a slot."""
    max_waiting: int = 64
    """Most requests that wait for a slot; more are refused with 429."""
    max_body: int = 128 * 2**20
    """Most bytes of a request's body."""
    image_bytes: int = 20 * 2**20
    video_bytes: int = 200 * 2**20
    image_pixels: int = 64_000_000
    """Most pixels of an image, checked before it is decoded."""
    fetch_s: int = 10
    """Seconds in which an image must be fetched; a video has three times as long."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from although their addresses are not public."""
    allow_files: tuple[Path, ...] = ()
    """Folders that `file://` addresses may name files of."""

    def __post_init__(self) -> None:
        for name in (
            "max_images",
            "max_videos",
            "max_tokens",
            "max_length",
            "max_waiting",
            "max_body",
        ):
            check_whole(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        # Now: a wrong folder would refuse every image later.
        for folder in self.allow_files:
            if not folder.is_dir():
                raise ConfigError(f"--allow-files: there is no folder {folder}")


@dataclass(frozen=True)
class Options:
    """Everything but the model that a server is started with.

    Raises:
        UserError: no such port, or no slot.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    """Gets the port, once it is bound."""
    name: str = ""
    """Name of the model under /v1/models."""
    api_keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    slots: int | None = None
    """Most requests in flight on a GPU; None: as its memory holds, up to 128."""
    temperature: float = 0.0
    """Of requests that do not say; 0 is greedy."""
    compiled: bool | None = None
    """Compile the model's blocks at the start; None: on a GPU, without adapters."""
    readers: int | None = None
    """Processes that decode and tile images, 0 for threads; None: by the machine, on a GPU."""
    drain_s: int = 60
    """Seconds that running answers get after SIGTERM."""

    def __post_init__(self) -> None:
        # The socket's own error is no OSError.
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be 0 (any free one) to 65535, not {self.port}")
        # Without a slot the first answer would be waited for without end.
        if self.slots is not None:
            check_whole("--slots", self.slots, 1)
        if self.readers is not None:
            check_whole("--readers", self.readers, 0)
        # It would let everyone in who sends an empty one.
        if not all(key.strip() for key in self.api_keys):
            raise ConfigError("--api-key is empty; give a key, or leave the option out")
        # Not first where a request leaves it out, whose sender could not help it.
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"--temperature is 0 (greedy) to 100, not {self.temperature}")


def parse_adapters(words: list[str], model: str) -> dict[str, Path]:
    """Parses NAME=PATH words, of adapters of a model of that name: name -> folder.

    Raises:
        ConfigError: no name, a name twice or the model's, or no such folder.
    """
    adapters: dict[str, Path] = {}
    for word in words:
        # At the first one: a path may hold others.
        name, equals, path = word.partition("=")
        # Names go into JSON, logs and metrics.
        if not equals or not re.fullmatch(r"[\w.:/-]+", name):
            raise ConfigError(
                f"--adapter {word}: write NAME=PATH, such as stamps=runs/stamps/final"
            )
        if name in adapters or name == model:
            whose = "the model's own (--name)" if name == model else "taken"
            raise ConfigError(f"--adapter {word}: the name {name} is {whose}; choose another one")
        # Before the model, which may take minutes.
        if not Path(path).expanduser().is_dir():
            raise ConfigError(f"--adapter {word}: there is no folder {path}")
        adapters[name] = Path(path).expanduser()
    return adapters
