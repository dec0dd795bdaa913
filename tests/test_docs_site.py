"""docs/build.py: its pages are those of today's package, and its site asks no other host."""

import importlib.util
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from internvl.compat import files, finetune
from internvl.config import Recipe

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
docs_build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs_build)


@pytest.mark.parametrize("name", ["recipe-keys.md", "flags.md", "scripts.md"])
def test_a_generated_page_is_current(name):
    committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert committed == docs_build.pages()[name], "run `python docs/build.py pages`"


def test_every_section_and_key_is_on_the_page():
    page = docs_build.recipe_keys()
    keys = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert keys >= {"id", "rank", "sources", "lr", "shard", "weights", "micro_batch"}
    headings = set(re.findall(r"^#+ (.+)$", page, re.MULTILINE))
    for name, hint in get_type_hints(Recipe).items():
        if is_dataclass(hint):
            assert name in headings


def test_every_shell_file_of_the_original_is_on_its_page():
    names = (ROOT / "tests/compat/shell_files.txt").read_text(encoding="utf-8").split()
    page, folder, rows = docs_build.scripts(), "", {}
    for line in page.splitlines():
        folder = line.removeprefix("## ") if line.startswith("## ") else folder
        match = re.match(r"\| `([^`]+\.sh)` \| ([^|]+) \|", line)
        if match:
            rows[f"{folder}/{match[1]}"] = match[2].partition(",")[0]
    assert sorted(rows) == sorted(names)
    assert rows == {name: files.answer(name).outcome for name in names}


def test_keys_of_flags_are_keys_of_recipes():
    page = docs_build.recipe_keys()
    keys = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    sections = {*re.findall(r"^#+ ([\w.]+)", page, re.MULTILINE)}
    for rows in finetune.table().values():
        for flag, row in rows.items():
            assert ("sets" in row) == ("rule" in row), flag
            for key in [*row.get("sets", []), *([row["to"]] if "to" in row else [])]:
                section, _, last = key.rpartition(".")
                assert last in keys or key in sections, (flag, key)
                assert not section or section in sections, (flag, key)


def test_every_flag_of_the_original_has_an_answer():
    rows = re.findall(r"^\| `(--[\w-]+|\w+\.py)` \| (.*) \|$", docs_build.flags(), re.MULTILINE)
    assert len(rows) > 150
    # After the default, which the training flags have in their second cell.
    answers = {flag: [*re.split(r" \| ", cells)][-2:] for flag, cells in rows}
    assert [flag for flag, cells in answers.items() if not any(map(str.strip, cells))] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    docs_build.BUILD = tmp_path_factory.mktemp("site")
    docs_build.build()
    return docs_build.BUILD / "site"


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_asks_no_other_host(site):
    # A warning would have ended the build.
    for language in docs_build.settings()["languages"]:
        pages = sorted((site / language).rglob("*.html"))
        assert len(pages) > 20
        for page in pages:
            text = page.read_text(encoding="utf-8")
            loaded = re.findall(
                r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="?([^"\s>]+)', text
            )
            assert [address for address in loaded if address.startswith(("http", "//"))] == [], page


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site):
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r'<a\b[^>]*href="?([^"\s>]+)', text):
            if target.startswith(("http", "mailto:", "#")):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve()
            # The logo leads to the folder.
            assert file.is_file() or (file / "index.html").is_file(), (page.name, target)
            if anchor:
                assert re.search(rf'id="?{re.escape(anchor)}[">\s]', file.read_text("utf-8"))
