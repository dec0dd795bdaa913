"""`install-shims DIR`: the original's folders with small files in place of its scripts.

A command line of the original's guides, typed after their `cd`, then runs this package.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from internvl.compat import files, scripts
from internvl.compat.translation import Translation, take_flags
from internvl.datasets.checklist import EXPECTED
from internvl.errors import ConfigError
from internvl.files import write_text

_MARK = "Written by `internvl compat install-shims`"
_FOLDERS = (
    "internvl_chat/pretrained",
    "internvl_chat/data",
    "internvl_chat/playground",
    "internvl_g/pretrained",
    "internvl_g/data",
    "internvl_g/work_dirs",
)
"""Folders that the guides `cd` into or fill."""
_LINKS = ("data", "pretrained", "work_dirs")
"""Folders of clip_benchmark/ that are internvl_g's: its guide fine-tunes there, evaluates here."""
_TOOLS = ("merge_lora", "internvl_custom2hf", "internvl_hf2custom")
_ENTRIES = {
    "internvl_chat": ("internvl_chat_finetune", "internvl_chat_pretrain", "internvl_chat_mpo"),
    "internvl_g": ("internvl_stage2_finetune",),
}
_LISTS = (".json", "internvl_stage2_finetune.py")
"""Ends of the names of files that the guides have users edit."""
_SETS = {
    "sharegpt4v_instruct_gpt4-vision_cap100k": "",
    "llava_instruct_150k_zh": "coco/",
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k": "",
    "dvqa_train_200k": "dvqa/",
    "chartqa_train_18k": "chartqa/",
    "ai2d_train_12k": "ai2d/",
    "docvqa_train_10k": "docvqa/",
    "geoqa+": "geoqa+/",
    "synthdog_en": "synthdog-en/",
}
"""Data set of InternVL-Chat-V1-2 -> folder of its images below playground/data."""


def is_shim(path: Path) -> bool:
    """True for a file that stands in for a script of the original."""
    # Bytes: a script of the user may be in any encoding.
    with path.open("rb") as file:
        return _MARK.encode() in file.read(400)


def install(words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Writes the folders; files that others have written are left alone, and refused."""
    positional, _ = take_flags(words, {})
    if len(positional) != 1:
        raise ConfigError("install-shims: one folder is expected")
    root = Path(positional[0])
    files = dict(_files())
    # All before any is written: a refusal leaves the folder as it was.
    taken = [root / name for name in files if _is_foreign(root / name)]
    links = {root / "clip_benchmark" / name: Path("../internvl_g") / name for name in _LINKS}
    taken += [path for path in links if path.exists() and not path.is_symlink()]
    if taken:
        raise ConfigError(
            f"{taken[0]}: exists and is not from here (of {len(taken)} such files); choose a new "
            "folder, for example beside the original's"
        )
    for name in _FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        # The user's own lists of data sets stay.
        if name.endswith(_LISTS) and (root / name).exists():
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(root / name, text)
        # The guides call some scripts without `sh`.
        (root / name).chmod(0o644 if name.endswith(".json") else 0o755)
    for path, target in links.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Relative targets: the whole folder may be moved.
        if not path.is_symlink():
            path.symlink_to(target)
    chat = shlex.quote(str(root / "internvl_chat"))
    done = f"{len(files)} files below {root}; now, for example: cd {chat}"
    return Translation(done=done)


def _is_foreign(path: Path) -> bool:
    if path.suffix == ".json" or not path.exists():
        return False
    return path.is_dir() or not is_shim(path)


def _files() -> Iterator[tuple[str, str]]:
    """Yields (path, text) of every file."""
    for root in ("internvl_chat", "internvl_g"):
        yield f"{root}/evaluate.sh", _shell("evaluate.sh")
        for entry in _ENTRIES[root]:
            file = f"internvl/train/{entry}.py"
            # Where the guide of InternVL-14B has users add their data sets.
            table = "ds_collections = {}\n" if root == "internvl_g" else ""
            yield f"{root}/{file}", _python("finetune", file, table=table)
    # A script knows its path below internvl_chat or internvl_g.
    for path in scripts.paths():
        yield path, _shell("shell", path.partition("/")[2])
    for path in files.benchmarks():
        yield path, _shell("shell", path)
    for tool in _TOOLS:
        yield f"internvl_chat/tools/{tool}.py", _python(tool)
    yield "clip_benchmark/clip_benchmark/cli.py", _python("clip_benchmark")
    for name, tree in _meta().items():
        yield f"internvl_chat/shell/data/{name}.json", json.dumps(tree, indent=2) + "\n"


_SAFE = "PYTHONSAFEPATH"
"""Keeps Python from importing the folder `internvl` beside the shims in place of the package."""


def _shell(*words: str) -> str:
    python = shlex.quote(sys.executable)
    command = shlex.join(("compat", *words))
    return f'#!/bin/sh\n# {_MARK}.\n{_SAFE}=1 exec {python} -m internvl {command} "$@"\n'


def _python(*words: str, table: str = "") -> str:
    # This Python: the one that the guides' line names may lack the package.
    command = [sys.executable, "-m", "internvl", "compat", *words]
    return (
        f"#!{sys.executable}\n# {_MARK}.\nimport os\nimport sys\n\n{table}"
        f'command = {command!r}\nos.environ[{_SAFE!r}] = "1"\n'
        "os.execv(command[0], [*command, *sys.argv[1:]])\n"
    )


def _meta() -> dict[str, dict[str, dict[str, object]]]:
    """Returns the lists of data sets that the original keeps in shell/data."""
    coco = "coco_karpathy_train_567k"
    sets = {
        name: _entry(f"playground/data/{folder}", f"playground/opensource/{name}.jsonl")
        for name, folder in _SETS.items()
    }
    captions = _entry("data/coco/", f"data/coco/annotations/{coco}.jsonl")
    return {
        "coco_caption": {coco: captions},
        "internvl_1_2_finetune": sets,
        "internvl_1_2_finetune_custom": sets,
    }


def _entry(root: str, annotation: str) -> dict[str, object]:
    # As published, so that a cut file is noticed.
    (length,) = EXPECTED[Path(annotation).name].values()
    return {
        "root": root,
        "annotation": annotation,
        "data_augment": False,
        "repeat_time": 1,
        "length": length,
    }
