"""The order of the rows: every row once an epoch, the same on any machine, and no place that a resume could miss."""

from __future__ import annotations

import numpy as np
import pytest

from telechat_mindie.training.order import BLANK, Order, held_out


def test_every_epoch_has_each_row_once_in_an_order_of_its_own():
    order = Order(11, seed=3)
    epochs = order.take(0, 33).reshape(3, 11)
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert not np.array_equal(Order(11, seed=4).take(0, 11), epochs[0])


@pytest.mark.parametrize("batch", [1, 2, 4, 11, 25])
def test_batches_go_on_over_the_end_of_an_epoch(batch):
    order = Order(11, seed=0)
    parts = [order.take(begin, batch) for begin in range(0, 50, batch)]
    assert np.array_equal(np.concatenate(parts)[:50], order.take(0, 50))


def test_the_order_is_the_same_on_any_machine():
    # Written down once: a numpy or Python that gave another order would make a resumed run another run.
    assert Order(8, seed=0).take(0, 16).tolist() == [3, 7, 4, 0, 2, 6, 5, 1, 0, 5, 6, 1, 3, 2, 4, 7]
    assert Order(8, seed=0, shuffle=False).take(6, 4).tolist() == [6, 7, 0, 1]


def test_the_last_step_is_filled_up_with_blank_rows():
    assert Order(5, seed=0, shuffle=False, end=7).take(4, 4).tolist() == [4, 0, 1, BLANK]


def test_position_is_epoch_and_row():
    order = Order(11, seed=0)
    assert [order.position(taken) for taken in (0, 10, 11, 25)] == [(0, 0), (0, 10), (1, 0), (2, 3)]


@pytest.mark.parametrize("rows, share, expected", [(100, 0.02, 2), (10, 0.02, 1), (2, 0.9, 1)])
def test_held_out_rows_are_not_trained_on(rows, share, expected):
    trained, kept = held_out(rows, share, seed=1)
    assert len(kept) == expected and sorted([*trained, *kept]) == list(range(rows))
    assert np.array_equal(held_out(rows, share, seed=1)[1], kept)
