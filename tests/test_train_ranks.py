"""Two real processes train as one does: gradients, curves, and going on with another number."""

import json

import pytest
import tiny_run
import torch
from ranks import run_ranks

from internvl import Request, log, train
from internvl.config import recipes
from internvl.evals import held_out
from internvl.inference import load as loading

TRAIN = """
from internvl import train
from internvl.config import recipes

train.run(recipes.load_recipe({recipe!r}, {settings!r}))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def curve(folder):
    rows = log.StepLog(folder, "metrics.jsonl").rows()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert {row["samples"] for row in rows} == {8}
    return torch.tensor([[row["loss"], row["grad_norm"]] for row in rows], dtype=torch.float64)


def test_curves_agree_and_a_run_goes_on_with_another_number_of_ranks(project, tmp_path):
    settings = ["steps=8", "checkpoint.every=4"]
    alone = train.run(recipes.load_recipe(project, [*settings, f"run={tmp_path / 'alone'}"]))
    together = tmp_path / "together"
    code = TRAIN.format(recipe=str(project), settings=[*settings, f"run={together}"])
    run_ranks(code)
    torch.testing.assert_close(curve(together), curve(alone), rtol=1e-3, atol=1e-4)
    assert (together / "finished.json").exists()
    again = curve(together)
    # As if the machine had gone after step 4 …
    (together / "finished.json").unlink()
    for file in sorted((together / "checkpoints" / "000008").iterdir()):
        file.unlink()
    (together / "checkpoints" / "000008").rmdir()
    run_ranks(code)
    assert torch.equal(curve(together), again)  # … with as many ranks, to the last bit
    (together / "finished.json").unlink()
    for file in sorted((together / "checkpoints" / "000008").iterdir()):
        file.unlink()
    (together / "checkpoints" / "000008").rmdir()
    train.run(recipes.load_recipe(project, [*settings, f"run={together}"]))
    torch.testing.assert_close(curve(together), again, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_ranks_list_bad_samples_once_and_stop_together(project, tmp_path):
    pictures = project.parent
    broken = pictures / "broken.jsonl"
    lines = (pictures / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[0]) | {"image": "missing.png"}
    broken.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    source = f"data.sources=[{{name: s, annotations: {broken}, images: {pictures}}}]"
    settings = [source, "steps=6", "data.on_bad_sample=skip", "data.max_bad_fraction=0.5"]
    done = tmp_path / "run"
    run_ranks(TRAIN.format(recipe=str(project), settings=[*settings, f"run={done}"]))
    (listed,) = log.StepLog(done, "bad_samples.jsonl").rows()
    assert "missing.png" in listed["reason"]
    rows = log.StepLog(done, "metrics.jsonl").rows()
    assert sum(row["samples"] for row in rows) == 47
    # On batches of two, the pair of lines of a missing image is a whole step.
    second = json.loads(lines[1]) | {"image": "missing.png"}
    broken.write_text("\n".join([json.dumps(row), json.dumps(second), *lines[2:]]) + "\n")
    settings = [*settings, "global_batch=2", "steps=24"]
    alone = train.run(recipes.load_recipe(project, [*settings, f"run={tmp_path / 'one'}"]))
    together = tmp_path / "two"
    run_ranks(TRAIN.format(recipe=str(project), settings=[*settings, f"run={together}"]))
    for name in ("skipped_steps.jsonl", "bad_samples.jsonl"):
        assert (together / name).read_bytes() == (alone / name).read_bytes()
    assert len(log.StepLog(together, "skipped_steps.jsonl").rows()) == 1
    assert log.StepLog(together, "metrics.jsonl").rows()[-1]["step"] == 24
    raising = [source, "steps=6", f"run={tmp_path / 'raised'}"]
    with pytest.raises(AssertionError, match=r"BadSample: .*broken.jsonl line 1"):
        run_ranks(TRAIN.format(recipe=str(project), settings=raising))


EVALUATE = """
from internvl import train
from internvl.config import recipes
from internvl.evals import held_out

held_out.CHUNK_SAMPLES = 16
for settings in {cases!r}:
    train.run(recipes.load_recipe({recipe!r}, settings))
"""


@pytest.mark.slow
def test_evaluations_on_every_rank_are_those_of_one_process(project, tmp_path, monkeypatch):
    """Of whole and of sharded weights; before the first step they are equal to the last bit."""
    folder = project.parent
    files = f"annotations: {folder}/captions.json, images: {folder}, prompt: Name it, before: true"
    settings = [
        f"evals.texts={{{files}, metrics: exact, max_new_tokens: 6, batch_size: 5}}",
        # Of 16 and of 8 samples: rank 1 has fewer rows.
        f"evals.held={{type: loss, {files}, max_tokens: 64}}",
        "steps=1",
        "checkpoint.every=0",
        "checkpoint.best=held/loss",
    ]
    stages = ("none", "zero2", "zero3")
    cases = [[*settings, f"run={tmp_path / stage}", f"parallel.shard={stage}"] for stage in stages]
    monkeypatch.setattr(held_out, "CHUNK_SAMPLES", 16)
    alone = train.run(recipes.load_recipe(project, [*settings, f"run={tmp_path / 'alone'}"]))
    run_ranks(EVALUATE.format(recipe=str(project), cases=cases))
    for stage in stages:
        for name in ("000000.json", "000000/texts.jsonl", "000000/held.jsonl"):
            found = (tmp_path / stage / "evals" / name).read_text()
            assert found == (alone / "evals" / name).read_text(), (stage, name)
        one, several = (
            json.loads((run / "evals/000001.json").read_text()) for run in (alone, tmp_path / stage)
        )
        assert several == pytest.approx(one, rel=1e-5)


ASK = """
from internvl import Request, dist, train
from internvl.config import recipes

run = train.build(recipes.load_recipe({recipe!r}, {settings!r}))
run.model.eval()
image = {image!r}
# Unequal in images, length and answers; each rank has a batch that the other has not.
asked = [["Hello"], [Request("What is this?", [image, image])]]
batch = asked[dist.rank()]
print(run.chat.answer(batch, max_new_tokens=3 + 4 * dist.rank(), min_new_tokens=2))
"""


@pytest.mark.slow
def test_ranks_in_step_may_differ_in_images_and_lengths(project, tmp_path):
    image = str(project.parent / "red-circle.png")
    settings = [f"run={tmp_path / 'run'}", "parallel.shard=zero3", "model.drop_path=0"]
    together = run_ranks(ASK.format(recipe=str(project), settings=settings, image=image))
    chat = loading.load(project.parent / "start", device="cpu", dtype="float32")
    alone = [
        chat.answer(["Hello"], max_new_tokens=3, min_new_tokens=2),
        chat.answer([Request("What is this?", [image, image])], max_new_tokens=7, min_new_tokens=2),
    ]
    assert together == [f"{answers}\n" for answers in alone]
