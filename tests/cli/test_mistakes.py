"""Wrong verbs and options are answered by what to type instead."""

import pytest

from internvl import cli
from internvl.config.recipes import load_recipe


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        # From the original's guides, without `compat`.
        ("evaluate.sh pretrained/X caption-coco --dynamic", "internvl compat evaluate.sh pretr"),
        ("merge_lora.py runs/a out/b", "`internvl compat merge_lora runs/a out/b`"),
        ("shell/finetune/x.sh", "`internvl compat shell shell/finetune/x.sh`"),
        ("tools/merge_lora.py in out", "`internvl compat merge_lora in out`"),
        ("clip_benchmark/cli.py eval --x", "`internvl compat clip_benchmark eval --x`"),
        ("./evaluate.sh runs/a vqa-gqa", "`internvl compat evaluate.sh runs/a vqa-gqa`"),
        (
            "train/internvl_chat_finetune.py --a 1",
            "`internvl compat finetune train/internvl_chat_finetune.py --a 1`",
        ),
        ("internvl/train/x.py --a 1", "`internvl compat --help` lists the original's programs"),
        ("evaluate runs/x caption-coco --dynamic", "--dynamic: a flag of the original's evaluate"),
        ("evaluate runs/x caption-coco --auto", "here it is --device-map auto"),
        ("train mine.yaml --meta_path m.json", "write the recipe's key: data.meta=m.json"),
        ("train mine.yaml --freeze_llm True", "write the recipe's key: model.train;"),
        ("train mine.yaml --learning_rate=1e-5", "optim.lr=1e-5"),
        ("train mine.yaml --group_by_length True", "changes nothing here: it saves padding"),
        ("train mine.yaml --optim.lr 1e-5", "write it without dashes: optim.lr=1e-5"),
        ("train mine.yaml --use_lora 8", "model.lora"),
        # Misspelled.
        ("tain mine.yaml", "did you mean `internvl train`?"),
        ("evaluate runs/x --lmit 3", "--lmit: no option; did you mean --limit?"),
        ("evaluate runs/x --frobnicate", "`internvl evaluate --help` lists all options"),
        ("tensorboard", "verbs: demo, doctor"),
        ("train", "the following arguments are required: recipe;"),
        ("chat", "the following arguments are required: model"),
    ],
)
def test_a_wrong_command_line(line, remedy, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(line.split())
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert remedy in message
    assert len(message.splitlines()) == 1


def test_variables_that_no_verb_reads(monkeypatch, capsys):
    monkeypatch.setenv("GPUS", "4")
    monkeypatch.setenv("PER_DEVICE_BATCH_SIZE", "4")
    for verb, said in (("train", 2), ("evaluate", 1)):
        with pytest.raises(SystemExit):
            cli.main([verb, "gone.yaml" if verb == "train" else "./gone"])
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == (
            "internvl: GPUS=4 changes nothing here; all GPUs are used, or those of --gpus N"
        )
        assert sum("changes nothing here" in line for line in lines) == said


def test_a_recipe_of_the_package_is_copied_to_be_edited(tmp_path, capsys):
    copy = tmp_path / "mine.yaml"
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "custom_flickr_format", "--copy", str(copy)])
    assert ended.value.code == 0
    assert f"{copy} written" in capsys.readouterr().out
    assert load_recipe(copy) == load_recipe("custom_flickr_format")
    assert copy.read_text().startswith("# ")
    for words, said in ((["epochs=2"], "--copy takes the file as it is"), ([], "exists; choose")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["check", "custom_flickr_format", *words, "--copy", str(copy)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
