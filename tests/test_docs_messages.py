"""docs/en/messages.md: every sentence that it explains is one of the package's."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/en/messages.md").read_text(encoding="utf-8")
CELLS = re.findall(r"^\| (`.+?) \| ", PAGE, re.MULTILINE)
MESSAGES = [text.strip() for cell in CELLS for _, text in re.findall(r"(``?)(.+?)\1(?!`)", cell)]
HOLE, END = "…", "\0"


@cache
def texts() -> str:
    """Every text in the package's source, with a hole where a value goes, and END after each."""
    return END.join(
        text
        for file in sorted((ROOT / "internvl").rglob("*.py"))
        for text in strings(ast.parse(file.read_text(encoding="utf-8")))
    )


def strings(node: ast.AST) -> list[str]:
    if isinstance(node, ast.JoinedStr):
        return [
            "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values),
            # What is inside the holes may be a sentence too.
            *(t for v in node.values if isinstance(v, ast.FormattedValue) for t in strings(v)),
        ]
    if isinstance(node, ast.Constant):
        # Messages of the log have their values after them.
        return (
            [re.sub(r"%[sdr.,\d]*f?|\{\}", HOLE, node.value)] if isinstance(node.value, str) else []
        )
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []  # a docstring, which nobody is shown
    return [text for child in ast.iter_child_nodes(node) for text in strings(child)]


def test_the_page_has_messages():
    assert len(MESSAGES) > 70


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_package(message):
    # A hole of the page may stand for anything, and one of the source for any value.
    pieces = [re.escape(piece.strip()) for piece in message.split(HOLE) if piece.strip()]
    assert re.search(f"[^{END}]*".join(pieces), texts())
