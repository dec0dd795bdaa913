"""The loop: exact resume after kills, ownership of a run folder, what LoRA moves, bad samples."""

import ast
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
import torch.nn.functional as F
from ranks import Verb
from tiny_run import losses, recipe_of, wait_for_step
from torch._dynamo.utils import counters

from internvl import export, log, train
from internvl.compute import feeding
from internvl.data.records import IGNORE, Example, Unit
from internvl.errors import BadSample
from internvl.inference import load as loading
from internvl.models.vision import normalize_tiles
from internvl.training import memory_ladder
from internvl.training.run import reading


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


@pytest.mark.slow
def test_killed_three_times_and_resumed_bit_for_bit(project, tmp_path):
    lora = ["model.train=[]", "model.lora={rank: 4}"]  # dropout: the RNG must come back too
    straight = train.run(recipe_of(project, tmp_path, "steps=40", *lora))
    folder, rng = tmp_path / "killed", random.Random(0)
    for lowest in (3, 14, 27):
        process = Verb("train", str(project), f"run={folder}", "steps=40", *lora)
        wait_for_step(folder, lowest + rng.randrange(8), process)
        process.kill()
    train.run(recipe_of(project, tmp_path, "steps=40", *lora, f"run={folder}"))
    assert losses(folder) == losses(straight)
    assert len(losses(folder)) == 40


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


# One image of 24 is broken; its two samples are a step of their own.
ALL_BAD = ["data.on_bad_sample=skip", "data.max_bad_fraction=0.5", "global_batch=2", "steps=24"]


@pytest.fixture(scope="module")
def broken(project, tmp_path_factory):
    """The override for the project's data with a broken image."""
    folder = tmp_path_factory.mktemp("data")
    for file in (*project.parent.glob("*.png"), project.parent / "train.jsonl"):
        shutil.copy(file, folder)
    (folder / "red-circle.png").write_bytes(b"no image")
    return f"data.sources=[{{name: s, annotations: {folder}/train.jsonl, images: {folder}}}]"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_of_bad_samples_alone_is_passed_over(project, broken, tmp_path, workers):
    settings = [broken, *ALL_BAD, f"data.workers={workers}", "checkpoint.every=1"]
    done = train.run(recipe_of(project, tmp_path, *settings, "checkpoint.keep=99"))
    (skipped,) = log.StepLog(done, "skipped_steps.jsonl").rows()
    assert skipped["reason"].startswith("all of its samples are bad")
    assert sorted([*losses(done), skipped["step"]]) == list(range(1, 25))
    listed = log.StepLog(done, "bad_samples.jsonl").rows()
    assert [row["step"] for row in listed] == [skipped["step"]] * 2
    # As if the machine had gone right before that step, in it, and after it.
    for first in (skipped["step"] - 1, skipped["step"], skipped["step"] + 1):
        again = tmp_path / f"from{first}"
        shutil.copytree(done, again)
        (again / "finished.json").unlink()
        for step in range(first + 1, 25):
            shutil.rmtree(again / "checkpoints" / f"{step:06d}")
        train.run(recipe_of(project, tmp_path, *settings, "checkpoint.keep=99", f"run={again}"))
        assert losses(again) == losses(done)
        for name in ("skipped_steps.jsonl", "bad_samples.jsonl"):
            assert (again / name).read_bytes() == (done / name).read_bytes()


@pytest.mark.slow
def test_killed_and_resumed_with_bad_samples_bit_for_bit(project, broken, tmp_path):
    settings = [broken, *ALL_BAD, "checkpoint.every=3", "data.workers=1"]
    straight = train.run(recipe_of(project, tmp_path, *settings))
    folder = tmp_path / "killed"
    for lowest in (4, 11, 18):
        process = Verb("train", str(project), f"run={folder}", *settings)
        wait_for_step(folder, lowest, process)
        process.kill()
    train.run(recipe_of(project, tmp_path, *settings, f"run={folder}"))
    assert losses(folder) == losses(straight)
    for name in ("skipped_steps.jsonl", "bad_samples.jsonl"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()


def test_accumulation_gives_the_same_gradient(project, tmp_path):
    """8 samples as one row, as several, and as one row each: 1 x 8, 2 x 4, 8 x 1."""
    found = []
    for max_tokens in (512, 180, 64):
        run = train.build(
            recipe_of(project, tmp_path, f"data.max_tokens={max_tokens}", "data.share_prefix=false")
        )
        step = next(reading.steps(run))
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
        step = next(reading.steps(run))
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
    step = next(reading.steps(run))
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
    step = next(reading.steps(run))
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
    (said,) = {message for message in ours if "supervised" in message}
    assert re.match(r"step 1: 8 samples in \d rows?, \d+ tokens, \d+\.\d% of them", said)
    assert said.count("[16 visual tokens]") == 2
    shown = re.findall(r"⟦(.*?)⟧", said)
    answers = {f"{color} {shape}" for color in tiny_run.COLORS for shape in tiny_run.SHAPES}
    told = [text.partition("<")[0].strip() for text in shown if text != "supervised"]
    assert len(told) == 2
    assert set(told) <= answers | set(tiny_run.COLORS)


def test_a_row_that_teaches_nothing_is_no_error(project, tmp_path):
    """Only the projector learns, and a row has no image."""
    run = train.build(recipe_of(project, tmp_path, "model.train=[multi_modal_projector]"))
    rows = [*run.objective.batches([made_up(run, 0, 9)]), *next(reading.steps(run)).batches]
    assert train.train_step(run, rows)["grad_norm"] > 0


def test_the_loop_reads_in_ten_minutes():
    source = Path(train.__file__).read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.walk(ast.parse(source)) if hasattr(node, "name")}
    assert {"train_step", "updates", "run"} <= functions.keys()
    assert max(node.end_lineno - node.lineno for node in functions.values()) < 100
    assert len(source.splitlines()) <= 350
