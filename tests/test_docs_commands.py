"""Every `internvl …` line of the guides: parsed, and resolved as far as no file is needed."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from internvl import cli, zoo
from internvl.config import eval_options, recipes
from internvl.config.unions import name_of
from internvl.datasets import prepare, published
from internvl.zoo import gpus

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs/en").glob("*.md"))
# Other languages have the same lines: test_docs_languages.py compares them.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *GUIDES]
TASKS = {line.split()[0] for line in published.list_tasks().splitlines()}
PLACEHOLDERS = {"RECIPE", "MODEL", "NAME", "KEY", "RUN", "CHECKPOINT", "IN", "TASK", "INDEX"}
USER_TYPES = {
    "qa-file": "qa",
    "caption-file": "caption",
    "retrieval-folder": "retrieval",
    "classify-folder": "classify",
}
TYPED = {*USER_TYPES, *published.TASKS}
"""Tasks whose type, and so whose options, follow from the name alone."""
ANY_RECIPE = """
model: {id: OpenGVLab/InternVL2-2B, lora: {rank: 16}}
data: {sources: [{name: mine, annotations: mine.jsonl, images: photos}]}
run: runs/mine
global_batch: 64
epochs: 1
"""


def lines(page: Path) -> list[str]:
    """The `internvl` lines of a page's code, comments and results left out."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    code = "\n".join(block for language, block in blocks if language in ("bash", "text", ""))
    joined = re.sub(r"\\\n\s*", "", code)
    pattern = r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(internvl [a-z].*)$"
    return re.findall(pattern, joined, re.MULTILINE)


def spans(page: Path) -> list[str]:
    """The `internvl` commands inside a page's sentences and tables, without those cut short."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"(?<!`)`(internvl [a-z][^`]*)`(?!`)", text)
    return [command for command in found if "…" not in command]


CASES = [
    pytest.param(line, id=f"{page.relative_to(ROOT)}: {line[:70]}")
    for page in PAGES
    for line in dict.fromkeys(lines(page))
]


@pytest.fixture(scope="module", autouse=True)
def _one_parser():
    """The parser of all lines: to make it takes as long as to parse twenty of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "parser", functools.cache(cli.parser))
        yield


def parsed(line: str):
    words = shlex.split(line, comments=True)[1:]
    try:
        return cli.parse(words)
    except SystemExit as stopped:
        pytest.fail(f"{line}: exit code {stopped.code}")


def resolve_recipe(name: Path, overrides: list[str], tmp_path: Path) -> None:
    """Raises ConfigError for a key or value that a recipe of this name does not take."""
    if str(name) in PLACEHOLDERS:
        return
    if str(name).startswith("recipes/"):
        recipes.load_recipe(ROOT / name, overrides)
    # A file that the reader has written, or the folder of a run.
    elif name.suffix == ".yaml" or len(name.parts) > 1:
        mine = tmp_path / "mine.yaml"
        mine.write_text(ANY_RECIPE, encoding="utf-8")
        recipes.load_recipe(mine, overrides)
    else:
        recipes.load_recipe(name, overrides)


def plain(task: str) -> str:
    """A task's name without the hyphens that it may have or not."""
    return re.sub("[-_]", "", task)


def resolve_evaluation(args) -> None:
    """Fails for a task that does not exist, or an option that none of the tasks has."""
    tasks = [*([args.model] if args.answers else []), *args.tasks]
    known = {plain(name) for name in (*TASKS, *PLACEHOLDERS)}
    assert [task for task in tasks if plain(task) not in known] == []
    types = {USER_TYPES.get(task) or published.TASKS[task].type for task in tasks if task in TYPED}
    if not types:
        return
    for key, sections in eval_options().items():
        if getattr(args, key) is not None:
            assert types & {name_of(section, "type") for section in sections}, key


def resolve(args, tmp_path: Path) -> None:
    if args.verb == "launch":
        resolve(args.command, tmp_path)
    elif args.verb == "train" or (args.verb == "check" and not args.parity):
        resolve_recipe(args.recipe, args.overrides, tmp_path)
        if args.verb == "check" and args.gpu != "auto":
            assert gpus.find(args.gpu)
    elif args.verb == "evaluate":
        resolve_evaluation(args)
    elif args.verb == "models" and args.name not in (None, *PLACEHOLDERS):
        assert zoo.describe(args.name)
    elif args.verb == "data" and args.action == "prepare" and args.name not in PLACEHOLDERS:
        assert args.name in {*prepare.NAMES, *TASKS}


@pytest.mark.parametrize("line", CASES)
def test_a_line_is_parsed_and_resolved(line, tmp_path):
    resolve(parsed(line), tmp_path)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_recipes_of_a_guide_are_recipes(page):
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for block in blocks:
        tree = yaml.safe_load(ANY_RECIPE)
        if "flickr_format" in block:
            tree |= {"model": {"id": "OpenGVLab/InternVL-14B-224px"}}
            tree |= {"objective": {"name": "retrieval"}}
        # A part of a recipe takes the place of the same part.
        recipes.resolve(tree | yaml.safe_load(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_inside_sentences_name_verbs_and_options(page):
    _, verbs = cli.parser()
    for span in spans(page):
        _, verb, *words = shlex.split(span)
        assert verb in verbs, span
        known = verbs[verb].format_help() + "".join(
            sub.format_help()
            for action in verbs[verb]._actions
            if isinstance(action.choices, dict)
            for sub in action.choices.values()
        )
        if verb == "launch":
            known += verbs["train"].format_help() + verbs["evaluate"].format_help()
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert [option for option in options if option not in known] == [], span


def test_the_pages_have_lines():
    assert len(CASES) > 150
