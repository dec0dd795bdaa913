"""The guides in every language of docs/site.toml: the same pages, headings, code, numbers."""

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SITE = tomllib.loads((DOCS / "site.toml").read_text(encoding="utf-8"))
LANGUAGES = list(SITE["languages"])
CASES = [
    pytest.param(language, page, id=f"{language}/{page}")
    for language in LANGUAGES
    for page in SITE["guides"]
]
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
HEADING = re.compile(r"^(#+) .+$", re.MULTILINE)


def sections(language: str, page: str) -> list[dict[str, object]]:
    """What every section of a page has that is no matter of language."""
    text = (DOCS / language / page).read_text(encoding="utf-8")
    # Comments in code begin with # as headings do, so code comes out first.
    blocks = FENCE.findall(text)
    text = FENCE.sub("\0", text)
    parts = re.split(r"^(?=#+ )", text, flags=re.MULTILINE)[1:]
    rows = []
    for part in parts:
        inside = [blocks.pop(0) for _ in range(part.count("\0"))]
        prose = CODE.sub(" ", part)
        table = [line.count(" |") for line in prose.splitlines() if line.startswith("|")]
        rows.append(
            {
                "heading": part.partition(" ")[0],
                "blocks of code": inside,
                "code in sentences": Counter(code.strip() for _, code in CODE.findall(part)),
                "links": Counter(LINK.findall(part)),
                "numbers": Counter(NUMBER.findall(LINK.sub("]", prose))),
                "cells of tables": table,
                "items of lists": len(re.findall(r"^ *[-*] ", part, re.MULTILINE)),
            }
        )
    return rows


def test_english_is_declared_and_no_page_is_left_out():
    assert "en" in LANGUAGES
    for language in LANGUAGES:
        pages = {page.name for page in (DOCS / language).glob("*.md")}
        assert pages == set(SITE["guides"]), language
    assert {page.name for page in DOCS.glob("*.md")} == set(SITE["reference"])
    for folder in DOCS.iterdir():
        assert not folder.is_dir() or folder.name in LANGUAGES or folder.name == "__pycache__"


@pytest.mark.parametrize(("language", "page"), CASES)
def test_a_page_has_the_headings_of_the_english_one(language, page):
    ours, english = sections(language, page), sections("en", page)
    assert [row["heading"] for row in ours] == [row["heading"] for row in english]


@pytest.mark.parametrize(("language", "page"), CASES)
def test_code_numbers_links_and_tables_are_those_of_the_english_page(language, page):
    for place, (ours, english) in enumerate(
        zip(sections(language, page), sections("en", page), strict=True), start=1
    ):
        for name, value in english.items():
            assert ours[name] == value, f"section {place}: {name}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_guides_link_to_whole_pages(language):
    """Anchors of headings differ from language to language."""
    for page in SITE["guides"]:
        text = (DOCS / language / page).read_text(encoding="utf-8")
        targets = LINK.findall(text)
        assert [t for t in targets if "#" in t and not t.startswith("../")] == [], page


@pytest.mark.parametrize(("language", "page"), CASES)
def test_no_paragraph_was_left_in_english(language, page):
    if language != "en":
        text = CODE.sub(" ", FENCE.sub("", (DOCS / language / page).read_text(encoding="utf-8")))
        english = {line for line in (DOCS / "en" / page).read_text("utf-8").splitlines() if line}
        left = [line for line in text.splitlines() if line in english and len(line.split()) > 4]
        assert [line for line in left if not line.startswith(("|", "-", "#"))] == []


def test_the_glossary_has_every_word_in_every_language():
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.*?) \| (.*?) \| (.*?) ?\|$", text, re.MULTILINE)[1:]
    assert len(rows) > 50
    assert [row for row in rows if not all(row[:3])] == []
    words = [row[0] for row in rows]
    assert words == sorted(set(words))
