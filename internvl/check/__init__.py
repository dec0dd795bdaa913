"""Reads all data of a run before it starts: `check.run(recipe)`. Needs no GPU and no weights.

Every annotation line is parsed and encoded, every image and video decoded, every evaluation's
images opened; all problems are collected. The result also counts tokens and tiles, computes the
number of steps and rows, and shows the first batch as text. Results are cached by content in the
cache folder, so a second check reads only what changed.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from dataclasses import replace as replaced
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from internvl import log
from internvl import report as pages
from internvl.check import report as check_report
from internvl.check.report import CheckResult, Counts, ShownSample
from internvl.config import DataConfig, EvalConfig, Recipe
from internvl.data.chat import ChatEncoder
from internvl.data.images import FileSlice, ImageRef, is_address
from internvl.data.loader import Read, UnitReader
from internvl.data.packing import least_padded, padded_tokens
from internvl.data.pairs import CaptionEncoder
from internvl.data.records import Example, PackedBatch, Pair, Sample, Tiles, Unit
from internvl.data.row_steps import row_steps
from internvl.data.sampler import Position, SampleOrder, UnitRef
from internvl.data.sources import Source, open_source, readable_configs, wrong_count
from internvl.data.workers import Reading, describe_refs, name_failing
from internvl.errors import BadSample, DataError, UserError, counted
from internvl.evals import EVALS
from internvl.evals.scores import DataProblems
from internvl.files import cache_folder, write_json
from internvl.inference import load as loading
from internvl.inference.families import FAMILIES
from internvl.inference.opened import OpenedModel, open_start
from internvl.models.attention.packed import BLOCK
from internvl.objectives import OBJECTIVES, Objective
from internvl.plan.work import first_step
from internvl.training import length

_CHUNK_LINES = 64
"""Lines that a worker reads per job; also the unit of the cache."""
_SHOWN_SAMPLES = 4
_MIN_GAIN = 0.02
"""Share of a row that another row length must fill better to be suggested."""
# Packing compares every unit with every row, so its time grows with the square.
_MAX_UNITS = 512
"""Units that row lengths are tried on."""
_MAX_SIDE = 512
"""Longest side of an image in the report, pixels."""
_COLUMNS = ("line", "media", "tokens", "tiles", "supervised", "unknown")
"""Columns of a chunk's rows, named as the fields of `Counts`."""


def run(recipe: Recipe, *, report: Path | None = None) -> CheckResult:
    """Reads all data that the recipe names and counts samples, tokens, tiles and steps.

    Args:
        recipe: what would be trained.
        report: path of an HTML page to write; None writes none.

    Raises:
        UserError: the model's folder cannot be used. Problems of the data are collected instead.
    """
    opened = open_start(recipe)
    # Tile size, template and limits may come from the checkpoint: training resolves them alike.
    completed = loading.complete(recipe, opened)
    recipe = completed.recipe
    checked = CheckResult(recipe, inherited=completed.render())
    encoder = _make_encoder(recipe, opened)
    files, problems, are_all = _open_all(recipe)
    checked.problems += problems
    # The recipe's own objective and reader: a new one is checked as what it is.
    objective: Any = OBJECTIVES[recipe.objective.name](recipe.objective, recipe.data, encoder)
    reader: Any = objective.reader(files, recipe.seed)
    if isinstance(reader, UnitReader):
        reader.pixels = False  # every image is still decoded, but not resized to tiles
    _count_lines(_ChunkCounter(reader, _settings(recipe, encoder), encoder), checked)
    for name, config in recipe.evals.items():
        checked.problems += _eval_problems(name, config)
    # With a source missing, the order of the samples and the number of steps would be others.
    if files and are_all:
        order = SampleOrder(files, share_prefix=recipe.shares_prefix, seed=recipe.seed)
        add_first_step = _first_rows if recipe.objective.rows_are_packed else _first_pairs
        add_first_step(order, reader, objective, checked)
    if report is not None:
        pages.write(check_report.page(checked), report)
    return checked


def _open_all(recipe: Recipe) -> tuple[list[Source], list[BadSample], bool]:
    """Opens the recipe's sources: (sources, problems, True if all can be read)."""
    try:
        configs, wrong = readable_configs(recipe.data)
        problems = [BadSample(f"{recipe.data.meta}: {bad.name}", bad.reason) for bad in wrong]
        are_all = all(bad.reason.startswith("`length`") for bad in wrong)
    except DataError as error:
        configs, problems = list(recipe.data.sources), [BadSample("data.meta", str(error))]
        are_all = False
    files = []
    for config in configs:
        try:
            # A wrong count hides no problem of the lines, so they are read all the same.
            file = open_source(config, check_count=False)
        except DataError as error:
            # Most sentences of files name the file; those of sources begin with the source.
            path, reason = (
                str(config.annotations),
                str(error).removeprefix(f"source {config.name}: "),
            )
            name = f"source {config.name}" if path in reason else path
            problems.append(BadSample(name, reason))
            are_all = False
            continue
        files.append(file)
        reason_of_count = wrong_count(file)
        if reason_of_count is not None:
            problems.append(BadSample(f"source {config.name}", reason_of_count))
    return files, problems, are_all


def _make_encoder(recipe: Recipe, opened: OpenedModel) -> ChatEncoder | CaptionEncoder:
    """Makes the encoder of training from the tokenizer alone, without reading weights.

    Args:
        recipe: completed with the checkpoint's settings.
        opened: `recipe.model`, opened.
    """
    family = FAMILIES[opened.files.family]
    # As training does: an objective of the other family would fail later and name no key.
    family.check_objective(recipe)
    return family.encoder(opened, recipe)


@dataclass
class _ChunkCounts:
    """Counts of a chunk of lines, as a worker returns them."""

    file: int
    """Index of the source."""
    num_lines: int
    rows: np.ndarray
    """int64 (good samples, columns)"""
    digests: np.ndarray
    """uint64 (good samples,)"""
    bad: list[BadSample]


class _ChunkCounter(Dataset[_ChunkCounts]):
    """Reads chunks of lines and returns counts instead of ids and pixels.

    Chunks are cached by their lines, media files and settings.
    """

    def __init__(self, reader: Any, settings: str, encoder: ChatEncoder | CaptionEncoder) -> None:
        self.reader = reader
        self.settings = settings
        self.encoder = encoder
        self.cache = cache_folder() / "check"

    def __getitem__(self, ref: UnitRef) -> _ChunkCounts:
        source = self.reader.files[ref.file]
        samples = list(source.samples(ref.lines))
        # `ref.row` seeds what is drawn for the samples, such as a video's frames.
        key = hashlib.sha256(f"{self.settings}{source.config!r}{ref.row}".encode())
        for sample in samples:
            key.update(repr((sample.name, _content(sample))).encode())
        # In subfolders: a large source has 100,000 chunks, too many files for one folder.
        file = self.cache / key.hexdigest()[:2] / f"{key.hexdigest()[2:34]}.json"
        if not file.is_file():
            write_json(file, self._count(ref, samples))
        # A fresh chunk is read back too: both ways then give the same types.
        chunk = json.loads(file.read_text(encoding="utf-8"))
        return _ChunkCounts(
            ref.file,
            len(ref.lines),
            # The reshape keeps the columns of a chunk without a good sample.
            np.asarray(chunk["rows"], dtype=np.int64).reshape(-1, len(_COLUMNS)),
            np.asarray(chunk["digests"], dtype=np.uint64),
            [BadSample(*bad) for bad in chunk["bad"]],
        )

    def _count(self, ref: UnitRef, samples: Sequence[Sample | BadSample]) -> dict[str, Any]:
        """Encodes the samples of a chunk; returns their rows, digests and problems for JSON."""
        # The reader returns samples by media, not in the order of lines.
        by_name = {
            sample.name: (line, sample)
            for line, sample in zip(ref.lines, samples, strict=True)
            if isinstance(sample, Sample)
        }
        read = self.reader[ref]
        rows, digests = [], []
        unknown_id = self.encoder.tokenizer.unk_token_id
        for name, *counts in (row for unit in read.units for row in _measures(unit, unknown_id)):
            line, sample = by_name[name]
            rows.append((line, _media_class(sample), *counts))
            # 64 bits fit a NumPy column; equal by chance: 1 in 3,000 among 100 million samples.
            digest = hashlib.blake2b(repr(_content(sample)).encode(), digest_size=8).digest()
            digests.append(int.from_bytes(digest, "little"))
        return {
            "rows": rows,
            "digests": digests,
            "bad": [(bad.name, bad.reason, bad.needs) for bad in read.bad],
        }

    def name_failing(self, ref: UnitRef, error: Exception) -> str:
        """Returns the sample of a chunk that an exception is about."""
        # By the reader: this one would make a cache file of every line tried alone.
        return name_failing(self.reader, self.reader.files, [ref], error)


def _measures(
    unit: Unit | Pair, unknown_id: int | None
) -> Iterator[tuple[str, int, int, int, int]]:
    """Yields (name, tokens, tiles, supervised tokens, unknown tokens) of every sample of a unit."""
    if isinstance(unit, Pair):
        # A byte-level tokenizer has no unknown token: it encodes every text.
        unknown = 0 if unknown_id is None else unit.summary.count(unknown_id)
        yield unit.name, len(unit.summary), 1, len(unit.written) - unit.num_given, unknown
        return
    by_name: dict[str, list[Example]] = {}
    for example in unit.examples:
        by_name.setdefault(example.name, []).append(example)
    for name, examples in by_name.items():
        # The answers of a pair share what comes before them.
        ids = np.concatenate(
            [examples[0].input_ids, *(e.input_ids[unit.prefix :] for e in examples[1:])]
        )
        unknown = 0 if unknown_id is None else int((ids == unknown_id).sum())
        supervised = sum(example.num_supervised for example in examples)
        yield name, len(ids), unit.num_tiles, supervised, unknown


def _settings(recipe: Recipe, encoder: ChatEncoder | CaptionEncoder) -> str:
    """Returns the part of the cache key that all lines share: all that decides how one is read."""
    # The tokenizer's content: its path stays the same when its files are edited.
    tokenizer = encoder.tokenizer.backend_tokenizer.to_str()
    # A source is in the key of its own chunks, so a new one does not make the others be read again.
    data = replaced(recipe.data, sources=(), meta=None, workers=0)
    return repr(
        (
            hashlib.sha256(tokenizer.encode()).hexdigest(),
            encoder.settings,
            data,
            recipe.objective,
            recipe.seed,
        )
    )


def _media_class(sample: Sample) -> int:
    """Returns 0 for text, 1 for one image, 2 for several images, 3 for video."""
    return 3 if sample.videos else min(len(sample.images), 2)


def _content(sample: Sample | BadSample) -> tuple[Any, ...]:
    """Returns the messages of a sample and the state of its media, for hashing."""
    if isinstance(sample, BadSample):
        return ("bad", sample.reason)
    media = [_state(image) for image in sample.images]
    media += [(_state(video.path), video.start_s, video.end_s) for video in sample.videos]
    return (
        (sample.messages, media)
        if sample.rejected is None
        else (sample.messages, media, sample.rejected)
    )


def _state(media: ImageRef) -> tuple[Any, ...]:
    """Returns what changes when a media file changes: (path, size, mtime_ns), or a hash of bytes.

    An address has its name only.
    """
    if isinstance(media, bytes):
        return (hashlib.sha256(media).hexdigest(),)
    if isinstance(media, FileSlice):
        return (*_state(media.path), media.offset, media.size)
    # Asking a store for the size of every image would take a request for each.
    if is_address(media):
        return (str(media),)
    # Size and time instead of a hash: a second check must not read the images again.
    try:
        state = os.stat(media)
    except OSError:
        return (str(media), "missing")
    return (str(media), state.st_size, state.st_mtime_ns)


def _count_lines(counter: _ChunkCounter, checked: CheckResult) -> None:
    """Adds the counts and problems of every line of every source to `checked`."""
    files = counter.reader.files
    chunks = (
        UnitRef(index, tuple(range(start, min(start + _CHUNK_LINES, len(file)))), 0, start)
        for index, file in enumerate(files)
        for start in range(0, len(file), _CHUNK_LINES)
    )
    reading = Reading(
        counter,
        chunks,
        name=counter.name_failing,
        describe=lambda ref: describe_refs(files, [ref]),
        workers=checked.recipe.data.workers,
    )
    by_file: list[list[_ChunkCounts]] = [[] for _ in files]
    with (
        reading.named_deaths(),
        log.Progress("samples", total=sum(map(len, files))) as progress,
    ):
        for chunk in reading:
            by_file[chunk.file].append(chunk)
            # Within a chunk they come by image; a reader looks for them by line.
            checked.problems += sorted(chunk.bad, key=lambda bad: (len(bad.name), bad.name))
            progress.update(chunk.num_lines)
    for file, file_chunks in zip(files, by_file, strict=True):
        columns = np.concatenate([chunk.rows for chunk in file_chunks]).T
        digests = np.concatenate([chunk.digests for chunk in file_chunks])
        named = dict(zip(_COLUMNS, columns, strict=True))
        checked.counts[file.config.name] = Counts(**named, digest=digests)


def _eval_problems(name: str, config: EvalConfig) -> list[BadSample]:
    """Returns the problems of an evaluation's annotations and images."""
    try:
        # The constructor reads the annotations and opens every image; no model is needed.
        EVALS[config.type](config)
    except DataProblems as error:
        return [
            BadSample(f"evals.{name} {problem.name}", problem.reason) for problem in error.problems
        ]
    except UserError as error:
        return [BadSample(f"evals.{name}", str(error))]
    return []


def _first_rows(
    order: SampleOrder, reader: UnitReader, objective: Any, checked: CheckResult
) -> None:
    """Adds the number of steps, the first step's rows and samples of its first row."""
    recipe = checked.recipe
    try:
        refs, units, rows = _rows_of_first_step(order, reader, objective, recipe)
    except BadSample as bad:
        checked.problems.append(bad)
        return
    if not units:
        checked.problems += _no_step(order, recipe)
        return
    checked.arithmetic = "\n".join(
        [
            _arithmetic(order, recipe),
            _row_line(rows, units, recipe) + _better_rows(units, recipe.data),
        ]
    )
    checked.step = first_step(rows, objective.weights, len(order))
    # One of each unit: the answers to an image differ little, images do.
    shown = (next(_show(ref, rows[0].names, reader, objective), None) for ref in refs)
    # A unit may be in another row: it has nothing to show.
    checked.first_samples = list(islice(filter(None, shown), _SHOWN_SAMPLES))


def _rows_of_first_step(
    order: SampleOrder, reader: UnitReader, objective: Any, recipe: Recipe
) -> tuple[list[UnitRef], list[Unit], list[PackedBatch]]:
    """Returns references, units and rows of the first step; all empty if no sample is readable."""
    if recipe.global_batch_rows is None:
        refs, units = _first_units(order, reader, recipe)
        return refs, units, objective.batches(units) if units else []
    groups: list[list[Unit]] = []

    # A step holds batches, which no longer tell their units.
    def build(rows: Sequence[Sequence[Unit]]) -> list[PackedBatch]:
        groups.extend(map(list, rows))
        return []

    # Without workers: they would read ahead of the one step that is wanted.
    data, num_rows = replaced(recipe.data, workers=0), recipe.global_batch_rows
    with closing(
        row_steps(
            order, reader, build, data, num_rows=num_rows, position=Position(), first=0, last=1
        )
    ) as steps:
        try:
            step = next(steps)
        except DataError:  # every sample is bad, and listed already
            return [], [], []
    refs, first = [], 0
    while first < step.num_seen:
        refs.append(order.group_at(first))
        first += len(refs[-1].lines)
    units = [unit for row in groups for unit in row]
    return refs, units, objective.rows(groups)


def _first_units(
    order: SampleOrder, reader: Dataset[Read], recipe: Recipe
) -> tuple[list[UnitRef], list[Any]]:
    """Returns references and units of the first step that has a good sample; empty if none has."""
    # Training passes over a step of bad samples alone.
    for step in range(recipe.num_steps(len(order))):
        refs = order.step(step, recipe.batch_samples, recipe.num_samples(len(order)))
        units = [unit for ref in refs for unit in reader[ref].units]
        # Later epochs have the same samples.
        if units or (step + 1) * recipe.batch_samples >= len(order):
            return refs, units
    return [], []


def _first_pairs(
    order: SampleOrder, reader: Dataset[Read], objective: Objective, checked: CheckResult
) -> None:
    """Adds the number of steps and a description of the first step's pairs."""
    recipe = checked.recipe
    _, units = _first_units(order, reader, recipe)
    if not units:
        checked.problems += _no_step(order, recipe)
    else:
        steps = _arithmetic(order, recipe)
        batches: Sequence[Any] = objective.batches(units)
        checked.arithmetic = f"{steps}\nthe first step: {objective.describe(batches)}"
        checked.step = first_step(batches, objective.weights, len(order))


def _no_step(order: SampleOrder, recipe: Recipe) -> Iterator[BadSample]:
    """Yields the problem of a run that would train nothing."""
    problem = length.no_step(recipe, len(order))
    if problem is not None:
        yield BadSample("recipe", problem)


def _arithmetic(order: SampleOrder, recipe: Recipe) -> str:
    """Formats samples, groups, epochs and steps of the run."""
    samples = counted(len(order), "sample")
    epoch = f"{samples} per epoch in {counted(order.num_groups, 'group')}; "
    num_steps = recipe.num_steps(len(order))
    if recipe.global_batch_rows is not None:
        return f"{epoch}{num_steps:,} steps of {recipe.global_batch_rows:,} rows"
    total, batch = recipe.num_samples(len(order)), recipe.batch_samples
    last = total - (num_steps - 1) * batch
    partial = "" if last == batch else f", the last of {last:,}"
    epochs = total / len(order)
    return (
        f"{epoch}{epochs:.4g} {'epoch' if epochs == 1 else 'epochs'} of them in steps of "
        f"{batch:,}{partial}: {counted(num_steps, 'step')}"
    )


def _row_line(rows: Sequence[PackedBatch], units: Sequence[Unit], recipe: Recipe) -> str:
    """Formats the first step's rows, tiles and supervised tokens, and what shared prefixes save."""
    limit = recipe.data.row_tokens or recipe.data.max_tokens
    tokens = sum(row.num_tokens for row in rows)
    padded = sum(padded_tokens(row.num_tokens, limit) for row in rows)
    tiles = sum(row.num_tiles for row in rows)
    # Without sharing, every example would have its own copy of the prefix and its tiles.
    alone = sum(len(example.input_ids) for unit in units for example in unit.examples)
    tiles_alone = sum(unit.num_tiles * len(unit.examples) for unit in units)
    saved = ""
    if alone > tokens:
        saved = f"; without shared prefixes {alone / tokens:.2f} times the tokens"
        saved += f" and {tiles_alone / tiles:.2f} times the tiles" if tiles else ""
    return (
        f"the first step: {counted(len(rows), 'row')} of at most {limit:,} tokens and "
        f"{recipe.data.max_tiles} tiles, {tokens / padded:.1%} full, {tiles} tiles, "
        f"{sum(len(row.targets) for row in rows):,} supervised tokens{saved}"
    )


def _better_rows(units: Sequence[Unit], data: DataConfig) -> str:
    """Suggests a `data.row_tokens` within 1/8 of the present one that wastes less; "" if none."""
    sizes = [(unit.num_tokens, unit.num_tiles) for unit in units[:_MAX_UNITS]]
    limit = data.row_tokens or data.max_tokens
    # May exceed `data.max_tokens`, the limit of a sample: a unit can hold several captions.
    largest = max(tokens for tokens, _ in sizes)
    if data.packing != "best-fit" or largest > limit:
        return ""

    def fill(length: int) -> float:
        rows = least_padded(sizes, length, data.max_tiles)
        held = [sum(sizes[i][0] for i in row) for row in rows]
        # A single row takes whatever there is: how full it is says nothing about the length.
        return sum(held) / sum(padded_tokens(n, length) for n in held) if len(rows) > 1 else 0.0

    first = max(data.max_tokens, largest, limit * 7 // 8)
    # Multiples of the attention block: a row is padded to one in any case.
    best = max(range(-(-first // BLOCK) * BLOCK, limit * 9 // 8, BLOCK), key=fill, default=limit)
    if fill(best) < fill(limit) + _MIN_GAIN:
        return ""
    return f"; data.row_tokens={best} would be {fill(best):.1%} full"


def _show(
    ref: UnitRef, names: Sequence[str], reader: UnitReader, objective: Any
) -> Iterator[ShownSample]:
    """Yields the samples of `ref` that are in `names`, with the tiles and text of training."""
    for sample in reader.files[ref.file].samples(ref.lines):
        if isinstance(sample, BadSample) or sample.name not in names:
            continue
        prepared, _, tiles = reader.prepare([sample], ref)
        for unit in objective.encode(prepared, tiles) if prepared else []:
            if isinstance(unit, BadSample):
                continue
            yield ShownSample(
                sample,
                _media_names(sample, tiles),
                tuple(_thumbnail(image) for image in reader.images(sample, ref)[0]),
                () if tiles is None else tiles.grids,
                () if tiles is None else tiles.per_image,
                tuple(objective.shown_spans(unit)),
            )


def _media_names(sample: Sample, tiles: Tiles | None) -> tuple[str, ...]:
    """Returns the path of each image, or path and number of each frame."""
    if sample.videos:
        count = 0 if tiles is None else len(tiles.grids)
        return tuple(f"{sample.videos[0].path} frame {n}" for n in range(1, count + 1))
    return tuple("(bytes)" if isinstance(image, bytes) else str(image) for image in sample.images)


def _thumbnail(pixels: np.ndarray) -> bytes:
    """Encodes uint8 (H, W, 3) as a JPEG of at most _MAX_SIDE pixels a side."""
    image = Image.fromarray(pixels)
    # The page embeds every image: photos at full size would make it tens of MB.
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
