"""Everything a run will read, read before it starts: `check.run(recipe)`. Needs no GPU, no weights.

Every annotation line is parsed and encoded, every image and video decoded, every evaluation's
images opened; all problems are collected. Then what the samples hold, the arithmetic of a step,
and the first batch as text. What was read once is kept by its content in the cache folder, so that
a second check reads only what changed.
"""

import functools
import hashlib
import io
import json
import operator
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
from internvl.check.report import Checked, Counts, Shown
from internvl.config import DataConfig, EvalConfig, Recipe
from internvl.data.chat import ChatEncoder, spans
from internvl.data.images import FileSlice, ImageRef, is_address
from internvl.data.loader import Read, UnitReader
from internvl.data.packing import least_padded, padded_tokens
from internvl.data.pairs import CaptionEncoder
from internvl.data.records import PackedBatch, Pair, Sample, Tiles, Unit
from internvl.data.row_steps import row_steps
from internvl.data.sampler import Position, SampleOrder, UnitRef
from internvl.data.sources import Source, open_source, source_configs
from internvl.data.workers import Reading, describe_refs, name_failing
from internvl.errors import BadSample, DataError, UserError
from internvl.evals import EVALS
from internvl.evals.scores import DataProblems
from internvl.files import cache_folder, write_json
from internvl.inference import load as loading
from internvl.inference.families import FAMILIES
from internvl.inference.opened import OpenedModel, open_start
from internvl.models.attention.packed import BLOCK
from internvl.objectives import OBJECTIVES, Objective
from internvl.objectives.sft import Sft
from internvl.plan import dual_flops
from internvl.plan.flops import work_of
from internvl.plan.work import FirstStep

_CHUNK = 64  # lines that a worker examines at once
_SHOWN_SAMPLES = 4
_WORTH_SAYING = 0.02  # of a row
_MOST_PACKED = 512  # units that row lengths are tried on
_IMAGE = 512  # longest side of an image in the report, pixels
_COLUMNS = ("line", "kind", "tokens", "tiles", "supervised", "unknown")


def run(recipe: Recipe, *, report: Path | None = None) -> Checked:
    """Reads everything the recipe names and counts what training will see.

    Args:
        recipe: what would be trained.
        report: where to write the findings as a page; None writes none.

    Raises:
        UserError: the model's folder cannot be used. Problems of the data are collected instead.
    """
    opened = open_start(recipe)
    completed = loading.complete(recipe, opened)
    recipe = completed.recipe
    checked = Checked(recipe, inherited=completed.render())
    encoder = encoder_of(recipe, opened)
    files, unusable = _open_all(recipe)
    checked.problems += unusable
    objective: Any = OBJECTIVES[recipe.objective.name](recipe.objective, recipe.data, encoder)
    reader: Any
    if isinstance(encoder, CaptionEncoder):
        reader = objective.reader(files, recipe.seed)
    else:
        reader = UnitReader(files, recipe.data, objective.encode, seed=recipe.seed, pixels=False)
    _examine(_Examiner(reader, _settings(recipe, encoder), encoder), checked)
    for name, spec in recipe.evals.items():
        checked.problems += _eval_problems(name, spec)
    if files and not unusable:
        order = SampleOrder(files, share_prefix=recipe.shares_prefix, seed=recipe.seed)
        if isinstance(encoder, CaptionEncoder):
            _first_pairs(order, reader, objective, checked)
        else:
            _first_step(order, reader, objective, encoder, checked)
    if report is not None:
        pages.write(check_report.page(checked), report)
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
            # Most sentences of files name the file; those of sources begin with the source.
            path, reason = (
                str(config.annotations),
                str(error).removeprefix(f"source {config.name}: "),
            )
            name = f"source {config.name}" if path in reason else path
            problems.append(BadSample(name, reason))
    return files, problems


def encoder_of(recipe: Recipe, opened: OpenedModel | None = None) -> ChatEncoder | CaptionEncoder:
    """The encoder that training would use, without reading weights.

    Args:
        recipe: with nothing left open.
        opened: `recipe.model`, where it is open already.
    """
    opened = opened or open_start(recipe)
    family = FAMILIES[opened.files.family]
    family.check_objective(recipe)
    return family.encoder(opened, recipe)


@dataclass
class _Examined:
    """A chunk of lines: int64 (samples, columns), uint64 (samples,) digests, and the bad ones."""

    file: int
    num_lines: int
    rows: np.ndarray
    digests: np.ndarray
    bad: list[BadSample]


class _Examiner(Dataset[_Examined]):
    """Counts instead of pixels and ids: what a worker sends back of a chunk stays small.

    A chunk whose lines, media files and settings were seen before is not read again.
    """

    def __init__(self, reader: Any, settings: str, encoder: ChatEncoder | CaptionEncoder) -> None:
        self.reader = reader
        self.settings = settings
        self.encoder = encoder
        self.cache = cache_folder() / "check"

    def __getitem__(self, ref: UnitRef) -> _Examined:
        source = self.reader.files[ref.file]
        samples = list(source.samples(ref.lines))
        key = hashlib.sha256(f"{self.settings}{source.config!r}{ref.row}".encode())
        for sample in samples:
            key.update(repr((sample.name, _content(sample))).encode())
        file = self.cache / key.hexdigest()[:2] / f"{key.hexdigest()[2:34]}.json"
        if not file.is_file():
            found = self._examine(ref, samples)
            write_json(file, found)
        found = json.loads(file.read_text(encoding="utf-8"))
        return _Examined(
            ref.file,
            len(ref.lines),
            np.asarray(found["rows"], dtype=np.int64).reshape(-1, len(_COLUMNS)),
            np.asarray(found["digests"], dtype=np.uint64),
            [BadSample(*bad) for bad in found["bad"]],
        )

    def _examine(self, ref: UnitRef, samples: Sequence[Sample | BadSample]) -> dict[str, Any]:
        by_name = {
            sample.name: (line, sample)
            for line, sample in zip(ref.lines, samples, strict=True)
            if isinstance(sample, Sample)
        }
        read = self.reader[ref]
        rows, digests = [], []
        unknown = self.encoder.tokenizer.unk_token_id
        for name, *numbers in (row for unit in read.units for row in _measures(unit, unknown)):
            line, sample = by_name[name]
            rows.append((line, _kind(sample), *numbers))
            digest = hashlib.blake2b(repr(_content(sample)).encode(), digest_size=8).digest()
            digests.append(int.from_bytes(digest, "little"))
        return {
            "rows": rows,
            "digests": digests,
            "bad": [(bad.name, bad.reason) for bad in read.bad],
        }


def _measures(unit: Unit | Pair, unknown: int | None) -> Iterator[tuple[str, int, int, int, int]]:
    """Name, tokens, tiles, supervised and unknown tokens of every sample."""
    if isinstance(unit, Pair):
        strange = 0 if unknown is None else unit.summary.count(unknown)
        yield unit.name, len(unit.summary), 1, len(unit.written) - unit.num_given, strange
        return
    for example in unit.examples:
        ids = example.input_ids
        strange = 0 if unknown is None else int((ids == unknown).sum())
        yield example.name, len(ids), unit.num_tiles, example.num_supervised, strange


def _settings(recipe: Recipe, encoder: ChatEncoder | CaptionEncoder) -> str:
    """All that decides how a line is read, besides the line and its source."""
    tokenizer = encoder.tokenizer.backend_tokenizer.to_str()
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


def _kind(sample: Sample) -> int:
    return 3 if sample.videos else min(len(sample.images), 2)


def _content(sample: Sample | BadSample) -> tuple[Any, ...]:
    """What a sample says and shows: files stand with their size and time."""
    if isinstance(sample, BadSample):
        return ("bad", sample.reason)
    media = [_state(image) for image in sample.images]
    media += [(_state(video.path), video.start_s, video.end_s) for video in sample.videos]
    return (sample.messages, media)


def _state(media: ImageRef) -> tuple[Any, ...]:
    if isinstance(media, bytes):
        return (hashlib.sha256(media).hexdigest(),)
    if isinstance(media, FileSlice):
        return (*_state(media.path), media.offset, media.size)
    if is_address(media):
        return (str(media),)
    try:
        state = os.stat(media)
    except OSError:
        return (str(media), "missing")
    return (str(media), state.st_size, state.st_mtime_ns)


def _examine(examiner: _Examiner, checked: Checked) -> None:
    """Counts and problems of every line of every file."""
    files = examiner.reader.files
    chunks = (
        UnitRef(number, tuple(range(start, min(start + _CHUNK, len(file)))), 0, start)
        for number, file in enumerate(files)
        for start in range(0, len(file), _CHUNK)
    )
    reading = Reading(
        examiner,
        chunks,
        name=lambda ref, error: name_failing(examiner.reader, files, [ref], error),
        describe=lambda ref: describe_refs(files, [ref]),
        workers=checked.recipe.data.workers,
    )
    found: list[list[_Examined]] = [[] for _ in files]
    with (
        reading.named_deaths(),
        log.Progress("samples", total=sum(map(len, files))) as progress,
    ):
        for examined in reading:
            found[examined.file].append(examined)
            # Within a chunk they come by image; a reader looks for them by line.
            checked.problems += sorted(examined.bad, key=lambda bad: (len(bad.name), bad.name))
            progress.update(examined.num_lines)
    for file, parts in zip(files, found, strict=True):
        columns = np.concatenate([part.rows for part in parts]).T
        digests = np.concatenate([part.digests for part in parts])
        named = dict(zip(_COLUMNS, columns, strict=True))
        checked.counts[file.config.name] = Counts(**named, digest=digests)


def _eval_problems(name: str, spec: EvalConfig) -> list[BadSample]:
    """What is wrong with an evaluation's annotations and images: making it reads and opens them."""
    try:
        EVALS[spec.type](spec)
    except DataProblems as error:
        return [BadSample(f"evals.{name}", str(problem)) for problem in error.problems]
    except UserError as error:
        return [BadSample(f"evals.{name}", str(error))]
    return []


def _first_step(
    order: SampleOrder,
    reader: UnitReader,
    objective: Sft,
    encoder: ChatEncoder,
    checked: Checked,
) -> None:
    """The arithmetic of the run, and the samples of the first row of its first step."""
    recipe = checked.recipe
    try:
        refs, units, rows = _rows_of_first_step(order, reader, objective, recipe)
    except BadSample as bad:
        checked.problems.append(bad)
        return
    if not units:
        return
    checked.arithmetic = "\n".join(
        [
            _arithmetic(order, recipe),
            _row_line(rows, units, recipe) + _better_rows(units, recipe.data),
        ]
    )
    work = functools.reduce(operator.add, map(work_of, rows))
    checked.step = FirstStep(work, tuple(row.num_tokens for row in rows), len(order))
    # One of each unit: the answers to an image differ little, images do.
    shown = (next(_show(ref, rows[0].names, reader, objective, encoder), None) for ref in refs)
    checked.first = list(islice((one for one in shown if one is not None), _SHOWN_SAMPLES))


def _rows_of_first_step(
    order: SampleOrder, reader: UnitReader, objective: Sft, recipe: Recipe
) -> tuple[list[UnitRef], list[Unit], list[PackedBatch]]:
    """The references, units and rows of the first step; none if no sample can be read."""
    if recipe.global_batch_rows is None:
        refs = order.step(0, recipe.batch_samples, recipe.num_samples(len(order)))
        units = [unit for ref in refs for unit in reader[ref].units]
        return refs, units, objective.batches(units) if units else []
    groups: list[list[Unit]] = []

    def build(rows: Sequence[Sequence[Unit]]) -> list[PackedBatch]:
        groups.extend(map(list, rows))
        return []

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


def _first_pairs(
    order: SampleOrder, reader: Dataset[Read], objective: Objective, checked: Checked
) -> None:
    """The arithmetic of the run, and how the first pairs of its first step read."""
    recipe = checked.recipe
    refs = order.step(0, recipe.batch_samples, recipe.num_samples(len(order)))
    units = [unit for ref in refs for unit in reader[ref].units]
    if units:
        steps = _arithmetic(order, recipe)
        batches: Sequence[Any] = objective.batches(units)
        checked.arithmetic = f"{steps}\nthe first step: {objective.describe(batches)}"
        checked.step = dual_flops.step_of(batches, objective.weights, len(order))


def _arithmetic(order: SampleOrder, recipe: Recipe) -> str:
    epoch = f"{len(order):,} samples an epoch in {order.num_groups:,} groups; "
    num_steps = recipe.num_steps(len(order))
    if recipe.global_batch_rows is not None:
        return f"{epoch}{num_steps:,} steps of {recipe.global_batch_rows:,} rows"
    total, batch = recipe.num_samples(len(order)), recipe.batch_samples
    last = total - (num_steps - 1) * batch
    partial = "" if last == batch else f", the last of {last:,}"
    return (
        f"{epoch}{total / len(order):.4g} epoch(s) of them in steps of {batch:,}{partial}: "
        f"{num_steps:,} steps"
    )


def _row_line(rows: Sequence[PackedBatch], units: Sequence[Unit], recipe: Recipe) -> str:
    """The rows of the first step, and what sharing prefixes saves in it."""
    limit = recipe.data.row_tokens or recipe.data.max_tokens
    tokens = sum(row.num_tokens for row in rows)
    padded = sum(padded_tokens(row.num_tokens, limit) for row in rows)
    tiles = sum(row.num_tiles for row in rows)
    alone = sum(len(example.input_ids) for unit in units for example in unit.examples)
    tiles_alone = sum(unit.num_tiles * len(unit.examples) for unit in units)
    saved = ""
    if alone > tokens:
        saved = f"; without shared prefixes {alone / tokens:.2f} times the tokens"
        saved += f" and {tiles_alone / tiles:.2f} times the tiles" if tiles else ""
    return (
        f"the first step: {len(rows)} row(s) of at most {limit:,} tokens and "
        f"{recipe.data.max_tiles} tiles, {tokens / padded:.1%} full, {tiles} tiles, "
        f"{sum(len(row.targets) for row in rows):,} supervised tokens{saved}"
    )


def _better_rows(units: Sequence[Unit], data: DataConfig) -> str:
    """A `data.row_tokens` close to this one that these units fill better, where there is one."""
    sizes = [(unit.num_tokens, unit.num_tiles) for unit in units[:_MOST_PACKED]]
    limit = data.row_tokens or data.max_tokens
    largest = max(tokens for tokens, _ in sizes)  # more than a sample's where captions share one
    if data.packing != "best-fit" or largest > limit:
        return ""

    def fill(length: int) -> float:
        rows = least_padded(sizes, length, data.max_tiles)
        held = [sum(sizes[i][0] for i in row) for row in rows]
        return sum(held) / sum(padded_tokens(n, length) for n in held) if len(rows) > 1 else 0.0

    first = max(data.max_tokens, largest, limit * 7 // 8)
    best = max(range(-(-first // BLOCK) * BLOCK, limit * 9 // 8, BLOCK), key=fill, default=limit)
    if fill(best) < fill(limit) + _WORTH_SAYING:
        return ""
    return f"; data.row_tokens={best} would be {fill(best):.1%} full"


def _show(
    ref: UnitRef,
    wanted: Sequence[str],
    reader: UnitReader,
    objective: Sft,
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
                sample,
                _media_names(sample, tiles),
                tuple(_small(image) for image in reader.images(sample, ref)[0]),
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


def _small(pixels: np.ndarray) -> bytes:
    """A JPEG of at most _IMAGE pixels a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((_IMAGE, _IMAGE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
