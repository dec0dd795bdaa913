"""What `check` found, as text and as a page.

Counts    what the good samples of a source hold
Shown     a sample of the first batch
Checked   all of it: `render` as text, `page` for a browser
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from internvl import report as pages
from internvl.config import Recipe
from internvl.data.chat import marked
from internvl.data.records import Grid, Sample
from internvl.errors import BadSample
from internvl.plan.dual_flops import PairStep
from internvl.plan.work import FirstStep

_SHOWN_PROBLEMS = 20
_NEAR = 0.9  # of data.max_tokens: from here on a sample is near the limit
_BARS = 10  # bins of a histogram
_KINDS = ("text", "one image", "several images", "video")


@dataclass(frozen=True)
class Counts:
    """What the good samples of a source hold. Every array has one number a sample."""

    line: np.ndarray
    """Number in the source, from 0."""
    kind: np.ndarray
    """Index into text, one image, several images, video."""
    tokens: np.ndarray
    tiles: np.ndarray
    supervised: np.ndarray
    """Supervised tokens."""
    unknown: np.ndarray
    """Tokens that stand for text the tokenizer does not know."""
    digest: np.ndarray
    """uint64: equal for equal messages with equal media."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Shown:
    """A sample of the first batch: its text in spans of (text, supervised), a grid per image."""

    sample: Sample
    images: tuple[str, ...]
    """What each image or frame is called."""
    small: tuple[bytes, ...]
    """Each image or frame as a small JPEG."""
    grids: tuple[Grid, ...]
    per_image: tuple[int, ...]
    """Tiles of each image, the thumbnail included."""
    spans: tuple[tuple[str, bool], ...]


@dataclass
class Checked:
    """What `run` found."""

    recipe: Recipe
    """With nothing left open."""
    inherited: str = ""
    """What holds of images and conversations, and where it is from, in lines."""
    problems: list[BadSample] = field(default_factory=list)
    """All bad samples and unusable files, by file and line."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """Of every source, by its name."""
    arithmetic: str = ""
    """Samples, groups, steps and rows, in words; empty where nothing can be trained on."""
    step: FirstStep | PairStep | None = None
    """None where nothing can be trained on."""
    first: list[Shown] = field(default_factory=list)
    """The first samples of the first row."""

    def render(self) -> str:
        """The findings as text: problems, what holds, sources, arithmetic, first batch."""
        parts = [
            "\n".join(_problem_lines(self.problems)),
            self.inherited,
            "\n".join(_source_line(name, counts) for name, counts in self.counts.items()),
            "\n".join(self.summary()),
            self.arithmetic,
            *map(_render_sample, self.first),
        ]
        return "\n\n".join(part for part in parts if part)

    def summary(self) -> Iterator[str]:
        """What all sources together hold, and what in it deserves a look."""
        tokens, tiles = self.joined("tokens"), self.joined("tiles")
        if not len(tokens):
            return
        yield from _histogram("tokens a sample", tokens)
        if tiles.any():
            yield from _histogram("tiles a sample", tiles)
        limit = self.recipe.data.max_tokens
        for count, what in (
            (int((tokens >= limit).sum()), f"are cut at data.max_tokens = {limit:,}"),
            (int((tokens >= _NEAR * limit).sum()), f"have {_NEAR:.0%} of data.max_tokens or more"),
            (int((self.joined("unknown") > 0).sum()), "hold text the tokenizer does not know"),
            (self.num_duplicates, "equal another sample, images and text"),
        ):
            if count:
                yield f"{count:,} sample(s) {what}"

    @property
    def num_duplicates(self) -> int:
        """Samples that an earlier one equals."""
        digests = self.joined("digest")
        return len(digests) - len(np.unique(digests))

    def joined(self, column: str) -> np.ndarray:
        """A column of `Counts` over all sources."""
        parts = [getattr(counts, column) for counts in self.counts.values()]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _problem_lines(problems: Sequence[BadSample]) -> Iterator[str]:
    if not problems:
        yield "no problem found"
        return
    yield f"{len(problems):,} problem(s)"
    for problem in problems[:_SHOWN_PROBLEMS]:
        yield f"  {problem}"
    if len(problems) > _SHOWN_PROBLEMS:
        yield f"  and {len(problems) - _SHOWN_PROBLEMS:,} more"


def _source_line(name: str, counts: Counts) -> str:
    if not len(counts):
        return f"source {name}: no good sample"
    tokens, tiles = int(counts.tokens.sum()), int(counts.tiles.sum())
    kinds = Counter(_KINDS[kind] for kind in counts.kind)
    return (
        f"source {name}: {len(counts):,} good samples "
        f"({', '.join(f'{kinds[kind]:,} {kind}' for kind in _KINDS if kinds[kind])}), "
        f"{tokens:,} tokens (longest {counts.tokens.max():,}), "
        f"{counts.supervised.sum() / tokens:.1%} supervised, {tiles:,} tiles "
        f"(most {counts.tiles.max()})"
    )


def _bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(samples in each bin, edges), whole numbers."""
    low, high = int(values.min()), int(values.max())
    step = max(1, -(-(high - low + 1) // _BARS))
    edges = np.arange(low, high + step + 1, step)
    return np.histogram(values, edges)


def _histogram(title: str, values: np.ndarray) -> Iterator[str]:
    counts, edges = _bins(values)
    yield f"{title}:"
    for count, (low, high) in zip(counts, pairwise(edges), strict=True):
        bar = "█" * round(40 * count / counts.max())
        yield f"  {low:>7,} to {high - 1:>7,}  {count:>9,}  {bar}".rstrip()


def _render_sample(shown: Shown) -> str:
    images = [
        f"  {path}: {columns} x {rows} grid, {count} tile(s)"
        for path, (columns, rows), count in zip(
            shown.images, shown.grids, shown.per_image, strict=True
        )
    ]
    return "\n".join([f"{shown.sample.name} (⟦supervised⟧)", *images, marked(shown.spans)])


def page(checked: Checked) -> pages.Report:
    """The findings as a page, with the first samples as the model will get them."""
    tokens, supervised = checked.joined("tokens"), checked.joined("supervised")
    share = supervised.sum() / max(1, tokens.sum())
    sections: list[pages.Section] = [
        pages.Facts(
            title="In numbers",
            facts=[
                (f"{len(tokens):,}", "good samples"),
                (f"{len(checked.problems):,}", "problems"),
                (f"{tokens.sum():,}", "tokens"),
                (f"{share:.1%}", "of them supervised"),
                (f"{checked.joined('tiles').sum():,}", "tiles"),
                (f"{checked.num_duplicates:,}", "duplicates"),
            ],
            note=checked.arithmetic.replace("\n", ". "),
        ),
        pages.Text(title="Problems", paragraphs=list(_problem_lines(checked.problems))),
    ]
    if len(tokens):
        lines = [_source_line(name, counts) for name, counts in checked.counts.items()]
        charts = [_chart(what, checked.joined(what)) for what in ("tokens", "tiles")]
        sections.append(pages.Text(title="Sources", paragraphs=lines))
        sections.append(pages.Charts(title="Sizes", charts=charts))
    if checked.inherited:
        title, *held = checked.inherited.splitlines()
        sections.append(pages.Text(title=title.capitalize(), paragraphs=held))
    if checked.first:
        shown = [_page_sample(one) for one in checked.first]
        sections.append(pages.Samples(title="First samples", samples=shown))
    return pages.Report(
        title="What will be trained on",
        subtitle=f"{checked.recipe.run}: {', '.join(checked.counts)}",
        sections=tuple(sections),
    )


def _chart(what: str, values: np.ndarray) -> pages.Chart:
    counts, edges = _bins(values)
    points = [
        (float(x), float(count))
        for count, edge in zip(counts, pairwise(edges), strict=True)
        for x in edge
    ]
    return pages.Chart(
        title=f"{what} a sample",
        x_label=what,
        y_label="samples",
        series=[pages.Series(name="samples", points=points)],
        form=",.0f",
        from_zero=True,
    )


def _page_sample(shown: Shown) -> pages.TrainingSample:
    images = [
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
