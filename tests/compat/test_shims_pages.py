"""The original's guides, their command lines typed top to bottom in a folder of shims.

Each line reads what the lines before it wrote. Batches are as small as the scripts' variables
allow, so that a few samples are two steps.
"""

import json
import shlex
import shutil
from pathlib import Path

import original_trees as trees
import pair_runs
import pytest
from launch.test_slurm import cluster, eventually  # noqa: F401 (a fixture)
from part_folders import split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import internvl
from internvl.compat import shims
from internvl.evals import metrics

NAME = "internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora_coco"
COCO = f"work_dirs/internvl_chat_v2_0/{NAME}"
V1_2 = "internvl_chat_v1_2_hermes2_yi34b_448_res_finetune"
CLIP = (
    "CUDA_VISIBLE_DEVICES=0 python3 clip_benchmark/cli.py eval --model_type internvl --language "
    '"{language}" --task "zeroshot_retrieval" --dataset "flickr30k" '
    "--dataset_root ./data/flickr30k --model internvl_{mode}_retrieval_hf "
    "--pretrained ./work_dirs/{run}/ --output result_ft.json"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _meteor():
    """One process for all evaluations of a guide: METEOR takes 9 CPU seconds to start."""
    with metrics.one_meteor():
        yield


@pytest.fixture
def root(tmp_path, monkeypatch):
    # No guide's line says how many steps; nor does it look for a GPU here.
    for name in ("GPUS", "BATCH_SIZE", "PER_DEVICE_BATCH_SIZE", "PARTITION", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    shims.install([str(tmp_path / "shims")], {})
    return tmp_path / "shims"


def steps(run):
    """Steps of a run that its TensorBoard files have."""
    events = EventAccumulator(str(next(Path(run).rglob("events.out.*")).parent)).Reload()
    return [event.step for event in events.Scalars("loss")]


def test_coco_tutorial(root, monkeypatch, capsys):
    chat = root / "internvl_chat"
    trees.chat_model(chat / "pretrained/InternVL2-2B")
    trees.coco(chat / "data/coco", 36)
    trees.set_length(chat / "shell/data/coco_caption.json", 36)
    terminal = trees.Terminal(chat, monkeypatch, capsys)
    monkeypatch.setenv("BATCH_SIZE", "32")  # of the script's 512: 36 samples are two steps
    before = terminal.type("GPUS=4 sh evaluate.sh pretrained/InternVL2-2B caption-coco --dynamic")
    assert "caption-coco/cider" in before
    assert "published values are for 5,000 images" in before
    line = f"GPUS=8 PER_DEVICE_BATCH_SIZE=4 sh shell/internvl2.0/2nd_finetune/{NAME}.sh"
    assert f"internvl train {COCO}.yaml" in terminal.type(line)
    assert steps(COCO) == [1, 2]
    after = terminal.type(f"GPUS=4 sh evaluate.sh {COCO} caption-coco --dynamic")
    assert "caption-coco/cider" in after
    lines = Path(f"results/internvl_chat_v2_0_{NAME}.txt").read_text().splitlines()
    assert json.loads(lines[0])[:2] == [COCO, "coco"]
    terminal.type(f"python tools/merge_lora.py {COCO}/ {COCO}_merge")
    # The two lines of the wrapping step, which merge_lora has done already.
    for file in (
        *Path("pretrained/InternVL2-2B").glob("*.py"),
        "pretrained/InternVL2-2B/config.json",
    ):
        shutil.copy(file, f"{COCO}_merge")
    model = internvl.load(f"{COCO}_merge", device="cpu")
    answer = model.ask(["data/coco/train2014/0.jpg"], "What is this?", max_new_tokens=3)
    assert isinstance(answer, str)


def test_habitat_on_one_process(root, monkeypatch, capsys):
    chat = root / "internvl_chat"
    trees.chat_model(chat / "pretrained/InternVL2-2B")
    trees.coco(chat / "data/coco", 8)
    entry = {
        "root": "data/coco/",
        "annotation": "data/coco/annotations/coco_karpathy_train_567k.jsonl",
        "data_augment": False,
        "repeat_time": 1,
        "length": 8,
    }
    meta = chat / "shell/data/internvl_1_2_finetune_custom.json"
    meta.write_text(json.dumps({"habitat": entry}))
    terminal = trees.Terminal(chat, monkeypatch, capsys)
    monkeypatch.setenv("BATCH_SIZE", "4")
    terminal.type(
        "GPUS=1 PER_DEVICE_BATCH_SIZE=4 bash shell/internvl2.0/habitat_2b_finetune/lora.sh"
    )
    assert steps("work_dirs/internvl_chat_v2_0/habitat_2b_finetune_lora") == [1, 2]


def chat_v1_2(chat, folder):
    """Parts and data of the guide; 18 samples."""
    vision, language, projector, _ = split(folder)
    tower = chat / "pretrained/InternViT-6B-448px-V1-2"
    shutil.copytree(vision, tower)
    (tower / "mlp_projector").mkdir()
    shutil.copy(projector, tower / "mlp_projector/hermes_2_yi_34b.pth")
    shutil.copytree(language, chat / "pretrained/Nous-Hermes-2-Yi-34B")
    meta = chat / "shell/data/internvl_1_2_finetune.json"
    trees.playground(chat, json.loads(meta.read_text()))
    trees.set_length(meta, 2)


def test_chat_v1_2_from_its_parts(root, monkeypatch, capsys, tmp_path):
    chat = root / "internvl_chat"
    chat_v1_2(chat, tmp_path)
    terminal = trees.Terminal(chat, monkeypatch, capsys)
    line = f"sh shell/internvl1.2/hermes2_yi34b/{V1_2}.sh"
    # Without --submit nothing is handed to Slurm; the job that would be is printed.
    shown = terminal.type(
        f"PARTITION='your partition' GPUS=32 PER_DEVICE_BATCH_SIZE=8 {line} --dry-run"
    )
    (command,) = [row for row in shown.splitlines() if row.startswith("internvl launch")]
    (chat / "recipe.yaml").write_text(shown.partition("\n\ninternvl launch")[0].partition("\n")[2])
    words = [word for word in shlex.split(command)[1:] if word != "--submit"]
    words[words.index("train") + 1] = "recipe.yaml"
    code, job, err = trees.call(capsys, *words, "--dry-run")
    assert code == 0, err
    assert "your partition" in job
    assert "#SBATCH --nodes=4" in job
    monkeypatch.setenv("BATCH_SIZE", "8")
    terminal.type(f"GPUS=1 PER_DEVICE_BATCH_SIZE=8 {line} --here")
    # 18 samples: the last step is smaller, for nothing is accumulated.
    assert steps(f"work_dirs/internvl_chat_v1_2/{V1_2}") == [1, 2, 3]


def test_chat_v1_2_as_a_job_of_slurm(root, monkeypatch, capsys, tmp_path, cluster):  # noqa: F811
    chat = root / "internvl_chat"
    chat_v1_2(chat, tmp_path)
    terminal = trees.Terminal(chat, monkeypatch, capsys)
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BATCH_SIZE", "9")
    monkeypatch.setenv("GPUS_PER_NODE", "1")
    # This cluster has no GPU.
    line = f"sh shell/internvl1.2/hermes2_yi34b/{V1_2}.sh device=cpu data.workers=0"
    out = terminal.type(f"PARTITION='patient' GPUS=1 PER_DEVICE_BATCH_SIZE=9 {line}")
    assert "--nodes 1 --processes-per-node 1 --partition patient --submit" in out
    assert "Submitted" in out
    run = Path("work_dirs/internvl_chat_v1_2") / V1_2
    eventually((run / "finished.json").exists)
    assert steps(run) == [1, 2]


def test_internvl_14b(root, monkeypatch, capsys):
    pairs = root / "internvl_g"
    folder = pair_runs.model_folder(pairs / "pretrained/InternVL-14B-224px")
    assert (folder / "config.json").is_file()
    trees.pairs(pairs)
    terminal = trees.Terminal(pairs, monkeypatch, capsys)
    for key in ("caption-coco", "caption-flickr30k", "caption-nocaps"):
        out = terminal.type(f"sh evaluate.sh pretrained/InternVL-14B-224px {key}")
        assert f"{key}/cider" in out
    # A partition needs Slurm: --here trains on this machine.
    few = "steps=1 --here"
    for name, epochs in (("flickr", 10), ("flickrcn", 10), ("coco", 5)):
        run = f"internvl_stage2_finetune_{name}"
        full = f"{run}_364_bs1024_ep{epochs}"
        terminal.type(
            f"PARTITION='your partition' GPUS=32 sh shell/finetune/{full}.sh {few} global_batch=8"
        )
        assert steps(f"work_dirs/{full}") == [1]
        for folder, end in (("head_finetune", "head_4gpu"), ("lora_finetune", "lora16_4gpu")):
            script = f"shell/{folder}/{run}_224_bs1024_ep{epochs}_{end}.sh"
            terminal.type(f"GPUS=4 BATCH_SIZE=2 sh {script} steps=1")
            assert steps(f"work_dirs/{full}_{end.replace('16', '')}") == [1]
    terminal.cd("../clip_benchmark")
    for language, name in (("en", "flickr"), ("cn", "flickrcn")):
        for mode in "cg":
            run = f"internvl_stage2_finetune_{name}_364_bs1024_ep10"
            terminal.type(CLIP.format(language=language, mode=mode, run=run))
    lines = [json.loads(line) for line in Path("result_ft.json").read_text().splitlines()]
    assert [(line["model"], line["language"]) for line in lines] == [
        ("internvl_c_retrieval_hf", "en"),
        ("internvl_g_retrieval_hf", "en"),
        ("internvl_c_retrieval_hf", "cn"),
        ("internvl_g_retrieval_hf", "cn"),
    ]
    assert lines[0]["pretrained"] == "./work_dirs/internvl_stage2_finetune_flickr_364_bs1024_ep10"
    assert sorted(lines[0]["metrics"]) == sorted(
        f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)
    )
