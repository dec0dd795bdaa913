"""Held-out samples of an annotation file, read as training reads them."""

from collections.abc import Sequence

from internvl.config import LossEval, PreferenceEval, SourceConfig
from internvl.data.images import FileSlice
from internvl.data.records import Sample
from internvl.data.sources import open_source
from internvl.errors import BadSample
from internvl.evals import sharing
from internvl.evals.scores import LEFT_OUT, raise_or_log, raise_or_log_images

CHUNK_SAMPLES = 64
"""Samples that are packed together, by one rank; their tiles are in memory."""
ROW_TILES = 48
"""Most tiles of a row, unless a sample has more."""

_REMEDY = "put them right, or set on_bad_sample to skip to leave them out"


class HeldOut:
    """Base of evaluators that run a chat model on the samples of a file, its answers included.

    Raises:
        UserError: the file is missing, holds nothing of that type, or has bad samples or images.
    """

    def __init__(self, config: LossEval | PreferenceEval, source: SourceConfig) -> None:
        self.source = open_source(source)
        self.lines = range(min(len(self.source), config.limit or len(self.source)))
        self.policy = config.on_bad_sample
        self._left_out = 0
        # Other policies meet bad samples in `run`, which reads every sample anyhow.
        if self.policy in ("raise", "skip_broken"):
            problems = self._bad_samples()
            unreadable = self._broken_images()
            raise_or_log_images(problems, unreadable, self.policy, _REMEDY)

    def chunks(self) -> list[range]:
        """Cuts the lines into those that are packed together."""
        return [
            self.lines[start : start + CHUNK_SAMPLES]
            for start in range(0, len(self.lines), CHUNK_SAMPLES)
        ]

    def leave_out(self, bad: Sequence[BadSample]) -> None:
        """Counts and lists the bad samples that `run` met, or raises, as the recipe says."""
        raise_or_log(bad, "skip" if self.policy != "raise" else "raise", _REMEDY)
        self._left_out = len(bad)

    def _bad_samples(self) -> list[BadSample]:
        samples = self.source.samples(self.lines)
        return [sample for sample in samples if isinstance(sample, BadSample)]

    def _broken_images(self) -> list[BadSample]:
        """Returns the problems of images, by the first sample that shows them."""
        first_samples: dict[str | FileSlice, str] = {}
        for sample in self.source.samples(self.lines):
            for image in sample.images if isinstance(sample, Sample) else ():
                if not isinstance(image, bytes):
                    first_samples.setdefault(
                        image if isinstance(image, FileSlice) else str(image), sample.name
                    )
        images = list(first_samples)  # each decoded once, however many samples show it
        unreadable = sharing.broken(images)
        return [
            BadSample(first_samples[images[index]], f"{images[index]}: {reason}")
            for index, reason in unreadable.items()
        ]

    def images(self) -> Sequence[str]:
        """Returns every image that will be opened."""
        samples = self.source.samples(self.lines)
        readable = (sample for sample in samples if isinstance(sample, Sample))
        return [str(image) for sample in readable for image in sample.images]

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        counts = {"samples": len(self.lines) - self._left_out}
        return counts | ({LEFT_OUT: self._left_out} if self._left_out else {})

    def table(self) -> None:
        """See `Evaluator.table`."""
