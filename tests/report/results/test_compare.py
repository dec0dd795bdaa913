"""Two evaluations: differences, their intervals, items that changed, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from result_folders import result_folder

from internvl import cli, report
from internvl.errors import ConfigError
from internvl.evals import metrics as caption_metrics
from internvl.evals.scoring import yes_no
from internvl.report import results
from internvl.report.results import pages
from internvl.report.results.compare import compare
from internvl.report.results.items import item_of
from internvl.report.results.statistics import statistics


def question(index: int, answer: str, score: float | None, **more) -> dict:
    row = {
        "images": [f"data/{index}.jpg"],
        "question": f"Question {index}?",
        "answer": answer,
        "references": ["yes"],
        "category": ["even" if index % 2 == 0 else "odd"],
        **more,
    }
    return row if score is None else row | {"score": score}


def folders(tmp_path: Path, first: list[dict], second: list[dict], **values) -> list:
    sides = []
    for name, rows in (("a", first), ("b", second)):
        scores = [row["score"] for row in rows if "score" in row]
        metrics = {"accuracy": sum(scores) / len(scores), **values}
        folder = result_folder(tmp_path / name, "my-set", rows, metrics, settings={"tiles": name})
        sides.append(results.read(folder))
    return sides


def test_differences_flips_and_categories(tmp_path: Path):
    first = [question(n, "no" if n < 6 else "yes", float(n >= 6)) for n in range(40)]
    second = [question(n, "yes" if n else "no", float(n > 0)) for n in range(39)]
    second.append(question(39, "no", 0.0))
    (found,) = compare(*folders(tmp_path, first, second))
    assert found.num_items == 40
    assert found.counts == {"right → wrong": 1, "wrong → right": 5}
    assert [pair.first.images for pair in found.worse] == [("data/39.jpg",)]
    assert found.settings == [("tiles", "a", "b")]
    by_name = {change.name: change for change in found.changes}
    assert by_name["accuracy"].difference == pytest.approx(0.1)
    low, high = by_name["accuracy"].interval
    # Of -1, 0 and 1 with shares of 1/40, 34/40 and 5/40.
    error = np.sqrt((6 / 40 - 0.1**2) / 40)
    assert (low, high) == pytest.approx((0.1 - 1.96 * error, 0.1 + 1.96 * error), abs=0.03)
    assert by_name["even"].is_category
    assert by_name["even"].second == pytest.approx(19 / 20)
    assert by_name["odd"].first == pytest.approx(17 / 20)


def test_questions_that_count_nowhere_change_nothing(tmp_path: Path):
    first = [question(n, "yes", 1.0) for n in range(10)] + [question(10, "?", None)]
    second = [question(n, "yes", 1.0) for n in range(10)] + [question(10, "!", None)]
    (found,) = compare(*folders(tmp_path, first, second))
    assert found.counts == {}
    assert found.changes[0].interval == (0.0, 0.0)
    assert not found.changes[0].is_clear


def test_other_items_are_refused_by_name(tmp_path: Path):
    first = [question(n, "yes", 1.0) for n in range(4)]
    sides = folders(tmp_path, first, [*first[:3], question(9, "yes", 1.0)])
    with pytest.raises(ConfigError) as raised:
        compare(*sides)
    message = str(raised.value)
    assert "my-set: 1 item is in A alone, 1 item is in B alone" in message
    assert "A: data/3.jpg, Question 3?, yes" in message
    assert "B: data/9.jpg, Question 9?, yes" in message
    with pytest.raises(ConfigError, match=r"vqa is not in both: .*a/result.json has my-set"):
        compare(*sides, "vqa")


def test_the_same_items_asked_otherwise_are_compared(tmp_path: Path):
    first = [question(n, "yes", 1.0) for n in range(4)]
    second = [question(n, "yes", 1.0) | {"question": f"Think: {n}"} for n in range(4)]
    # In another folder, and in another order where their keys are equal.
    moved = [row | {"images": [f"/elsewhere/{row['images'][0]}"]} for row in reversed(first)]
    (found,) = compare(*folders(tmp_path / "asked", first, second))
    assert ("question", "Question 0?", "Think: 0") in found.settings
    (found,) = compare(*folders(tmp_path / "moved", first, moved))
    assert found.num_items == 4
    assert [key for key, *_ in found.settings] == ["tiles"]


def test_a_metric_that_the_rows_do_not_give_has_no_interval(tmp_path: Path):
    rows = [question(n, "yes", float(n % 2)) for n in range(6)]
    (found,) = compare(*folders(tmp_path, rows, rows, odd_one=0.123))
    by_name = {change.name: change for change in found.changes}
    assert by_name["odd_one"].interval is None
    assert by_name["accuracy"].interval is not None
    assert found.notes == ["no interval of odd_one: the rows of the items do not give it again"]


def test_a_loss_has_no_items(tmp_path: Path):
    sides = [
        results.read(result_folder(tmp_path / name, "loss", [], {"loss": value}))
        for name, value in (("a", 2.0), ("b", 1.5))
    ]
    (found,) = compare(*sides)
    assert found.changes[0].difference == -0.5
    assert found.notes == ["no interval of loss: it has no rows of items"]


CAPTIONS = {
    1: (["a man rides a horse", "a person on a brown horse"], "a man riding a horse"),
    2: (["two dogs play on grass"], "two dogs play on grass"),
    3: (["a red bus stops at a station", "the bus is red"], "the bus stop"),
    4: (["a cat sleeps on the sofa"], "nothing here"),
    5: (["people walk along the beach"], "people walking along a beach at night"),
}


@pytest.mark.slow  # METEOR loads its tables for seconds
def test_caption_metrics_of_a_corpus_follow_from_its_rows():
    """BLEU and METEOR are no means: they come from the counts of the images, as CIDEr from its
    scores. Also of every half of the corpus, which a resampled set is."""
    candidates = {key: answer for key, (_, answer) in CAPTIONS.items()}
    references = {key: texts for key, (texts, _) in CAPTIONS.items()}

    def rows(scores: caption_metrics.CaptionScores) -> list[dict]:
        return [
            {
                "image": f"{key}.jpg",
                "image_id": key,
                "references": references[key],
                "answer": candidates[key],
                "exact": False,
                "scores": {name: values[n] for name, values in scores.per_image.items()},
                "sums": {name: values[n] for name, values in scores.sums.items()},
            }
            for n, key in enumerate(candidates)
        ]

    with caption_metrics.one_meteor():
        scores = caption_metrics.score_captions(candidates, references, tokenize="words")
        items = [item_of(row) for row in rows(scores)]
        computed = statistics("captions", items, scores.values)
        assert computed.keys() == scores.values.keys()
        for name, statistic in computed.items():
            assert statistic.total() == pytest.approx(scores.values[name], abs=1e-12)
        for start in (0, 2):
            part = [*candidates][start : start + 3]
            fewer = caption_metrics.score_captions(
                {key: candidates[key] for key in part},
                {key: references[key] for key in part},
                tokenize="words",
            )
            for name in ("bleu_1", "bleu_4", "meteor", "rouge_l"):
                total = computed[name].sums[start : start + 3].sum(axis=0)
                value = float(computed[name].value(total))
                assert value == pytest.approx(fewer.values[name], abs=1e-12), name


def test_mme_and_pope_are_no_plain_means():
    random = np.random.default_rng(0)
    rows, values = [], {}
    for task in ("existence", "OCR", "code_reasoning"):
        pairs = [(e, str(random.choice(["yes", "no"]))) for _ in range(10) for e in ("yes", "no")]
        values[task] = yes_no.mme_task_score(pairs)
        rows += [
            question(n // 2, a, float(a == e), category=[task], references=[e])
            for n, (e, a) in enumerate(pairs)
        ]
    values |= {"perception": values["existence"] + values["OCR"]}
    values |= {"cognition": values["code_reasoning"]}
    computed = statistics("mme", [item_of(row) for row in rows], values)
    assert {name: computed[name].total() for name in values} == pytest.approx(values)
    # An image is drawn with both of its questions.
    assert len(computed["perception"].sums) == 20
    assert len(computed["OCR"].sums) == 30
    rows, values, f1s = [], {}, []
    for category in ("random", "popular"):
        labels = [str(random.choice(["yes", "no"])) for _ in range(30)]
        answers = [str(random.choice(["yes", "no"])) for _ in range(30)]
        scores = yes_no.binary_scores(answers, labels)
        f1s.append(scores.f1)
        values |= {f"{category}_{n}": getattr(scores, n) for n in ("f1", "recall", "yes_ratio")}
        rows += [
            question(n, a, float(a == e), category=[category], references=[e])
            for n, (a, e) in enumerate(zip(answers, labels, strict=True))
        ]
    values["f1"] = sum(f1s) / 2
    computed = statistics("pope", [item_of(row) for row in rows], values)
    assert {name: computed[name].total() for name in values} == pytest.approx(values)


def test_a_recipe_may_call_a_benchmark_otherwise(tmp_path: Path):
    rows = [
        question(
            n // 2, "yes", float(n % 2), category=["OCR"], references=["yes" if n % 2 else "no"]
        )
        for n in range(8)
    ]
    values = {"OCR": 50.0, "perception": 50.0}
    sides = [
        results.read(
            result_folder(tmp_path / n, "my/points", rows, values, settings={"task": "mme"})
        )
        for n in "ab"
    ]
    (tmp_path / "a/result/mme_settings.json").write_text('{"mme": {"tiles": "one"}}')
    assert sides[0].benchmark_settings("my/points") == {"mme": {"tiles": "one"}}
    assert sides[1].benchmark_settings("my/points") == {}
    (found,) = compare(*sides)
    assert [change.interval for change in found.changes] == [(0.0, 0.0)] * 2
    assert "my/points" in report.render(pages.evaluation_page(sides[0]))


def retrieval_rows(ranks: list[int], image_ranks: list[int]) -> list[dict]:
    texts = [
        {"text": f"text {n}", "image": f"{n // 2}.jpg", "rank": {"g": rank}}
        for n, rank in enumerate(ranks)
    ]
    images = [{"image": f"{n}.jpg", "rank": {"g": rank}} for n, rank in enumerate(image_ranks)]
    return texts + images


def test_recalls_are_drawn_by_image(tmp_path: Path):
    sides = []
    for name, ranks in (("a", [0, 3, 9, 0, 1, 0]), ("b", [0, 0, 0, 0, 1, 0])):
        values = {
            "g_image_retrieval_recall@1": sum(rank < 1 for rank in ranks) / 6,
            "g_text_retrieval_recall@1": 1 / 3,
        }
        values["g_mean_recall"] = sum(values.values()) / 2
        rows = retrieval_rows(ranks, [0, 2, 5])
        sides.append(results.read(result_folder(tmp_path / name, "retrieval-coco", rows, values)))
    (found,) = compare(*sides)
    assert all(change.interval is not None for change in found.changes)
    assert found.counts == {"wrong → right": 2}
    computed = statistics("retrieval-coco", sides[0].items("retrieval-coco"), values)
    assert {len(statistic.sums) for statistic in computed.values()} == {3}


def test_classes_are_recalled_one_by_one():
    rows = [
        {"inside": f"{n}.jpg in a tar", "class": label, "rank": {"c": rank}}
        for n, (label, rank) in enumerate([("cat", 0), ("cat", 0), ("cat", 7), ("dog", 3)])
    ]
    values = {"c_acc1": 0.5, "c_acc5": 0.75, "c_mean_per_class_recall": (2 / 3 + 0) / 2}
    values |= {"c_lp_acc1": 0.5, "c_lp_acc5": 0.6}
    computed = statistics("classify-folder", [item_of(row) for row in rows], values)
    # The last one is another number than the rows give.
    assert computed.keys() == values.keys() - {"c_lp_acc5"}


def test_ones_own_questions_by_metric_and_category(tmp_path: Path):
    rows = [
        {
            "sample": f"line {n}",
            "turn": 1,
            "images": [],
            "question": "?",
            "answer": "a",
            "references": ["a"],
            "metric": "exact" if n % 2 else "anls",
            "score": score,
            "category": "x" if n < 2 else "y",
            "exact": score == 1,
        }
        for n, score in enumerate([1.0, 0.5, 0.25, 1.0])
    ]
    values = {"score": 0.6875, "anls": 0.625, "category_x": 0.75, "category_y": 0.625}
    values |= {"exact": 0.5}
    computed = statistics("qa-file", [item_of(row) for row in rows], values)
    assert computed.keys() == values.keys()
    sides = [results.read(result_folder(tmp_path / n, "qa-file", rows, values)) for n in "ab"]
    (found,) = compare(*sides)
    # Four rows of one question: told apart by how often it stood before.
    assert found.num_items == 4
    assert [change.name for change in found.changes] == [*values]


def test_margins_of_pairs():
    rows = [
        {"sample": f"{n}", "margin": m, "accuracy": float(m > 0)} for n, m in enumerate([1, -2])
    ]
    values = {"margin": -0.5, "accuracy": 0.5}
    assert statistics("pairs", [item_of(row) for row in rows], values).keys() == values.keys()


def test_the_verb_prints_writes_and_refuses(capsys, tmp_path: Path):
    first = [question(n, "no <b>", float(n % 3 == 0)) for n in range(12)]
    second = [question(n, "yes", 1.0) for n in range(12)]
    folders(tmp_path, first, second)
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            cli.main([*words, *more])
        return exited.value.code, *capsys.readouterr()

    code, out, _ = run("--html", str(tmp_path / "page.html"), "--show", "1")
    assert code == 0
    assert "A  org/a" in out
    assert "my-set: 12 items, 8 wrong → right" in out
    assert "accuracy      0.3333      1.0000     +0.6667  [+0." in out
    assert "tiles: a -> b" in out
    assert "better in B: 1 of 8" in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "no &lt;b&gt;" in page
    code, out, _ = run("--json")
    tree = json.loads(out)["evaluations"]["my-set"]
    assert tree["changed"] == {"wrong → right": 8}
    assert len(tree["better"]) == 8
    assert tree["metrics"][0]["difference"] == pytest.approx(2 / 3)
    code, _, err = run("--task", "gone")
    assert code == 2
    assert "gone is not in both" in err
