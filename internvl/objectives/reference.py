"""Log-probabilities of preference pairs under the reference: three ways to have them.

adapters      the same weights with adapters off
precomputed   the weights of the start, once for all pairs, in the run folder
live          a second model in memory
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from internvl import dist, log
from internvl.data import loader
from internvl.data.records import PreferenceBatch, Sample
from internvl.data.sampler import UnitRef
from internvl.data.workers import Reading, describe_refs, name_failing
from internvl.errors import DataError, RunError, counted
from internvl.models.trainable import adapters_off
from internvl.objectives.run_start import RunStart
from internvl.training import watchdog

FILE = "reference.jsonl"
"""The file of a run folder that holds log-probabilities under its first weights."""
_CHUNK_PAIRS = 64  # lines that are read together, and a line of the file
_FRAMES = (
    "its frames are drawn anew each time, so no log-probabilities of it can be kept; set "
    "data.video.sampling=fps2, or middle with data.video.min_frames equal to max_frames, or "
    "objective.reference=live"
)

Compute = Callable[..., Tensor]
"""(model, row, visual tokens or None) -> log-probabilities of its answers, float32 (P, 2)."""


class Reference(Protocol):
    """Where the reference's log-probabilities come from."""

    by_content: bool
    """Whether it needs the digests of the pairs, which take time."""

    def begin_run(self, start: RunStart, rows: Callable[..., Sequence[PreferenceBatch]]) -> None:
        """Prepares for a run.

        Args:
            rows: makes rows of units; with no argument, a row of no pairs.
        """
        ...

    def attach(self, row: PreferenceBatch) -> PreferenceBatch:
        """Returns the row with what is stored of its pairs."""
        ...

    def logps(self, model: Any, row: PreferenceBatch, visual: Tensor | None = None) -> Tensor:
        """Returns log-probabilities (P, 2) of a row on the device.

        Args:
            visual: the row's visual tokens, if the policy's are the reference's.
        """
        ...


class Adapters:
    """The policy's own weights with adapters off."""

    by_content = False

    def __init__(self, compute: Compute) -> None:
        self.compute = compute

    def begin_run(self, start: RunStart, rows: Callable[..., Sequence[PreferenceBatch]]) -> None:
        """See `Reference.begin_run`."""

    def attach(self, row: PreferenceBatch) -> PreferenceBatch:
        """See `Reference.attach`."""
        return row

    def logps(self, model: Any, row: PreferenceBatch, visual: Tensor | None = None) -> Tensor:
        """See `Reference.logps`."""
        with adapters_off(model), evaluating(model):
            return self.compute(model, row, visual)


class Live:
    """A second model with the weights of the start."""

    by_content = False
    model: Any

    def __init__(self, compute: Compute) -> None:
        self.compute = compute

    def begin_run(self, start: RunStart, rows: Callable[..., Sequence[PreferenceBatch]]) -> None:
        """See `Reference.begin_run`; loads the model."""
        # Not the model at hand: a resumed run's has learned since.
        self.model = start.initial_model()

    def attach(self, row: PreferenceBatch) -> PreferenceBatch:
        """See `Reference.attach`."""
        return row

    def logps(self, model: Any, row: PreferenceBatch, visual: Tensor | None = None) -> Tensor:
        """See `Reference.logps`."""
        with evaluating(self.model):
            return self.compute(self.model, row, visual)


@dataclass
class _Table:
    """What is stored of pairs."""

    logps: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Digest of the content -> log-probabilities (chosen, rejected)."""
    names: set[str] = field(default_factory=set)
    """To tell a pair that has changed from one that could not be read."""

    def add(self, pairs: Sequence[tuple[str, str, float, float]]) -> None:
        """Adds (name, content, chosen, rejected) of pairs."""
        for name, content, chosen, rejected in pairs:
            self.names.add(name)
            self.logps[content] = (float(chosen), float(rejected))


class Precomputed:
    """Log-probabilities that were computed before the first step, by sample and content."""

    by_content = True
    file: Path | None = None

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.stored = _Table()

    def begin_run(self, start: RunStart, rows: Callable[..., Sequence[PreferenceBatch]]) -> None:
        """See `Reference.begin_run`; computes what the run folder lacks, in evaluation mode."""
        augmented = [file.config.name for file in start.files if file.config.augment]
        if augmented:
            raise RunError(
                f"objective.reference: precomputed needs the same pixels each time, but source "
                f"{augmented[0]} is augmented; turn that off, or set objective.reference=live"
            )
        path = start.folder / FILE
        # From rank 0 to all: a node's view of a shared disk may be some seconds old.
        done, self.stored = dist.on_main(lambda: _read(path))
        chunks = [ref for ref in _chunks(start) if _key(ref) not in done]
        if chunks:
            self._compute(start, rows, chunks, path)
        self.file = path

    def _compute(
        self,
        start: RunStart,
        make_rows: Callable[..., Sequence[PreferenceBatch]],
        chunks: Sequence[UnitRef],
        path: Path,
    ) -> None:
        # The weights at hand are those of the start only before the first step.
        model = start.model if start.step == 0 else start.initial_model()
        num_pairs = sum(len(ref.lines) for ref in chunks)
        # In step after each chunk, so that a killed run keeps all but the chunks under way.
        message = "the reference of %s is computed once, into %s"
        log.get_logger().info(message, counted(num_pairs, "pair"), path)
        ranks = dist.world_size()
        here = chunks[dist.rank() :: ranks]
        reading = Reading(
            loader.Groups(start.reader),
            ([ref] for ref in here),
            name=partial(name_failing, start.reader, start.files),
            describe=partial(describe_refs, start.files),
            workers=start.data.workers,
        )
        with (
            closing(iter(reading)) as reads,
            log.Progress("pairs", total=num_pairs) as progress,
            evaluating(model),
            start.computing(),
        ):
            for index in range(0, len(chunks), ranks):
                watchdog.beat("computes the reference of pairs")
                mine = here[index // ranks : index // ranks + 1]
                problem = next((text for ref in mine for text in _random(start, ref)), None)
                units = [
                    u for _ in mine for read in loader.received(next(reads)) for u in read.units
                ]
                rows = list(make_rows(units)) if units and problem is None else []
                pairs = self._pairs(start, model, _as_many(start, rows, make_rows))
                # To all: a pair may be trained on by any rank, and in another step by another.
                gathered = dist.gather_objects((problem, [(_key(ref), pairs) for ref in mine]))
                problem = next((text for text, _ in gathered if text is not None), None)
                if problem is not None:
                    raise DataError(problem)
                for key, chunk in (entry for _, entries in gathered for entry in entries):
                    self.stored.add(chunk)
                    if dist.is_main():
                        _append(path, key, chunk)
                progress.update(sum(len(ref.lines) for ref in chunks[index : index + ranks]))

    def _pairs(
        self, start: RunStart, model: Any, rows: Sequence[PreferenceBatch]
    ) -> list[tuple[str, str, float, float]]:
        pairs = []
        for row in rows:
            logps = self.compute(model, start.pad(row).to(start.device)).tolist()
            for name, content, (chosen, rejected) in zip(
                row.names, row.contents, logps, strict=True
            ):
                pairs.append((name, content, chosen, rejected))
        return pairs

    def attach(self, row: PreferenceBatch) -> PreferenceBatch:
        """See `Reference.attach`.

        Raises:
            DataError: a pair is not what its reference was computed on.
        """
        # Not begun: data are checked, or the pass itself makes rows.
        if self.file is None:
            return row
        logps = [self._stored_of(n, c) for n, c in zip(row.names, row.contents, strict=True)]
        # A row without pairs has this shape too.
        row.reference = torch.tensor(logps, dtype=torch.float32).view(-1, 2)
        return row

    def _stored_of(self, name: str, content: str) -> tuple[float, float]:
        # By content alone: a data set may be moved, which changes the names of its samples.
        if content in self.stored.logps:
            return self.stored.logps[content]
        reason = (
            "it is not what its reference was computed on: its text or its image has changed"
            if name in self.stored.names
            else "its reference was not computed, for it could not be read then"
        )
        raise DataError(
            f"{name}: {reason}. Put it back as it was to go on, or remove {self.file} to compute "
            "the reference of all pairs anew"
        )

    def logps(self, model: Any, row: PreferenceBatch, visual: Tensor | None = None) -> Tensor:
        """See `Reference.logps`."""
        if row.reference is None:  # a synthetic row, which trains nothing
            return torch.zeros_like(row.lengths)
        return row.reference


REFERENCES: dict[str, Callable[[Compute], Reference]] = {
    "adapters": Adapters,
    "precomputed": Precomputed,
    "live": Live,
}
"""`objective.reference` of a recipe -> its class."""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Computes without dropout, stochastic depth and gradients inside."""
    was_training = model.training
    # As in the original: dropout and stochastic depth are the policy's alone.
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _chunks(start: RunStart) -> list[UnitRef]:
    """Lists every line that the run shows, once, cut into chunks by file."""
    lines: dict[int, set[int]] = {}
    for ref in start.refs():
        lines.setdefault(ref.file, set()).update(ref.lines)
    chunks: list[UnitRef] = []
    for file, shown in sorted(lines.items()):
        by_chunk: dict[int, list[int]] = {}
        # By line, not by count: a longer run shows more lines, and keeps what is computed.
        for line in sorted(shown):
            by_chunk.setdefault(line // _CHUNK_PAIRS, []).append(line)
        chunks += [UnitRef(file, tuple(chunk), 0, chunk[0]) for chunk in by_chunk.values()]
    return chunks


def _key(ref: UnitRef) -> str:
    return f"{ref.file}:{','.join(map(str, _ranges(ref.lines)))}"


def _ranges(lines: Sequence[int]) -> Iterator[str]:
    """Yields runs of consecutive lines as "first-last"."""
    first = previous = lines[0]
    for line in (*lines[1:], -1):
        if line != previous + 1:
            yield f"{first}-{previous}"
            first = line
        previous = line


def _random(start: RunStart, ref: UnitRef) -> Iterator[str]:
    """Yields why the pairs of a chunk differ from time to time."""
    config = start.data.video
    # Videos are seen in the rows alone: most data have none, and random frames are the default.
    counted_alike = config.sampling == "middle" and config.min_frames == config.max_frames
    if counted_alike or config.sampling.startswith("fps"):
        return
    for sample in start.files[ref.file].samples(ref.lines):
        if isinstance(sample, Sample) and sample.videos:
            yield f"{sample.name}: {_FRAMES}"


def _as_many(
    start: RunStart,
    rows: list[PreferenceBatch],
    make_rows: Callable[..., Sequence[PreferenceBatch]],
) -> list[PreferenceBatch]:
    """Returns the rows, and empty ones if all ranks must run as many."""
    if not start.in_step:
        return rows
    # Shards are gathered module by module, by all ranks together.
    most = max(dist.gather_objects(len(rows)))
    return rows + [row for _ in range(most - len(rows)) for row in make_rows()]


def _read(path: Path) -> tuple[set[str], _Table]:
    """Reads the file: (chunks that are there, their pairs); drops a line that was cut off."""
    done: set[str] = set()
    stored = _Table()
    if not path.exists():
        return done, stored
    whole = 0
    content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        try:
            chunk = json.loads(line)
            stored.add(chunk["pairs"])
            done.add(chunk["lines"])
        except (ValueError, TypeError, KeyError):
            break
        whole += len(line)
    # A killed run leaves half a line; the next one would be appended to it.
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return done, stored


def _append(path: Path, key: str, pairs: Sequence[tuple[str, str, float, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"lines": key, "pairs": pairs}, ensure_ascii=False) + "\n")
