"""The rotary tables against the formulas written out once more, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_mindie.model.rope import ResidentRotary, RotaryTable

HEAD_DIM = 16


def angles(positions, theta=10000.0):
    return positions[:, None] * theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)


@given(
    st.integers(1, 4096),
    st.sampled_from([(8192, 8192), (32, 16), (64, 64), (128, 512)]),
    st.sampled_from([1e4, 5e5, 1e6]),
)
def test_dynamic_ntk(length, lengths, theta):
    trained, base = lengths
    positions = np.array([0, length // 2, length - 1])
    cos, sin = RotaryTable(HEAD_DIM, trained, base, theta=theta).tables(positions, np.full(3, length))
    seen = max(length, trained)
    alpha = max(2 ** math.ceil(math.log2(seen / base) + 1) - 1, 1)
    scale = 1 if seen <= trained else 0.1 * math.log(seen / trained) + 1
    wanted = angles(positions, theta * alpha ** (HEAD_DIM / (HEAD_DIM - 2)))
    # float32 angles: a relative error of 1e-7 of an angle of up to `length` radians.
    np.testing.assert_allclose(cos, np.cos(wanted) * scale, atol=2e-6 + 3e-7 * length)
    np.testing.assert_allclose(sin, np.sin(wanted) * scale, atol=2e-6 + 3e-7 * length)


def test_length_is_per_sequence():
    table = RotaryTable(HEAD_DIM, 32, 16)
    positions, lengths = np.array([3, 3, 3]), np.array([8, 100, 300])
    together = table.tables(positions, lengths)
    for row in range(3):
        alone = table.tables(positions[row : row + 1], lengths[row : row + 1])
        np.testing.assert_array_equal(together[0][row], alone[0][0])
    assert len({tuple(row) for row in together[0]}) == 3


def test_up_to_the_trained_length_it_is_the_plain_table():
    positions, lengths = np.arange(100), np.full(100, 100)
    extended = RotaryTable(HEAD_DIM, 8192, 8192).tables(positions, lengths)
    plain = RotaryTable(HEAD_DIM, 8192, 8192, "None").tables(positions, lengths)
    np.testing.assert_array_equal(extended[0], plain[0])


def test_mindformers_other_methods():
    positions, lengths = np.arange(0, 4000, 400), np.full(10, 4000)
    interpolated, _ = RotaryTable(HEAD_DIM, extend_method="PI", scaling_factor=4.0).tables(positions, lengths)
    np.testing.assert_allclose(interpolated, np.cos(angles(positions / 4)), atol=1e-4)
    stretched, _ = RotaryTable(HEAD_DIM, extend_method="NTK", scaling_factor=4.0).tables(positions, lengths)
    np.testing.assert_allclose(stretched, np.cos(angles(positions, 40000.0)), atol=1e-3)
    given_base = RotaryTable(HEAD_DIM, extend_method="NTK", scaling_factor=4.0, theta=1e6).tables(positions, lengths)
    np.testing.assert_allclose(given_base[0], np.cos(angles(positions, 4e6)), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding(dtype):
    positions, lengths = np.arange(50), np.full(50, 50)
    exact, _ = RotaryTable(HEAD_DIM).tables(positions, lengths)
    rounded, _ = RotaryTable(HEAD_DIM, rotary_dtype=dtype).tables(positions, lengths)
    error = np.abs(rounded - exact).max()
    assert 0 < error <= {"float16": 2**-11, "bfloat16": 2**-8}[dtype]


class TestResident:
    """Tables that stay on a device give each token the row that the host's would, whatever its sequence's length."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(["DYNAMIC_NTK", "NTK", "PI", "None"]),
        st.sampled_from([(64, 64), (64, 32), (32, 64), (60, 7), (16, 16)]),
        st.integers(1, 200),
        st.lists(st.tuples(st.integers(1, 200), st.integers(0, 199)), min_size=1, max_size=12),
    )
    def test_rows(self, method: str, lens: tuple[int, int], longest: int, asked: list[tuple[int, int]]) -> None:
        table = RotaryTable(16, *lens, method, "float32", 2.0)
        lengths = np.array([min(length, longest) for length, _ in asked])
        positions = np.array(
            [position % length for (_, position), length in zip(asked, lengths, strict=True)], np.int32
        )
        resident = ResidentRotary(table, longest)
        rows, scale = resident.rows(positions, lengths)
        assert rows.dtype == np.int32 and len(resident.cos) < 3 * longest + 1
        for found, expected in zip((resident.cos, resident.sin), table.tables(positions, lengths), strict=True):
            got = found[rows] if scale is None else found[rows] * scale[:, None]
            np.testing.assert_array_equal(got, np.tile(expected, 2))

    def test_one_plain_table_up_to_the_training_length(self) -> None:
        resident = ResidentRotary(RotaryTable(16, 64, 64), 64)
        assert resident.cos.shape == (64, 16) and not resident.has_scale

    def test_rounded_as_the_hosts(self) -> None:
        table = RotaryTable(16, 64, 64, rotary_dtype="float16")
        positions = np.arange(64, dtype=np.int32)
        np.testing.assert_array_equal(ResidentRotary(table, 64).cos[:, :8], table.tables(positions, positions + 1)[0])

    def test_drafts_beyond_the_longest_sequence_have_the_last_row(self) -> None:
        for longest in (64, 100):
            resident = ResidentRotary(RotaryTable(16, 64, 64), longest)
            rows, _ = resident.rows(np.array([longest + 3], np.int32), np.array([longest + 4]))
            assert rows.tolist() == [len(resident.cos) - 1]
