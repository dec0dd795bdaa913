"""`check MODEL --parity`: what training, inference and plain transformers make of a sample."""

import json
import subprocess
import sys

import numpy as np
import pytest
from chat_folders import add_tokenizer, golden_folder
from PIL import Image

from internvl.check import parity
from internvl.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path_factory.mktemp("model") / "m")
    return add_tokenizer(folder, "internlm2")


def verdicts(compared):
    return {
        (row.sample.split()[-1], row.path): bool(row.differences) for row in compared.comparisons
    }


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # transformers' own
def test_training_and_inference_and_an_export_agree(model):
    compared = parity.run(model, device="cpu")
    seen = verdicts(compared)
    assert {path for _, path in seen} == {"training", "plain transformers"}
    assert len(seen) == 10
    different = {key for key, is_different in seen.items() if is_different}
    # Several images share the budget of tiles here and in the original; transformers' processor
    # gives each image all of it.
    assert different <= {("4", "plain transformers")}
    text = compared.render()
    assert "line 1: training: the same" in text
    assert "vllm is not installed" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_what_differs_is_named(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    turns = [
        {"from": "human", "value": "<image>\n<image>\nSame?"},
        {"from": "gpt", "value": "Yes."},
    ]
    rows = [{"image": ["a.png", "b.png"], "conversations": turns}]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "internvl", "check", str(model), "--parity"]
    command += ["--annotations", str(tmp_path / "two.jsonl"), "--images", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "line 1: plain transformers:\n" in done.stdout
    assert "they part at token" in done.stdout
    assert "tiles (" in done.stdout
    assert done.stdout.splitlines()[-1] == "2 comparisons, 1 of them different"


def test_a_model_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="nope"):
        parity.run(tmp_path / "nope")
