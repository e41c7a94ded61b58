"""Conversion of image collections into shard sets."""
