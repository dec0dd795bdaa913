"""Pieces of HTML that several sections have."""

import base64
import math
import re
from collections.abc import Sequence
from html import escape

_MAGIC = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8[79]a"),
    # Four bytes of file size, any of which may be a line feed.
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}


def note(text: str) -> str:
    """Renders a remark below a section; nothing for an empty text."""
    return f'<p class="note">{escape(text)}</p>' if text else ""


def data_url(image: bytes) -> str:
    """Returns an encoded image as a data URL.

    Raises:
        ValueError: it is no PNG, JPEG, GIF or WebP.
    """
    # By content: images come as bytes without a file name.
    for subtype, magic in _MAGIC.items():
        if magic.match(image):
            return f"data:image/{subtype};base64,{base64.b64encode(image).decode('ascii')}"
    raise ValueError(f"an image starts with {image[:12]!r}: no PNG, JPEG, GIF or WebP file")


def head_cells(names: Sequence[str], css_class: str = "number") -> str:
    """Renders the headings of columns."""
    return "".join(f'<th class="{css_class}">{escape(name)}</th>' for name in names)


def number_cell(text: str, head: str, css_class: str = "") -> str:
    """Renders a number; `head` is shown beside it where a narrow window has no headings."""
    name = f"number {css_class}".strip()
    return f'<td class="{name}" data-head="{escape(head)}">{escape(text)}</td>'


def value_text(value: float | None, form: str) -> str:
    """Formats a value; a dash stands for none, and for what is not finite."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)
