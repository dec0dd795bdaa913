"""The guides: links lead somewhere, and files that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for folder in (".", "docs", "benchmarks", "recipes", "internvl/models/kernels")
    for page in (ROOT / folder).glob("*.md")
)
NAMED = re.compile(r"`((?:internvl|tests|benchmarks|recipes|docs|dev)/[\w/.-]*\w/?)`")


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
            missing.append(target)
    if page.name != "CHANGELOG.md":  # earlier versions had other files
        missing += [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    assert not missing
