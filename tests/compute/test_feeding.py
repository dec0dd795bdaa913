"""Padding, reading ahead and prefetching: rows come in order and train the same."""

import threading
from dataclasses import replace

import pytest
import torch
from packed_rows import assert_same, loss_and_gradients, row

from internvl.compute import feeding
from internvl.models.attention.packed import BLOCK

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_row_takes_the_first_length_that_holds_it():
    padded = [len(feeding.pad(row(), lengths).document) for lengths in ((), (30,), (16, 40, 64))]
    assert padded == [30, 30, 40]
    assert feeding.pad(row(), (64,)).num_tokens == 30
    padding = feeding.pad(row(), (30 + 2 * BLOCK + 1,)).document[30:]
    assert padding.tolist() == [-1] * BLOCK + [-2] * BLOCK + [-3]


def test_padding_changes_neither_loss_nor_gradients(model):
    assert_same(
        loss_and_gradients(model, feeding.pad(row(), (64,))), loss_and_gradients(model, row())
    )


def test_the_next_item_is_made_while_one_is_worked_on():
    made = [threading.Event() for _ in range(3)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    seen = []
    for number, wait_s in feeding.prefetch(items()):
        assert wait_s >= 0
        if number < 2:
            made[number + 1].wait()  # for ever, were it not made
        seen.append(number)
    assert seen == [0, 1, 2]


def test_an_error_in_what_is_read_ahead_is_raised():
    def items():
        yield 1
        raise ValueError("bad line")

    found = feeding.prefetch(items())
    assert next(found)[0] == 1
    with pytest.raises(ValueError, match="bad line"):
        next(found)


def test_rows_come_in_order():
    rows = [replace(row(), names=(name,)) for name in "abc"]
    assert [r.names for r in feeding.prefetch_to_device(rows, CPU)] == [("a",), ("b",), ("c",)]
    assert list(feeding.prefetch_to_device([], CPU)) == []


@pytest.mark.gpu
def test_rows_come_in_order_to_a_gpu():
    rows = [feeding.pin(row(length)) for length in (20, 30, 40)]
    for given, found in zip(rows, feeding.prefetch_to_device(rows, GPU), strict=True):
        assert found.input_ids.is_cuda
        assert torch.equal(found.input_ids.cpu(), given.input_ids)
    assert list(feeding.prefetch_to_device([], GPU)) == []
