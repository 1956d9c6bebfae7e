"""The native CPU kernels' library, on each path that this CPU can run: against numpy, and what it refuses."""

from __future__ import annotations

import ctypes
import os
import threading

import ml_dtypes
import numpy as np
import pytest

from telechat_mindie.model.kernels import native_build, native_selftest
from telechat_mindie.model.kernels.native_build import NativeUnavailable

USABLE = native_build.usable_instruction_sets()
EPS = np.float32([1e-5])


def compiler_or_skip() -> None:
    try:
        native_build.compiler()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module", params=USABLE, ids=lambda found: found.name)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Each path that this CPU can run, compiled and self-tested."""
    compiler_or_skip()
    # One folder for the whole session, and for other test modules' sake the user's own cache stays as it is.
    built = native_build.build(request.param, tmp_path_factory.getbasetemp() / "kernels")
    return native_build.load(built, threads=2)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def call(library: ctypes.CDLL, name: str, inputs: list[np.ndarray], *shape: int) -> np.ndarray:
    code, out = native_selftest.call(library, name, inputs, shape)
    assert code == 0
    return out


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("dtype", native_selftest.STORED, ids=str)
@pytest.mark.parametrize(("tokens", "depth", "rows"), [(1, 1, 1), (2, 32, 5), (5, 31, 3), (8, 300, 97), (9, 33, 25)])
def test_linear_of_any_shape(library: ctypes.CDLL, dtype: np.dtype, tokens: int, depth: int, rows: int) -> None:
    x, weight = draw(0, tokens, depth), draw(1, rows, depth).astype(dtype)
    close(call(library, "linear", [x, weight], tokens, rows), x.astype(np.float64) @ weight.astype(np.float64).T)


@pytest.mark.parametrize("tokens", [16, 17, 33, 70])
def test_prefill_equals_decode(library: ctypes.CDLL, tokens: int) -> None:
    x, norm, weight = draw(0, tokens, 520), draw(1, 520), draw(2, 60, 520).astype(ml_dtypes.bfloat16)
    together = call(library, "norm_swiglu", [x, norm, weight, EPS], tokens, 30)
    alone = [call(library, "norm_swiglu", [x[t : t + 1], norm, weight, EPS], 1, 30) for t in range(tokens)]
    close(together, np.concatenate(alone))


def test_swiglu_saturates(library: ctypes.CDLL) -> None:
    x = np.float32([[1e4], [-1e4], [0.5]])
    out = call(library, "norm_swiglu", [x, np.float32([1]), np.float32([[200], [1]]), np.float32([0])], 3, 1)
    assert out.ravel().tolist() == pytest.approx([200, 0, 200], abs=1e-30)


def test_nan_is_not_hidden(library: ctypes.CDLL) -> None:
    qkv = draw(0, 1, 3 * 16)
    qkv[0, 0] = np.nan
    cache = np.zeros((4, 16), np.float32)
    inputs = [
        qkv,
        cache,
        cache.copy(),
        np.ones((1, 16), np.float32),
        np.int32([0]),
        np.int32([[0, 1, 1]]),
        np.int32([4]),
    ]
    code, out = native_selftest.call(library, "attention", inputs, (1, 16))
    assert code == 0 and np.isnan(out).all()


@pytest.mark.parametrize("dtype", native_selftest.STORED, ids=str)
def test_cache_is_written_and_rounded_to_its_dtype(library: ctypes.CDLL, dtype: np.dtype) -> None:
    # Without rotation the key is stored as it came. Subnormal, rounding and overflow cases stand at the front.
    qkv = draw(0, 3, 3 * 64) * np.float32(100)
    qkv[0, 64:72] = [1e-7, -3e-6, 65519, 65520, 1e30, 1 + 2**-9, 1 + 3 * 2**-9, -0.0]
    keys, values = np.zeros((2, 8, 64), dtype)
    rotary = np.zeros((3, 64), np.float32)
    rotary[:, :32] = 1
    inputs = [qkv, keys, values, rotary, np.int32([5, -1, 2]), np.int32([[0, 3, 3, 0]]), np.int32([4])]
    call(library, "attention", inputs, 3, 64)
    with np.errstate(over="ignore"):
        expected_keys, expected_values = qkv[:, 64:128].astype(dtype), qkv[:, 128:].astype(dtype)
    assert (keys[[5, 2]] == expected_keys[[0, 2]]).all() and (values[[5, 2]] == expected_values[[0, 2]]).all()
    untouched = [0, 1, 3, 4, 6, 7]
    assert not keys[untouched].any() and not values[untouched].any()


def attention_inputs() -> list[np.ndarray]:
    """A valid call: a sequence of two tokens after five, another of three new ones; kv width 16, blocks of 4."""
    cache = np.zeros((13, 16), np.float32)
    sequences = np.int32([[0, 2, 7, 2, 0], [2, 3, 3, 0, 0]])
    return [draw(0, 5, 64), cache, cache.copy(), draw(1, 5, 8), np.int32([0, 1, 2, -1, -1]), sequences, np.int32([4])]


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        (4, np.int32([0, 13, 2, -1, -1]), "slot 13"),
        (4, np.int32([0, -2, 2, -1, -1]), "slot -2"),
        (4, np.int64([0, 1, 2, 3, 4]), "dtype"),
        (5, np.int32([[0, 2, 7, 3, 0], [2, 3, 3, 0, 0]]), "block 3"),
        (5, np.int32([[0, 2, 7, -1, 0], [2, 3, 3, 0, 0]]), "block -1"),
        (5, np.int32([[0, 2, 11, 0, 0], [2, 3, 3, 0, 0]]), "too few blocks"),
        (5, np.int32([[0, 2, 1, 0, 0]]), "negative length"),
        (5, np.int32([[0, 3, 3, 0, 0], [2, 3, 3, 0, 0]]), "overlap"),
        (5, np.int32([[0, 6, 6, 0, 0]]), "outside the call"),
        (6, np.int32([0]), "block size"),
        (3, np.ones((5, 7), np.float32), "odd"),
        (0, np.ones((5, 60), np.float32), "width"),
        (1, np.zeros((13, 16), np.float16), "dtype"),
        (2, np.zeros((12, 16), np.float32), "differ in shape"),
    ],
)
def test_attention_refuses_what_lies_outside(
    library: ctypes.CDLL, capfd: pytest.CaptureFixture[str], argument: int, value: np.ndarray, reason: str
) -> None:
    inputs = attention_inputs()
    assert native_selftest.call(library, "attention", inputs, (5, 32))[0] == 0
    inputs[argument] = value
    assert native_selftest.call(library, "attention", inputs, (5, 32))[0] == 1
    assert reason in capfd.readouterr().err


def test_other_kernels_refuse_wrong_shapes(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    x, weight, norm = draw(0, 2, 8), draw(1, 6, 8), draw(2, 8)
    experts = draw(3, 2, 8, 4)
    wrong: list[tuple[str, list[np.ndarray], tuple[int, ...]]] = [
        ("linear", [x, draw(1, 6, 9)], (2, 6)),
        ("linear", [x, weight.astype(np.int32)], (2, 6)),
        ("linear", [x.astype(np.float16), weight], (2, 6)),
        ("linear", [x, weight], (2, 5)),
        ("norm_linear", [x, draw(2, 7), weight, EPS], (2, 6)),
        ("norm_swiglu", [x, norm, draw(1, 5, 8), EPS], (2, 2)),
        ("linear_add", [x, weight, draw(3, 5), draw(4, 2, 6)], (2, 6)),
        ("linear_add", [x, weight, draw(3, 6), draw(4, 3, 6)], (2, 6)),
        ("norm", [x, draw(2, 9), EPS], (2, 8)),
        ("embed", [weight, np.int32([0, 6])], (2, 8)),
        ("embed", [weight, np.int32([-1, 0])], (2, 8)),
        ("experts", [x, draw(4, 2, 3), experts, experts, draw(5, 2, 4, 8)], (2, 8)),
        ("experts", [x, draw(4, 2, 2), experts, experts.astype(np.float16), draw(5, 2, 4, 8)], (2, 8)),
    ]
    for name, inputs, shape in wrong:
        assert native_selftest.call(library, name, inputs, shape)[0] == 1, (name, [a.shape for a in inputs])
        assert f"telechat kernel {name}: " in capfd.readouterr().err


def test_callers_from_several_threads_do_not_disturb_each_other(library: ctypes.CDLL) -> None:
    weight = draw(0, 400, 200)
    xs = [draw(seed, 3, 200) for seed in range(4)]
    wrong: list[float] = []

    def work(x: np.ndarray) -> None:
        for _ in range(200):
            error = np.abs(call(library, "linear", [x, weight], 3, 400) - x @ weight.T).max()
            if not error < 1e-3:
                wrong.append(float(error))

    threads = [threading.Thread(target=work, args=(x,)) for x in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_has_a_pool_of_its_own(library: ctypes.CDLL) -> None:
    x, weight = draw(0, 3, 200), draw(1, 400, 200)
    expected = call(library, "linear", [x, weight], 3, 400)  # the parent's pool has its threads now
    child = os.fork()
    if child == 0:
        code, out = native_selftest.call(library, "linear", [x, weight], (3, 400))
        os._exit(0 if code == 0 and (out == expected).all() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_self_test_sees_a_wrong_kernel(library: ctypes.CDLL) -> None:
    class Wrong:
        """The library with a kernel that forgets the last row."""

        def __getattr__(self, name: str) -> object:
            kernel = getattr(library, name)
            if name != "telechat_norm_swiglu":
                return kernel

            def forgetful(count: int, data: object, ranks: object, shapes: object, *rest: object) -> int:
                for argument in (0, 4):  # x and the output have a row less
                    ctypes.c_int64.from_address(shapes[argument]).value -= 1  # type: ignore[index]
                return int(kernel(count, data, ranks, shapes, *rest))

            return forgetful

    assert native_selftest.run(library) == []
    found = native_selftest.run(Wrong())  # type: ignore[arg-type]
    assert found and all(line.startswith("norm_swiglu") for line in found)
