"""What a recipe trains, and the chat and merge verbs on what came of it."""

from pathlib import Path

import pytest
import tiny_run
import torch
from chat_folders import add_tokenizer, official_folder, shared
from test_cli import call

from internvl import cli, export, handles, train
from internvl.config import ConfigError, UserError, load_recipe, resolve
from internvl.models import lora

LORA = {"rank": 4, "on": ["language_model", "vision_tower"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def recipe(project: Path, **model: object):
    folder = project.parent
    tree = {"model": {"id": str(folder / "start"), **model}, "run": str(folder / "run")}
    source = {"name": "a", "annotations": "a.jsonl"}
    data = {"sources": [source], "tiles": {"size": 64, "max": 1, "thumbnail": False}}
    return resolve({**tree, "data": data, "global_batch": 8, "steps": 2, "device": "cpu"})


def test_the_last_blocks_of_the_tower_train_with_a_recipe(project):
    chosen = recipe(project, train=["multi_modal_projector"], train_last_vision_blocks=1)
    model = handles.for_training(chosen).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    last = len(model.model.vision_tower.encoder.layer) - 1
    stems = ("model.multi_modal_projector.", f"model.vision_tower.encoder.layer.{last}.")
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(stems)}


def test_a_quantized_recipe_needs_a_gpu(project):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="quantize='4bit' needs a CUDA GPU"):
        handles.for_training(recipe(project, lora={"rank": 4}, quantize="4bit"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"quantize": "4bit"}, "quantized weights do not train; set model.lora"),
        ({"quantize": "8bit", "lora": LORA, "train_last_vision_blocks": 1}, "do not train"),
        ({"lora": LORA, "train_last_vision_blocks": 1}, "vision_tower is in model.train or"),
        ({"train": ["vision_tower"], "train_last_vision_blocks": 1}, "choose one"),
        ({"quantize": "2bit"}, "model.quantize"),
    ],
)
def test_contradictions_of_a_model(project, model, said):
    with pytest.raises(ConfigError, match=said):
        recipe(project, **model)


def test_blocks_alone_are_something_to_train(project):
    assert recipe(project, train=[], train_last_vision_blocks=2).model.parts == ()
    assert recipe(project, quantize="4bit", lora=LORA, train=["multi_modal_projector"])


def test_gpt_oss_does_not_train(project, tmp_path):
    folder = add_tokenizer(
        official_folder("GptOssForCausalLM", tmp_path, template="Hermes-2"), "qwen2"
    )
    with pytest.raises(UserError, match="GPT-OSS answers and exports here, but does not train"):
        handles.for_training(recipe(project, id=str(folder)))


def test_a_run_merges_and_a_plain_model_is_refused(capsys, project, tmp_path):
    lines = tiny_run.make(tmp_path / "p", steps=2, run=str(tmp_path / "run"))
    train.run(load_recipe(lines, ["model.train=[]", "model.lora.rank=4"]))
    for number, folder in enumerate((tmp_path / "run", tmp_path / "run" / "adapter")):
        assert export.has_adapters(folder)
        words = ("merge", folder, "--to", tmp_path / f"merged{number}")
        assert call(capsys, *words)[0] == 0
        merged = handles.load(tmp_path / f"merged{number}", device="cpu").model
        adapted = handles.load(folder, device="cpu").model
        assert not lora.has_adapters(merged)
        torch.testing.assert_close(export.probe(merged), export.probe(adapted))
    code, _, err = call(capsys, "merge", project.parent / "start", "--to", tmp_path / "no")
    assert (code, "has no adapters to merge; `internvl export`" in err) == (1, True)


def test_a_conversation_streams_to_a_terminal(capsys, project, monkeypatch):
    """The same text as without one, and the history reaches the next question."""
    start, image = project.parent / "start", project.parent / "red-circle.png"
    typed = iter(["What is this?", "Sure?"])

    def ask(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    words = ["chat", str(start), "--image", str(image), "--max-new-tokens", "5"]
    plain = call(capsys, *words, "--prompt", "What is this?")[1]
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(SystemExit):
        cli.main(words)
    said = capsys.readouterr().out.splitlines()
    assert said[: len(plain.splitlines())] == plain.splitlines()
    assert len(said) >= 2


@pytest.mark.parametrize("options", [("--num-beams", 2), ("--temperature", 0.7, "--top-p", 0.9)])
def test_chat_takes_settings(capsys, project, options):
    words = ("chat", project.parent / "start", "--prompt", "Hi", "--max-new-tokens", 3)
    assert call(capsys, *words, *options)[0] == 0


def test_chat_about_a_video(capsys, project):
    pytest.importorskip("av")
    video = shared("data/video/realshort.mp4")
    words = ("chat", project.parent / "start", "--prompt", "What happens?", "--max-new-tokens", 3)
    assert call(capsys, *words, "--video", video, "--frames", 2)[0] == 0
