"""Shard sets: WebDataset tars with an index per tar, opened, read, cached, indexed and verified."""

from .dataset import ShardSet, open_shards, open_splits

__all__ = ["ShardSet", "open_shards", "open_splits"]
