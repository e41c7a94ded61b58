"""Encoded bytes from shards: one read per sample at the offset that the index gives."""

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from errors import UserError
from pipeline.shards import ShardSet, filesystem


class Reader:
    """Reads samples of a shard set by their index; holds no file open, so any number of threads may call it.

    Local shards are opened once per call, remote ones read by byte ranges, all of a call at once.
    """

    def __init__(self, shards: ShardSet):
        self.shards = shards
        self.fs, root = filesystem(shards.root)
        self.paths = [f"{root}/{shard['file']}" for shard in shards.manifest["shards"]]

    def __call__(self, samples: np.ndarray) -> list[bytes]:
        """The encoded images of `samples` ((n,) integers), in that order.

        Raises:
            UserError: a shard is missing or shorter than its index says.
        """
        rows = self.shards.index[samples]
        numbers = np.searchsorted(self.shards.shard_starts, samples, side="right") - 1
        try:
            if isinstance(self.fs, LocalFileSystem):
                encoded = self._read_local(numbers, rows["offset"], rows["size"])
            else:
                paths = [self.paths[shard] for shard in numbers]
                ends = (rows["offset"] + rows["size"]).tolist()
                encoded = self.fs.cat_ranges(paths, rows["offset"].tolist(), ends, on_error="raise")
        except OSError as error:
            raise UserError(f"A shard of {self.shards.root} can't be read ({error}): copy it again.") from error
        for data, size, shard in zip(encoded, rows["size"], numbers, strict=True):
            if len(data) != size:
                path = self.paths[shard]
                raise UserError(f"{path} is shorter than its index says: copy it again or convert the images anew.")
        return encoded

    def _read_local(self, numbers: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> list[bytes]:
        encoded = [b""] * len(numbers)
        for shard in np.unique(numbers):
            with open(self.paths[shard], "rb", buffering=0) as tar:  # a buffer would read past every sample
                for i in np.flatnonzero(numbers == shard):
                    tar.seek(int(offsets[i]))
                    encoded[i] = tar.read(int(sizes[i]))
        return encoded
