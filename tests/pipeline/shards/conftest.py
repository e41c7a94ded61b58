"""Shard sets that several tests serve from a web server or cache."""

import pytest

from pipeline.shards.dataset import ShardSet
from tests.pipeline.web_server import write_set


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> ShardSet:
    """Twenty-four shards of six samples, enough for a common index."""
    return write_set(tmp_path_factory.mktemp("sets") / "train", shards=24)


@pytest.fixture
def small(tmp_path) -> ShardSet:
    """Four shards of six samples."""
    return write_set(tmp_path / "small", shards=4)
