import pytest
import torch.distributed as dist


@pytest.fixture
def two_ranks(monkeypatch):
    """Pretend to be one of two ranks, for code that converts modules but does not communicate."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
