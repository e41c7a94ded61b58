"""From a shard set to batches on the device: sample order, prefetching, unreadable images, subsets."""
