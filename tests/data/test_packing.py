"""Rows: every example once and whole, few open at a time, well filled."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.data.examples import Example
from telechat_mindie.data.packing import IGNORED, PADDING, Packer


def example(length, serial):
    return Example(np.full(length, 100 + serial, np.int32), np.arange(length) % 2 == 1)


def pack(lengths, row_length, window):
    packer, rows, most = Packer(row_length, window), [], 0
    for serial, length in enumerate(lengths):
        rows += packer.add(example(length, serial))
        most = max(most, len(packer._open))
    return rows + list(packer.rest()), most


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=60), window=st.integers(1, 8))
def test_each_example_stands_whole_in_one_row(lengths, window):
    rows, most = pack(lengths, 20, window)
    assert most <= window
    seen = []
    for row in rows:
        token_ids, labels = row.arrays()
        assert token_ids.dtype == labels.dtype == np.int32 and len(token_ids) == len(labels) == 20
        used = sum(map(len, row.examples))
        assert (token_ids[used:] == PADDING).all() and (labels[used:] == IGNORED).all()
        trained = labels != IGNORED
        assert (labels[trained] == token_ids[trained]).all()
        for one in row.examples:
            seen.append(int(one.token_ids[0]) - 100)
            assert (token_ids[:used] == one.token_ids[0]).sum() == len(one)
    assert sorted(seen) == list(range(len(lengths)))


def test_long_rows_are_filled():
    lengths = np.random.default_rng(1).lognormal(5.3, 0.8, 5000).clip(10, 8193).astype(int)
    rows, _ = pack(lengths.tolist(), 8193, 256)
    assert lengths.sum() / (len(rows) * 8193) > 0.97
