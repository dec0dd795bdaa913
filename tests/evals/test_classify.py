"""Zero-shot classes through a real small model."""

import json
from pathlib import Path

import pytest
import torch
from photos import COLORS, photo

from internvl.config import eval_config
from internvl.errors import UserError
from internvl.evals.classify import Classify, accuracies


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
