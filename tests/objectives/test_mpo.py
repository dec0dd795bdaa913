"""Mixed preference optimization against two plain models, however a step is cut."""

import json
import math
import shutil

import preference_runs
import pytest
import torch
from ranks import run_ranks

from internvl import check, log, train
from internvl.config import recipes
from internvl.data.packing import common_prefix
from internvl.errors import DataError, RunError
from internvl.objectives import mpo
from internvl.objectives.mpo import RunningMean, Watch

STEPS = 3


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return preference_runs.make(tmp_path_factory.mktemp("project"))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def take_steps(recipe):
    """Yields (run, weights before a step, its metrics, its gradients)."""
    state = train.build(recipe)
    gradients = {}

    def keep(optimizer, *_):
        named = state.model.named_parameters()
        gradients.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    state.optimizer.register_step_pre_hook(keep)
    before = weights(state.model)
    for metrics in train.updates(state):
        yield state, before, metrics, gradients
        before = weights(state.model)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        pytest.param(
            ["objective.reference=live", "data.row_tokens=600", "data.share_prefix=false"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["objective.normalize=tokens", "data.packing=official"], marks=pytest.mark.slow
        ),
    ],
    ids=["precomputed", "live", "tokens"],
)
def test_every_step_is_that_of_two_models(project, tmp_path, settings):
    recipe = recipes.load_recipe(
        project, [f"run={tmp_path}/run", "optim.max_grad_norm=1e9", f"steps={STEPS}", *settings]
    )
    plain = None
    for state, before, metrics, gradients in take_steps(recipe):
        if plain is None:
            plain, pairs = preference_runs.TwoModels(state.recipe), preference_runs.encoded(state)
        plain.policy.load_state_dict(before, strict=False)
        plain.policy.zero_grad()
        for name, value in plain.step(pairs).items():
            if name == "rewards/accuracies" and state.step < STEPS:
                continue  # margins are still rounding errors
            assert metrics[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name
        for name, parameter in plain.policy.named_parameters():
            if parameter.grad is not None:
                assert (parameter.grad - gradients[name]).abs().max() <= 1e-5, name
    assert state.step == STEPS
    assert abs(metrics["rewards/margins"]) > 1e-3


RUN = """
from internvl import train
from internvl.config import recipes

train.run(recipes.load_recipe({recipe!r}, {settings!r}))
"""
ADAPTERS = ["model.train=[]", "model.lora={rank: 4, dropout: 0.0}"]


def curve(folder):
    """(loss, norm, delta, reward of the chosen answers) of every step."""
    names = ("loss", "grad_norm", "delta", "rewards/chosen", "logps/rejected")
    rows = log.StepLog(folder, "metrics.jsonl").rows()
    return [tuple(row[name] for name in names) for row in rows]


def run(project, folder, *settings):
    recipe = recipes.load_recipe(project, [f"run={folder}", f"steps={STEPS}", *settings])
    train.run(recipe)
    return curve(folder)


def close(one, other):
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_step_does_not_depend_on_how_it_is_cut(project, tmp_path):
    whole = run(project, tmp_path / "whole", "data.row_tokens=2048", *ADAPTERS)
    cut = run(project, tmp_path / "cut", *ADAPTERS)
    close(cut, whole)
    folder = tmp_path / "two"
    settings = [f"run={folder}", f"steps={STEPS}", *ADAPTERS]
    run_ranks(RUN.format(recipe=str(project), settings=settings))
    close(curve(folder), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    # The last one's tower and projector are frozen: without shards they run once a row.
    [("objective.reference=precomputed",), ("objective.reference=live",), ADAPTERS],
)
def test_shards_change_nothing(project, tmp_path, chosen):
    # Three pairs in rows of one: one rank gets an empty row.
    settings = ["global_batch=3", "data.row_tokens=256", *chosen]
    whole = run(project, tmp_path / "whole", *settings)
    folder = tmp_path / "two"
    settings += ["parallel.shard=zero3", f"run={folder}", f"steps={STEPS}"]
    run_ranks(RUN.format(recipe=str(project), settings=settings))
    close(curve(folder), whole)


@pytest.mark.slow
def test_adapters_off_are_the_reference_that_is_stored(project, tmp_path):
    off = run(project, tmp_path / "off", *ADAPTERS)
    assert not (tmp_path / "off" / "reference.jsonl").exists()
    close(run(project, tmp_path / "stored", *ADAPTERS, "objective.reference=precomputed"), off)
    assert (tmp_path / "stored" / "reference.jsonl").exists()


def test_a_frozen_tower_runs_once_a_row(project, tmp_path, monkeypatch):
    settings = ["objective.delta=exact", "steps=1", *ADAPTERS]
    recipe = recipes.load_recipe(project, [f"run={tmp_path}/run", *settings])
    state = train.build(recipe)
    towers, passes = [], []
    state.model.model.vision_tower.register_forward_hook(lambda *_: towers.append(1))

    def keep(module, args, kwargs):
        assert kwargs["pixel_values"] is None
        passes.append(kwargs["visual"])

    state.model.register_forward_pre_hook(keep, with_kwargs=True)
    (metrics,) = train.updates(state)
    # Policy and reference of every row, and the policy once more in all rows but one.
    assert len(passes) == 3 * metrics["rows"] - 1
    assert len(towers) == len({id(visual) for visual in passes if visual is not None})
    monkeypatch.setattr(mpo, "_MOST_VISUAL_BYTES", 0)
    again = train.build(recipes.load_recipe(project, [f"run={tmp_path}/again", *settings]))
    (computed_again,) = train.updates(again)
    names = ("loss", "grad_norm", "delta", "logps/chosen")
    assert [computed_again[n] for n in names] == [metrics[n] for n in names]


@pytest.mark.parametrize("delta", ["exact", pytest.param("lagged", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(project, tmp_path, delta):
    settings = ["checkpoint.every=1", "checkpoint.keep=9", f"objective.delta={delta}"]
    settings += ["model.drop_path=0.3", "global_batch=4"]
    whole = run(project, tmp_path / "run", *settings)
    table = (tmp_path / "run" / "reference.jsonl").read_bytes()
    (tmp_path / "run" / "finished.json").unlink()
    for step in range(2, STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{step:06d}")
    saved = json.loads((tmp_path / "run/checkpoints/000001/state.json").read_text())
    assert saved["objective"]["count"] == 1
    # As a kill leaves it: the last line cut off. It is computed again, from the first weights.
    (tmp_path / "run" / "reference.jsonl").write_bytes(table[:-9])
    assert run(project, tmp_path / "run", *settings) == whole
    assert (tmp_path / "run" / "reference.jsonl").read_bytes() == table


@pytest.mark.slow
def test_lagged_delta_is_that_of_the_steps_before(project, tmp_path):
    lagged = run(project, tmp_path / "lagged", "objective.delta=lagged")
    rows = log.StepLog(tmp_path / "lagged", "metrics.jsonl").rows()
    means = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in rows]
    deltas = [0.0, means[0], (means[0] + means[1]) / 2]
    assert [delta for _, _, delta, _, _ in lagged] == pytest.approx(deltas, abs=1e-7)


def test_the_first_loss_is_explained(project, tmp_path, caplog):
    with caplog.at_level("INFO", logger="internvl"):
        run(project, tmp_path / "run", "steps=1")
    (line,) = [r.getMessage() for r in caplog.records if "expected" in r.getMessage()]
    (shown,) = [r.getMessage() for r in caplog.records if "⟦" in r.getMessage()]
    assert "6 pairs in" in shown
    assert "  | ⟦It turns blue.<|im_end|>⟧\n  | \n  | ⟦Nothing.<|im_end|>⟧" in shown
    (row,) = log.StepLog(tmp_path / "run", "metrics.jsonl").rows()
    expected = 0.8 * math.log(2) + 0.2 * 2 * math.log(2)
    assert row["loss"] == pytest.approx(expected + row["sft"], abs=1e-5)
    assert f"first loss {row['loss']:.4f}; expected {row['loss']:.4f} = 0.8318 of" in line


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["image", "text"])
def test_a_changed_pair_is_refused_by_name(tmp_path, changed):
    project = preference_runs.make(tmp_path)
    state = train.build(recipes.load_recipe(project))
    next(train.updates(state))
    if changed == "image":
        preference_runs.picture(tmp_path / "b.png", (90, 200))
    else:
        file = tmp_path / "pairs.jsonl"
        file.write_text(file.read_text().replace("Two dogs sit", "Two cats sit"))
    state = train.build(recipes.load_recipe(project))
    # Nothing names the pair but its content: its line and the file's name are equal.
    lines = "36" if changed == "image" else "6"
    with pytest.raises(DataError, match=rf"pairs.jsonl line [{lines}]: .*its image has changed"):
        next(train.updates(state))


@pytest.mark.slow
def test_what_a_stored_reference_cannot_be_is_refused(project, tmp_path):
    settings = [f"run={tmp_path}/run", "steps=1"]
    with pytest.raises(DataError, match="pairs.jsonl line 5: its frames are drawn anew"):
        run(project, tmp_path / "run", "data.video.sampling=rand")
    with pytest.raises(Exception, match="source pairs has augment: true"):
        recipes.load_recipe(project, [*settings, "data.sources.0.augment=true"])
    with pytest.raises(Exception, match="objective.reference: adapters needs model.lora"):
        recipes.load_recipe(project, [*settings, "objective.reference=adapters"])


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ({"rejected": "A red gradient."}, "its chosen and rejected answers are equal"),
        ({"rejected": "no " * 300}, r"tokens with its rejected answer, which data.max_tokens"),
        ({"question": "<image><image> Which?"}, "with its chosen answer: 2 <image> marks in"),
        ({"rejected": None}, "`rejected` must be a text"),
    ],
)
def test_bad_pairs_are_named(tmp_path, pair, reason):
    pairs = [{**preference_runs.PAIRS[0], **pair}]
    state = train.build(recipes.load_recipe(preference_runs.make(tmp_path, pairs)))
    with pytest.raises(Exception, match=f"pairs.jsonl line 1: .*{reason}"):
        next(train.updates(state))


def test_the_question_is_shared_up_to_the_answers(project):
    state = train.build(recipes.load_recipe(project))
    for (chosen, rejected, _), line in zip(
        preference_runs.encoded(state), range(len(preference_runs.PAIRS)), strict=True
    ):
        prefix = common_prefix((chosen, rejected))
        assert (chosen.labels[:prefix] < 0).all(), line
        assert prefix > 0.5 * len(chosen.input_ids) or "5" in str(line)


def test_the_running_mean_is_the_mean_of_all_steps():
    mean = RunningMean()
    for value in (1.0, math.nan, 2.0, 6.0):
        mean = mean.updated(value)
    assert (mean.mean, mean.count) == (3.0, 3)


def test_known_failures_are_noticed_once(project, caplog):
    config = recipes.load_recipe(project, ["objective.watch_steps=2"]).objective
    falling = [
        {"rewards/chosen": -step, "rewards/margins": step, "rewards/accuracies": 1.0}
        for step in map(float, range(6))
    ]
    watch = Watch(config)
    with caplog.at_level("WARNING", logger="internvl"):
        for measured in falling:
            watch.step(measured)
    assert [r.getMessage().split(" ")[1] for r in caplog.records] == ["chosen", "pairs"]
    stopping = recipes.load_recipe(
        project, ["objective.watch_steps=2", "objective.watch=stop"]
    ).objective
    watch = Watch(stopping)
    for measured in falling[:3]:
        watch.step(measured)
    with pytest.raises(RunError, match="chosen answers become less probable"):
        watch.step(falling[3])


def test_a_check_counts_and_shows_pairs(project, tmp_path):
    checked = check.run(recipes.load_recipe(project, [f"run={tmp_path}/run"]))
    assert not checked.problems
    assert len(checked.counts["pairs"].tokens) == len(preference_runs.PAIRS)
    assert "6 samples per epoch" in checked.arithmetic
    shown = ["".join(text for text, _ in sample.spans) for sample in checked.first_samples]
    assert all("<|im_end|>\n\nrejected: " in text for text in shown), shown
