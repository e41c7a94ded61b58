"""Data pipeline: from images encoded in WebDataset shards to augmented views on the device."""
