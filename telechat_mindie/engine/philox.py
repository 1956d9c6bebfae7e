"""Random numbers without state: each is a function of a seed and a counter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        counter: [4, n], 32 bits used of each.
        key: [2, n], likewise.

    Returns:
        [4, n] of 32 random bits each.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIERS[0] * word0
        product1 = _MULTIPLIERS[1] * word2
        word0, word1 = (product1 >> _HALF) ^ word1 ^ key0, product1 & _LOW
        word2, word3 = (product0 >> _HALF) ^ word3 ^ key1, product0 & _LOW
        key0 = (key0 + _KEY_STEPS[0]) & _LOW
        key1 = (key1 + _KEY_STEPS[1]) & _LOW
    return np.stack([word0, word1, word2, word3])


def uniforms(seeds: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """[n] numbers in [0, 1), 53 bits fine, one for each pair of seed and counter."""
    zero = np.zeros_like(counters)
    words = philox4x32(
        np.stack([counters & _LOW, counters >> _HALF, zero, zero]), np.stack([seeds & _LOW, seeds >> _HALF])
    )
    mantissa = (words[0] >> np.uint64(5)) * np.uint64(1 << 26) + (words[1] >> np.uint64(6))
    points: NDArray[np.float64] = mantissa * 2.0**-53
    return points
