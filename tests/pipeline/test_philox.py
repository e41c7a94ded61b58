"""Random numbers: published vectors of Random123, and dependence on the address only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.philox import philox4x32, uniforms


# kat_vectors of Random123 1.14, lines "philox4x32 10"
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, expected):
    words = philox4x32([np.array(word) for word in hexadecimal(counter)], tuple(hexadecimal(key)))
    assert [int(word) for word in words] == hexadecimal(expected)


def hexadecimal(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


def test_uniforms_are_the_words_in_sequence():
    """The counter is (sample, epoch, stream, block), the key (low and high word of the seed)."""
    seed = 0x299F31D0_A4093822
    expected = [word / 2**32 for word in hexadecimal("d16cfe09 94fdcceb 5001e420 24126ea1")]
    block = uniforms(seed, 0x85A308D3, np.array([0x243F6A88]), 0x13198A2E, 4 * 3 + 2)
    assert block.shape == (1, 14)
    zeros = uniforms(0, 0, np.array([0]), 0, 4)[0]
    assert zeros.tolist() == [word / 2**32 for word in hexadecimal("6627e8d5 e169c58d bc57ac4c 9b00dbd8")]
    assert [float(word) / 2**32 for word in philox4x32(pi_counter(), (0xA4093822, 0x299F31D0))] == expected
    second_block = philox4x32([np.array(c) for c in (0x243F6A88, 0x85A308D3, 0x13198A2E, 1)], (0xA4093822, 0x299F31D0))
    assert block[0, 4:8].tolist() == [float(word) / 2**32 for word in second_block]


def pi_counter() -> list[np.ndarray]:
    return [np.array(word) for word in hexadecimal("243f6a88 85a308d3 13198a2e 03707344")]


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**32 - 1),
    samples=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8),
    count=st.integers(1, 40),
)
def test_values_depend_on_their_address_only(seed, epoch, stream, samples, count):
    together = uniforms(seed, epoch, np.array(samples), stream, count)
    assert ((together >= 0) & (together < 1)).all()
    for row, sample in zip(together, samples, strict=True):
        assert np.array_equal(uniforms(seed, epoch, np.array([sample]), stream, 40)[0, :count], row)


def test_a_stream_for_each_sample():
    samples, streams = np.array([3, 3, 4, 4]), np.array([5, 2**32 - 1, 5, 0])
    together = uniforms(2**40 + 1, 7, samples, streams, 9)
    alone = [uniforms(2**40 + 1, 7, samples[[i]], int(streams[i]), 9)[0] for i in range(4)]
    assert np.array_equal(together, alone)


def test_values_depend_on_every_part_of_the_address():
    address = {"seed": 1, "epoch": 2, "sample": np.array([3]), "stream": 4, "count": 8}
    other = [{"seed": 1 + 2**32}, {"seed": 2}, {"epoch": 3}, {"sample": np.array([4])}, {"stream": 5}]
    rows = [uniforms(**address | change)[0] for change in [{}, *other]]
    assert len({tuple(row) for row in rows}) == len(rows)


def test_values_are_uniform_and_uncorrelated():
    u = uniforms(0, 0, np.arange(20_000), 0, 4)
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 63 + 5 * np.sqrt(2 * 63)  # chi-squared
    lagged = np.corrcoef(np.concatenate([u[:-1].T, u[1:].T]))
    assert np.abs(lagged - np.eye(8)).max() < 5 / np.sqrt(len(u))
