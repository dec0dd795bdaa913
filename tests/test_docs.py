"""The guides: links lead somewhere, and files that they name exist."""

import json
import re
from pathlib import Path

import pytest
import tiny_run
from PIL import Image

from internvl import check, train
from internvl.config.recipes import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "recipes/*.md", "internvl/**/*.md")
    for page in ROOT.glob(pattern)
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


def block(page: Path, language: str, containing: str) -> str:
    """The one code block of a page that contains a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    (text,) = (block for block in blocks if containing in block)
    return text


def test_five_photos_of_ones_own(tmp_path, monkeypatch):
    """The README's recipe and line, on a model that is as small as the demo's."""
    line = json.loads(block(ROOT / "README.md", "json", "minka.jpg"))
    tiny_run.make(tmp_path)
    (tmp_path / "start").rename(make_folder(tmp_path / "runs/demo") / "model")
    photos = make_folder(tmp_path / "photos")
    for index in range(5):
        Image.new("RGB", (80, 60), (40 * index, 90, 120)).save(photos / f"{index}.jpg")
    lines = [json.dumps(line | {"image": f"{index}.jpg"}) for index in range(5)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(block(ROOT / "README.md", "yaml", "photos"), "utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("mine.yaml", ["steps=2", "device=cpu"])
    assert check.run(recipe).problems == []
    assert (train.run(recipe) / "checkpoints/000002").is_dir()


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
