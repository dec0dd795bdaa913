"""A folder is opened once: an audit hook counts what the process really opens."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pair_runs
import pytest
import tiny_run

from internvl import export, train
from internvl.config.recipes import load_recipe

_COUNT = """
import json, sys
from pathlib import Path
from internvl.data.tokenizers import load_tokenizer
from internvl.inference import load as loading
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
load_tokenizer(Path(sys.argv[2]))
alone, opened[:] = opened[:], []
loading.load(sys.argv[1], device="cpu")
print(json.dumps([alone, opened]))
"""


def counts(folder: Path, base: Path) -> tuple[Counter[str], Counter[str]]:
    """How often `load_tokenizer` of `base`, and then `load` of `folder`, opens each file of it."""
    command = [sys.executable, "-c", _COUNT, str(folder), str(base)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    alone, opened = (
        Counter(Path(name).name for name in names if Path(name).parent == base)
        for names in json.loads(output.splitlines()[-1])
    )
    return alone, opened


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (the folder that is loaded, the folder of the model below it)."""
    root = tmp_path_factory.mktemp("once")
    start = tiny_run.make(root, steps=1, run=str(root / "run")).parent / "start"
    words = ["model.train=[]", "model.lora.rank=4"]
    train.run(load_recipe(tiny_run.make(root, steps=1, run=str(root / "run")), words))
    return {
        "official": (start, start),
        "hf": (export.run(start, root / "hf"), root / "hf"),
        "dual": (pair_runs.model_folder(root / "dual"), root / "dual"),
        "adapter": (root / "run" / "adapter", start),
        "run": (root / "run", start),
    }


@pytest.mark.parametrize("kind", ["official", "hf", "dual", "adapter", "run"])
def test_a_folder_is_opened_once(folders, kind):
    alone, opened = counts(*folders[kind])
    assert opened["config.json"] == 1
    # One reading of a tokenizer opens some of its files itself and leaves others to transformers.
    names = {name for name in alone if "token" in name or name in ("vocab.json", "merges.txt")}
    assert names
    assert {name: opened[name] for name in names} == {name: alone[name] for name in names}
