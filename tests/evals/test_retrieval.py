"""Recall as the original's, in any chunk; retrieval through a real small model."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from chat_folders import prompt_folder
from data_files import SHARED
from dual_folders import add_small_tokenizer, dual_folder
from photos import COLORS, photo
from safetensors.torch import load_file
from torch.nn.functional import normalize

from internvl import evals, evaluate, train
from internvl.config import eval_config
from internvl.config.recipes import resolve
from internvl.errors import UserError
from internvl.evals import features
from internvl.evals.retrieval import Retrieval, recalls
from internvl.inference import load as loading

GOLDEN = Path(__file__).parents[1] / "golden/recall"
FLICKR8K = SHARED / "data/flickr8k_cn"
CASES = json.loads((GOLDEN / "metrics.json").read_text())
_NAMES_AT_1 = ("image_retrieval_recall@1", "text_retrieval_recall@1", "mean_recall")


def plain_recalls(texts, images, of_text, ks=(1, 5, 10)):
    """The definition, query by query, ties to the lower index."""
    scores = (texts @ images.T).tolist()
    found = {}
    for k in ks:
        hits = []
        for t, row in enumerate(scores):
            order = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))
            hits.append(of_text[t] in order[:k])
        found[f"image_retrieval_recall@{k}"] = sum(hits) / len(hits)
        hits = []
        for i in range(len(images)):
            order = sorted(range(len(scores)), key=lambda t, i=i: (-scores[t][i], t))
            hits.append(any(of_text[t] == i for t in order[:k]))
        found[f"text_retrieval_recall@{k}"] = sum(hits) / len(hits)
    return found


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("ties")])
def test_recall_is_the_originals(name: str) -> None:
    golden = load_file(GOLDEN / "tensors.safetensors")
    of_text = golden[f"{name}.text_to_image"]
    if name == "evaluate":
        texts, images = (normalize(golden[f"evaluate.{x}_emb"], dim=-1) for x in ("text", "image"))
        found = features.ranks_both_ways(texts, images, of_text)
    else:
        scores = golden[f"{name}.scores_text_by_image"]
        of_image = torch.arange(scores.shape[1])
        found = (
            features.ranks_of_scores(scores, of_text[:, None] == of_image, of_image),
            features.ranks_of_scores(
                scores.T, of_image[:, None] == of_text, torch.arange(len(scores))
            ),
        )
    wanted = {k: v for k, v in CASES[name]["metrics"].items() if "retrieval" in k}
    assert recalls(*found, (1, 5, 10)) == wanted  # the same float32 means, every digit


@pytest.mark.parametrize("kind", ["random", "equal texts", "all equal", "rounded", "without texts"])
@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
def test_ranks_are_those_of_the_definition(monkeypatch, kind: str, at_once: int) -> None:
    monkeypatch.setattr(features, "SCORES_AT_ONCE", at_once)
    torch.manual_seed(3)
    images = normalize(torch.randn(12, 7), dim=-1)
    of_text = torch.arange(30) % (9 if kind == "without texts" else 12)
    texts = normalize(images[of_text] + torch.randn(30, 7), dim=-1)
    if kind == "equal texts":
        texts[15:] = texts[:15].clone()
    if kind == "all equal":
        texts, images = texts[:1].repeat(30, 1), images[:1].repeat(12, 1)
    if kind == "rounded":
        texts, images = (normalize(x.sign(), dim=-1) for x in (texts, images))
    found = recalls(*features.ranks_both_ways(texts, images, of_text), (1, 5, 10))
    assert found == pytest.approx(plain_recalls(texts, images, of_text.tolist()), abs=1e-7)


def test_ranks_are_float32_under_autocast_and_tf32() -> None:
    torch.manual_seed(1)
    images = normalize(torch.randn(300, 32), dim=-1)
    of_text = torch.arange(600) % 300
    texts = normalize(images[of_text] + torch.randn(600, 32), dim=-1)
    wanted = features.ranks_both_ways(texts, images, of_text)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = features.ranks_both_ways(texts, images, of_text)
            rough = features.ranks_of_scores(
                texts @ images.T, of_text[:, None] == torch.arange(300), torch.arange(300)
            )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(map(torch.equal, found, wanted))
    assert not torch.equal(rough, wanted[0])  # the check can fail


def test_a_model_that_says_nothing_has_the_recall_of_chance() -> None:
    same = torch.ones(20, 4) / 2
    found = recalls(*features.ranks_both_ways(same, same, torch.arange(20)), (1, 5))
    assert list(found.values()) == pytest.approx([0.05, 0.05, 0.25, 0.25])


def spec(data: Path, **more):
    return eval_config(
        type="retrieval", annotations=data / "test.txt", images=data, batch_size=4, **more
    )


def test_retrieval_of_a_model_in_both_modes(dual, data: Path, tmp_path: Path) -> None:
    scores = Retrieval(spec(data, clean=True)).run(dual, tmp_path / "features")
    kept = {
        file.name.partition("-")[0]: load_file(file)["features"]
        for file in (tmp_path / "features").rglob("*.safetensors")
    }
    lines = (data / "test.txt").read_text().splitlines()[1:]
    texts = [line.partition(",")[2].lower().rstrip(".") for line in lines]
    assert torch.allclose(kept["texts"], dual.encode_texts(texts), atol=1e-5)
    of_text = [int(line.partition(".")[0]) for line in lines]
    paths = [str(data / f"{n}.jpg") for n in range(10)]
    for mode, images in zip("cg", kept["images_cg"].chunk(2, dim=1), strict=True):
        assert torch.allclose(images, dual.encode_images(paths, mode), atol=1e-5)
        wanted = plain_recalls(kept["texts"], images, of_text)
        mean = sum(wanted.values()) / 6
        assert scores.values.pop(f"{mode}_mean_recall") == pytest.approx(mean)
        found = {name: scores.values.pop(f"{mode}_{name}") for name in wanted}
        assert found == pytest.approx(wanted)
    assert scores.values == {}
    assert len(scores.rows) == len(lines) + 10
    assert scores.rows[0].keys() == {"text", "image", "rank", "first"}
    # The first candidates of a query, whose rank says where the right one is.
    for row in scores.rows:
        for mode, names in row["first"].items():
            is_text = "text" in row
            right = (
                {row["image"]}
                if is_text
                else {
                    r["text"] for r in scores.rows if r.get("text") and r["image"] == row["image"]
                }
            )
            hits = [n for n, name in enumerate(names) if name in right]
            assert hits[:1] == ([row["rank"][mode]] if row["rank"][mode] < 5 else [])


def test_retrieval_in_shards_is_that_of_the_files(dual, data: Path, tmp_path: Path) -> None:
    """The same images and texts in two tars: the same ranks, recalls and match scores."""
    found = Retrieval(spec(data)).pairs
    for part in range(2):
        with tarfile.open(data / f"{part}.tar", "w") as tar:
            for n in range(5 * part, 5 * part + 5):
                texts = [t for t, i in zip(found.texts, found.image_of_text, strict=True) if i == n]
                (data / f"{n}.txt").write_text("\n".join(texts), encoding="utf-8")
                tar.add(data / f"{n}.jpg", f"{n}.jpg")
                tar.add(data / f"{n}.txt", f"{n}.txt")
    files = Retrieval(spec(data, rerank=4)).run(dual, None)
    shards = eval_config(
        type="retrieval", annotations=data, batch_size=4, rerank=4, form="webdataset"
    )
    for _ in range(2):  # the second time from its kept features
        scores = Retrieval(shards).run(dual, tmp_path / "features")
        assert scores.values == files.values
        assert [row["rank"] for row in scores.rows] == [row["rank"] for row in files.rows]
    assert scores.rows[0]["image"] == f"0.jpg in {data}/0.tar"


def test_reranked_by_match(dual, data: Path) -> None:
    """All candidates re-ranked: the order is that of the match scores alone."""
    evaluator = Retrieval(spec(data, modes=("g",), rerank=30, recall_k=(1, 5)))
    values = evaluator.run(dual, None).values
    found = evaluator.pairs
    pairs = [(found.images[i], text) for i in range(len(found.images)) for text in found.texts]
    # In the same batches: the scores of random weights differ by little more than rounding.
    batches = [dual.match(*zip(*pairs[n : n + 4], strict=True)) for n in range(0, len(pairs), 4)]
    table = torch.cat(batches).view(len(found.images), len(found.texts)).T
    first = (table.argmax(dim=1) == torch.tensor(found.image_of_text)).float().mean().item()
    assert values["g_itm_image_retrieval_recall@1"] == pytest.approx(first)
    best = [found.image_of_text[t] == i for i, t in enumerate(table.argmax(dim=0).tolist())]
    assert values["g_itm_text_retrieval_recall@1"] == pytest.approx(sum(best) / len(best))
    assert "g_text_retrieval_recall@1" in values


def test_pairs_of_one_picture_look_at_it_once(dual, data: Path) -> None:
    """Same paths share the tower's work, and the answers are those of single pairs."""
    paths = [str(data / f"{n}.jpg") for n in (3, 3, 1, 3, 1)]
    texts = [f"something {color}" for color in COLORS[:5]]
    rows: list[int] = []
    with dual.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["pixel_values"])),
        with_kwargs=True,
    ):
        together = dual.match(paths, texts)
    assert rows == [2]
    alone = [dual.match([p], [t]) for p, t in zip(paths, texts, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_an_interrupted_evaluation_goes_on(dual, data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(features, "CHUNK_TEXTS", 4)
    monkeypatch.setattr(features, "CHUNK_BATCHES", 1)
    kept = tmp_path / "features"
    whole = Retrieval(spec(data)).run(dual, kept)
    files = sorted(kept.rglob("*.safetensors"))
    assert len(files) == 5 + 3  # 19 texts, 10 images, in fours
    lost = [file for file in files if "images_cg" in file.name][1:]
    for file in lost:
        file.unlink()
    times = {file: file.stat().st_mtime_ns for file in files if file not in lost}
    again = Retrieval(spec(data)).run(dual, kept)
    assert again.values == whole.values
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert sorted(kept.rglob("*.safetensors")) == files
    # Another image under the same name is other data.
    photo(data / "3.jpg", 333)
    Retrieval(spec(data)).run(dual, kept)
    assert len(sorted(kept.rglob("*.safetensors"))) == 2 * len(files)


def test_equal_images_are_encoded_once_in_a_call(dual, data: Path, tmp_path: Path) -> None:
    calls = []

    class Counted:
        model, device, encode_texts = dual.model, dual.device, dual.encode_texts

        def as_dual(self, purpose: str) -> "Counted":
            return self

        def encode_images_of(self, images, modes, **options):
            calls.append((len(images), modes))
            return dual.encode_images_of(images, modes, **options)

    first, second = Retrieval(spec(data, clean=True)), Retrieval(spec(data))
    one_mode = Retrieval(spec(data, modes=["g"]))
    few = Retrieval(spec(data, limit=6, recall_k=[1]))
    chosen = {"first": first, "second": second, "one-mode": one_mode, "few": few}
    together = evals.run_all(chosen, Counted(), tmp_path)
    assert calls == [(10, ("c", "g")), (10, ("g",)), (6, ("c", "g"))]
    for name, evaluator in chosen.items():
        alone = evaluator.run(dual, None).values
        assert {metric: together[f"{name}/{metric}"] for metric in alone} == alone


def test_problems_are_named_before_anything_is_encoded(data: Path) -> None:
    shutil.copy(data / "1.jpg", data / "copy.jpg")
    (data / "train.txt").write_text("image,caption\ncopy.jpg,x\n2.jpg,y\n")
    (data / "4.jpg").write_bytes((data / "4.jpg").read_bytes()[:500])
    with (data / "test.txt").open("a") as file:
        file.write("5.jpg,\ngone.jpg,nothing\n")
    with pytest.raises(UserError) as error:
        Retrieval(spec(data, train=data / "train.txt"))
    said = str(error.value)
    assert "5 problems in the data" in said
    for part in (
        "test.txt line 21: the caption is empty",
        f"test.txt line 22: there is no image {data}/gone.jpg",
        "4.jpg: the image cannot be decoded",
        "1.jpg: the training data holds the same file as",
        "2.jpg: the training data names it too",
    ):
        assert part in said
    skipped = Retrieval(spec(data, train=data / "train.txt", on_bad_sample="skip", recall_k=(1, 5)))
    names = [Path(path).name for path in skipped.images()]
    assert names == [f"{n}.jpg" for n in (0, 3, 5, 6, 7, 8, 9)]
    with pytest.raises(UserError, match="cannot be decoded"):  # it cannot be kept
        Retrieval(spec(data, on_bad_sample="keep"))
    with pytest.raises(UserError, match="recall_k has 10, but there are only 7 images"):
        Retrieval(spec(data, train=data / "train.txt", on_bad_sample="skip"))


def test_a_broken_image_costs_its_own_line(model: Path, data: Path) -> None:
    (data / "4.jpg").write_bytes((data / "4.jpg").read_bytes()[:500])
    options = {"annotations": data / "test.txt", "recall_k": [1, 5], "device": "cpu"}
    found = evaluate.measure(model, "retrieval-folder", to=data / "out", modes="c", **options)
    assert found.counts == {"retrieval-folder": {"images": 9, "texts": 17, "left out": 1}}
    written = json.loads((data / "out/result.json").read_text())
    assert written == found.metrics | {"retrieval-folder/left_out": 1}
    *_, last = map(
        json.loads, (data / "out/result/retrieval-folder.jsonl").read_text().splitlines()
    )
    assert last["sample"] == str(data / "4.jpg")
    # What is wrong in another way still is an error, and so is all of it if that is asked for.
    with pytest.raises(UserError, match="1 problem in the data"):
        evaluate.measure(model, "retrieval-folder", on_bad_sample="raise", **options)
    with (data / "test.txt").open("a") as file:
        file.write("gone.jpg,nothing\n")
    with pytest.raises(UserError, match="2 problems in the data"):
        evaluate.measure(model, "retrieval-folder", **options)


def test_an_image_that_breaks_later_is_left_out(dual, data: Path, tmp_path: Path) -> None:
    (data / "4.jpg").rename(data / "away.jpg")
    fewer = Retrieval(spec(data, recall_k=(1,), on_bad_sample="skip")).run(dual, None)
    (data / "away.jpg").rename(data / "4.jpg")
    evaluator = Retrieval(spec(data, recall_k=(1,), rerank=2))
    (data / "4.jpg").unlink()
    scores = evaluator.run(dual, tmp_path / "kept")
    assert evaluator.counts() == {"images": 9, "texts": 17, "left out": 1}
    assert scores.rows[-1]["sample"] == str(data / "4.jpg")
    assert scores.rows[-1]["reason"].startswith("there is no image")
    assert fewer.values == {name: scores.values[name] for name in fewer.values}
    ranks = [{mode: row["rank"][mode] for mode in "cg"} for row in scores.rows[:-1]]
    assert ranks == [row["rank"] for row in fewer.rows[:-1]]
    # Its chunk alone is not kept, and what it was is not measured again.
    assert len([*(tmp_path / "kept").rglob("images_cg-*")]) == 0
    assert evaluator.run(dual, None).values == scores.values


def test_a_chat_model_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match="retrieval needs an InternVL-14B model"):
        Retrieval(spec(data)).run(
            loading.load(prompt_folder("internlm2.internlm2-chat", data / "chat"), device="cpu"),
            None,
        )


def test_evaluate_appends_the_lines_of_clip_benchmark(model: Path, data: Path) -> None:
    output = data / "result.json"
    for mode in (["c", "g"], ["g"]):
        metrics = evaluate.run(
            model,
            ["retrieval-folder"],
            annotations=data / "test.txt",
            to=data / "out",
            output=output,
            modes=mode,
            recall_k=[1, 5],
            rerank=2 if len(mode) == 1 else 0,
            languages=["cn"],
        )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["model"], row["task"]) for row in lines] == [
        ("internvl_c_retrieval_hf", "zeroshot_retrieval"),
        ("internvl_g_retrieval_hf", "zeroshot_retrieval"),
        ("internvl_g_retrieval_hf", "zeroshot_retrieval"),
        ("internvl_g_retrieval_hf", "zeroshot_retrieval_with_itm"),
    ]
    ks = [f"{way}_retrieval_recall@{k}" for k in (1, 5) for way in ("image", "text")]
    for row in lines:
        assert [*row] == ["dataset", "model", "pretrained", "task", "metrics", "language"]
        assert (row["dataset"], row["pretrained"], row["language"]) == ("test", str(model), "cn")
        assert [*row["metrics"]] == ks
    assert lines[1]["metrics"] == lines[2]["metrics"]
    assert lines[2]["metrics"][ks[0]] == metrics[f"retrieval-folder/g_{ks[0]}"]
    assert not (data / "out/features").exists()


def test_named_sets_are_found_and_compared(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "released/InternVL-14B-224px"
    add_small_tokenizer(dual_folder(folder))
    root = tmp_path / "data/flickr30k"
    (root / "Images").mkdir(parents=True)
    for n in range(10):
        shutil.copy(data / f"{n}.jpg", root / f"Images/{n}.jpg")
    shutil.copy(data / "test.txt", root / "flickr30k_cn_test.txt")
    options = {"root": tmp_path / "data", "to": tmp_path / "out"}
    found = evaluate.measure(folder, ["retrieval-flickr30k-cn"], **options)
    table = evaluate.render(found.metrics, folder, found.counts, found.tables).splitlines()
    assert not any("92.9" in row for row in table)
    assert table[-1] == (
        "retrieval-flickr30k-cn: published values are for 1,000 images and 5,000 texts; this set "
        "has 10 images and 19 texts"
    )
    # Beside results of as many they stand.
    whole = {"retrieval-flickr30k-cn": {"images": 1000, "texts": 5000}}
    table = evaluate.render(found.metrics, folder, whole, found.tables).splitlines()
    assert table[0] == "retrieval-flickr30k-cn: 1,000 images, 5,000 texts"
    assert table[1].split() == ["recall", "in", "%", "R@1", "R@5", "R@10"]
    measured = 100 * found.metrics["retrieval-flickr30k-cn/g_text_retrieval_recall@1"]
    row = next(row for row in table if row.startswith("  InternVL-G  image → text"))
    assert row[26:42].split() == [f"{measured:.2f}", "(92.9)"]
    assert table[-1] == "  (in brackets: published)"
    # Without the tables, a line for every metric.
    table = evaluate.render(found.metrics, folder, whole).splitlines()
    line = next(row for row in table if "g_text_retrieval_recall@1 " in row)
    assert line.split()[-1] == "0.9290"
    assert "published" in table[0]
    assert not any("this set has" in row for row in table)
    (row, _) = map(json.loads, (tmp_path / "out/result.jsonl").read_text().splitlines())
    assert (row["dataset"], row["language"]) == ("flickr30k", "cn")


def test_during_training_and_after_it(model: Path, data: Path) -> None:
    """What a run measured at its end is what `evaluate` measures of its folder."""
    pairs = {"annotations": str(data / "test.txt"), "images": str(data)}
    recipe = resolve(
        {
            "model": {"id": str(model), "train": ["heads"]},
            "data": {
                "sources": [{"name": "pairs", "type": "captions", **pairs}],
                "tiles": {"size": 84, "max": 1},
                "max_tokens": 80,
                "workers": 0,
            },
            "objective": {"name": "retrieval"},
            "evals": {"val": {"type": "retrieval", **pairs, "before": True}},
            "optim": {"lr": 1e-3},
            "run": str(data / "run"),
            "global_batch": 5,
            "steps": 2,
            "dtype": "float32",
            "device": "cpu",
        }
    )
    train.run(recipe)
    before, after = (
        json.loads((data / f"run/evals/{step:06d}.json").read_text()) for step in (0, 2)
    )
    assert before.keys() == after.keys()
    assert evaluate.run(data / "run", device="cpu") == after
    chosen = {"annotations": data / "test.txt", "modes": ["g"], "device": "cpu"}
    found = evaluate.run(data / "run", ["retrieval-folder"], **chosen)
    name = "g_text_retrieval_recall@5"
    assert found[f"retrieval-folder/{name}"] == after[f"val/{name}"]
    few = evaluate.run(data / "run", ["val"], limit=3, recall_k=[1], device="cpu")
    assert [*few] == [f"val/{m}_{x}" for m in ("c", "g") for x in _NAMES_AT_1]


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="no Flickr8k-CN here")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_real_photos(dual, language: str) -> None:
    config = eval_config(
        type="retrieval",
        annotations=FLICKR8K / f"flickr8k_{language}_test.txt",
        images=FLICKR8K / "images",
        train=FLICKR8K / f"flickr8k_{language}_train.txt",
        clean=True,
        limit=40,
        modes=("g",),
    )
    evaluator = Retrieval(config)
    assert (len(evaluator.pairs.images), len(evaluator.pairs.texts)) == (40, 200)
    values = evaluator.run(dual, None).values
    assert 0 <= values["g_image_retrieval_recall@1"] <= values["g_image_retrieval_recall@10"] <= 1
