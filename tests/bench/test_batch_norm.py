"""The bench of batch norm on a small batch."""

import pytest
import torch

from bench.batch_norm import measure


@pytest.mark.parametrize("added", [False, True])
def test_row(added):
    row = measure(16, 4, views=8, dtype=torch.float32, added=added, seconds=0.05)
    assert row["dtype"] == "float32" and (row["channels"], row["map"], row["shortcut"]) == (16, 4, added)
    assert row["rounds"] >= 1 and min(row["torch_ms"], row["kernels_ms"], row["floor_ms"], row["ratio"]) > 0
