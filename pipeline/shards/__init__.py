"""Shard sets: WebDataset tars with an index per tar, opened, read, cached, indexed and verified."""
