"""Every reader of labelled sets by name."""

from collections.abc import Callable, Mapping

from internvl.datasets.labelled.listed import LISTED
from internvl.datasets.labelled.packed import PACKED
from internvl.datasets.labelled.source import Read, Source

# Two modules, as the readers of files and of arrays share nothing.
READERS: Mapping[str, Callable[[Source], Read]] = {**LISTED, **PACKED}
