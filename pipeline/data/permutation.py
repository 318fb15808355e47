"""A random order of any number of rows; any part of it is computed, without an array of all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
"""Of a Feistel network: three suffice where its function is random (Luby and Rackoff, 1988); ours
is a hash of two multiplications, whose order the tests cannot tell from a drawn one with eight."""
MULTIPLIERS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)  # SplitMix64's


def permute(places: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rows that stand at `places` [B] of a random order of `size` rows, determined by the `keys`.

    A Feistel network permutes the numbers below the next power of two; a place that it takes beyond
    `size` is permuted again until it falls below (Black and Rogaway, 2002): less than twice on
    average.
    """
    bits = max((size - 1).bit_length(), 2)
    rows = places.astype(np.uint64)
    outside = np.arange(len(rows))
    while len(outside):
        rows[outside] = _network(rows[outside], bits, keys)
        outside = outside[rows[outside] >= size]
    return rows.astype(np.int64)


def _network(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the numbers below 2 ** bits."""
    low_bits = bits // 2
    widths = [bits - low_bits, low_bits]
    halves = [values >> np.uint64(low_bits), values & np.uint64((1 << low_bits) - 1)]
    for number, key in enumerate(keys):
        changed, other = number % 2, 1 - number % 2
        halves[changed] = halves[changed] ^ _hash(halves[other], key, widths[changed])
    return (halves[0] << np.uint64(low_bits)) | halves[1]


def _hash(values: NDArray[np.uint64], key: np.uint64, bits: int) -> NDArray[np.uint64]:
    """So many bits of each value's hash."""
    mixed: NDArray[np.uint64] = (values + key) * MULTIPLIERS[0]
    mixed ^= mixed >> np.uint64(32)
    mixed *= MULTIPLIERS[1]
    mixed >>= np.uint64(64 - bits)
    return mixed
