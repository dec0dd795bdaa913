"""Model cards: the README.md of a pushed folder, for people and for the hub's search.

Everything in it is read from the folder, the run and the base model; nothing is guessed.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import yaml

from internvl import zoo
from internvl.config import Recipe, recipes
from internvl.errors import UnknownModel
from internvl.export import servers
from internvl.files import read_object, write_text
from internvl.inference.opened import OpenedModel
from internvl.models import hub
from internvl.report import results

NAME = "README.md"

_HUB = "https://huggingface.co"
_TASKS = {"chat": "image-text-to-text", "dual": "image-feature-extraction"}
"""Family -> the hub's name of what such a model does."""
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_TEXTS = ("prompt", "system_message", "label")
"""Keys whose values a model reads: no paths, though they may begin with a slash."""
_LICENSE_KEYS = ("license", "license_name", "license_link")


def write(folder: Path, repo_id: str, opened: OpenedModel, format: str) -> Path:
    """Writes the card of an exported folder into it; returns the card's path.

    Args:
        opened: the run, adapter or model that was exported.
        format: hf or official.
    """
    text = build(folder, repo_id, opened, format)
    write_text(folder / NAME, text)
    return folder / NAME


def build(folder: Path, repo_id: str, opened: OpenedModel, format: str) -> str:
    """Builds a card as `write` does; returns its text."""
    base = _bottom(opened)
    served = servers.describe(folder, format)
    head = _metadata(folder, served.family, format, base)
    title = repo_id.rpartition("/")[2]
    sections = [
        f"# {title}\n\n{_summary(opened, base, format)}",
        *_usage(repo_id, served),
        *_scores(opened),
        *_training(opened),
        _license(base, head),
    ]
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def license_of(folder: Path) -> dict[str, str]:
    """Reads the licence that a model folder's own card states; {} if it states none."""
    file = folder / NAME
    if not file.is_file():
        return {}
    front = _FRONT_MATTER.match(file.read_text(encoding="utf-8", errors="replace"))
    try:
        tree = yaml.safe_load(front.group(1)) if front else None
    except yaml.YAMLError:
        # Another's file: what cannot be read states nothing, and the card says so.
        return {}
    if not isinstance(tree, dict):
        return {}
    return {key: tree[key] for key in _LICENSE_KEYS if isinstance(tree.get(key), str)}


def _bottom(opened: OpenedModel) -> OpenedModel:
    """Returns the model without run and adapters that all of it started from."""
    while opened.base is not None:
        opened = opened.base
    return opened


def _base_ids(base: OpenedModel) -> list[str]:
    """Lists the hub ids of a base model or of its parts; none for folders of no release."""
    if base.parts is None:
        # A moved run's base has the recipe's name, which need not be there from here.
        ids = [_hub_id(base.name, is_local=base.local is not None)]
    else:
        names = [str(name) for name in (base.parts.vision, base.parts.language) if name]
        ids = [_hub_id(name, is_local=False) for name in names]
    return [repository for repository in ids if repository]


def _hub_id(name: str, *, is_local: bool) -> str | None:
    if not is_local and hub.is_hub_id(name):
        return name
    # A download bears the release's name; a converted one has it before "-hf".
    last = Path(name).expanduser().resolve().name.removesuffix("-hf")
    try:
        release = zoo.find(last).name
    except UnknownModel:
        return None
    # A file alone, such as InternVL-C's, is no repository.
    if last.endswith(".pth"):
        return None
    # Another stage of a release is a repository of its own name.
    return f"OpenGVLab/{release if release.lower() == last.lower() else last}"


def _metadata(folder: Path, family: str, format: str, base: OpenedModel) -> dict[str, Any]:
    """Returns the head of a card under the hub's keys."""
    # Without the original's Python files an official folder opens with this package alone.
    has_classes = format == "hf" or "auto_map" in read_object(folder / "config.json")
    # First, as people look for it there.
    bases = _base_ids(base)
    head: dict[str, Any] = _linked_license(license_of(base.folder), bases)
    if bases:
        head |= {"base_model": bases if len(bases) > 1 else bases[0]}
        head |= {"base_model_relation": "finetune"}
    head |= {"library_name": "transformers" if has_classes else "internvl"}
    head |= {"pipeline_tag": _TASKS[family], "tags": ["internvl"]}
    return head


def _linked_license(stated: dict[str, str], bases: list[str]) -> dict[str, str]:
    """Returns a licence of the base's card with an address for the file that its link names."""
    link = stated.get("license_link")
    if link is None or urlsplit(link).scheme:
        return stated
    # The file itself is not copied: a link into the folder would lead nowhere.
    if len(bases) == 1:
        link = urljoin(f"{_HUB}/{bases[0]}/blob/main/", link)
        return stated | {"license_link": link}
    return {key: text for key, text in stated.items() if key != "license_link"}


def _summary(opened: OpenedModel, base: OpenedModel, format: str) -> str:
    # A folder that is no release has no address, only a name.
    names = " and ".join(map(_linked, _base_ids(base))) or f"`{Path(base.name).name}`"
    layout = "transformers" if format == "hf" else "the original InternVL code"
    done = "adapters merged" if opened is not base or opened.adapter else "converted"
    if opened.recipe is not None:
        done = f"trained further for {opened.step:,} steps with internvl"
    return f"{names}, {done}; in the format of {layout}."


def _linked(repo_id: str) -> str:
    return f"[{repo_id}]({_HUB}/{repo_id})"


def _usage(repo_id: str, served: servers.Folder) -> Iterator[str]:
    question = (
        'model.ask("cat.jpg", "What is this?")'
        if served.family == "chat"
        else 'model.similarity(["dog.jpg", "cat.jpg"], ["a dog in the snow"])'
    )
    loaded = f'import internvl\n\nmodel = internvl.load("{repo_id}")'
    yield f"## Use\n\n```python\n{loaded}\n{question}\n```"
    if served.family == "chat" and served.format == "hf":
        yield (
            "Or with transformers alone:\n\n```python\n"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f'processor = AutoProcessor.from_pretrained("{repo_id}")\n'
            f'model = AutoModelForImageTextToText.from_pretrained("{repo_id}", dtype="auto")\n```'
        )
    # As the folder's own lines, for a reader who has only the id.
    at_hub = dataclasses.replace(served, path=Path(repo_id))
    yield "Served by one of:\n\n```bash\n" + "\n".join(servers.lines(at_hub)) + "\n```"


def _scores(opened: OpenedModel) -> Iterator[str]:
    """Yields a table of a run's newest evaluations up to the exported step."""
    file = _evaluated(opened)
    if file is None:
        return
    rows = [
        f"| {name} | {metric} | {value:.4g} |"
        for name, metrics in results.read(file).metrics.items()
        for metric, value in metrics.items()
    ]
    # Scores of an earlier step are not this model's: the step stands beside them.
    yield "\n".join(
        [
            f"## Scores\n\nMeasured at step {int(file.stem):,}, with the recipe's `evals`.\n",
            *("| evaluation | metric | value |", "|---|---|--:|", *rows),
        ]
    )


def _evaluated(opened: OpenedModel) -> Path | None:
    if opened.run is None or opened.step is None:
        return None
    folder = opened.run.folder
    # The best step is a run inside the run, which was evaluated outside.
    root = folder.parent if folder.name == "best" else folder
    files = [file for file in sorted((root / "evals").glob("*.json")) if file.stem.isdigit()]
    return next((file for file in reversed(files) if int(file.stem) <= opened.step), None)


def _training(opened: OpenedModel) -> Iterator[str]:
    if opened.recipe is None:
        return
    text = yaml.safe_dump(public_recipe(opened.recipe), sort_keys=False, allow_unicode=True)
    yield (
        "## Training\n\nThe recipe, without values that are defaults. Of paths that lead out of "
        f"the project, the last name alone.\n\n```yaml\n{text}```"
    )


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """Returns what a recipe sets; paths from outside the project are cut to their last name."""
    tree: dict[str, Any] = _shortened(_without_defaults(recipe, recipes.to_tree(recipe)))
    # Where metrics are sent is nothing that another run needs.
    tree.pop("wandb", None)
    return tree


def _without_defaults(section: Any, tree: Any) -> Any:
    """Returns `tree`, which a section was dumped to, without keys whose values are defaults."""
    if isinstance(section, dict):
        return {key: _without_defaults(section[key], value) for key, value in tree.items()}
    if isinstance(section, list | tuple):
        return [_without_defaults(*pair) for pair in zip(section, tree, strict=True)]
    if not dataclasses.is_dataclass(section):
        return tree
    fields = {field.name: field for field in dataclasses.fields(section)}
    return {
        key: _without_defaults(getattr(section, key), value)
        for key, value in tree.items()
        # These two say of which class a section is.
        if key in ("name", "type") or getattr(section, key) != _default(fields[key])
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        # By its value too: an evaluation may be called `prompt`.
        return {
            key: inner if key in _TEXTS and isinstance(inner, str) else _shortened(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_shortened(inner) for inner in value]
    if not isinstance(value, str):
        return value
    # A judge's address may hold a password.
    if "://" in value:
        return re.sub(r"://[^/@]*@", "://", value)
    return Path(value).name if value.startswith(("/", "~", "..")) else value


def _license(base: OpenedModel, head: dict[str, Any]) -> str:
    names = ", ".join(_linked(name) for name in _base_ids(base)) or "the base model"
    # No table of licences: releases of one family differ, and change theirs.
    if "license" not in head:
        return (
            f"## Licence\n\nThe folder of {names} states no licence. Look it up, and add it to the "
            "head of this card as `license:`, before you share this model."
        )
    shown = head.get("license_name", head["license"])
    link = head.get("license_link")
    linked = f"[{shown}]({link})" if link else f"`{shown}`"
    return f"## Licence\n\n{linked}, as {names} states it."
