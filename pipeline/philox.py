"""Counter-based random numbers: a value depends on its address only, never on earlier draws.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3), vectorized over numpy
arrays. The views of a sample are therefore independent of threads, ranks, backends and resumption.
"""

import numpy as np

MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32 with ten rounds.

    Args:
        counter: four integer arrays that broadcast against each other, with values below 2**32.
        key: two integers below 2**32.

    Returns:
        Four uint64 arrays of the broadcast shape, each holding 32 random bits.
    """
    c0, c1, c2, c3 = (c.astype(np.uint64) for c in np.broadcast_arrays(*counter))
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> SHIFT) ^ c1 ^ np.uint64(k0),
            product_1 & LOW,
            (product_0 >> SHIFT) ^ c3 ^ np.uint64(k1),
            product_0 & LOW,
        )
        k0, k1 = (k0 + WEYL_0) & 0xFFFFFFFF, (k1 + WEYL_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniforms(seed: int, epoch: int, sample: np.ndarray, stream: int | np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), addressed by (seed, epoch, sample, stream).

    Args:
        seed: seed of up to 64 bits.
        epoch: epoch below 2**32.
        sample: (n,) integers below 2**32.
        stream: number below 2**32 of an independent use, such as a view; (n,) integers for one per sample.
        count: number of values per sample.

    Returns:
        (n, count) float64.
    """
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    blocks = np.arange((count + 3) // 4)
    counter = (np.asarray(sample)[:, None], np.array(epoch), np.reshape(stream, (-1, 1)), blocks[None, :])
    words = np.stack(philox4x32(counter, key), axis=-1)  # (n, blocks, 4)
    return words.reshape(len(words), -1)[:, :count] * 2.0**-32
