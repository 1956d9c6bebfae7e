"""The native library's self-test: each kernel once, against numpy in float64, called as MindSpore calls it.

`python -m telechat_mindie.model.kernels.native_selftest LIBRARY` exits with 1 and a sentence where one is wrong.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from telechat_mindie.dtypes import DTYPES, WEIGHT_DTYPES

TOLERANCE = 1e-4
"""Of the largest result: float32 sums of a few hundred products are well below, a wrong element is well above."""

STORED = tuple(DTYPES[name].numpy for name in WEIGHT_DTYPES)


def call(library: ctypes.CDLL, name: str, inputs: list[np.ndarray], shape: tuple[int, ...]) -> tuple[int, np.ndarray]:
    """Call a kernel through the interface of ops.Custom(func_type="aot").

    Returns:
        The kernel's return value, 0 for success, and its float32 output of `shape`.
    """
    out = np.full(shape, np.nan, np.float32)
    arrays = [*inputs, out]
    count = len(arrays)
    dimensions = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    code = getattr(library, f"telechat_{name}")(
        count,
        (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
        (ctypes.c_int * count)(*(array.ndim for array in arrays)),
        (ctypes.c_void_p * count)(*map(ctypes.addressof, dimensions)),
        (ctypes.c_char_p * count)(*(array.dtype.name.encode() for array in arrays)),
        None,
        None,
    )
    return code, out


def run(library: ctypes.CDLL) -> list[str]:
    """What is wrong, a kernel a line; nothing when all is well."""
    random = np.random.default_rng(0)
    wrong = []

    def check(name: str, inputs: list[np.ndarray], expected: np.ndarray) -> None:
        code, found = call(library, name, inputs, expected.shape)
        error = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
        if code or not error <= TOLERANCE:
            wrong.append(f"{name} of {inputs[1].dtype} with {len(inputs[0])} rows: code {code}, error {error:.1e}")

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    eps = np.array([1e-5], np.float32)
    for stored in STORED:
        for tokens in (1, 3, 7, 37):
            depth, rows = 277, 70
            x, residual, norm = draw(tokens, depth), draw(tokens, rows), draw(depth)
            weight, bias = draw(rows, depth).astype(stored), draw(rows).astype(stored)
            normed = rms_norm(x, norm)
            product = x.astype(np.float64) @ weight.astype(np.float64).T
            both = normed @ weight.astype(np.float64).T
            check("linear", [x, weight], product)
            check("linear_add", [x, weight, bias, residual], product + bias.astype(np.float64) + residual)
            check("norm_linear", [x, norm, weight, eps], both)
            check("norm_swiglu", [x, norm, weight, eps], silu(both[:, : rows // 2]) * both[:, rows // 2 :])
            check("norm", [x, norm.astype(stored), eps], rms_norm(x, norm.astype(stored)))
        ids = np.array([3, 0, 69], np.int32)
        check("embed", [weight, ids], weight[ids].astype(np.float64))
        gates = np.array([[1, 0, 3], [0, 4, 0], [2, 0, 2], [1, 0, 5], [3, 0, 2], [0, 0, 1]], np.float32) / 4
        x, gate, up = draw(6, 70), draw(3, 70, 90).astype(stored), draw(3, 70, 90).astype(stored)
        down = draw(3, 90, 70).astype(stored)
        hidden = [silu(x @ g) * (x @ u) for g, u in zip(gate.astype(np.float64), up.astype(np.float64), strict=True)]
        outs = [h @ d for h, d in zip(hidden, down.astype(np.float64), strict=True)]
        check("experts", [x, gates, gate, up, down], np.einsum("te,eth->th", gates, np.stack(outs)))
        for dim in (32, 18):  # whole vectors, and not
            check("attention", *_attention_case(random, dim, stored))
    return wrong


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight.astype(np.float64))


def silu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1 + np.exp(-x)))


def _attention_case(random: np.random.Generator, dim: int, stored: np.dtype) -> tuple[list[np.ndarray], np.ndarray]:
    """Two sequences without rotation: a prefill of 5 tokens, and one token after 70 that lie in blocks of 16."""
    heads, kv_heads, block_size = 4, 2, 16
    qkv = random.standard_normal((7, (heads + 2 * kv_heads) * dim), np.float32)  # the last row is padding
    qkv[:, heads * dim :] = qkv[:, heads * dim :].astype(stored)
    keys, values = random.standard_normal((2, 8 * block_size, kv_heads * dim), np.float32).astype(stored)
    rotary = np.zeros((7, dim), np.float32)
    rotary[:, : dim // 2] = 1
    blocks = [6, 2, 7, 0, 3]
    sequences = np.array([[0, 5, 5, 0, 0, 0, 0, 0], [5, 1, 71, *blocks]], np.int32)
    history = (np.array(blocks)[:, None] * block_size + np.arange(block_size)).ravel()[:70]
    q, k, v = np.split(qkv.astype(np.float64), [heads * dim, (heads + kv_heads) * dim], axis=1)
    expected = np.zeros((7, heads * dim))
    for token in range(6):
        own = slice(0, token + 1) if token < 5 else slice(5, 6)
        past = history if token == 5 else history[:0]
        for head in range(heads):
            side = slice(head // 2 * dim, (head // 2 + 1) * dim)
            context = np.concatenate([keys[past, side], k[own, side]])
            scores = context @ q[token, head * dim : (head + 1) * dim] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            mixed = weights / weights.sum() @ np.concatenate([values[past, side], v[own, side]])
            expected[token, head * dim : (head + 1) * dim] = mixed
    slots = np.full(7, -1, np.int32)
    return [qkv, keys, values, rotary, slots, sequences, np.array([block_size], np.int32)], expected


def main(path: str) -> int:
    library = ctypes.CDLL(path)
    library.telechat_set_threads(2)
    wrong = run(library)
    if wrong:
        print(f"error: self-test failed: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
