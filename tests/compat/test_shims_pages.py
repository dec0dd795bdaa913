"""The original's guides, their command lines typed top to bottom in a folder of shims."""

import json
import sys

import original_trees as trees
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import internvl
from internvl.compat import shims

PYTHON = sys.executable  # the guides' `python` is that of an environment with the package
COCO = "work_dirs/internvl_chat_v2_0/internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora_coco"


@pytest.fixture
def root(tmp_path):
    shims.install([str(tmp_path / "shims")], {})
    return tmp_path / "shims"


@pytest.mark.slow
def test_coco_tutorial(root):
    """Evaluate, train two steps, evaluate again, merge, wrap, load: each reads what came before."""
    chat = root / "internvl_chat"
    trees.chat_model(chat / "pretrained/InternVL2-2B")
    trees.coco(chat / "data/coco", 64)
    trees.set_length(chat / "shell/data/coco_caption.json", 64)
    name = "internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora_coco"
    out = trees.type_lines(
        f"""
        GPUS=4 sh evaluate.sh pretrained/InternVL2-2B caption-coco --dynamic
        GPUS=8 PER_DEVICE_BATCH_SIZE=4 sh shell/internvl2.0/2nd_finetune/{name}.sh
        cd {COCO}
        cd ../../..
        GPUS=4 sh evaluate.sh {COCO} caption-coco --dynamic
        {PYTHON} tools/merge_lora.py {COCO}/ {COCO}_merge
        cp pretrained/InternVL2-2B/*.py {COCO}_merge
        cp pretrained/InternVL2-2B/config.json {COCO}_merge
        """,
        chat,
        # 64 samples are two steps of 32, not of the script's 512.
        BATCH_SIZE="32",
    )
    assert f"internvl train {COCO}.yaml" in out
    assert "caption-coco/cider" in out
    events = EventAccumulator(str(next((chat / COCO).rglob("events.out.*")).parent)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    result = json.loads(
        (
            chat / "results" / COCO.replace("work_dirs/", "").replace("/", "_") / "result.json"
        ).read_text()
    )
    assert "caption-coco/cider" in result
    model = internvl.load(chat / f"{COCO}_merge", device="cpu")
    assert isinstance(model.ask([chat / "data/coco/train2014/0.jpg"], "What is this?"), str)
