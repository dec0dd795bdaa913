"""Wrong verbs and options are answered by what to type instead."""

import pytest

from internvl import cli


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        # From the original's guides, without `compat`.
        ("evaluate.sh pretrained/X caption-coco --dynamic", "internvl compat evaluate.sh pretr"),
        ("merge_lora.py runs/a out/b", "`internvl compat merge_lora runs/a out/b`"),
        ("shell/finetune/x.sh", "`internvl compat shell shell/finetune/x.sh`"),
        ("internvl/train/x.py --a 1", "`internvl compat finetune internvl/train/x.py --a 1`"),
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
