"""Everything a run will read, read before it starts: `check.run(recipe)`. Needs no GPU, no weights.

Every annotation line is parsed and encoded, every image decoded, every evaluation's pictures
opened; all problems are collected. Then the arithmetic of a step, and the first batch as text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from internvl import handles, log
from internvl.config import EvalConfig, Recipe, UserError
from internvl.data.chat import ChatEncoder
from internvl.data.images import BadImage, open_rgb
from internvl.data.loader import UnitReader
from internvl.data.order import SampleOrder, UnitRef
from internvl.data.records import (
    IGNORE,
    BadSample,
    DataError,
    Example,
    Grid,
    PackedBatch,
    Sample,
    Tiles,
)
from internvl.data.sources import Source, open_source, source_configs
from internvl.data.templates import template
from internvl.evals import EVALS
from internvl.models import hub, lora, vlm
from internvl.objectives import OBJECTIVES, Objective

_CHUNK = 64  # lines that a worker examines at once
_SHOWN_PROBLEMS = 20
_SHOWN_SAMPLES = 4


@dataclass(frozen=True)
class Counts:
    """What the good samples of a source hold. Every array is int64, one number a sample."""

    tokens: np.ndarray
    tiles: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Shown:
    """A sample of the first batch: its text in spans of (text, supervised), a grid per image."""

    name: str
    images: tuple[str, ...]
    grids: tuple[Grid, ...]
    per_image: tuple[int, ...]
    """Tiles of each image, the thumbnail included."""
    spans: tuple[tuple[str, bool], ...]


@dataclass
class Checked:
    """What `run` found."""

    recipe: Recipe
    problems: list[BadSample] = field(default_factory=list)
    """All bad samples and unusable files, by file and line."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """Of every source, by its name."""
    arithmetic: str = ""
    """Samples, groups, steps and rows, in words; empty where nothing can be trained on."""
    first: list[Shown] = field(default_factory=list)
    """The first samples of the first row."""

    def render(self) -> str:
        """The findings as text: problems, sources, arithmetic, first batch."""
        parts = [
            "\n".join(self._problem_lines()),
            "\n".join(_source_line(name, counts) for name, counts in self.counts.items()),
            self.arithmetic,
            *map(_render_sample, self.first),
        ]
        return "\n\n".join(part for part in parts if part)

    def _problem_lines(self) -> Iterator[str]:
        if not self.problems:
            yield "no problem found"
            return
        yield f"{len(self.problems):,} problem(s)"
        for problem in self.problems[:_SHOWN_PROBLEMS]:
            yield f"  {problem}"
        if len(self.problems) > _SHOWN_PROBLEMS:
            yield f"  and {len(self.problems) - _SHOWN_PROBLEMS:,} more"


def run(recipe: Recipe, *, report: Path | None = None) -> Checked:
    """Reads everything the recipe names and counts what training will see.

    Args:
        recipe: what would be trained.
        report: where to write the findings as a page; None writes none.

    Raises:
        UserError: the model's folder cannot be used. Problems of the data are collected instead.
    """
    checked = Checked(recipe)
    encoder = encoder_of(recipe)
    objective = OBJECTIVES[recipe.objective.name](recipe.objective, recipe.data, encoder)
    files, unusable = _open_all(recipe)
    checked.problems += unusable
    reader = UnitReader(files, recipe.data, objective.encode, seed=recipe.seed, pixels=False)
    _examine(reader, checked)
    for name, spec in recipe.evals.items():
        checked.problems += _eval_problems(name, spec)
    if files and not unusable:
        order = SampleOrder(files, share_prefix=recipe.data.share_prefix, seed=recipe.seed)
        _first_step(order, reader, objective, encoder, checked)
    return checked


def _open_all(recipe: Recipe) -> tuple[list[Source], list[BadSample]]:
    """The recipe's sources, and what is wrong with those that cannot be opened."""
    try:
        configs = source_configs(recipe.data)
    except DataError as error:
        return [], [BadSample("data.meta", str(error))]
    files, problems = [], []
    for config in configs:
        try:
            files.append(open_source(config))
        except DataError as error:
            problems.append(BadSample(str(config.annotations), str(error)))
    return files, problems


def encoder_of(recipe: Recipe) -> ChatEncoder:
    """The encoder that training would use, without reading weights."""
    folder = hub.find_folder(recipe.model.id)
    if lora.is_adapter(folder):
        folder = hub.find_folder(lora.base_of(folder))
    head = handles.describe(folder)
    if head.tokenizer is None:
        raise UserError(f"{folder}: no tokenizer files; copy those of the release there")
    data = recipe.data
    return ChatEncoder(
        head.tokenizer,
        template(data.template) if data.template else head.template,
        vlm.tokens_per_tile(head.config, data.tiles.size),
        head.system_message if data.system_message is None else data.system_message,
    )


@dataclass
class _Examined:
    """A chunk of lines: int64 (samples, 3) of tokens, tiles, supervised; and the bad ones."""

    file: int
    num_lines: int
    counts: np.ndarray
    bad: list[BadSample]


class _Examiner(Dataset[_Examined]):
    """Counts instead of pixels and ids: what a worker sends back of a chunk stays small."""

    def __init__(self, reader: UnitReader) -> None:
        self.reader = reader

    def __getitem__(self, ref: UnitRef) -> _Examined:
        read = self.reader[ref]
        counts = [
            (len(example.input_ids), unit.num_tiles, example.num_supervised)
            for unit in read.units
            for example in unit.examples
        ]
        array = np.asarray(counts, dtype=np.int64).reshape(-1, 3)
        return _Examined(ref.file, len(ref.lines), array, read.bad)


def _examine(reader: UnitReader, checked: Checked) -> None:
    """Counts and problems of every line of every file."""
    chunks = [
        UnitRef(number, tuple(range(start, min(start + _CHUNK, len(file)))), 0)
        for number, file in enumerate(reader.files)
        for start in range(0, len(file), _CHUNK)
    ]
    loader = DataLoader(
        _Examiner(reader),
        sampler=chunks,
        batch_size=None,
        num_workers=reader.config.workers,
    )
    counts: list[list[np.ndarray]] = [[] for _ in reader.files]
    with log.Progress("samples", total=sum(map(len, reader.files))) as progress:
        for examined in loader:
            counts[examined.file].append(examined.counts)
            # Within a chunk they come by picture; a reader looks for them by line.
            checked.problems += sorted(examined.bad, key=lambda bad: (len(bad.name), bad.name))
            progress.update(examined.num_lines)
    for file, parts in zip(reader.files, counts, strict=True):
        tokens, tiles, supervised = np.concatenate(parts).T
        checked.counts[file.config.name] = Counts(tokens, tiles, supervised)


def _eval_problems(name: str, spec: EvalConfig) -> list[BadSample]:
    """What is wrong with an evaluation's annotations and pictures."""
    try:
        requests = EVALS[spec.type](spec).requests()
    except (UserError, BadImage) as error:
        return [BadSample(f"evals.{name}", str(error))]
    problems = []
    for image in dict.fromkeys(str(image) for request in requests for image in request.images):
        try:
            open_rgb(image)
        except BadImage as error:
            problems.append(BadSample(f"evals.{name}", f"{image}: {error}"))
    return problems


def _first_step(
    order: SampleOrder,
    reader: UnitReader,
    objective: Objective,
    encoder: ChatEncoder,
    checked: Checked,
) -> None:
    """The arithmetic of the run, and the samples of the first row of its first step."""
    recipe = checked.recipe
    num_steps = recipe.num_steps(len(order))
    total = recipe.num_samples(len(order))
    refs = order.step(0, recipe.global_batch, total)
    units = [unit for ref in refs for unit in reader[ref].units]
    if not units:
        return
    try:
        rows = objective.batches(units)
    except BadSample as bad:
        checked.problems.append(bad)
        return
    checked.arithmetic = _arithmetic(order, num_steps, total, rows, recipe)
    wanted = rows[0].names[:_SHOWN_SAMPLES]
    checked.first = [
        shown for ref in refs for shown in _show(ref, wanted, reader, objective, encoder)
    ]


def _arithmetic(
    order: SampleOrder, num_steps: int, total: int, rows: Sequence[PackedBatch], recipe: Recipe
) -> str:
    last = total - (num_steps - 1) * recipe.global_batch
    partial = "" if last == recipe.global_batch else f", the last of {last:,}"
    epochs = total / len(order)
    filled = sum(row.num_tokens for row in rows) / (len(rows) * recipe.data.max_tokens)
    return (
        f"{len(order):,} samples an epoch in {order.num_groups:,} groups; {epochs:.4g} epoch(s) of "
        f"them in steps of {recipe.global_batch:,}{partial}: {num_steps:,} steps\n"
        f"the first step: {len(rows)} row(s) of at most {recipe.data.max_tokens:,} tokens and "
        f"{recipe.data.max_tiles} tiles, {filled:.1%} full, "
        f"{sum(row.num_tiles for row in rows)} tiles, "
        f"{sum(len(row.targets) for row in rows):,} supervised tokens"
    )


def _show(
    ref: UnitRef,
    wanted: Sequence[str],
    reader: UnitReader,
    objective: Objective,
    encoder: ChatEncoder,
) -> Iterator[Shown]:
    for sample in reader.files[ref.file].samples(ref.lines):
        if isinstance(sample, BadSample) or sample.name not in wanted:
            continue
        prepared, _, tiles = reader.prepare([sample], ref)
        for unit in objective.encode(prepared, tiles) if prepared else []:
            if isinstance(unit, BadSample):
                continue
            yield Shown(
                sample.name,
                _media_names(sample, tiles),
                () if tiles is None else tiles.grids,
                () if tiles is None else tiles.per_image,
                tuple(spans(unit.examples[0], encoder)),
            )


def _media_names(sample: Sample, tiles: Tiles | None) -> tuple[str, ...]:
    """What the text calls each of a sample's images or frames."""
    if sample.videos:
        count = 0 if tiles is None else len(tiles.grids)
        return tuple(f"{sample.videos[0].path} frame {n}" for n in range(1, count + 1))
    return tuple("(bytes)" if isinstance(i, bytes) else str(i) for i in sample.images)


def spans(example: Example, encoder: ChatEncoder) -> Iterator[tuple[str, bool]]:
    """(text, supervised) of an example's runs; placeholders are counted, not repeated."""
    ids, labels = example.input_ids, example.labels != IGNORE
    kind = np.where(ids == encoder.context_id, 2, labels.astype(np.int64))
    bounds = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(ids)]
    for start, end in pairwise(bounds):
        if kind[start] == 2:
            yield f"[{end - start} visual tokens]", False
        else:
            yield encoder.tokenizer.decode(ids[start:end].tolist()), bool(kind[start])


def _source_line(name: str, counts: Counts) -> str:
    if not len(counts):
        return f"source {name}: no good sample"
    tokens, tiles = int(counts.tokens.sum()), int(counts.tiles.sum())
    return (
        f"source {name}: {len(counts):,} good samples, {tokens:,} tokens (longest "
        f"{counts.tokens.max():,}), {counts.supervised.sum() / tokens:.1%} supervised, "
        f"{tiles:,} tiles (most {counts.tiles.max()})"
    )


def _render_sample(shown: Shown) -> str:
    pictures = [
        f"  {path}: {columns} x {rows} grid, {count} tile(s)"
        for path, (columns, rows), count in zip(
            shown.images, shown.grids, shown.per_image, strict=True
        )
    ]
    text = "".join(f"⟦{text}⟧" if supervised else text for text, supervised in shown.spans)
    body = "\n".join("  | " + line for line in text.split("\n"))
    return "\n".join([f"{shown.name} (⟦supervised⟧)", *pictures, body])
