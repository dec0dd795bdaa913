"""The lines of the guides, typed top to bottom: small models and data in place of the released."""

import json
import re
import shlex
import shutil

import original_trees as trees
import pair_runs
import pytest
from command_line import call
from data_files import picture, turns, write_lines
from photo_library import dated_jpeg, library
from test_docs_commands import ROOT, lines

GUIDES = ROOT / "docs/en"
ELSEWHERE = {
    "--download": "the network",
    "data prepare": "tests/datasets/test_prepare.py",
    "--submit": "tests/launch/test_slurm.py",
    "serve": "tests/serve/",
    "--page": "tests/search/test_page.py",
    "--rehearse": "tests/check/test_rehearse.py",
    "--plan": "tests/plan/; planning a large model takes seconds",
    "compat": "tests/compat/",
    "--judge": "tests/evals/test_judge.py",
    "internvl_chat_v1_2_sft": "tests/compat/test_shims_pages.py",
    "evaluate OpenGVLab/InternVL2-2B vqa": "tests/test_evaluate_benchmarks.py",
    "evaluate OpenGVLab/InternVL2-2B caption": "as pretrained/InternVL2-2B in coco.md",
    "vqa-textvqa-val": "tests/test_evaluate_benchmarks.py",
    "mmbench": "tests/test_evaluate_benchmarks.py",
    "14b_full": "as the heads, whose recipe runs",
    "14b_lora": "as the heads, whose recipe runs",
    "make-pairs": "tests/pairing/; a model that knows nothing makes no pairs",
    "--parity": "tests/check/test_check_parity.py",
    "mpo_": "as preferences.yaml of the same page",
    "retrieval-coco": "as retrieval-flickr30k",
    "--gpus": "several GPUs",
    "--push": "tests/export/test_export_push.py",
    "r64": "as the line without rank and rate",
}
"""Part of a line -> what runs it instead, or what it needs."""
SMALL = ("device=cpu", "dtype=float32", "data.workers=0", "checkpoint.every=1")
MORE = {
    "coco.md": ("global_batch=4", "data.tiles.size=56", "evals.coco.metrics=exact"),
    "own-data.md": ("data.tiles.size=56",),
    "internvl-14b.md": ("steps=1",),
}
"""Guide -> overrides that its trainings get besides."""

pytestmark = pytest.mark.slow


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with the models, photos and files that the guides name."""
    monkeypatch.chdir(tmp_path)
    chat = trees.chat_model(tmp_path / "pretrained/InternVL2-2B")
    dual = pair_runs.model_folder(tmp_path / "pretrained/InternVL-14B-224px")
    for name in ("InternVL2-2B", "InternVL2_5-2B"):
        shutil.copytree(chat, tmp_path / "OpenGVLab" / name)
    shutil.copytree(dual, tmp_path / "OpenGVLab/InternVL-14B-224px")
    shutil.copytree(dual, tmp_path / "runs/demo/retrieval/model")
    library(tmp_path / "photos")
    dated_jpeg(tmp_path / "photos/2024/dog.jpg", "2024:06:01 10:00:00")
    for name in ("cat.jpg", "query.jpg", "photos/1.jpg"):
        picture(tmp_path / name)
    box = turns("<image>\nWhere is it?", "[0.12, 0.08, 0.46, 0.9]")
    write_lines(tmp_path / "llava.jsonl", [{"image": "1.jpg", "conversations": box}])
    return tmp_path


def recipe(**changes):
    """A recipe of a reader's own, in YAML's JSON form."""
    tree = {
        "model": {"id": "pretrained/InternVL2-2B", "lora": {"rank": 2}},
        "data": {
            "sources": [{"name": "mine", "annotations": "mine.jsonl", "images": "photos"}],
            "tiles": {"size": 56, "max": 2},
        },
        "run": "runs/mine",
        "global_batch": 2,
        "steps": 1,
    }
    return json.dumps(tree | changes)


def own_run(desk, capsys):
    """Trains runs/mine."""
    samples = [{"image": "1.jpg", "conversations": turns("<image>\nWhat?", "red")}] * 2
    write_lines(desk / "mine.jsonl", samples)
    write_lines(desk / "held_out.jsonl", samples)
    (desk / "mine.yaml").write_text(recipe())
    assert call(capsys, "train", "mine.yaml", *SMALL)[0] == 0


def coco(desk, capsys):
    trees.coco(desk / "data/coco", 8)
    # `data prepare` makes this file of the whole set alone.
    images = [{"id": i, "file_name": f"val2014/COCO_val2014_{i:012d}.jpg"} for i in range(4)]
    captions = [
        {"id": i, "image_id": i, "caption": f"a {trees.COLORS[i]} square"} for i in range(4)
    ]
    file = desk / "data/coco/annotations/coco_karpathy_test_captions.json"
    file.write_text(json.dumps({"images": images, "annotations": captions}))


def run_and_coco(desk, capsys):
    own_run(desk, capsys)
    coco(desk, capsys)


def results(desk, capsys):
    run_and_coco(desk, capsys)
    write_lines(desk / "answers.jsonl", [{"image_id": i, "caption": "red"} for i in range(4)])
    for name in ("before", "after"):
        words = ("runs/mine", "qa-file", "--annotations", "held_out.jsonl", "--images", "photos")
        assert call(capsys, "evaluate", *words, "--limit", "1", "--to", f"out/{name}")[0] == 0


def own_data(desk, capsys):
    blocks = re.findall(r"```json\n(.*?)```", (GUIDES / "own-data.md").read_text(), re.DOTALL)
    (images,) = (block for block in blocks if '"conversations"' in block)
    (references,) = (block for block in blocks if '"annotations"' in block)
    folder = desk / "data/habitat"
    for name in ("0001", "0002", "0900"):
        picture(folder / f"images/{name}.jpg")
    # A video is read by tests/data/.
    rows = [line for line in images.splitlines() if '"video"' not in line]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "validation.json").write_text(references)


def retrieval(desk, capsys):
    trees.pairs(desk)
    mine = desk / "data/my_dataset"
    pair_runs.draw(mine / "images")
    shutil.copy(mine / "images/captions.txt", mine / "annotations.txt")
    notes = [{"image": f"images/{i:04d}.jpg", "caption": f"photo {i}"} for i in range(12)]
    (mine / "val.json").write_text(json.dumps(notes))
    source = re.search(r"```yaml\n(.*?)```", (GUIDES / "internvl-14b.md").read_text(), re.DOTALL)
    (desk / "mine.yaml").write_text(
        "model: {id: pretrained/InternVL-14B-224px, train: [heads]}\n"
        + source[1].replace("run:", "  tiles: {size: 84, max: 1}\nrun:")
        + "objective: {name: retrieval}\nglobal_batch: 8\nsteps: 1\n"
    )


def preferences(desk, capsys):
    write_lines(
        desk / "questions.jsonl",
        [{"image": "1.jpg", "question": "<image>\nWhich color?", "answer": "red"}],
    )
    write_lines(
        desk / "held_out.jsonl",
        [{"image": "1.jpg", "conversations": turns("<image>\nWhich color?", "red")}],
    )
    block = re.search(r"```yaml\n(.*?)```", (GUIDES / "preferences.md").read_text(), re.DOTALL)
    (desk / "preferences.yaml").write_text(block[1])
    write_lines(
        desk / "pairs.jsonl",
        [{"image": "1.jpg", "question": "<image>\nWhich?", "chosen": "red", "rejected": "blue"}],
    )


SETUPS = {
    "index.md": None,
    "installation.md": None,
    "coco.md": coco,
    "chat-v1-2.md": None,
    "internvl-14b.md": retrieval,
    "own-data.md": own_data,
    "preferences.md": preferences,
    "evaluation.md": results,
    "deployment.md": own_run,
    "photo-search.md": None,
    "many-gpus.md": run_and_coco,
    "migration.md": None,
    "messages.md": own_run,
}


def extra(page: str, words: list[str]) -> list[str]:
    """What makes a line small: overrides of a training, few tokens, few scores."""
    verb = words[0]
    if verb == "train":
        return [*SMALL, *MORE.get(page, ())]
    if verb == "check" and page == "coco.md":
        return list(MORE[page])
    if verb == "chat":
        return ["--max-new-tokens", "4"]
    if "qa-file" in words:
        return ["--max-new-tokens", "4"]
    # METEOR would start Java.
    if verb == "evaluate" and ("caption-coco" in words or "--prompt" in words):
        return ["--metrics", "exact", "--limit", "2"]
    return []


@pytest.mark.parametrize("page", SETUPS)
def test_the_lines_of_a_guide_run(page, desk, capsys):
    if SETUPS[page] is not None:
        SETUPS[page](desk, capsys)
    for line in lines(GUIDES / page):
        if any(part in line for part in ELSEWHERE):
            continue
        words = shlex.split(line, comments=True)[1:]
        code, out, err = call(capsys, *words, *extra(page, words))
        assert code == 0, f"{line}\n{out[-1500:]}\n{err[-1500:]}"


def test_every_guide_is_here():
    assert set(SETUPS) == {page.name for page in GUIDES.glob("*.md")}
