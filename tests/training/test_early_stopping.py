"""Evaluations during training: held-out loss, the best step, an early end, what is forgotten."""

import json
import shutil

import pytest
import tiny_run
import torch
import torch.nn.functional as F

from internvl import evals, evaluate, log, train
from internvl.config import recipes
from internvl.data.images import STATISTICS
from internvl.data.records import IGNORE
from internvl.data.sampler import UnitRef
from internvl.errors import ConfigError, UserError
from internvl.inference import load as loading
from internvl.models.vision import normalize_tiles
from internvl.training import early_stopping

LORA = ("model.train=[multi_modal_projector]", "model.lora.rank=4")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def recipe_of(project, tmp_path, *overrides, **fields):
    """A run with an evaluation `val` on the first samples of the training file."""
    folder = project.parent
    spec = {"type": "loss", "annotations": f"{folder}/train.jsonl", "images": str(folder)}
    spec |= {"limit": 10, "every": 2, **fields}
    words = [f"run={tmp_path / 'run'}", f"evals.val={json.dumps(spec)}", *overrides]
    return recipes.load_recipe(project, words)


def test_the_loss_is_the_mean_over_supervised_tokens(project, tmp_path):
    """Against transformers' own forward on every sample alone."""
    run = train.build(recipe_of(project, tmp_path))
    model = run.model.eval()
    found = evals.run_all(evals.build(run.recipe.evals), run.chat, tmp_path / "evals", 3)
    assert found == evals.run_all(evals.build(run.recipe.evals), run.chat, tmp_path / "more", 3)
    assert json.loads((tmp_path / "evals" / "000003.json").read_text()) == found
    losses = []
    for line in range(10):
        (unit,) = run.reader[UnitRef(0, (line,), 0, line)].units
        (example,) = unit.examples
        pixels = normalize_tiles(unit.tiles, torch.float32, *STATISTICS["imagenet"])
        with torch.no_grad():
            ids = torch.from_numpy(example.input_ids)[None]
            logits = model(input_ids=ids, pixel_values=pixels).logits[0]
        labels = torch.from_numpy(example.labels)
        each = F.cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=IGNORE)
        losses += each[labels[1:] != IGNORE].tolist()
    assert found["val/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_captions_are_samples_too_and_bad_ones_are_named(project, tmp_path):
    folder = project.parent
    captions = {"annotations": f"{folder}/captions.json", "prompt": "Name it", "limit": 5}
    recipe = recipe_of(project, tmp_path, **captions)
    chat = loading.for_training(recipe)
    found = evals.run_all(evals.build(recipe.evals), chat, tmp_path / "evals")
    assert 0 < found["val/loss"] < 20
    lines = (folder / "train.jsonl").read_text().splitlines()[:3]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([lines[0].replace(".png", ".gif"), *lines[1:]]) + "\n")
    raising = recipe_of(project, tmp_path, annotations=str(broken))
    with pytest.raises(UserError, match="broken.jsonl line 1"):
        evals.run_all(evals.build(raising.evals), chat, tmp_path / "evals")
    skipping = recipe_of(project, tmp_path, annotations=str(broken), on_bad_sample="skip")
    evals.run_all(evals.build(skipping.evals), chat, tmp_path / "evals")
    listed = (tmp_path / "evals" / "result" / "val.jsonl").read_text()
    assert "broken.jsonl line 1" in json.loads(listed)["sample"]


@pytest.mark.parametrize("kind", ["caption", "loss"])
def test_bad_data_of_an_evaluation_is_named_before_the_model_loads(
    project, tmp_path, kind, monkeypatch
):
    tree = json.loads((project.parent / "captions.json").read_text())
    tree["annotations"][1]["caption"] = None
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(tree))
    recipe = recipe_of(project, tmp_path, annotations=str(path), type=kind, prompt="Name it.")

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "for_training", refuse)
    monkeypatch.setattr(loading, "load", refuse)
    said = r"bad.json annotation \w+: the caption is null, not text"
    with pytest.raises(UserError, match=said):
        train.build(recipe)
    with pytest.raises(UserError, match=said):
        evaluate.run("no/model", annotations=path, images=project.parent)


def test_training_lowers_it_and_the_best_step_is_a_run_of_its_own(project, tmp_path):
    recipe = recipe_of(project, tmp_path, "steps=8", "checkpoint.best=val/loss", *LORA, before=True)
    train.run(recipe)
    found = {
        step: row["val/loss"]
        for step, row in early_stopping.history(recipe.run / "evals", 99).items()
    }
    assert sorted(found) == [0, 2, 4, 6, 8]
    assert found[8] < found[0]
    top = min(list(found)[1:], key=found.get)
    (kept,) = [p.name for p in (recipe.run / "best" / "checkpoints").iterdir() if p.is_dir()]
    assert kept == f"{top:06d}"
    chat = loading.load(recipe.run / "best", device="cpu")
    again = evals.run_all(evals.build(recipe.evals), chat, tmp_path / "evals")
    assert again["val/loss"] == pytest.approx(found[top], rel=1e-5)


@pytest.mark.parametrize("cut", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_that_gains_nothing_more_ends(project, tmp_path, cut, caplog):
    """A rate so high that the loss rises after the first evaluation; once with a kill between."""
    words = ["steps=40", "checkpoint.best=val/loss", "stop.patience=2", "optim.lr=0.3"]
    words += ["optim.warmup_steps=0", "optim.max_grad_norm=1e9", "checkpoint.every=1"]
    recipe = recipe_of(project, tmp_path, *words, "checkpoint.keep=3")
    train.run(recipe)
    end = json.loads((recipe.run / "finished.json").read_text())
    assert end["step"] < 40
    assert "did not improve in 2 evaluations (stop.patience = 2)" in end["why"]
    rows = log.StepLog(recipe.run, "metrics.jsonl").rows()
    assert len(rows) == end["step"]
    if cut:  # after the last evaluation, before the run was marked as finished
        (recipe.run / "finished.json").unlink()
    else:  # before the last steps
        (recipe.run / "finished.json").unlink()
        shutil.rmtree(recipe.run / "checkpoints" / f"{end['step']:06d}")
    train.run(recipe)
    assert json.loads((recipe.run / "finished.json").read_text()) == end
    assert len(log.StepLog(recipe.run, "metrics.jsonl").rows()) == end["step"]


@pytest.mark.parametrize("action", ["stop", "warn"])
def test_what_is_forgotten_stops_or_warns(project, tmp_path, action, caplog):
    guard = {"metric": "loss", "max_worsening": 0.05, "action": action}
    words = ["steps=4", "optim.lr=0.3", "optim.warmup_steps=0", "optim.max_grad_norm=1e9"]
    recipe = recipe_of(project, tmp_path, *words, guard=guard)
    said = r"val/loss was .* before the first step and is .* at step 2: worse by .*%, and "
    log.get_logger().propagate = True
    if action == "warn":
        train.run(recipe)
        assert [r for r in caplog.records if "worse by" in r.getMessage()]
        return
    with pytest.raises(train.RunError, match=said + r"evals.val.guard.max_worsening allows 5.0%"):
        train.run(recipe)
    assert (recipe.run / "checkpoints" / "000002").is_dir()
    with pytest.raises(train.RunError, match=said):  # the same again …
        train.run(recipe)
    allowed = recipe_of(project, tmp_path, *words, guard=guard | {"max_worsening": 1e9})
    train.run(allowed)  # … until more is allowed
    assert (recipe.run / "finished.json").exists()


HISTORY = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.0}


@pytest.mark.parametrize(
    ("settings", "best_at", "stops_at"),
    [
        ({"best": "val/loss"}, [2, 4], []),
        ({"best": "val/loss", "best_is": "max"}, [2], []),
        ({"best": "val/CIDEr"}, [2], [8]),
        ({"best": "val/other"}, [], []),
    ],
)
def test_verdicts(settings, best_at, stops_at):
    tree = {
        "model": {"id": "m"},
        "data": {"sources": [{"name": "x", "annotations": "x.jsonl"}]},
        "evals": {"val": {"type": "loss", "annotations": "x.jsonl"}},
        "checkpoint": settings,
        "stop": {"patience": 3},
        "run": "r",
        "global_batch": 8,
        "epochs": 1,
    }
    recipe = recipes.resolve(tree)
    found = {step: {"val/loss": value, "val/CIDEr": value} for step, value in HISTORY.items()}
    verdicts = {
        step: early_stopping.judge(recipe, {s: v for s, v in found.items() if s <= step}, step)
        for step in found
    }
    assert [step for step, verdict in verdicts.items() if verdict.best] == best_at
    stopping = [step for step, verdict in verdicts.items() if verdict.stop]
    assert stopping == (stops_at or ([8] if settings.get("best_is") == "max" else []))
    assert early_stopping.judge(recipe, found, 7) == early_stopping.Verdict()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint.best=other/loss"], "is no metric of an evaluation.*evaluations: val"),
        (["stop.patience=2"], "stop.patience: name the metric that should improve"),
    ],
)
def test_contradictions(project, tmp_path, words, said):
    with pytest.raises(ConfigError, match=said):
        recipe_of(project, tmp_path, *words)
