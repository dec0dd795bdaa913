"""Result of `check`, as text (`CheckResult.render`) and as an HTML page (`page`)."""

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from internvl import report as pages
from internvl.check import problems as grouped
from internvl.config import Recipe
from internvl.data.chat import marked
from internvl.data.records import Grid, Sample
from internvl.errors import BadSample, counted
from internvl.plan.work import FirstStep

_NEAR = 0.9
"""Share of `data.max_tokens` from which on a sample counts as near the limit."""
_NUM_BINS = 10
"""Bins of a histogram."""
_MEDIA = ("text", "one image", "several images", "video")


@dataclass(frozen=True)
class Counts:
    """Counts of the good samples of a source; every array is (samples,), in no fixed order."""

    line: np.ndarray
    """Index of the line in the source."""
    media: np.ndarray
    """0 text, 1 one image, 2 several images, 3 video."""
    tokens: np.ndarray
    # Of the whole unit: samples that share a prefix share its tiles, and each counts them.
    tiles: np.ndarray
    supervised: np.ndarray
    """Supervised tokens."""
    unknown: np.ndarray
    """Unknown tokens, `tokenizer.unk_token_id`."""
    # A number instead of the text: duplicates are found without holding the samples in memory.
    digest: np.ndarray
    """uint64: equal for equal messages with equal media."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ShownSample:
    """A sample of the first batch, as the model gets it."""

    sample: Sample
    images: tuple[str, ...]
    """Name of each image or frame."""
    small: tuple[bytes, ...]
    """Each image or frame as a small JPEG."""
    grids: tuple[Grid, ...]
    per_image: tuple[int, ...]
    """Tiles of each image, the thumbnail included."""
    spans: tuple[tuple[str, bool], ...]
    """(text, supervised)"""


@dataclass
class CheckResult:
    """Problems, counts and first batch of a run's data."""

    recipe: Recipe
    """Completed with the checkpoint's settings."""
    inherited: str = ""
    """Settings of images and conversations and the source of each, one a line."""
    problems: list[BadSample] = field(default_factory=list)
    """All bad samples and unusable files, by file and line."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """Counts by the source's name."""
    arithmetic: str = ""
    """Samples, groups, steps and rows, as text; empty if no sample can be used."""
    step: FirstStep | None = None
    """None if no sample can be used."""
    first_samples: list[ShownSample] = field(default_factory=list)
    """Samples of the first row."""

    def render(self) -> str:
        """Formats problems, settings, sources, sizes, steps and the first batch as text."""
        paragraphs = [
            "\n".join(grouped.lines(self.problems, self.recipe.data)),
            self.inherited,
            "\n".join(_source_line(name, counts) for name, counts in self.counts.items()),
            "\n".join(self.summary()),
            self.arithmetic,
            *map(_render_sample, self.first_samples),
        ]
        # Filtered: pairs have no samples to show, and a run without a good sample no sizes.
        return "\n\n".join(filter(None, paragraphs))

    def summary(self) -> Iterator[str]:
        """Yields histograms of tokens and tiles, and a line for each thing to look at."""
        tokens, tiles = self.column("tokens"), self.column("tiles")
        # `_bins` takes the minimum, which fails without values.
        if not len(tokens):
            return
        yield from _histogram("tokens a sample", tokens)
        if tiles.any():
            yield from _histogram("tiles a sample", tiles)
        limit = self.recipe.data.max_tokens
        for count, does, do, trait in (
            (int((tokens >= limit).sum()), "is cut", "are cut", f"at data.max_tokens = {limit:,}"),
            (
                int((tokens >= _NEAR * limit).sum()),
                "has",
                "have",
                f"{_NEAR:.0%} of data.max_tokens or more",
            ),
            (
                int((self.column("unknown") > 0).sum()),
                "holds",
                "hold",
                "text the tokenizer does not know",
            ),
            (self.num_duplicates, "equals", "equal", "another sample, images and text"),
        ):
            if count:
                yield f"{counted(count, f'sample {does}', f'samples {do}')} {trait}"

    @property
    def num_duplicates(self) -> int:
        """Samples that equal an earlier one in messages and media."""
        digests = self.column("digest")
        return len(digests) - len(np.unique(digests))

    def column(self, name: str) -> np.ndarray:
        """Concatenates a field of `Counts` over all sources: (samples,)."""
        columns = [getattr(counts, name) for counts in self.counts.values()]
        # Not from an empty int64 array: with it, uint64 digests become float64 and lose 11 bits.
        return np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)


def _source_line(name: str, counts: Counts) -> str:
    if not len(counts):
        return f"source {name}: no good sample"
    tokens, tiles = int(counts.tokens.sum()), int(counts.tiles.sum())
    by_media = Counter(_MEDIA[index] for index in counts.media)
    return (
        f"source {name}: {len(counts):,} good samples "
        f"({', '.join(f'{by_media[name]:,} {name}' for name in _MEDIA if by_media[name])}), "
        f"{tokens:,} tokens (longest {counts.tokens.max():,}), "
        f"{counts.supervised.sum() / tokens:.1%} supervised, {tiles:,} tiles "
        f"(most {counts.tiles.max()})"
    )


def _bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int64 (samples per bin, edges) of at most _NUM_BINS bins."""
    low, high = int(values.min()), int(values.max())
    # Whole numbers: edges at fractions would put one token count more into some bins.
    step = max(1, -(-(high - low + 1) // _NUM_BINS))
    edges = np.arange(low, high + step + 1, step)
    return np.histogram(values, edges)


def _histogram(title: str, values: np.ndarray) -> Iterator[str]:
    counts, edges = _bins(values)
    yield f"{title}:"
    for count, (low, high) in zip(counts, pairwise(edges), strict=True):
        # The fullest bin has 40 columns, so that a line fits a terminal of 80.
        bar = "█" * round(40 * count / counts.max())
        yield f"  {low:>7,} to {high - 1:>7,}  {count:>9,}  {bar}".rstrip()


def _render_sample(shown: ShownSample) -> str:
    images = [
        f"  {path}: {columns} x {rows} grid, {counted(count, 'tile')}"
        for path, (columns, rows), count in zip(
            shown.images, shown.grids, shown.per_image, strict=True
        )
    ]
    return "\n".join([f"{shown.sample.name} (⟦supervised⟧)", *images, marked(shown.spans)])


def page(checked: CheckResult) -> pages.Report:
    """Builds the HTML page: figures, problems, sources, sizes, settings and first samples."""
    tokens, supervised = checked.column("tokens"), checked.column("supervised")
    # At least 1: nothing can be read if every line is bad.
    share = supervised.sum() / max(1, tokens.sum())
    sections: list[pages.Section] = [
        pages.Facts(
            title="In numbers",
            facts=[
                (f"{len(tokens):,}", "good samples"),
                (f"{len(checked.problems):,}", "problem" + "s" * (len(checked.problems) != 1)),
                (f"{tokens.sum():,}", "tokens"),
                (f"{share:.1%}", "of them supervised"),
                (f"{checked.column('tiles').sum():,}", "tiles"),
                (f"{checked.num_duplicates:,}", "duplicates"),
            ],
            note=". ".join(line[:1].upper() + line[1:] for line in checked.arithmetic.splitlines()),
        ),
        _problem_table(checked),
    ]
    if len(tokens):
        lines = [_source_line(name, counts) for name, counts in checked.counts.items()]
        charts = [_chart(name, checked.column(name)) for name in ("tokens", "tiles")]
        sections.append(pages.Text(title="Sources", paragraphs=lines))
        sections.append(pages.Charts(title="Sizes", charts=charts))
    if checked.inherited:
        title, *held = checked.inherited.splitlines()
        # Columns of text, which paragraphs would close up.
        held = textwrap.dedent("\n".join(held)).splitlines()
        sections.append(pages.Text(title=title.capitalize(), commands=held))
    if checked.first_samples:
        shown = list(map(_page_sample, checked.first_samples))
        sections.append(pages.Samples(title="First samples", samples=shown))
    return pages.Report(
        title="What will be trained on",
        subtitle=f"{checked.recipe.run}: {', '.join(checked.counts)}",
        sections=tuple(sections),
    )


def _problem_table(checked: CheckResult) -> pages.Section:
    if not checked.problems:
        return pages.Text(title="Problems", paragraphs=["no problem found"])
    data = checked.recipe.data
    _, *rest = grouped.lines(checked.problems, data)
    return pages.Table(
        title="Problems",
        head=("count", "problem", "first places", "what keeps them"),
        rows=grouped.table_rows(checked.problems, data),
        note=rest[-1].strip() if len(rest) > grouped.SHOWN else "",
    )


def _chart(name: str, values: np.ndarray) -> pages.Chart:
    counts, edges = _bins(values)
    # Half a number down: the bar of 3 alone stands around 3.
    points = [
        (float(x) - 0.5, float(count))
        for count, edge in zip(counts, pairwise(edges), strict=True)
        for x in edge
    ]
    return pages.Chart(
        title=f"{name} a sample",
        x_label=name,
        y_label="samples",
        series=[pages.Series(name="samples", points=points)],
        form=",.0f",
        from_zero=True,
        bars=True,
    )


def _page_sample(shown: ShownSample) -> pages.TrainingSample:
    images = [
        # A tile more than the grid has is the thumbnail.
        pages.TiledImage(image=image, columns=columns, rows=rows, thumbnail=count > columns * rows)
        for image, (columns, rows), count in zip(
            shown.small, shown.grids, shown.per_image, strict=True
        )
    ]
    return pages.TrainingSample(
        name=shown.sample.name,
        images=images,
        spans=[pages.Span(text, supervised) for text, supervised in shown.spans],
    )
