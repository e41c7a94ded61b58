"""Fixture for tests of every implementation."""

import pytest


@pytest.fixture
def impl(request, monkeypatch):
    """impl="one pass" stands for "blockwise" of a small batch, and "blockwise" for that of a large one."""
    if request.param == "blockwise":
        monkeypatch.setattr("loss.cpu.one_pass.MAX_ROWS", 0)
    return "blockwise" if request.param == "one pass" else request.param
