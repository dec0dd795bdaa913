"""What a page is made of: plain data, which knows nothing of runs or models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


# By keyword alone: most fields are texts, whose order nobody remembers.
@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs, then commands to copy."""

    title: str
    paragraphs: Sequence[str] = ()
    commands: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A few large numbers, e.g. ("317", "samples per second")."""

    title: str
    facts: Sequence[tuple[str, str]]
    """(value, label)."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts; the first column is a count."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of `Scores`."""

    group: str
    """Rows of the same group stand together, e.g. the language."""
    name: str
    before: float | None
    after: float | None
    reference: float | None = None
    """A further value to compare with, without a bar."""
    best: float = 1.0
    """The value of a full bar, in the score's unit."""
    form: str = ".3f"
    """Python format specification of the values, e.g. ".1%"."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Two values with bars, such as before and after. None is shown as a dash."""

    title: str
    scores: Sequence[Score]
    before: str = "before"
    """Heading of the first values; they are left out if empty."""
    after: str = "after"
    reference: str = ""
    """Heading of the references; empty without any."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve; points with a value that is not finite leave a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), in the order of x."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    form: str = ",.4g"
    """Python format specification of the y values, e.g. ".0%"."""
    from_zero: bool = False
    """True includes zero in the y axis."""
    bars: bool = False
    """True draws the bars of a histogram of whole numbers: of each, a point at both ends."""


@dataclass(frozen=True, kw_only=True)
class Charts:
    """Charts side by side if the window is wide enough."""

    title: str
    charts: Sequence[Chart]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One row of `Differences`."""

    group: str
    name: str
    first: float | None
    second: float | None
    interval: tuple[float, float] | None = None
    """Ends of the interval of second - first; None without one."""
    form: str = ".3f"
    neutral: bool = False
    """True for a value that is neither better nor worse if it is larger."""


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Two results with the interval of their difference, drawn around zero."""

    title: str
    first: str
    second: str
    rows: Sequence[Difference]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Properties:
    """Names with their values, such as settings."""

    title: str
    pairs: Sequence[tuple[str, str]]
    note: str = ""


@dataclass(frozen=True)
class Box:
    """A rectangle of an image, in shares of its width and height."""

    x1: float
    y1: float
    x2: float
    y2: float
    # Not a colour: the style sheet says how each looks.
    role: Literal["reference", "answer"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """An image with rectangles on it."""

    image: bytes
    """An encoded PNG, JPEG, GIF or WebP file."""
    # Said by the caller: a page decodes no image.
    size: tuple[int, int] = (1, 1)
    """Width and height, px; needed with boxes."""
    boxes: Sequence[Box] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Reference and model's answer, of one language or model."""

    language: str = ""
    """A language tag, e.g. "en"; it also picks the font."""
    label: str = ""
    """Shown instead of the language, e.g. the name of a model."""
    reference: str
    answer: str
    # Not derived from the texts: an evaluator may call several answers right.
    right: bool | None
    """None for an answer without a score."""
    note: str = ""
    """Such as its score."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Images, a question about them, and the answers to it."""

    images: Sequence[Drawing]
    answers: Sequence[Answer]
    question: str = ""
    note: str = ""
    """Such as its category."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """A grid of images with their answers, right or wrong by colour and by symbol."""

    title: str
    cards: Sequence[Card]
    note: str = ""
    roomy: bool = False
    """True leaves room for questions and long answers."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One of the first results of a search: an image, a text, or both."""

    right: bool
    image: bytes | None = None
    """An encoded PNG, JPEG, GIF or WebP file."""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A query, text or image, and its first results."""

    language: str
    """A language tag, e.g. "en", of the text or of the results; it also picks the font."""
    rank: int
    """Rank of the right result, from 1."""
    hits: Sequence[Hit]
    """Best first."""
    text: str = ""
    image: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Searches:
    """Searches with their first results, the right one marked by colour and by symbol."""

    title: str
    searches: Sequence[Search]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TiledImage:
    """An image stretched onto a grid of square tiles, the model's input."""

    image: bytes
    """An encoded PNG, JPEG, GIF or WebP file, of the whole image."""
    columns: int
    rows: int
    thumbnail: bool = False
    """True adds the whole image once more as one tile."""


@dataclass(frozen=True)
class Span:
    """A piece of a sample's text."""

    text: str
    supervised: bool
    """The loss counts its tokens."""


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One sample as training sees it."""

    name: str
    images: Sequence[TiledImage]
    spans: Sequence[Span]
    """The whole text in order, special tokens included."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples with their tile grids and the text the loss counts."""

    title: str
    samples: Sequence[TrainingSample]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Credits of shown works. URLs (http, https) become links, the only ones to other pages."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sections of one subject, below its title."""

    title: str
    sections: Sequence["Section"]
    note: str = ""


# A union, not a base class: a section is data, and how it looks is `report.render`'s alone.
Section = (
    Text
    | Facts
    | Table
    | Scores
    | Differences
    | Properties
    | Charts
    | Images
    | Searches
    | Samples
    | Attribution
    | Group
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
