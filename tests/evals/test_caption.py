"""Captions of a dual, and an interrupted evaluation that goes on."""

import json
import shutil
from pathlib import Path

import pytest

from internvl import evals, evaluate
from internvl.config import eval_config
from internvl.errors import UserError


def test_captions_of_a_dual(model: Path, dual, data: Path, tmp_path: Path) -> None:
    images = [{"id": 100 + n, "image": f"flickr30k-images/{n}.jpg"} for n in range(3)]
    annotations = [{"image_id": 100 + n, "id": n, "caption": f"thing {n}"} for n in range(3)]
    root = tmp_path / "data/flickr30k"
    (root / "Images").mkdir(parents=True)
    for n in range(3):
        shutil.copy(data / f"{n}.jpg", root / f"Images/{n}.jpg")
    tree = json.dumps({"images": images, "annotations": annotations})
    (root / "flickr30k_test_karpathy.json").write_text(tree)
    metrics = evaluate.run(
        model,
        ["caption-flickr30k"],
        root=tmp_path / "data",
        to=tmp_path / "out",
        metrics="exact",
        max_new_tokens=9,
        batch_size=2,
    )
    (file,) = (tmp_path / "out/result").glob("flickr30k_*.json")
    assert file.stem.rpartition("_")[2].isdigit()
    assert len(file.stem) == len("flickr30k_yymmddHHMMSS")
    paths = [str(data / f"{n}.jpg") for n in range(3)]
    captions = dual.caption(paths, max_new_tokens=9)
    wanted = [{"image_id": 100 + n, "caption": captions[n]} for n in range(3)]
    assert json.loads(file.read_text()) == wanted
    length = sum(len(text.split()) for text in captions) / 3
    assert metrics["caption-flickr30k/average_length"] == pytest.approx(length)
    (line,) = (tmp_path / "out/result.jsonl").read_text().splitlines()
    assert json.loads(line) == ["flickr30k", "English caption:", pytest.approx(length), {}]


def test_nocaps_in_its_published_layout(model, dual, data: Path, tmp_path: Path) -> None:
    """Ten captions of an image, whose name stands beside the ids of Open Images."""
    root = tmp_path / "data/nocaps"
    (root / "images").mkdir(parents=True)
    images = []
    for n in range(3):
        name = f"{n:04d}ea2087020901.jpg"
        shutil.copy(data / f"{n}.jpg", root / "images" / name)
        entry = {
            "id": n,
            "open_images_id": Path(name).stem,
            "file_name": name,
            "domain": "in-domain",
        }
        images.append(entry | {"width": 80, "height": 60, "coco_url": "", "date_captured": ""})
    annotations = [
        {"image_id": n, "id": 10 * n + k, "caption": f"A photo, {k}."}
        for n in range(3)
        for k in range(10)
    ]
    tree = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (root / "nocaps_val_4500_captions.json").write_text(json.dumps(tree))
    measured = evaluate.measure(
        model,
        ["caption-nocaps"],
        root=tmp_path / "data",
        to=tmp_path / "out",
        metrics="exact",
        max_new_tokens=9,
    )
    assert measured.counts == {"caption-nocaps": {"images": 3, "texts": 30}}
    (file,) = (tmp_path / "out/result").glob("nocaps_*.json")
    captions = dual.caption(
        [str(root / "images" / i["file_name"]) for i in images], max_new_tokens=9
    )
    wanted = [{"image_id": n, "caption": caption} for n, caption in enumerate(captions)]
    assert json.loads(file.read_text()) == wanted
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "A photo, 0. / A photo, 1. / A photo, 2. / +7" in page
    # InternVL-14B's script has no file of lines; a chat model's is held to the original's.
    assert not [*(tmp_path / "out/result").glob("*.txt")]


def test_interrupted_captions_go_on(dual, data: Path, tmp_path: Path) -> None:
    tree = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(10)],
        "annotations": [{"image_id": n, "id": n, "caption": "x"} for n in range(10)],
    }
    (data / "captions.json").write_text(json.dumps(tree))
    config = eval_config(
        annotations=data / "captions.json",
        images=data,
        metrics="exact",
        max_new_tokens=4,
        num_beams=1,
        batch_size=1,
    )
    whole = evals.EVALS["caption"](config).run(dual, tmp_path)
    (kept,) = tmp_path.glob("captions-*/*.jsonl")
    lines = kept.read_text().splitlines()
    rows = [{"item": n, "answer": row["answer"]} for n, row in enumerate(whole.rows)]
    assert [json.loads(line) for line in lines] == rows
    first = json.dumps({"item": 0, "answer": "kept"})
    kept.write_bytes("\n".join([first, *lines[1:8], '{"item": 8, "answer": "\u4e00'])[:-1].encode())
    again = evals.EVALS["caption"](config).run(dual, tmp_path)
    assert [row["answer"] for row in again.rows] == ["kept", *(r["answer"] for r in whole.rows[1:])]
    # Those that were missing, in a file of this start.
    (added,) = {*tmp_path.glob("captions-*/*.jsonl")} - {kept}
    assert [json.loads(line) for line in added.read_text().splitlines()] == rows[8:]


def test_a_broken_image_costs_its_own_line(dual, data: Path, tmp_path: Path) -> None:
    tree = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)],
        "annotations": [{"image_id": n, "id": n, "caption": "x"} for n in range(4)],
    }
    (data / "captions.json").write_text(json.dumps(tree))
    (data / "1.jpg").write_bytes((data / "1.jpg").read_bytes()[:300])
    options = {
        "annotations": data / "captions.json",
        "images": data,
        "metrics": "exact",
        "max_new_tokens": 2,
        "num_beams": 1,
    }
    broken = rf"1 problem in the data.*\n{data}/1.jpg: the image cannot be decoded"
    with pytest.raises(UserError, match=broken):
        evals.EVALS["caption"](eval_config(**options))
    evaluator = evals.EVALS["caption"](eval_config(**options, on_bad_sample="skip_broken"))
    # Broken since then.
    (data / "2.jpg").unlink()
    rows = evaluator.run(dual, tmp_path / "kept").rows
    assert [row.get("image_id") for row in rows] == [0, 3, None, None]
    assert [row["sample"] for row in rows[2:]] == [str(data / "1.jpg"), str(data / "2.jpg")]
    assert "2.jpg" in rows[3]["reason"]
    assert evaluator.counts() == {"images": 2, "texts": 2, "left out": 2}
    # A file that was never there is a mistake of another kind.
    missing = rf"2 problems in the data.*\n{data}/captions.json image 2: there is no image"
    with pytest.raises(UserError, match=missing):
        evals.EVALS["caption"](eval_config(**options, on_bad_sample="skip_broken"))
