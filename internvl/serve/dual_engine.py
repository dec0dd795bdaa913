"""The engine of InternVL-14B: what waits is embedded or matched in one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl.errors import UserError
from internvl.inference.dual import Dual
from internvl.models.dual.model import Mode
from internvl.serve.engines import JobQueue

_MOST_JOBS = 64


@dataclass(eq=False)
class DualJob:
    """Inputs of one request, and what became of them."""

    key: Any
    """The caller's own; it is told when the job has ended."""
    task: str
    """A key of TASKS."""
    inputs: Sequence[Any]
    """Texts, encoded images, or pairs (image, text)."""
    mode: Mode = "c"
    outputs: list[Any] = field(default_factory=list)
    """Of each input: its vector, or the probability that the pair matches."""
    error: UserError | None = None
    """Why there are no outputs."""
    ended: bool = False


def _texts(dual: Dual, inputs: Sequence[str], mode: Mode) -> list[Any]:
    return list(dual.encode_texts(inputs))


def _images(dual: Dual, inputs: Sequence[bytes], mode: Mode) -> list[Any]:
    return list(dual.encode_images(inputs, mode))


def _pairs(dual: Dual, inputs: Sequence[tuple[bytes, str]], mode: Mode) -> list[Any]:
    images, texts = zip(*inputs, strict=True)
    return dual.match(list(images), list(texts)).tolist()


TASKS: dict[str, Callable[[Dual, Any, Mode], list[Any]]] = {
    "texts": _texts,
    "images": _images,
    "pairs": _pairs,
}


class DualEngine:
    """Answers the jobs of a queue with one InternVL-14B."""

    slots = _MOST_JOBS

    def __init__(self, dual: Dual) -> None:
        """Embeds once, so that what is built at first use is there.

        Raises:
            ModelFolderError: no tokenizer.
        """
        self.dual = dual
        # Without a tokenizer this fails now, not at the first request.
        dual.encode_texts(["Hello"])

    def run(self, queue: JobQueue[Any], tell: Callable[[Any], None]) -> None:
        """See `Answering`."""
        while (job := queue.take(wait=True)) is not None:
            jobs = [job]
            while len(jobs) < _MOST_JOBS and (job := queue.take(wait=False)) is not None:
                jobs.append(job)
            # One batch for all that ask alike; most requests have one input.
            for task, mode in dict.fromkeys((job.task, job.mode) for job in jobs):
                self._answer([j for j in jobs if (j.task, j.mode) == (task, mode)])
            for job in jobs:
                # After all groups: a job is told once, with its outputs.
                job.ended = True
                tell(job)

    def _answer(self, jobs: Sequence[DualJob]) -> None:
        inputs = [value for job in jobs for value in job.inputs]
        try:
            outputs = iter(TASKS[jobs[0].task](self.dual, inputs, jobs[0].mode))
        except UserError as error:
            # One of them cannot be read: each by itself, so that the others are answered.
            if len(jobs) == 1:
                jobs[0].error = error
                return
            for job in jobs:
                self._answer([job])
            return
        for job in jobs:
            job.outputs = [next(outputs) for _ in job.inputs]
