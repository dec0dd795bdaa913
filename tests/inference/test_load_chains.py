"""Runs and adapters that build on one another: loaded, moved, exported, at every kept step."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_run
import torch
from command_line import call

from internvl import evaluate, export, train
from internvl.config.recipes import load_recipe
from internvl.errors import ModelFolderError, UserError
from internvl.inference import load as loading
from internvl.inference.opened import open_model
from internvl.models.vision import DropPath

LORA = ["model.train=[]", "model.lora.rank=4", "optim.lr=0.02"]
FOLDERS = ("first", "second", "second/adapter", "third", "third/adapter", "full", "full/best")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """start <- runs/first <- runs/second <- its adapter <- runs/third <- its adapter <- runs/full.

    The position embeddings grow and shrink again, as tiles do.
    """
    root = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        project = tiny_run.make(root / "p", steps=3, checkpoint={"every": 1, "keep": 2})
        (root / "p/start").rename(root / "start")
        for run, start, words in (
            ("first", "start", LORA),
            ("second", "runs/first", [*LORA, "data.tiles.size=112", "data.exif=apply"]),
            ("third", "runs/second/adapter", [*LORA, "data.system_message=Be brief."]),
            ("full", "runs/third/adapter", ["model.drop_path=0.2", *best(root)]),
        ):
            names = [f"model.id={start}", f"run=runs/{run}"]
            train.run(load_recipe(project, [*names, *words]))
    return root


def best(root: Path) -> list[str]:
    words = {"type": "loss", "annotations": root / "p/train.jsonl", "images": root / "p"}
    words |= {"limit": 4, "every": 1}
    return [*(f"evals.val.{k}={v}" for k, v in words.items()), "checkpoint.best=val/loss"]


def probe(folder: Path, **options) -> torch.Tensor:
    return export.probe(loading.load(folder, device="cpu", **options).model)


@pytest.fixture(scope="module")
def probes(chain):
    return {name: probe(chain / "runs" / name) for name in FOLDERS}


@pytest.fixture
def copied(chain, tmp_path):
    """The chain in another place, where the first one cannot be reached."""
    for name in ("start", "runs"):
        shutil.copytree(chain / name, tmp_path / "moved" / name)
    away = chain.rename(chain.with_name("away"))
    yield tmp_path / "moved"
    away.rename(chain)


def test_adapters_compute_what_their_run_does(chain, probes):
    for run in ("second", "third"):
        torch.testing.assert_close(probes[f"{run}/adapter"], probes[run], atol=5e-5, rtol=0)
    different = [probes[name] for name in ("first", "second", "third", "full")]
    for below, above in pairwise(different):
        assert not torch.allclose(below, above, atol=1e-3)


def test_a_chain_that_was_moved_loads_from_anywhere(copied, probes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in FOLDERS:
        assert torch.equal(probe(copied / "runs" / name), probes[name]), name


def test_runs_without_a_record_find_a_base_that_moved_along(copied, probes):
    """As earlier versions wrote them: by the two paths of their recipe."""
    for name in ("first", "second"):
        (copied / "runs" / name / "base.json").unlink()
    assert torch.equal(probe(copied / "runs/second"), probes["second"])
    (copied / "runs/first").rename(copied / "elsewhere")
    with pytest.raises(ModelFolderError, match="second: its base model is not there .* --base DIR"):
        probe(copied / "runs/second")
    assert torch.equal(
        probe(copied / "runs/second", base=[copied / "elsewhere", copied / "start"]),
        probes["second"],
    )


@pytest.mark.parametrize("name", ["second", "third/adapter", "full"])
def test_every_link_of_a_chain_merges_and_exports(name, capsys, chain, probes, tmp_path):
    """Also a run that trains all weights: its base's adapters are merged into them."""
    words = ("merge", chain / "runs" / name, "--to", tmp_path / "hf")
    assert call(capsys, *words)[0] == 0
    torch.testing.assert_close(probe(tmp_path / "hf"), probes[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["third", "third/adapter", "full"])
def test_the_settings_of_a_run_stay_with_what_came_of_it(name, chain):
    """Of all runs below: the orientation of the second, the message of the third."""
    chat = loading.load(chain / "runs" / name, device="cpu")
    assert chat.system_message == "Be brief."
    assert chat.model.config.internvl["exif"] == "apply"
    assert chat.tiles.size == 64
    second = loading.load(chain / "runs/second/adapter", device="cpu")
    assert (second.tiles.size, second.system_message) == (112, "")


def test_a_run_inherits_from_adapters_what_they_were_trained_with(chain):
    adapter = chain / "runs/second/adapter"
    recipe = load_recipe(chain / "p/recipe.yaml", [f"model.id={adapter}", "data.tiles.size=null"])
    settings = {s.key: (s.value, s.source) for s in loading.complete(recipe).settings}
    assert settings["data.exif"] == ("apply", f"{adapter}/internvl.json")
    assert settings["data.tiles.size"] == (112, f"{adapter}/internvl.json")


@pytest.mark.parametrize(
    ("text", "value", "says"),
    [
        ("112", "[]", "force_image_size"),
        ("112", "57", "force_image_size = 57 does not fit this model"),
        ("internvl2_5", "nobody's", 'its conversation template "nobody\'s" is not known here'),
    ],
)
def test_settings_of_an_adapter_folder_are_checked(text, value, says, chain, tmp_path):
    adapter = shutil.copytree(chain / "runs/second/adapter", tmp_path / "a")
    file = adapter / "internvl.json"
    file.write_text(file.read_text().replace(text, value))
    with pytest.raises(ModelFolderError, match=f"internvl.json: {says}"):
        probe(adapter)


def test_a_folder_alone_asks_for_its_base(copied, probes, capsys, tmp_path):
    run = shutil.copytree(copied / "runs/second", tmp_path / "run")
    (copied / "start").rename(tmp_path / "base")
    code, _, err = call(capsys, "export", run, "--to", tmp_path / "out")
    assert code == 1
    assert f"{run}: its base model runs/first is not there (looked for it at " in err
    assert "name its folder with --base DIR" in err
    chosen = [copied / "runs/first", tmp_path / "base"]
    assert torch.equal(probe(run, base=chosen), probes["second"])
    with pytest.raises(ModelFolderError, match="runs/first: its base model start is not there"):
        probe(run, base=chosen[0])
    words = [word for folder in chosen for word in ("--base", folder)]
    assert call(capsys, "export", run, "--to", tmp_path / "out", *words)[0] == 0
    torch.testing.assert_close(probe(tmp_path / "out"), probes["second"], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="no base of .* is missing; leave it out"):
        probe(tmp_path / "out", base="start")


def test_every_kept_step_is_a_model(chain, probes, capsys, monkeypatch, tmp_path):
    run = chain / "runs/first"
    expected = probe(run, step=2)
    assert torch.equal(probe(run, step=3), probes["first"])
    assert not torch.equal(expected, probes["first"])
    assert torch.equal(probe(run / "checkpoints/000002"), expected)
    monkeypatch.chdir(run / "checkpoints/000002")
    assert torch.equal(probe("."), expected)
    by_step, by_folder = tmp_path / "a", tmp_path / "b"
    assert call(capsys, "export", run, "--to", by_step, "--step", "2")[0] == 0
    assert call(capsys, "merge", run / "checkpoints/000002", "--to", by_folder)[0] == 0
    torch.testing.assert_close(probe(by_step), expected, atol=1e-4, rtol=0)
    assert torch.equal(probe(by_step), probe(by_folder))
    words = ("chat", run, "--step", "2", "--prompt", "Hi", "--max-new-tokens", "2")
    assert call(capsys, *words)[0] == 0


@pytest.mark.parametrize(
    ("name", "step", "says"),
    [
        ("first", 1, "first: has no checkpoint of step 1; its steps are 2, 3"),
        ("first/checkpoints/000002", 3, "is step 2; name one of the two"),
        ("first/checkpoints/000001", None, "has no checkpoint of step 1; its steps are 2, 3"),
        ("second/adapter", 3, "is no run; only a run folder has steps"),
    ],
)
def test_a_step_that_is_not_there_is_named(chain, name, step, says):
    with pytest.raises(UserError, match=says):
        open_model(chain / "runs" / name, step=step)


def test_the_best_step_is_found_when_the_newest_are_kept_alone(copied, probes):
    (best_step,) = (copied / "runs/full/best/checkpoints").glob("0*")
    shutil.rmtree(copied / "runs/full/checkpoints" / best_step.name, ignore_errors=True)
    step = int(best_step.name)
    assert torch.equal(probe(copied / "runs/full", step=step), probes["full/best"])


def test_a_run_keeps_the_step_of_its_base(copied, probes):
    """Not its newest: that of a run that went on has other weights."""
    checkpoints = copied / "runs/first/checkpoints"
    shutil.copytree(checkpoints / "000002", checkpoints / "000004")
    assert torch.equal(probe(copied / "runs/second"), probes["second"])
    shutil.rmtree(checkpoints / "000003")
    with pytest.raises(ModelFolderError, match=r"second: the checkpoint .* is gone .*step 3; its"):
        probe(copied / "runs/second")


def test_tiles_and_stochastic_depth_are_of_the_last_run(chain):
    words = [f"model.id={chain}/runs/full", f"run={chain}/runs/larger", "data.tiles.size=112"]
    handle = loading.for_training(load_recipe(chain / "p/recipe.yaml", words))
    config = handle.model.config.vision_config
    patches = (112 // config.patch_size[0]) ** 2
    table = handle.model.model.vision_tower.embeddings.position_embeddings
    assert (config.image_size, table.shape[1], handle.tiles.size) == ((112, 112), 1 + patches, 112)
    assert not any(isinstance(module, DropPath) for module in handle.model.modules())
    start = loading.load(chain / "runs/full", device="cpu", image_size=112)
    assert torch.equal(export.probe(start.model), export.probe(handle.model))


def test_what_a_run_cannot_take_is_refused(chain):
    with pytest.raises(UserError, match=r"quantize = '4bit' is for model folders, and .* is a run"):
        probe(chain / "runs/first", quantize="4bit")


def test_steps_are_evaluated_into_folders_of_their_own(chain, copied):
    run = copied / "runs/first"
    options = {"annotations": chain.with_name("away") / "p/captions.json", "max_new_tokens": 2}
    options |= {
        "images": chain.with_name("away") / "p",
        "prompt": "Name it.",
        "limit": 4,
        "metrics": "exact",
    }
    newest = evaluate.run(run, **options)
    earlier = evaluate.run(run, step=2, **options)
    assert set(newest) == set(earlier)
    assert evaluate.run(run / "checkpoints/000002", **options) == earlier
    written = [path.relative_to(run) for path in run.glob("evals/evaluate/**/result.json")]
    assert len(written) == 2
    assert Path("evals/evaluate/000002/caption-file-captions/result.json") in written
    compared = evaluate.compare(run, [2, 3], **options)
    assert {step: result.metrics for step, result in compared.items()} == {2: earlier, 3: newest}
    lines = [line.split() for line in evaluate.render_steps(compared).splitlines()]
    assert lines[0] == ["step", "2", "step", "3"]
    assert [line[0] for line in lines[1:]] == [*newest]
    with pytest.raises(UserError, match="has no checkpoint of step 9"):
        evaluate.compare(run, [2, 9], **options)


def test_steps_are_compared_on_the_command_line(chain, capsys, tmp_path):
    words = [f"--annotations={chain}/p/captions.json", f"--images={chain}/p", "--limit=2"]
    words += ["--metrics=exact", "--max-new-tokens=2", f"--to={tmp_path}", "--prompt=Name it."]
    code, out, _ = call(capsys, "evaluate", chain / "runs/first", "--step", "2,3", *words)
    assert code == 0
    assert "step 2    step 3" in out
    assert f"written to {tmp_path}/000002" in out
    code, _, err = call(capsys, "evaluate", chain / "runs/first", "--step", "2,x", *words)
    assert code == 2
    assert "argument --step: '2,x' is no step; write a number, or several as 200,400" in err
