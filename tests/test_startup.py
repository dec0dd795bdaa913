"""What each verb imports: heavy libraries come late, or never.

A time would depend on the machine; the modules that a verb has imported do not.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import tiny_run

HEAVY = {"torch", "transformers", "peft", "safetensors", "huggingface_hub"}
"""Libraries that take half a second or more."""

RARE = {"peft", "triton", "torch._inductor.compile_fx", "tensorboard"}
"""What only adapters, compilation and TensorBoard need."""
PARALLEL = set() if find_spec("torchao") else {"torch.distributed.checkpoint"}
"""What runs alone need: their checkpoints may be of many ranks. transformers imports an installed
torchao, which imports it."""
WORK = (
    *("train", "training.checkpoint", "training.optim", "objectives", "compute"),
    *("evaluate", "evals", "export", "check", "plan"),
)
"""Rooms and modules of the package that a verb may do without."""

SCRIPT = """
import json, sys
from internvl import cli, log
lines = []
def note(record):
    lines.append([record.getMessage(), "torch" in sys.modules])
    return True
log.get_logger().addFilter(note)
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    print(json.dumps([end.code, lines, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    recipe = tiny_run.make(tmp_path_factory.mktemp("project"))
    (recipe.parent / "empty").mkdir()
    return recipe


def started(folder, *words):
    """(exit code, log lines with whether torch was there, modules) of a verb in its own process."""
    command = [sys.executable, "-c", SCRIPT, *map(str, words)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    code, lines, modules = json.loads(done.stdout.strip().splitlines()[-1])
    return code, lines, set(modules), done.stderr


def rooms(*names):
    return {f"internvl.{name}" for name in names}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models"], ""),
        (["models", "InternVL2-2B"], ""),
        (["chat", "./gone"], "./gone: no such folder"),
        (["chat", "./empty"], "config.json"),
        (["chat", "{folder}/start", "--image", "gone.png"], "there is no image gone.png"),
        (["chat", "{folder}/start", "--image", "{folder}/train.jsonl"], "train.jsonl: JSON"),
        (["chat", "{folder}/start", "--top-p", "7"], "top_p"),
        (["chat", "{folder}/start", "--video", "gone.mp4"], "gone.mp4"),
        (["evaluate", "./gone"], "./gone: no such folder"),
        (["evaluate", "{folder}/start", "--step", "2,4"], "step 2"),
        (["export", "./gone", "--to", "out"], "./gone: no such folder"),
        (["merge", "./gone", "--to", "out"], "./gone: no such folder"),
        (["train", "gone.yaml"], "there is no recipe gone.yaml"),
        (["train", "{recipe}", "optim.lr=x"], "optim.lr"),
        (["train", "{recipe}", "model.id=./gone"], "./gone: no such folder"),
        (["train", "{recipe}", "data.sources.0.annotations=gone.jsonl"], "no annotation file"),
        (["train", "{recipe}", "data.meta=gone.json"], "no meta file gone.json"),
        (["index", "gone", "--to", "out", "--model", "x"], "gone: no folder of photos"),
        (["search", "gone", "a dog"], "gone: no index of photos; make it with"),
        (["launch", "{recipe}", "--nodes", "2", "--gpus-per-node", "8", "--dry-run"], ""),
        (["check", "{recipe}", "model.id=./gone"], "./gone: no such folder"),
        (["check", "{recipe}", "--plan", "--gpu", "Z80"], "--gpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_arguments_and_files_come_before_heavy_libraries(project, words, said):
    names = {"folder": project.parent, "recipe": project}
    code, lines, modules, err = started(project.parent, *(word.format(**names) for word in words))
    assert HEAVY & modules == set()
    assert said in err
    assert (code != 0) == bool(said)
    assert lines == []


def test_a_hub_id_that_is_not_here_is_refused_before_torch(project):
    code, _, modules, err = started(project.parent, "chat", "nobody/gone")
    assert (code, "nobody/gone: no such folder, not in the local hub cache" in err) == (1, True)
    assert {"torch", "transformers"} & modules == set()


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (["chat", "{folder}/start", "--prompt", "x"], RARE | PARALLEL | rooms(*WORK)),
        pytest.param(
            ["export", "{folder}/start", "--to", "{out}"],
            RARE | PARALLEL | rooms(*(name for name in WORK if name != "export")),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["train", "{recipe}", "steps=1"],
            # The plan's costs share out the rows of a step.
            RARE - {"tensorboard"} | rooms("evaluate", "export", "check"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["check", "{recipe}"],
            RARE | PARALLEL | rooms("train", "evaluate", "export"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["check", "{recipe}", "--plan", "--gpu", "H200"],
            RARE | PARALLEL | rooms("train", "evaluate", "export"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_verb_imports_only_what_it_uses(project, tmp_path, words, forbidden):
    names = {"folder": project.parent, "recipe": project, "out": tmp_path / "out"}
    code, lines, modules, err = started(project.parent, *(word.format(**names) for word in words))
    assert code == 0, err
    assert forbidden & modules == set()
    # The first line stands on the screen while the imports run.
    assert lines[0][0].startswith("loading ")
    assert lines[0][1] is False
