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
    *("train", "training.run", "training.checkpoint", "training.optim", "objectives", "compute"),
    *("evaluate", "evals", "export", "check", "plan"),
)
"""Rooms and modules of the package that a verb may do without."""

SCRIPT = """
import json, os, sys
from internvl import cli, log
lines = []
def note(record):
    lines.append([record.getMessage(), "torch" in sys.modules])
    return True
log.get_logger().addFilter(note)
for number, words in enumerate(json.loads(sys.argv[2])):
    # Each as a process that has imported the command line alone, which takes half a second.
    if os.fork():
        os.wait()
        continue
    to = f"{sys.argv[1]}/{number}"
    for descriptor, file in ((1, os.devnull), (2, f"{to}.err")):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    try:
        cli.main(words)
    except SystemExit as end:
        with open(f"{to}.json", "w") as file:
            json.dump([end.code, lines, sorted(sys.modules)], file)
    sys.stderr.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    recipe = tiny_run.make(tmp_path_factory.mktemp("project"))
    (recipe.parent / "empty").mkdir()
    return recipe


def started(folder, commands, to):
    """(exit code, log lines with whether torch was there, modules, standard error) of verbs, each
    in a process of its own."""
    words = [[str(word) for word in command] for command in commands]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    script = [sys.executable, "-c", SCRIPT, str(to), json.dumps(words)]
    subprocess.run(script, cwd=folder, env=environment, check=True)
    for number in range(len(words)):
        error = (to / f"{number}.err").read_text()
        file = to / f"{number}.json"
        assert file.exists(), error
        code, lines, modules = json.loads(file.read_text())
        yield code, lines, set(modules), error


def rooms(*names):
    return {f"internvl.{name}" for name in names}


REFUSED = [
    (["models"], ""),
    (["models", "InternVL2-2B"], ""),
    (["chat", "./gone"], "./gone: no such folder"),
    (["chat", "./empty"], "config.json"),
    (["chat", "{folder}/start", "--image", "gone.png"], "there is no image gone.png"),
    (["chat", "{folder}/start", "--image", "{folder}/train.jsonl"], "train.jsonl: JSON"),
    (["chat", "{folder}/start", "--top-p", "7"], "top_p"),
    (["chat", "{folder}/start", "--video", "gone.mp4"], "gone.mp4"),
    (["serve", "./gone"], "./gone: no such folder"),
    (["serve", "{folder}/start", "--adapter", "x"], "write NAME=PATH"),
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
    (["launch", "{recipe}", "--nodes", "2", "--processes-per-node", "8", "--dry-run"], ""),
    (["check", "{recipe}", "model.id=./gone"], "./gone: no such folder"),
    (["check", "{recipe}", "--plan", "--gpu", "Z80"], "--gpu"),
    (["chat", "nobody/gone"], "nobody/gone: no such folder, not in the local hub cache"),
]
"""Words, and what is said of them; nothing if they are right."""


@pytest.fixture(scope="module")
def refused(project, tmp_path_factory):
    names = {"folder": project.parent, "recipe": project}
    commands = [[word.format(**names) for word in words] for words, _ in REFUSED]
    return list(started(project.parent, commands, tmp_path_factory.mktemp("refused")))


@pytest.mark.parametrize(
    "number", range(len(REFUSED)), ids=[" ".join(words) for words, _ in REFUSED]
)
def test_arguments_and_files_come_before_heavy_libraries(refused, number):
    (words, said), (code, lines, modules, error) = REFUSED[number], refused[number]
    # What the hub's cache holds is asked of its library.
    hub = {"huggingface_hub"} if words == ["chat", "nobody/gone"] else set()
    assert (HEAVY - hub) & modules == set()
    assert said in error
    assert (code != 0) == bool(said)
    assert lines == []


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
    command = [word.format(**names) for word in words]
    ((code, lines, modules, error),) = started(project.parent, [command], tmp_path)
    assert code == 0, error
    assert forbidden & modules == set()
    # The first line stands on the screen while the imports run.
    assert lines[0][0].startswith("loading ")
    assert lines[0][1] is False
