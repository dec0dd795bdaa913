"""The page of a result folder: whole, escaped, small, and complete for every evaluator."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from photos import photo
from PIL import Image
from result_folders import result_folder

from internvl import report
from internvl.errors import BadImage
from internvl.report import results
from internvl.report.results import pages, thumbnails
from internvl.report.results.items import item_of, shown

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"images/{n}.jpg" for n in range(6)]
    for n, path in enumerate(paths):
        photo(path, n, (1600, 900))
    return list(map(str, paths))


def rendered(folder: Path) -> str:
    return report.render(pages.evaluation_page(results.read(folder)))


def boxed(images: list[str]) -> list[dict]:
    return [
        {
            "images": [image],
            "question": f"Where is {EVIL}?",
            "answer": f"{EVIL}[[1, 2, 3, 4]]",
            "references": [f"[1, 2, 3, {n}]"],
            "boxes": {"reference": [0.1, 0.1, 0.5, 0.5], "answer": [0, 0, 0.3, 0.3 + n / 100]},
            "score": float(n % 2),
        }
        for n, image in enumerate(images)
    ]


def test_boxes_references_and_settings_are_shown_and_escaped(tmp_path: Path, images):
    settings = {"tiles": "one", "limit": None, "note": EVIL}
    folder = result_folder(
        *(tmp_path / "out", "refcoco-val", boxed(images), {"precision": 0.5}),
        settings=settings,
        counts={"questions": 6},
        published={"precision": 0.825},
    )
    page = rendered(folder)
    assert "<script" not in page
    assert page.count('class="boxed"') == 6
    assert page.count('<rect class="answer"') == page.count('<rect class="reference"') == 6
    assert "refcoco-val (6 questions)" in page
    assert ">published<" in page
    assert ">0.8250<" in page
    assert page.count('class="wrong"') == page.count('class="right"') == 3
    assert '<th scope="row">tiles</th>' in page
    assert "limit" not in page
    # 1600 x 900 in 360 px: six images in a few kilobytes.
    assert len(page) < 120_000


def test_before_and_after_a_published_training_stand_beside(tmp_path: Path, images):
    rows = [
        {
            "image": image,
            "image_id": n,
            "references": ["a dog", "the dog"],
            "answer": f"a dog {n}",
            "exact": False,
            "scores": {"cider": n / 3, "bleu_4": 0.1, "meteor": 0.2},
        }
        for n, image in enumerate(images)
    ]
    folder = result_folder(
        *(tmp_path / "out", "caption-coco", rows, {"cider": 1.3}),
        published={"cider": 1.312},
        published_before={"cider": 0.793},
    )
    page = rendered(folder)
    for text in ("published before training", ">0.7930<", ">1.3120<", ">1.3000<"):
        assert text in page
    # Without a right and wrong: the lowest CIDEr comes first.
    assert re.findall(r"CIDEr ([\d.]+)", page)[:2] == ["0.000", "0.333"]
    assert "✓" not in page
    assert "a dog / the dog" in page


def test_categories_that_are_no_metric_have_their_means(tmp_path: Path):
    rows = [
        {
            "images": [],
            "question": "q" * 5000,
            "answer": "a" * 100_000,
            "category": ["maps" if n else "charts"],
            "score": float(n > 1),
        }
        for n in range(4)
    ]
    page = rendered(result_folder(tmp_path / "out", "vqa", rows, {"accuracy": 0.5}))
    assert "Mean score by category" in page
    assert re.search(r"maps</th><td[^>]*>0.6667", page)
    assert "99,400 more characters" in page
    assert len(page) < 60_000


def test_searches_show_their_first_results(tmp_path: Path, images):
    rows: list[dict] = [
        {
            "text": f"photo {n}",
            "image": image,
            "rank": {"c": 4, "g": n},
            "first": {"c": images[::-1], "g": images},
        }
        for n, image in enumerate(images)
    ]
    rows += [{"image": images[0], "rank": {"c": 1, "g": 1}, "first": {"g": ["photo 3", "photo 0"]}}]
    values = {"g_image_retrieval_recall@1": 1 / 6, "c_image_retrieval_recall@1": 0.0}
    page = rendered(result_folder(tmp_path / "out", "retrieval-coco", rows, values))
    assert "text → image: worst ranks" in page
    assert "rank 6<" in page
    # The last mode's, its right result marked.
    assert page.count('<li class="right">') == 6 + 1
    assert "image → text: worst ranks" in page


ANSWERED = {"question": "?", "answer": "!", "references": ["!"], "metric": "exact", "score": 1.0}


@pytest.mark.parametrize(
    "row",
    [
        {"image": "gone.jpg", "class": "cat", "rank": {"c": 3}},
        {"inside": "image 3 in data.bin", "classes": ["cat", "dog"], "predicted": {"c": "cow"}},
        {"sample": "line 1", "margin": 0.5, "accuracy": 1.0},
        {"sample": "line 1", "turn": 1, "images": [], **ANSWERED},
    ],
    ids=["classify", "labels", "preference", "qa"],
)
def test_every_evaluator_has_a_page(tmp_path: Path, row: dict):
    page = rendered(result_folder(tmp_path / "out", "mine", [row], {"score": 1.0}))
    assert "Lowest scores" in page
    if row.get("image"):
        assert "the image cannot be read" in page


def test_a_loss_has_a_page_of_its_scores(tmp_path: Path):
    assert ">1.5000<" in rendered(result_folder(tmp_path / "out", "held", [], {"loss": 1.5}))


def test_many_evaluations_share_the_room(tmp_path: Path, images):
    for n in range(40):
        result_folder(tmp_path / "out", f"set-{n}", boxed(images), {"precision": 0.5})
    page = rendered(tmp_path / "out")
    assert 40 * 4 <= page.count("<article>") <= 240


def test_worst_and_best_are_spread_over_equal_scores():
    rows = [
        {"images": [], "question": str(n), "answer": "", "score": 0.0 if n < 40 else 1.0}
        for n in range(60)
    ]
    items = [item_of(row) for row in rows]
    worst, best = shown(items, 4)
    assert [item.question for item in worst] == ["0", "10", "20", "30"]
    assert [item.question for item in best] == ["40", "45", "50", "55"]
    assert shown(items[:3], 4) == (items[:3], [])


def test_images_that_are_no_files_get_small_copies(tmp_path: Path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((900, 600, 3), np.uint8)).save(buffer, "PNG")
    row = {"images": [], "question": "?", "answer": "A", "score": 1.0}
    rows = [row, {"sample": "bad", "reason": "broken"}, row | {"images": ["a.jpg"]}]
    rows.append(row | {"question": "gone"})
    asked = []

    def load(index: int) -> list:
        asked.append(index)
        if index == 3:
            raise BadImage("it is away")
        return [buffer.getvalue(), np.zeros((10, 20, 3), np.uint8)]

    changed = thumbnails.with_thumbnails(rows, load, tmp_path / "result/vqa_images")
    assert asked == [0, 3]
    assert changed[0]["thumbnails"] == ["vqa_images/0-0.jpg", "vqa_images/0-1.jpg"]
    assert changed[1:] == rows[1:]
    with Image.open(tmp_path / "result/vqa_images/0-0.jpg") as image:
        assert image.size == (240, 360)
    folder = result_folder(tmp_path, "vqa", changed, {"accuracy": 1.0})
    assert rendered(folder).count("<img") == 2
    assert json.loads((folder / "settings.json").read_text())["model"] == f"org/{tmp_path.name}"
