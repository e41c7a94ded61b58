"""From encoded images in shards to augmented views on the device."""
