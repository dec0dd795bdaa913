"""The loop: exact resume after kills, ownership of a run folder, what LoRA moves, bad samples."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters

from internvl import evaluate, export, log, train
from internvl.compute import feeding
from internvl.config import TilesConfig, recipes
from internvl.data.records import IGNORE, Example, Unit
from internvl.errors import BadSample
from internvl.inference import load as loading
from internvl.models.vision import normalize_tiles
from internvl.training import memory_ladder, run_folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def recipe_of(project, tmp_path, *overrides):
    return recipes.load_recipe(project, [f"run={tmp_path / 'run'}", *overrides])


def losses(folder):
    return {
        row["step"]: (row["loss"], row["grad_norm"])
        for row in log.StepLog(folder, "metrics.jsonl").rows()
    }


def command(project, folder, *overrides):
    return [sys.executable, "-m", "internvl", "train", str(project), f"run={folder}", *overrides]


def wait_for_step(folder, step, process, limit_s=3600):
    """Returns once metrics.jsonl has reached `step`."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until and process.poll() is None:
        if max(losses(folder), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


@pytest.mark.slow
def test_killed_three_times_and_resumed_bit_for_bit(project, tmp_path):
    lora = ["model.train=[]", "model.lora={rank: 4}"]  # dropout: the RNG must come back too
    straight = train.run(recipe_of(project, tmp_path, "steps=40", *lora))
    folder, rng = tmp_path / "killed", random.Random(0)
    for lowest in (3, 14, 27):
        process = subprocess.Popen(command(project, folder, "steps=40", *lora))
        wait_for_step(folder, lowest + rng.randrange(8), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(project, folder, "steps=40", *lora), check=True)
    assert losses(folder) == losses(straight)
    assert len(losses(folder)) == 40


def test_a_finished_run_says_so(project, tmp_path, caplog):
    recipe = recipe_of(project, tmp_path, "steps=2")
    train.run(recipe)
    before = losses(recipe.run)
    with caplog.at_level("INFO", logger="internvl"):
        log.get_logger().propagate = True
        train.run(recipe)
    assert "is finished" in caplog.text
    assert losses(recipe.run) == before


def test_the_run_folder(project, tmp_path):
    recipe = recipe_of(project, tmp_path, "steps=12")
    train.run(recipe)
    assert recipes.load_recipe(recipe.run / "recipe.yaml") == loading.complete(recipe).recipe
    saved = sorted(p.name for p in (recipe.run / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == ["000010", "000012"]  # keep = 2
    assert (recipe.run / "checkpoints" / "LATEST").read_text().strip() == "000012"
    rows = log.StepLog(recipe.run, "metrics.jsonl").rows()
    assert [row["samples"] for row in rows] == [8] * 12
    assert rows[-1]["loss"] < rows[0]["loss"]
    events = EventAccumulator(str(recipe.run / "tensorboard")).Reload()
    wanted = ("loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "data_wait_s")
    for name in (*wanted, "memory_gib"):
        assert len(events.Scalars(name)) == 12
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in rows])


@pytest.mark.slow
def test_ctrl_c_saves_and_goes_on(project, tmp_path):
    straight = train.run(recipe_of(project, tmp_path, "steps=30"))
    folder = tmp_path / "stopped"
    process = subprocess.Popen(command(project, folder, "steps=30"), stderr=subprocess.PIPE)
    wait_for_step(folder, 7, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1].decode()
    assert process.returncode == 1
    assert "checkpoint written" in said
    subprocess.run(command(project, folder, "steps=30"), check=True)
    assert losses(folder) == losses(straight)


def test_a_second_process_and_another_recipe_are_refused(project, tmp_path):
    recipe = recipe_of(project, tmp_path, "steps=2")
    with (
        run_folder.owned(recipe),
        pytest.raises(train.RunError, match="another process is training"),
    ):
        train.run(recipe)
    train.run(recipe)
    with pytest.raises(train.RunError, match="optim.lr was 0.001, is 0.01"):
        train.run(recipe_of(project, tmp_path, "steps=2", "optim.lr=0.01"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(train.RunError, match="not empty and no run"):
        train.run(recipe_of(project, tmp_path, f"run={tmp_path / 'full'}"))


@pytest.mark.slow
def test_annotations_that_grew_under_a_run(project, tmp_path):
    """Stopped at step 2, four lines more: refused, or the first epoch ends as it had begun."""
    file = tmp_path / "train.jsonl"
    lines = (project.parent / "train.jsonl").read_text().splitlines()
    images = f"{{name: shapes, annotations: {file}, images: {project.parent}}}"
    keys = (f"data.sources=[{images}]", "checkpoint.every=2", "checkpoint.keep=9")
    keys += ("steps=7", "data.share_prefix=false")

    def start(name, *overrides):
        return train.run(recipe_of(project, tmp_path, f"run={tmp_path / name}", *keys, *overrides))

    def stop_at_step_2(name):
        run = tmp_path / name
        (run / "finished.json").unlink()
        for step in (4, 6, 7):
            shutil.rmtree(run / "checkpoints" / f"{step:06d}")

    file.write_text("\n".join(lines))
    straight = losses(start("straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "grown")
    stop_at_step_2("grown")
    file.write_text("\n".join([*lines, *lines[:4]]))
    with pytest.raises(train.RunError, match=r"train.jsonl had 48 samples, has 52; the first ones"):
        start("grown")
    grown = losses(start("grown", "data.changed=accept"))
    assert list(grown) == list(range(1, 8))
    for step in range(1, 7):  # 6 steps of 8 are the 48 samples of the first epoch
        assert grown[step] == straight[step]
    assert grown[7] != straight[7]
    file.write_text("\n".join(lines))
    stop_at_step_2("straight")
    assert losses(start("straight")) == straight


def test_lora_moves_only_what_it_says_and_merges_equal(project, tmp_path):
    recipe = recipe_of(
        project, tmp_path, "steps=4", "model.train=[multi_modal_projector]", "model.lora={rank: 4}"
    )
    train.run(recipe)
    start = loading.load(recipe.model.id, device="cpu").model.state_dict()
    trained = loading.load(recipe.run, device="cpu")
    moved = set()
    for name, tensor in trained.model.state_dict().items():
        if ".lora_" in name:
            moved |= {"lora"} if "lora_B" in name and tensor.any() else set()
        elif not torch.equal(tensor, start[name.replace(".base_layer", "")]):
            moved.add(name.split(".")[1])
    assert moved == {"multi_modal_projector", "lora"}
    export.run(recipe.run, tmp_path / "merged")  # compares the logits of what it wrote itself
    merged = loading.load(tmp_path / "merged", device="cpu")
    for model in (trained.model, merged.model):
        model.eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        a, b = trained.model(input_ids=ids).logits, merged.model(input_ids=ids).logits
    assert torch.allclose(a, b, atol=1e-4)
    adapter = json.loads((recipe.run / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4


def test_bad_samples_are_raised_or_listed(project, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(project.parent, folder, ignore=shutil.ignore_patterns("run", "start"))
    (folder / "red-circle.png").write_bytes(b"no image")
    sources = f"data.sources=[{{name: s, annotations: {folder}/train.jsonl, images: {folder}}}]"
    with pytest.raises(BadSample, match=r"train.jsonl line [12]: .*red-circle.png"):
        train.run(recipe_of(project, tmp_path, "steps=6", sources))
    skip = [sources, "data.on_bad_sample=skip", "data.max_bad_fraction=0.5", "steps=6"]
    done = train.run(recipe_of(project, tmp_path, f"run={tmp_path / 'skipped'}", *skip))
    listed = [json.loads(line) for line in (done / "bad_samples.jsonl").read_text().splitlines()]
    assert len(listed) == 2
    assert all("red-circle.png" in row["reason"] for row in listed)
    assert sum(row["samples"] for row in log.StepLog(done, "metrics.jsonl").rows()) == 46
    with (folder / "train.jsonl").open("a") as file:
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "red \ud83d"}]
        file.write(json.dumps({"conversations": turns}) + "\n")
    skip = [*skip, f"run={tmp_path / 'half'}", "steps=7"]
    done = train.run(recipe_of(project, tmp_path, *skip))
    listed = [json.loads(line) for line in (done / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["sample"].rpartition(" ")[2] for row in listed if "half a" in row["reason"]] == [
        "49"
    ]
    few = [sources, "data.on_bad_sample=skip", "data.max_bad_fraction=0.01", "steps=6"]
    with pytest.raises(train.RunError, match="max_bad_fraction"):
        train.run(recipe_of(project, tmp_path, f"run={tmp_path / 'few'}", *few))


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_loses_nothing(project, tmp_path):
    """On a file system of 60 MiB two checkpoints of 23 MiB fit, a third does not."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("unshare -rm is not allowed here")
    disk = tmp_path / "disk"
    disk.mkdir()
    words = command(project, disk / "run", "checkpoint.every=2", "checkpoint.keep=9", "steps=20")
    script = (
        f"mount -t tmpfs -o size=60m tmpfs {disk} && {' '.join(map(repr, words))}; "
        f"echo code $?; ls -a {disk}/run/checkpoints"
    )
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], check=False, capture_output=True, text=True
    )
    assert "code 1" in done.stdout, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert "000002" in done.stdout
    assert "partial" not in done.stdout


def test_accumulation_gives_the_same_gradient(project, tmp_path):
    """8 samples as one row, as several, and as one row each: 1 x 8, 2 x 4, 8 x 1."""
    found = []
    for max_tokens in (512, 180, 64):
        run = train.build(
            recipe_of(project, tmp_path, f"data.max_tokens={max_tokens}", "data.share_prefix=false")
        )
        step = next(train._steps(run))
        found.append((len(step.batches), *_gradient(run, step.batches)))
    assert [rows for rows, _, _ in found] == sorted({rows for rows, _, _ in found})
    assert found[-1][0] == 8
    for _, loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        assert torch.allclose(gradient, found[0][2], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("weighting", ["token", "square"])
def test_micro_batch_normalization_is_the_mean_of_row_means(project, tmp_path, weighting):
    """Against transformers' own forward on every row, without packing."""
    settings = ["data.max_tokens=64", "data.share_prefix=false", f"objective.weighting={weighting}"]
    found = {}
    for kind in ("global", "micro_batch"):
        run = train.build(
            recipe_of(project, tmp_path, *settings, f"objective.loss_normalization={kind}")
        )
        step = next(train._steps(run))
        found[kind] = _gradient(run, step.batches)
    assert len({len(row.targets) for row in step.batches}) > 1
    assert not torch.allclose(found["global"][1], found["micro_batch"][1], rtol=1e-3)
    means = []
    for row in step.batches:
        pixels = normalize_tiles(row.pixel_values, torch.float32)
        logits = run.model(input_ids=row.input_ids, pixel_values=pixels).logits[0]
        means.append(F.cross_entropy(logits[row.loss_positions], row.targets))
    torch.stack(means).mean().backward()
    wanted = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.requires_grad])
    loss, gradient = found["micro_batch"]
    assert loss == pytest.approx(float(torch.stack(means).mean().detach()), rel=1e-5)
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=2e-6)


def _gradient(run, batches):
    """Loss and flat gradient of a step, read before the optimizer clears it."""
    kept = {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            kept["gradient"] = torch.cat(
                [p.grad.flatten().clone() for group in self.param_groups for p in group["params"]]
            )

    run.optimizer = Keep([p for p in run.model.parameters() if p.requires_grad], lr=0.0)
    run.model.eval()
    numbers = train.train_step(run, batches)
    # Undo the clipping, which is a function of the whole gradient.
    norm = numbers["grad_norm"]
    return numbers["loss"], kept["gradient"] * max(1.0, norm / run.recipe.optim.max_grad_norm)


def test_an_objective_sees_the_whole_step_before_its_first_row(project, tmp_path):
    run = train.build(recipe_of(project, tmp_path, "data.max_tokens=64", "data.share_prefix=false"))
    seen = []

    class Whole(type(run.objective)):
        def begin_step(self, model, batches, counts):
            seen.append(([batch.names for batch in batches], dict(counts)))

        def __call__(self, model, batch):
            seen.append(batch.names)
            return super().__call__(model, batch)

    run.objective.__class__ = Whole
    step = next(train._steps(run))
    train.train_step(run, step.batches)
    names = [batch.names for batch in step.batches]
    supervised = sum(len(batch.targets) for batch in step.batches)
    assert seen == [(names, {"sft": supervised}), *names]


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ([], "Set compute.checkpointing=selective; the same command"),
        (["compute.checkpointing=selective"], "Set compute.checkpointing=full; the same command"),
        (["compute.checkpointing=full", "data.row_tokens=512"], "Set data.row_tokens=256; the"),
        (["compute.checkpointing=full"], "Set compute.offload=true; the same command"),
        (
            ["compute={checkpointing: full, offload: true}"],
            "Set optim.offload=true; the same command",
        ),
        (
            ["compute={checkpointing: full, offload: true}", "model.train=[]", "model.lora.rank=4"],
            "Set model.quantize=4bit in a new run",
        ),
    ],
)
def test_out_of_memory_names_the_row_and_one_setting(project, tmp_path, settings, remedy):
    run = train.build(recipe_of(project, tmp_path, *settings))
    assert memory_ladder.advice(run.recipe).startswith(remedy)

    class TooLarge(type(run.objective)):
        def __call__(self, model, batch):
            raise torch.OutOfMemoryError

    run.objective.__class__ = TooLarge
    row = r"a row of \d samples, \d+ tokens and \d tiles \(the first: .*train.jsonl line \d+\)"
    with pytest.raises(train.RunError, match=f"step 1, in {row}. {remedy}"):
        next(train.updates(run))


def test_a_loss_that_is_no_number_stops_and_names_its_samples(project, tmp_path):
    recipe = recipe_of(project, tmp_path, "data.max_tokens=64", "data.share_prefix=false")
    run = train.build(recipe)
    step = next(train._steps(run))
    bad = step.batches[1].names

    class Broken(type(run.objective)):
        def __call__(self, model, batch):
            sums = super().__call__(model, batch)
            return {"sft": sums["sft"] * (float("nan") if batch.names == bad else 1.0)}

    run.objective.__class__ = Broken
    with pytest.raises(train.RunError) as caught:
        train.train_step(run, step.batches)
    said = f"the loss of step 1 is not a finite number, from a row of {bad[0]}. "
    assert said in str(caught.value)


def made_up(run, num_tiles, num_words):
    """A sample of any size, as the reader would give it."""
    encoder = run.chat.encoder
    ids = np.array([encoder.context_id] * (num_tiles * encoder.tokens_per_tile) + [20] * num_words)
    labels = np.where(np.arange(len(ids)) >= len(ids) - 2, ids, IGNORE)
    tiles = torch.zeros(num_tiles, 3, 64, 64, dtype=torch.uint8) if num_tiles else None
    return Unit((Example("made up", ids, labels),), 0, tiles)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "trained", ["model.train=[multi_modal_projector]", "model.train=[language_model]"]
)
@pytest.mark.usefixtures("graphs_alone")
def test_nothing_is_compiled_after_the_warm_up(project, tmp_path, trained):
    counters.clear()
    settings = ["compute.compile=true", "model.lora={rank: 4}", trained]
    if "language" in trained:
        settings[:2] = ["compute={compile: true, checkpointing: selective, offload: true}"]
    run = train.build(recipe_of(project, tmp_path, *settings, "data.row_tokens=384"))
    assert run.row_lengths == (256, 384)
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    train.warm_up(run)
    assert not run.optimizer.state
    assert all(parameter.grad is None for parameter in run.model.parameters())
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    compiled = counters["stats"]["unique_graphs"]
    assert 4 <= compiled <= 3 * len(run.row_lengths) + 3
    sizes = [(tiles, words) for tiles in (0, 1, 2, 3, 7) for words in (5, 60, 120)]
    for tiles, words in sizes:
        (row,) = run.objective.batches([made_up(run, tiles, words)])
        train.train_step(run, [feeding.pad(row, run.row_lengths)])
    rows = run.objective.batches([made_up(run, *size) for size in sizes])
    train.train_step(run, [feeding.pad(row, run.row_lengths) for row in rows])
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("share", ["true", "false"])
def test_the_log_shows_the_first_samples_and_what_is_supervised(project, tmp_path, caplog, share):
    run = train.build(recipe_of(project, tmp_path, f"data.share_prefix={share}"))
    with caplog.at_level("INFO", logger="internvl"):
        log.get_logger().propagate = True
        updates = train.updates(run)
        next(updates)
        next(updates)
    ours = [r.getMessage() for r in caplog.records if r.name == "internvl"]
    (said,) = [message for message in ours if "supervised" in message]
    assert re.match(r"step 1: 8 samples in \d row\(s\), \d+ tokens, \d+\.\d% of them", said)
    assert said.count("[16 visual tokens]") == 2
    shown = re.findall(r"⟦(.*?)⟧", said)
    answers = {f"{color} {shape}" for color in tiny_run.COLORS for shape in tiny_run.SHAPES}
    told = [text.partition("<")[0].strip() for text in shown if text != "supervised"]
    assert len(told) == 2
    assert set(told) <= answers | set(tiny_run.COLORS)


def test_a_row_that_teaches_nothing_is_no_error(project, tmp_path):
    """Only the projector learns, and a row has no image."""
    run = train.build(recipe_of(project, tmp_path, "model.train=[multi_modal_projector]"))
    rows = [*run.objective.batches([made_up(run, 0, 9)]), *next(train._steps(run)).batches]
    assert train.train_step(run, rows)["grad_norm"] > 0


def test_the_loop_reads_in_ten_minutes():
    source = Path(train.__file__).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(source) if line.startswith("def run("))
    end = next(i for i in range(start + 1, len(source)) if source[i].startswith("def "))
    assert end - start <= 100


def test_an_evaluation_cut_off_by_a_kill_is_made_up_for(project, tmp_path):
    folder = project.parent
    spec = f"{{annotations: {folder}/captions.json, images: {folder}, prompt: Name it, "
    spec += "metrics: exact, limit: 3, max_new_tokens: 3, every: 5, before: true}"
    recipe = recipe_of(project, tmp_path, "steps=7", f"evals.shapes={spec}")
    train.run(recipe)
    made = sorted(path.name for path in (recipe.run / "evals").glob("*.json"))
    assert made == ["000000.json", "000005.json", "000007.json"]
    # As a kill within the evaluation at step 5 leaves it.
    for name in ("finished.json", "evals/000005.json", "evals/000007.json"):
        (recipe.run / name).unlink()
    for name in ("000007",):
        shutil.rmtree(recipe.run / "checkpoints" / name)
    train.run(recipe)
    assert sorted(path.name for path in (recipe.run / "evals").glob("*.json")) == made


def open_recipe(project, tmp_path, *overrides):
    """A recipe that says nothing of tiles, on a start model of its own."""
    start = tmp_path / "start"
    if not start.exists():
        shutil.copytree(project.parent / "start", start)
    return recipe_of(project, tmp_path, f"model.id={start}", "data.tiles={}", *overrides)


def test_a_recipe_without_tiles_trains_as_its_checkpoint_is(project, tmp_path, caplog):
    """And goes on so, whatever becomes of the checkpoint's config.json."""
    recipe = open_recipe(project, tmp_path, "steps=2")
    log.get_logger().propagate = True
    with caplog.at_level("INFO", logger="internvl"):
        train.run(recipe)
    source = tmp_path / "start/config.json"
    assert f"data.tiles.size        64             {source}" in caplog.text
    saved = recipes.load_recipe(recipe.run / "recipe.yaml")
    assert saved.data.tiles == TilesConfig(size=64, min=1, max=1, thumbnail=False)
    assert (saved.data.normalize, saved.data.template) == ("imagenet", "internvl2_5")
    assert saved.data.system_message == ""
    stated = train.run(recipe_of(project, tmp_path / "stated", "steps=2"))
    assert losses(stated) == losses(recipe.run)
    config = json.loads(source.read_text())
    config["internvl"] |= {"max_dynamic_patch": 9, "dynamic_image_size": True}
    source.write_text(json.dumps(config))
    again = loading.complete(recipe)
    assert again.recipe.data == saved.data
    assert {setting.source for setting in again.settings} == {str(recipe.run / "recipe.yaml")}
    other = loading.complete(open_recipe(project, tmp_path, f"run={tmp_path / 'other'}"))
    assert other.recipe.data.tiling.max == 9


def evaluated(project):
    folder = project.parent
    captions = (
        f"{{annotations: {folder / 'captions.json'}, images: {folder}, prompt: 'What is this?'"
    )
    loss = f"{{type: loss, annotations: {folder / 'train.jsonl'}, images: {folder}}}"
    return [
        f"evals.captions={captions}, metrics: exact, max_new_tokens: 8, batch_size: 5}}",
        f"evals.held={loss}",
    ]


def answers_of(folder):
    return {file.name: file.read_text() for file in folder.glob("*.jsonl")}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_measures_the_same_inside_and_outside(project, tmp_path, dtype, method):
    lora = ["model.train=[]", "model.lora={rank: 4}", "compute.attention=eager"]
    overrides = [*evaluated(project), f"dtype={dtype}", *(lora if method == "lora" else [])]
    run = train.run(recipe_of(project, tmp_path, "steps=2", *overrides))
    inside = json.loads((run / "evals/000002.json").read_text())
    to = tmp_path / "outside"
    outside = evaluate.measure(run, device="cpu", to=to)
    assert outside.metrics == inside
    assert json.loads((to / "result.json").read_text()) == inside
    assert answers_of(to / "result") == answers_of(run / "evals/000002")
    inner = "bfloat16 autocast" if dtype == "bfloat16" else dtype
    assert outside.computed.startswith(f"{inner}, cpu, attention")
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    outer = "bfloat16 autocast" if other == "bfloat16" else other
    said = f"{outer}; inside the run: {inner}"
    found = evaluate.measure(run, ["held"], device="cpu", dtype=other, to=to)
    assert found.computed == said
    written = json.loads((to / "result.json").read_text())
    assert written["held/computed"] == said
    assert "captions/computed" not in written
    assert found.metrics["held/loss"] != inside["held/loss"]
    # The file with that text is read by the next evaluation, which removes it.
    evaluate.measure(run, ["held"], device="cpu", to=to)
    assert json.loads((to / "result.json").read_text()) == inside


@pytest.mark.parametrize("format", ["hf", "official"])
def test_an_export_measures_what_its_run_measured(project, tmp_path, format):
    run = train.run(recipe_of(project, tmp_path, "steps=2", *evaluated(project)))
    inside = json.loads((run / "evals/000002.json").read_text())
    export.run(run, tmp_path / "export", format)
    folder = project.parent
    found = evaluate.measure(
        tmp_path / "export",
        device="cpu",
        to=tmp_path / "outside",
        annotations=folder / "captions.json",
        images=folder,
        prompt="What is this?",
        metrics="exact",
        max_new_tokens=8,
        batch_size=5,
    )
    names = ("exact", "average_length")
    assert [found.metrics[f"caption-file/{n}"] for n in names] == [
        inside[f"captions/{n}"] for n in names
    ]
    answers = tmp_path / "outside/result/caption-file.jsonl"
    assert answers.read_text() == (run / "evals/000002/captions.jsonl").read_text()
    assert found.computed == "float32"
    half = evaluate.measure(
        tmp_path / "export",
        device="cpu",
        dtype="bfloat16",
        to=tmp_path / "half",
        annotations=folder / "captions.json",
        images=folder,
        limit=2,
        metrics="exact",
    )
    assert half.computed == "bfloat16; the folder's weights: float32"
