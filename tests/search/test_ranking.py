"""Ranks equal a plain sort, and approximate ones are near them."""

import numpy as np
import photo_library
import pytest
import torch
import torch.nn.functional as F

from internvl.errors import UserError
from internvl.search import approximation, ranking
from internvl.search.encoder import Encoder
from internvl.search.query import Term
from internvl.search.searcher import Searcher
from internvl.search.store import Store

CPU = torch.device("cpu")


def unit(count, width=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=draw), dim=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 7, 100, 1000])
def test_blocks_equal_a_plain_sort(monkeypatch, dtype, k):
    monkeypatch.setattr(ranking, "CPU_ROWS", 64)
    features = unit(300).numpy().astype(dtype)
    features[200:] = features[:100]  # equal scores: the lower row comes first
    (query,) = unit(1, seed=1)
    scores = features.astype(np.float32) @ query.numpy()
    order = np.argsort(-np.round(scores, 5), kind="stable")
    rows, best = ranking.Exact(features, CPU).top(query, k)
    assert rows.tolist() == order[:k].tolist()
    np.testing.assert_allclose(best, scores[order[:k]], atol=1e-5)
    allowed = np.arange(0, 300, 3)
    rows, _ = ranking.Exact(features, CPU).top(query, k, allowed)
    assert rows.tolist() == [row for row in order.tolist() if row % 3 == 0][:k]


def test_threads_share_the_rows(monkeypatch):
    monkeypatch.setattr(ranking, "CPU_ROWS", 16)
    features, (query,) = unit(300).numpy().astype(np.float16), unit(1, seed=1)
    expected = ranking.Exact(features, CPU).top(query, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rows, scores = ranking.Exact(features, CPU).top(query, 300)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert rows.tolist() == expected[0].tolist()
    np.testing.assert_array_equal(scores, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_gpu_ranks_alike(monkeypatch, limit):
    """Whether the features are kept there, or copied block by block."""
    monkeypatch.setattr(ranking, "DEVICE_BYTES", limit)
    monkeypatch.setattr(ranking, "GPU_ROWS", 64)
    features, (query,) = unit(300).numpy().astype(np.float16), unit(1, seed=1)
    for allowed in (None, np.arange(0, 300, 3)):
        expected, scores = ranking.Exact(features, CPU).top(query, 20, allowed)
        rows, best = ranking.Exact(features, torch.device("cuda")).top(query, 20, allowed)
        assert rows.tolist() == expected.tolist()
        np.testing.assert_allclose(best, scores, atol=1e-5)


def test_nothing_is_ranked_among_nothing():
    rows, scores = ranking.Exact(np.empty((0, 16), np.float16), CPU).top(unit(1)[0], 5)
    assert (len(rows), len(scores)) == (0, 0)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    features = unit(4000).numpy().astype(np.float16)
    file = tmp_path_factory.mktemp("faiss") / "a.faiss"
    queries = {"images": torch.from_numpy(features[:50].astype(np.float32))}
    measured = ranking.build_approximate(features, file, recall=0.9, queries=queries)
    return features, file, measured


def test_approximate_ranks_reach_the_recall_that_was_asked_for(built):
    features, file, measured = built
    assert 0.9 <= measured["recall"]["images"] <= 1
    assert 1 <= measured["probes"] < measured["lists"] == 102
    exact = ranking.Exact(features, CPU)
    near = ranking.read_approximate(file, measured["probes"], exact)
    queries = unit(50, seed=3)
    shares = [np.isin(exact.top(q, 10)[0], near.top(q, 10)[0]).mean() for q in queries]
    assert np.mean(shares) > 0.8
    rows, scores = near.top(queries[0], 10)
    expected = features[rows].astype(np.float32) @ queries[0].numpy()
    np.testing.assert_allclose(scores, expected, atol=2e-3)


def test_rows_that_came_later_and_filters_are_ranked_too(built):
    features, file, measured = built
    (query,) = unit(1, seed=4)
    later = np.concatenate([features, query.numpy()[None].astype(np.float16)])
    near = ranking.read_approximate(file, measured["lists"], ranking.Exact(later, CPU))
    assert near.top(query, 3)[0][0] == 4000
    allowed = np.arange(1, 4001, 2)
    rows = near.top(query, 10, allowed)[0]
    assert rows.tolist() == near.exact.top(query, 10, allowed)[0].tolist()
    rare = np.array([5, 9])
    assert sorted(near.top(query, 10, rare)[0].tolist()) == [5, 9]


def test_an_index_builds_and_uses_it(tmp_path):
    dual = photo_library.load_dual(tmp_path / "dual")
    names = [f"{i}.png" for i in range(50)]
    index = photo_library.make(photo_library.library(tmp_path / "p", names), tmp_path / "i", dual)
    with Store(index) as store:
        encoder = Encoder(lambda: dual, store.settings)
        with pytest.raises(UserError, match="no approximate index of mode c; make it with"):
            Searcher(store, encoder, approximate=True).find([Term("two cats")])
        assert approximation.renew(store, encoder, None) == {}
        built = approximation.renew(store, encoder, 1.0)["c"]
        assert built["recall"] == {"texts": 1, "images": 1}
        assert "recall@10 1.000 (texts)" in approximation.describe(built)
        assert approximation.renew(store, encoder, None) == {}
        exact, near = (
            Searcher(store, encoder, approximate=value).find([Term("two cats")], page_size=5)
            for value in (False, True)
        )
    assert [hit.photo.path for hit in near.hits] == [hit.photo.path for hit in exact.hits]
    with Store(index) as store:
        store.compact()
        # Rows have other numbers now: the next update builds it again.
        assert approximation.renew(store, encoder, None)["c"]["rows"] == 50


def test_few_photos_make_one_list_without_a_warning(tmp_path, capfd):
    features = np.eye(3, 8, dtype=np.float32)
    queries = {"images": torch.from_numpy(features)}
    built = ranking.build_approximate(features, tmp_path / "a.faiss", recall=1, queries=queries)
    assert (built["lists"], built["recall"]) == (1, {"images": 1.0})
    assert capfd.readouterr() == ("", "")


def test_a_damaged_file_of_faiss_is_named(tmp_path):
    (tmp_path / "a.faiss").write_bytes(b"x" * 100)
    exact = ranking.Exact(unit(3).numpy(), CPU)
    with pytest.raises(UserError, match="a.faiss: faiss cannot read it"):
        ranking.read_approximate(tmp_path / "a.faiss", 1, exact)
