"""Zero-shot classes through a real small model."""

import json
from pathlib import Path

import pytest
import torch
from labelled_trees import draw
from photos import COLORS, photo

from internvl import evaluate
from internvl.config import eval_config
from internvl.datasets import labelled
from internvl.errors import UserError
from internvl.evals.classify import Classify, accuracies, mean_average_precision


def spec(data: Path, **more):
    return eval_config(
        type="retrieval", annotations=data / "test.txt", images=data, batch_size=4, **more
    )


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for number in range(6):
        for k in range(1 + number % 2):
            photo(tmp_path / f"classes/n{number}/{k}.jpg", 10 * number + k, (50 + 60 * k, 90))
    named = {"birds": [f"{color} bird" for color in COLORS[:6]], "cars": []}
    (tmp_path / "classnames.json").write_text(json.dumps(named))
    names = {f"n{n}": f"bird {n}" for n in range(6)}
    for name, tree in {
        "numbers.json": names | {"n1": 3},
        "more.json": names | {"n9": "gone"},
        "bare.json": ["a {c}", "a bird"],
        "half.json": ["{c} \ud83d"],
    }.items():
        (tmp_path / name).write_text(json.dumps(tree))
    (tmp_path / "templates.json").write_text(json.dumps({"birds": ["a {c}.", "the {c}, {c}"]}))
    return tmp_path


def test_zero_shot_classes(dual, classes: Path) -> None:
    config = eval_config(
        type="classify",
        annotations=classes / "classes",
        classes=classes / "classnames.json",
        templates=classes / "templates.json",
        key="birds",
        modes=("c",),
    )
    found = Classify(config).run(dual, None)
    weights = []
    for color in COLORS[:6]:
        name = f"{color} bird"
        mean = dual.encode_texts([f"a {name}.", f"the {name}, {name}"]).mean(dim=0)
        weights.append(mean / mean.norm())
    paths = sorted((classes / "classes").rglob("*.jpg"))
    logits = 100 * dual.encode_images(paths, "c", crop=True) @ torch.stack(weights).T
    truth = torch.tensor([int(path.parent.name[1:]) for path in paths])
    hits = logits.argmax(dim=1) == truth
    assert found.values["c_acc1"] == pytest.approx(hits.double().mean().item())
    top = (logits.topk(5, dim=1)[1] == truth[:, None]).any(dim=1)
    assert found.values["c_acc5"] == pytest.approx(top.double().mean().item())
    per_class = [hits[truth == n].double().mean().item() for n in range(6)]
    assert found.values["c_mean_per_class_recall"] == pytest.approx(sum(per_class) / 6)


def test_an_image_that_breaks_later_is_left_out(dual, classes: Path) -> None:
    spec = {"type": "classify", "annotations": classes / "classes", "batch_size": 2}
    evaluator = Classify(eval_config(**spec))
    (classes / "classes/n1/0.jpg").unlink()
    scores = evaluator.run(dual, None)
    assert evaluator.counts() == {"images": 8, "classes": 6, "left out": 1}
    assert scores.rows[-1]["sample"] == str(classes / "classes/n1/0.jpg")
    assert scores.values == Classify(eval_config(**spec)).run(dual, None).values


def test_a_class_without_an_image_is_named(classes: Path) -> None:
    (classes / "classes/n8").mkdir()
    spec = {"type": "classify", "annotations": classes / "classes"}
    with pytest.raises(UserError, match="n8: this class has no image"):
        Classify(eval_config(**spec))
    for policy in ("keep", "skip"):  # it stays one of the classes to choose from
        found = Classify(eval_config(**spec, on_bad_sample=policy)).counts()
        assert found == {"images": 9, "classes": 7, "left out": 1}


def test_accuracies_with_few_classes() -> None:
    found = accuracies(torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 2, 2]), 3)
    assert found == {"acc1": 0.5, "mean_per_class_recall": 0.5}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"classes": "classnames.json"}, "has no name for the folder n0"),
        ({"classes": "classnames.json", "key": "cats"}, "no entry 'cats'; it has birds, cars"),
        ({"classes": "classnames.json", "key": "cars"}, "a JSON list of texts is expected"),
        ({"templates": "templates.json"}, "a JSON list of texts is expected"),
        ({"templates": "gone.json"}, "cannot read"),
        ({"classes": "numbers.json"}, "the name of n1 is the number 3, not text"),
        ({"classes": "more.json"}, r"names 1 folder missing from .*classes: n9"),
        ({"templates": "bare.json"}, "entry 2: 'a bird' has no {c}"),
        ({"templates": "half.json"}, "entry 1 holds half a character"),
        ({"annotations": "gone"}, "is no folder"),
    ],
)
def test_wrong_classes(classes: Path, keys: dict[str, str], said: str) -> None:
    given = {"annotations": "classes"} | keys
    paths = {name: value if name == "key" else classes / value for name, value in given.items()}
    with pytest.raises(UserError, match=said):
        Classify(eval_config(type="classify", **paths))


def original_precision(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """Class by class, as CLIP_benchmark writes it down."""
    values = []
    for k in range(scores.shape[1]):
        truth = targets[scores[:, k].sort(descending=True)[1], k]
        hits = [(i + 1, truth[: i + 1].sum().item()) for i in range(len(truth)) if truth[i]]
        values.append(sum(hit / place for place, hit in hits) / max(1, len(hits)))
    return sum(values) / len(values)


def test_mean_average_precision() -> None:
    # By hand: class 0 is right at places 1 and 3 (1 and 2/3), class 1 at 2, class 2 never.
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.8, 0.1], [0.2, 0.4, 0.2]])
    targets = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
    expected = (5 / 6 + 1 / 2 + 0) / 3
    assert mean_average_precision(scores, targets) == pytest.approx(expected)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 6, generator=generator)
    targets = torch.rand(40, 6, generator=generator) < 0.3
    assert mean_average_precision(scores, targets) == pytest.approx(
        original_precision(scores, targets)
    )


def test_published_sets_by_name(model: Path, dual, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "r.json"
    truth = {name: draw(name, data) for name in ("cifar10", "vtab-flowers", "voc2007_multilabel")}
    options = {"root": data, "modes": ["c", "g"], "device": "cpu", "dtype": "float32"}
    names = ["cifar-10", "vtab/flowers", "voc2007_multilabel"]
    measured = evaluate.measure(model, names, to=tmp_path / "out", output=output, **options)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["dataset"], line["model"]) for line in lines] == [
        (dataset, f"internvl_{mode}_classification_hf")
        for dataset in ("cifar10", "vtab/flowers", "voc2007_multilabel")
        for mode in "cg"
    ]
    assert {line["task"] for line in lines} == {"zeroshot_classification"}
    for line in lines:
        entry = labelled.find(line["dataset"])
        assert entry is not None
        rows = labelled.read(entry, labelled.folder_of(entry, data))
        weights = [
            torch.nn.functional.normalize(
                dual.encode_texts([t.format(c=name) for t in rows.templates]).mean(dim=0), dim=0
            )
            for name in rows.classes
        ]
        mode = line["model"][len("internvl_")]
        logits = 100 * dual.encode_images(list(rows.images), mode, crop=True)
        logits = logits @ torch.stack(weights).T
        labels = truth[entry.name]
        if entry.multilabel:
            targets = torch.zeros(logits.shape).bool()
            for row, classes in enumerate(labels):
                targets[row, list(classes)] = True
            expected = {"mean_average_precision": original_precision(logits, targets)}
        else:
            gold = torch.tensor(labels)
            hits = logits.topk(min(5, len(rows.classes)), dim=1)[1] == gold
            recalls = [
                hits[gold[:, 0] == label, 0].double().mean().item()
                for label in set(gold[:, 0].tolist())
            ]
            expected = {
                "acc1": hits[:, 0].double().mean().item(),
                "acc5": hits.any(dim=1).double().mean().item(),
                "mean_per_class_recall": sum(recalls) / len(recalls),
            }
            if len(rows.classes) < 5:
                del expected["acc5"]
        assert line["metrics"] == pytest.approx(expected)
    # Images inside larger files have copies for the page.
    rows = (tmp_path / "out/result/cifar10.jsonl").read_text().splitlines()
    first = json.loads(rows[0])
    assert first["inside"].startswith("image 0 in ")
    assert (tmp_path / "out/result" / first["thumbnails"][0]).is_file()
    assert "the image cannot be read" not in (tmp_path / "out/report.html").read_text()
    shown = evaluate.render(
        measured.metrics, "InternVL-14B-224px", measured.counts, measured.tables
    )
    assert "cifar10: 4 images, 10 classes" in shown
    assert "published values are for 10,000 images of 10 classes; this set has 4 images" in shown
    assert "mAP" in shown


def test_published_scores_stand_beside_whole_sets() -> None:
    entry = labelled.find("imagenet1k")
    assert entry is not None
    name = labelled.evaluation_name(entry, "cn")
    metrics = {
        f"{name}/c_acc1": 0.5,
        f"{name}/c_acc5": 0.75,
        f"{name}/c_mean_per_class_recall": 0.5,
    }
    config = eval_config(type="classify", annotations=".", modes=("c",))
    evaluator = Classify.__new__(Classify)
    evaluator.config, evaluator.names, evaluator.multilabel = config, range(1000), False
    counts = {name: {"images": 50_000, "classes": 1_000}}
    shown = evaluate.render(
        metrics, "pretrained/InternVL-14B-224px", counts, {name: evaluator.table()}
    )
    assert "50.00 (64.5)" in shown
    assert "75.00 (87.8)" in shown


def test_prompts_of_a_set_may_be_the_users(dual, tmp_path: Path) -> None:
    draw("mnist", tmp_path)
    spec = {"type": "classify", "annotations": tmp_path, "set": "mnist"}
    (tmp_path / "names.json").write_text(json.dumps([f"digit {n}" for n in range(10)]))
    (tmp_path / "prompts.json").write_text(json.dumps(["the {c}"]))
    files = {"classes": tmp_path / "names.json", "templates": tmp_path / "prompts.json"}
    evaluator = Classify(eval_config(**spec, **files))
    assert (evaluator.names[3], list(evaluator.templates)) == ("digit 3", ["the {c}"])
    (tmp_path / "names.json").write_text(json.dumps(["a"]))
    with pytest.raises(UserError, match=r"1 class names, but mnist has 10 classes"):
        Classify(eval_config(**spec, **files))
    with pytest.raises(UserError, match="no set 'mnits' of labelled images"):
        Classify(eval_config(**spec | {"set": "mnits"}))
