"""CLIP_benchmark's command line."""

import csv
import json
import shlex

import pytest

from internvl.compat import benchmark
from internvl.datasets import labelled
from internvl.errors import ConfigError

LINE = (
    'eval --model_type internvl --language "{}" --task "zeroshot_retrieval" --dataset "{}" '
    "--dataset_root ./data/flickr30k --model internvl_{}_retrieval_hf --pretrained "
    "./work_dirs/x_ep10/ --output result_ft.json"
)


def command(line, **environment):
    (words,) = benchmark.translate(shlex.split(line), environment).commands
    return " ".join(words)


@pytest.mark.parametrize(
    ("language", "dataset", "task"),
    [
        ("en", "flickr30k", "retrieval-flickr30k"),
        ("cn", "flickr30k", "retrieval-flickr30k-cn"),
        ("en", "mscoco_captions", "retrieval-coco"),
        ("cn", "mscoco_captions", "retrieval-coco-cn"),
    ],
)
@pytest.mark.parametrize("mode", ["c", "g"])
def test_the_guides_lines(language, dataset, task, mode):
    # The original's result line has the path without its last slash.
    assert command(LINE.format(language, dataset, mode)) == (
        f"evaluate ./work_dirs/x_ep10 {task} --mode {mode} --dataset-root ./data/flickr30k "
        "--split test --batch-size 64 --output result_ft.json"
    )


def test_other_flags():
    line = LINE.format("en", "multilingual_mscoco_captions", "c")
    line += " --language ko --recall_k 1 5 --no_amp --batch_size 8 --num_workers 2"
    done = benchmark.translate(shlex.split(line), {})
    words = " ".join(done.commands[0])
    assert " retrieval-xtd " in words
    assert "--language ko --batch-size 8 --recall-k 1,5 --dtype float32" in words
    assert done.notes == ("--num_workers: changes nothing here",)


def test_the_output_is_a_template():
    line = LINE.format("en", "flickr30k", "g").replace(
        "result_ft", "{dataset}_{pretrained}_{language}"
    )
    assert "--output flickr30k_x_ep10_en.json" in command(line)


def test_results_that_exist_are_skipped_if_asked(tmp_path):
    (tmp_path / "r.json").touch()
    line = LINE.format("en", "flickr30k", "g").replace("result_ft", f"{tmp_path}/r")
    done = benchmark.translate(shlex.split(f"{line} --skip_existing"), {})
    assert (done.commands, "exists" in done.done) == ((), True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("eval ", "evaluate ", "`eval` or `build` and its flags"),
        ("--model_type internvl", "", "internvl only"),
        ("zeroshot_retrieval", "zeroshot_retrieval_with_itm", "--rerank"),
        ("zeroshot_retrieval", "zeroshot_classification", "flickr30k: has no classes"),
        ("zeroshot_retrieval", "mscoco_generative", "is for CoCa"),
        ("zeroshot_retrieval", "segmentation", "no such task"),
        ("flickr30k", "cifar10", "not one of flickr30k"),
        ("flickr30k", "flickr8k", "not one of flickr30k"),
        ('"en"', '"ko"', "flickr30k has en, cn"),
        ("internvl_c_retrieval_hf", "ViT-B-32", "internvl_c_retrieval_hf or"),
        ("--output result_ft.json", "--cupl", "CuPL"),
        ("--output result_ft.json", "--colour red", "no such flag"),
        ("--output result_ft.json", "--output", "a file is missing"),
    ],
)
def test_refused(old, new, message):
    line = LINE.format("en", "flickr30k", "c").replace(old, new)
    with pytest.raises(ConfigError, match=message):
        command(line)


CLASSES = (
    'eval --model_type internvl --language "{}" --task "zeroshot_classification" --dataset "{}" '
    "--dataset_root ./data/ --model internvl_c_classification --pretrained ./pretrained/c.pth"
)


def test_classification():
    for name in (entry.dataset for entry in labelled.entries().values()):
        task = name.replace("/", "-")
        assert command(CLASSES.format("en", name)) == (
            f"evaluate ./pretrained/c.pth {task} --mode c --dataset-root ./data/ --split test "
            "--batch-size 64 --output result.json"
        )
    assert "imagenet1k --mode c --dataset-root ./data/ --split test --language cn,jp " in command(
        CLASSES.format('cn" "jp', "imagenet1k")
    )
    assert " imagenetv2 imagenet_sketch imagenet-a imagenet-r objectnet " in command(
        CLASSES.format("en", "imagenet_robustness")
    )


def test_build(tmp_path):
    line = {"dataset": "cifar10", "model": "m", "pretrained": "p", "task": "t", "language": "en"}
    file, output = tmp_path / "result.json", tmp_path / "b.csv"
    file.write_text("".join(json.dumps({**line, "metrics": {"acc1": n}}) + "\n" for n in (1, 2)))
    done = benchmark.translate(["build", str(file), "--output", str(output)], {})
    assert (done.commands, done.done) == ((), f"2 rows appended to {output}")
    rows = [*csv.DictReader(output.read_text().splitlines())]
    assert [(row["acc1"], row["model_fullname"]) for row in rows] == [("1", "m p"), ("2", "m p")]
    file.write_text("x")
    with pytest.raises(ConfigError, match="no file of result lines"):
        benchmark.translate(["build", str(file)], {})
    with pytest.raises(ConfigError, match="files of result lines are expected"):
        benchmark.translate(["build"], {})


def test_a_linear_probe():
    line = CLASSES.format("en", "cifar10").replace("zeroshot_classification", "linear_probe")
    done = benchmark.translate(shlex.split(f"{line} --fewshot_k 16 --seed 3 --num_workers 2"), {})
    assert done.notes == ("--num_workers: changes nothing here",)
    assert "--batch-size 64 --method probe --shots 16 --probe-seed 3 --output" in " ".join(
        done.commands[0]
    )
    assert "--shots" not in command(f"{line} --fewshot_k=-1")


def test_the_data_set_decides_the_task(tmp_path):
    (tmp_path / "sets.txt").write_text("wds/vtab/flowers\nflickr30k\n")
    line = CLASSES.format("en", tmp_path / "sets.txt").replace("zeroshot_classification", "auto")
    commands = benchmark.translate(shlex.split(line), {}).commands
    assert [words[2] for words in commands] == ["retrieval-flickr30k", "vtab-flowers"]


@pytest.mark.parametrize(
    ("language", "dataset", "message"),
    [
        ("cn", "cifar10", "cifar10 has en"),
        ("ko", "imagenet1k", "imagenet1k has en, cn, jp, ar, it"),
        ("en", "vtab/clevr_count_all", "CLEVR is not read"),
        ("en", "cifar11", "not one of imagenet1k, "),
    ],
)
def test_classification_refused(language, dataset, message):
    with pytest.raises(ConfigError, match=message):
        command(CLASSES.format(language, dataset))
