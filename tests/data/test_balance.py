"""Dealing a step's pieces to ranks: nothing lost, little lost to the slowest, little moved."""

import random
from itertools import pairwise

import numpy as np
import pytest

from internvl.data.balance import Piece, deal_rows, even_out, even_rows


def drawn(num_ranks, pieces, seed=0):
    rng = random.Random(seed)
    return [[87 + 0.2 * rng.uniform(50, 1700) for _ in range(pieces)] for _ in range(num_ranks)]


def loads(costs, dealt):
    return np.array([sum(costs[rank][i] for rank, i in places) for places in dealt])


@pytest.mark.parametrize("num_ranks", [1, 2, 8, 64])
def test_every_piece_once_and_nearly_equal_loads(num_ranks):
    costs = drawn(num_ranks, 512 // num_ranks)
    dealt = even_out(costs)
    everything = {(rank, i) for rank, row in enumerate(costs) for i in range(len(row))}
    assert sorted(place for places in dealt for place in places) == sorted(everything)
    assert loads(costs, dealt).max() <= 1.002 * loads(costs, dealt).mean()


def test_what_is_even_stays_and_little_of_the_rest_moves():
    even = [[1.0] * 4] * 3
    assert even_out(even) == [[(rank, i) for i in range(4)] for rank in range(3)]
    costs = drawn(8, 64)
    moved = [
        place for rank, places in enumerate(even_out(costs)) for place in places if place[0] != rank
    ]
    assert len(moved) < 25  # of 512


def test_pieces_keep_the_order_of_the_step():
    """Rank r reads every third piece, so (index, rank) is the order in which they are read."""
    for places in even_out([[9, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]):
        assert places == sorted(places, key=lambda place: place[::-1])


@pytest.mark.parametrize(
    "costs",
    [[[], []], [[5.0], []], [[5.0, 5.0], []], [[0.0, 0.0], [0.0]], [[100.0, 1.0], [1.0, 1.0]]],
)
def test_empty_ranks_and_pieces_that_cannot_be_evened_out(costs):
    dealt = even_out(costs)
    assert sum(map(len, dealt)) == sum(map(len, costs))
    before = [sum(row) for row in costs]
    assert loads(costs, dealt).max() <= max(before)


def test_rows_are_dealt_in_equal_numbers_and_rounds_of_like_cost():
    costs = [random.Random(n).uniform(1, 2) for n in range(50)]
    dealt = deal_rows(costs, 8)
    assert sorted(row for rows in dealt for row in rows) == list(range(50))
    assert {len(rows) for rows in dealt} == {6, 7}
    rounds = [[costs[rows[n]] for rows in dealt] for n in range(6)]
    for these, following in pairwise(rounds):
        assert min(these) >= max(following)


@pytest.mark.parametrize("lengths", [(100,), (62, 100)])
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_rows_fit_and_the_nth_rows_of_all_ranks_cost_the_same(num_ranks, lengths):
    rng = random.Random(1)
    pieces = [
        [Piece(rng.uniform(10, 20), rng.randrange(2, 14), rng.randrange(3)) for _ in range(24)]
        for _ in range(num_ranks)
    ]
    dealt = even_rows(pieces, lengths, 26)
    places = [place for rows in dealt for row in rows for place in row]
    assert sorted(places) == [(rank, i) for rank in range(num_ranks) for i in range(24)]
    assert len({len(rows) for rows in dealt}) == 1
    for rounds in zip(*dealt, strict=True):
        rows = [[pieces[rank][i] for rank, i in row] for row in rounds]
        for row in rows:
            assert sum(piece.tokens for piece in row) <= 100
            assert sum(piece.tiles for piece in row) <= 26
        costs = [sum(piece.cost for piece in row) for row in rows]
        assert max(costs) < 1.03 * sum(costs) / num_ranks


def test_the_shape_of_a_step_is_the_one_that_pads_least():
    """1.4 rows of tokens a rank: a long and a short row, not two long ones."""
    pieces = [[Piece(1.0, 5)] * 28] * 2
    dealt = even_rows(pieces, (63, 100), 99)
    assert [[5 * len(row) for row in rows] for rows in dealt] == [[85, 55]] * 2


def test_pieces_of_one_length_fill_their_rows():
    pieces = [[Piece(1.0, 2048, 1)] * 8] * 4
    dealt = even_rows(pieces, [10240, 16384], 64)
    assert [[len(row) for row in rows] for rows in dealt] == [[8]] * 4


def test_large_pieces_take_a_row_each():
    pieces = [[Piece(1.0, 90)] * 3, [Piece(1.0, 60)]]
    dealt = even_rows(pieces, (63, 100), 9)
    assert sorted(len(row) for rows in dealt for row in rows) == [1, 1, 1, 1]
    assert even_rows([[], []], (100,), 9) == [[[]], [[]]]
