"""Renders images: cards of answers, results of searches, tile grids of training samples."""

from html import escape

from internvl.report.markup import data_url, note
from internvl.report.sections import (
    Answer,
    Card,
    Drawing,
    Hit,
    Images,
    Samples,
    Search,
    Searches,
    TiledImage,
    TrainingSample,
)


def images(section: Images) -> str:
    """Renders a grid of cards."""
    css_class = "cards roomy" if section.roomy else "cards"
    cards = "".join(map(_card, section.cards))
    return f'<div class="{css_class}">{cards}</div>{note(section.note)}'


def _card(card: Card) -> str:
    drawings = "".join(map(_drawing, card.images))
    shown = f'<div class="drawings">{drawings}</div>' if drawings else ""
    question = f'<p class="question">{escape(card.question)}</p>' if card.question else ""
    lines = "".join(map(_answer, card.answers))
    return f"<article>{shown}{question}<ul>{lines}</ul>{note(card.note)}</article>"


def _drawing(drawing: Drawing) -> str:
    url = data_url(drawing.image)
    if not drawing.boxes:
        return f'<img src="{url}" alt="">'
    width, height = drawing.size
    # A box beyond the image, as a model may answer, is cut at its edge.
    rectangles = "".join(
        f'<rect class="{box.role}" x="{left * width:.1f}" y="{top * height:.1f}" '
        f'width="{(right - left) * width:.1f}" height="{(bottom - top) * height:.1f}"/>'
        for box in drawing.boxes
        for left, right in [_clipped(box.x1, box.x2)]
        for top, bottom in [_clipped(box.y1, box.y2)]
    )
    # The viewBox has the image's own proportions, so that rectangles lie where they should.
    return (
        f'<svg class="boxed" viewBox="0 0 {width} {height}" role="img" aria-label="boxes">'
        f'<image href="{url}" width="{width}" height="{height}"/>{rectangles}</svg>'
    )


def _clipped(low: float, high: float) -> tuple[float, float]:
    # Corners that a model swapped still draw a rectangle.
    low, high = sorted((min(1.0, max(0.0, low)), min(1.0, max(0.0, high))))
    return low, high


_VERDICTS = {True: ("right", "✓"), False: ("wrong", "✗"), None: ("unscored", "·")}
"""Whether an answer is right -> its class and symbol."""


def _answer(answer: Answer) -> str:
    verdict, symbol = _VERDICTS[answer.right]
    language = f' lang="{escape(answer.language)}"' if answer.language else ""
    # An equal reference would only repeat the answer.
    expected = (
        ""
        if answer.answer == answer.reference or not answer.reference
        else f'<div class="reference"{language}>{escape(answer.reference)}</div>'
    )
    # Last: a score explains the answer above it.
    remark = f'<div class="score">{escape(answer.note)}</div>' if answer.note else ""
    tag = escape(answer.label or answer.language)
    return (
        f'<li class="{verdict}"><span class="tag">{tag}</span>'
        f'<span class="mark" role="img" aria-label="{verdict}">{symbol}</span>'
        f"<div><div{language}>{escape(answer.answer) or '(nothing)'}</div>"
        f"{expected}{remark}</div></li>"
    )


def searches(section: Searches) -> str:
    """Renders searches with their first results."""
    return f'<div class="searches">{"".join(map(_search, section.searches))}</div>' + note(
        section.note
    )


def _search(search: Search) -> str:
    language = escape(search.language)
    verdict = "right" if search.rank == 1 else "wrong"
    hits = "".join(_hit(hit, language) for hit in search.hits)
    tag = f'<span class="tag">{language}</span>' if language else ""
    plain = "" if tag else ' class="plain"'
    return (
        f'<article class="search"><h3{plain}>{tag}'
        f"{_shown(search.image, search.text, language)}"
        f'<span class="rank {verdict}">rank {search.rank:,}</span></h3><ol>{hits}</ol></article>'
    )


def _hit(hit: Hit, language: str) -> str:
    shown = _shown(hit.image, hit.text, language)
    if not hit.right:
        return f"<li>{shown}</li>"
    mark = '<span class="mark" role="img" aria-label="right">✓</span>'
    return f'<li class="right">{mark}{shown}</li>'


def _shown(data: bytes | None, text: str, language: str) -> str:
    image = "" if data is None else f'<img src="{data_url(data)}" alt="">'
    return image + (f'<span lang="{language}">{escape(text)}</span>' if text else "")


def samples(section: Samples) -> str:
    """Renders training samples."""
    legend = (
        '<p class="note"><mark>Marked text</mark> is what the loss counts. Dashed lines '
        "cut an image into tiles, numbered in the order the model gets them.</p>"
    )
    return legend + "".join(map(_sample, section.samples)) + note(section.note)


def _sample(sample: TrainingSample) -> str:
    images = "".join(map(_tiled, sample.images))
    spans = "".join(
        f"<mark>{escape(span.text)}</mark>" if span.supervised else escape(span.text)
        for span in sample.spans
    )
    return (
        f'<article class="sample"><h3>{escape(sample.name)}</h3>'
        f'<div class="tiled">{images}</div><pre class="spans">{spans}</pre>'
        f"{note(sample.note)}</article>"
    )


_TILE = 100  # side of a tile in a drawing, SVG units


def _tiled(image: TiledImage) -> str:
    if image.columns < 1 or image.rows < 1:
        raise ValueError(f"a grid of {image.columns} x {image.rows} tiles has no tile")
    url = data_url(image.image)
    drawings = [_tile_grid(url, image.columns, image.rows, first=1)]
    if image.thumbnail:
        drawings.append(_tile_grid(url, 1, 1, first=image.columns * image.rows + 1))
    return "".join(drawings)


def _tile_grid(url: str, columns: int, rows: int, *, first: int) -> str:
    width, height = columns * _TILE, rows * _TILE
    cuts = "".join(f"M{i * _TILE} 0V{height}" for i in range(1, columns)) + "".join(
        f"M0 {i * _TILE}H{width}" for i in range(1, rows)
    )
    numbers = "".join(
        f'<text x="{i % columns * _TILE + 6}" y="{i // columns * _TILE + 18}">{first + i}</text>'
        for i in range(columns * rows)
    )
    # Not to scale, for tiles are cut from the image stretched onto the grid. Lines twice, light
    # under dark, so that they show on any image.
    return (
        f'<svg class="tiles" viewBox="0 0 {width} {height}" role="img" '
        f'style="--columns:{columns}" aria-label="{columns} x {rows} tiles">'
        f'<image href="{url}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f'<path class="under" d="{cuts}"/><path class="over" d="{cuts}"/>{numbers}</svg>'
    )
