"""Rows of the benchmark of weight gradients, on a small shape."""

from bench.convolution import measure


def test_a_row_compares_torch_with_the_product():
    row = measure(channels=12, side=2, views=2, seconds=0)
    assert row["used"] and row["rounds"] == 3
    assert row["ratio"] > 0 and row["ratio_to_floor"] > 0
