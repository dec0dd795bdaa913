"""Searches: recall as `evaluate` measures it, weights, filters, pages, the match head."""

import json

import numpy as np
import photo_library
import pytest
import torch.nn.functional as F
from photos import photo

from internvl.config import RetrievalEval
from internvl.errors import BadImage, UserError
from internvl.evals.retrieval import Retrieval
from internvl.search.encoder import Encoder
from internvl.search.query import Filters, Term, parse_terms
from internvl.search.searcher import Searcher, describe_results
from internvl.search.store import Store

NAMES = [f"{2020 + i % 3}/{i:02d}.png" for i in range(24)]
WORDS = ("a photo", "two cats", "red panda", "the sofa", "猫", "一张照片")


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    return photo_library.load_dual(tmp_path_factory.mktemp("dual"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_library.library(tmp_path_factory.mktemp("photos"), NAMES)


@pytest.fixture(scope="module")
def searcher(dual, photos, tmp_path_factory):
    index = photo_library.make(photos, tmp_path_factory.mktemp("i") / "index", dual, "cg")
    with Store(index) as store:
        yield Searcher(store, Encoder(lambda: dual, store.settings))


def found(results):
    return [hit.photo.path for hit in results.hits]


def test_recall_is_what_evaluate_measures(dual, photos, searcher, tmp_path):
    captions = {name: f"{WORDS[i % 6]} {i}." for i, name in enumerate(sorted(NAMES))}
    lines = [json.dumps({"image": name, "caption": text}) for name, text in captions.items()]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = RetrievalEval(annotations=tmp_path / "pairs.jsonl", images=photos, clean=True)
    values = Retrieval(config).run(dual, None).values
    for mode in "cg":
        for k in config.recall_k:
            hits = [
                name in found(searcher.find([Term(text)], mode=mode, page_size=k))
                for name, text in captions.items()
            ]
            expected = values[f"{mode}_image_retrieval_recall@{k}"]
            assert np.mean(hits) == pytest.approx(expected, abs=1e-6)
    assert 0 < values["c_image_retrieval_recall@5"] < 1


def test_scores_are_cosines_of_the_weighted_sum(dual, photos, searcher):
    terms = [*parse_terms("two cats:2 猫:-0.5"), Term(image=photos / NAMES[3])]
    results = searcher.find(terms, page_size=24)
    texts = dual.encode_texts(["two cats", "猫"])
    query = 2 * texts[0] - 0.5 * texts[1] + dual.encode_images(photos / NAMES[3])[0]
    cosines = dual.encode_images([photos / name for name in found(results)])
    cosines = cosines @ F.normalize(query, dim=0)
    np.testing.assert_allclose([hit.score for hit in results.hits], cosines, atol=1e-5)
    assert [hit.rank for hit in results.hits] == [*range(1, 25)]
    assert sorted(found(results)) == sorted(NAMES)


def test_terms_that_cancel_one_another_are_refused(searcher):
    with pytest.raises(UserError, match="two cats, two cats × -1: they cancel one another"):
        searcher.find([Term("two cats"), Term("two cats", weight=-1)])


def test_an_image_finds_itself(photos, searcher):
    data = (photos / NAMES[5]).read_bytes()
    digest = next(
        photo.digest for photo in searcher.store.photos(range(24)) if photo.path == NAMES[5]
    )
    for term in (Term(image=photos / NAMES[5]), Term(image=data), Term(digest=digest)):
        for mode in "cg":
            (hit,) = searcher.find([term], mode=mode, page_size=1).hits
            assert (hit.photo.path, hit.score) == (NAMES[5], pytest.approx(1, abs=1e-5))
    with pytest.raises(BadImage, match="not an image"):
        searcher.find([Term(image=b"no image")])
    with pytest.raises(UserError, match="no longer in the index"):
        searcher.find([Term(digest=b"?")])


def test_pages_follow_each_other(searcher):
    terms = [Term("two cats")]
    whole = searcher.find(terms, page_size=24)
    pages = [searcher.find(terms, page_size=10, skip=skip) for skip in (0, 10, 20)]
    assert [hit for page in pages for hit in page.hits] == whole.hits
    assert [describe_results(page) for page in pages] == [
        *("1 to 10 of 24 photos", "11 to 20 of 24 photos", "21 to 24 of 24 photos")
    ]
    assert describe_results(searcher.find(terms, skip=30)) == "none of 24 photos"
    for wrong in ({"page_size": 0}, {"skip": -1}, {"rerank": 5000}):
        with pytest.raises(UserError):
            searcher.find(terms, **wrong)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["2021"], [name for name in NAMES if name.startswith("2021/")]),
        (["*/1?.png"], [name for name in NAMES if name[5] == "1"]),
        (["./2020/", "2022/02.png"], [n for n in NAMES if n[:4] == "2020" or n == "2022/02.png"]),
        (["nowhere"], []),
    ],
)
def test_folders_filter(searcher, folders, names):
    results = searcher.find([Term("two cats")], filters=Filters(tuple(folders)), page_size=30)
    assert (sorted(found(results)), results.total) == (sorted(names), len(names))


def test_dates_filter(dual, tmp_path):
    for day in ("2023:12:31 23:59:59", "2024:05:01 08:00:00", "2024:06:30 12:00:00"):
        name = f"{day[:10].replace(':', '-')}.jpg"
        photo_library.dated_jpeg(tmp_path / "p" / name, day)
        photo(tmp_path / "p/x.png", 1)
    # The same pixels with another date are another file.
    index = photo_library.make(tmp_path / "p", tmp_path / "i", dual)
    with Store(index) as store:
        searcher = Searcher(store, Encoder(lambda: dual, store.settings))
        for since, until, names in (
            ("2024", "2024", ["2024-05-01.jpg", "2024-06-30.jpg"]),
            ("", "2023", ["2023-12-31.jpg"]),
            ("2024-05", "2024-05-01", ["2024-05-01.jpg"]),
            ("2024-06-30", "2024", ["2024-06-30.jpg"]),
        ):
            filters = Filters(("*.jpg",), since, until)
            assert sorted(found(searcher.find([Term("a")], filters=filters))) == names


def test_the_match_head_sorts_the_best(dual, photos, searcher):
    terms = parse_terms("two cats:1 the sofa:-0.5")
    plain = searcher.find(terms, page_size=24)
    best = found(plain)[:8]
    images = [photos / name for name in best]
    match = dual.match(images, ["two cats"] * 8) - 0.5 * dual.match(images, ["the sofa"] * 8)
    results = searcher.find(terms, page_size=24, rerank=8)
    order = sorted(range(8), key=lambda i: -match[i])
    assert found(results) == [best[i] for i in order] + found(plain)[8:]
    np.testing.assert_allclose([hit.match for hit in results.hits[:8]], match[order], atol=1e-5)
    assert {hit.match for hit in results.hits[8:]} == {None}
    page = searcher.find(terms, page_size=5, skip=5, rerank=8)
    assert page.hits == results.hits[5:10]
    with pytest.raises(UserError, match="look for words too"):
        searcher.find([Term(image=photos / NAMES[0])], rerank=4)


def test_a_photo_that_cannot_be_read_any_more_is_last(dual, tmp_path, caplog):
    photos = photo_library.library(tmp_path / "p")
    index = photo_library.make(photos, tmp_path / "i", dual)
    (photos / "e.png").unlink()
    with Store(index) as store:
        searcher = Searcher(store, Encoder(lambda: dual, store.settings))
        results = searcher.find([Term("two cats")], rerank=5)
    assert (found(results)[-1], results.hits[-1].match) == ("e.png", None)
    assert "e.png" in caplog.text


def test_a_search_sees_what_was_indexed_meanwhile(dual, tmp_path):
    photos = photo_library.library(tmp_path / "p")
    index = photo_library.make(photos, tmp_path / "i", dual)
    with Store(index) as store:
        searcher = Searcher(store, Encoder(lambda: dual, store.settings))
        assert searcher.find([Term("two cats")]).total == 5
        photo(photos / "more.png", 50)
        (photos / "e.png").unlink()
        photo_library.update(index, dual)
        names = found(searcher.find([Term("two cats")]))
    assert len(names) == 5
    assert "more.png" in names
    assert "e.png" not in names


def test_words_are_needed(searcher):
    with pytest.raises(UserError, match="has no words to look for"):
        searcher.find([Term("!!!")])
    with pytest.raises(UserError, match="nothing to look for"):
        searcher.find([])
