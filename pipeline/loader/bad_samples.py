"""Samples that can't be read or decoded: replaced, written down, counted, and past a share of all a reason to stop."""

import json
from pathlib import Path

import numpy as np

from ..common import UserError
from ..philox import uniforms
from ..shards.dataset import ShardSet

REPLACEMENT_STREAM = 2**32 - 4  # of random numbers: apart from order, views and conversion
CANDIDATES = 16


class BadSampleTracker:
    """Keeps a run going where a few images are bad.

    What takes a bad sample's place is a function of (seed, epoch, sample): a run and its continuation put in the same,
    on any rank. A sample known to be bad is not tried again, but for one that the disk failed to read: that is tried in
    the next epoch.

    Args:
        shards: where the samples are.
        seed: of the run.
        max_bad: the share of the samples of an epoch that may be replaced, for every epoch that was started.
        path: `bad_samples.jsonl`, one row {"shard", "key", "reason"} per bad sample; None keeps no file.
        population: (n,) samples from which replacements come; None for all.
    """

    def __init__(
        self,
        shards: ShardSet,
        seed: int,
        max_bad: float,
        path: Path | None = None,
        population: np.ndarray | None = None,
    ):
        self.shards, self.seed, self.max_bad, self.path = shards, seed, max_bad, path
        self.population = population
        self.reasons: dict[int, str] = {}
        self._tried_after: dict[int, int] = {}  # epochs
        self.replaced = 0
        """Replacements by this process; in a resumed run, rank 0 starts from the total of all ranks."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.shards) if self.population is None else len(self.population)

    def choose(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """`samples` ((n,) int64) with every one that is known to be bad replaced.

        Raises:
            UserError: all candidates for a replacement are bad as well.
        """
        if not self.reasons:
            return samples
        return np.array([self._good(int(sample), epoch) for sample in samples], np.int64)

    def _bad(self, sample: int, epoch: int) -> bool:
        return sample in self.reasons and epoch <= self._tried_after.get(sample, epoch)

    def _good(self, sample: int, epoch: int) -> int:
        if not self._bad(sample, epoch):
            return sample
        drawn = uniforms(self.seed, epoch, np.array([sample]), REPLACEMENT_STREAM, CANDIDATES)[0]
        for place in (drawn * len(self)).astype(np.int64).tolist():
            candidate = place if self.population is None else int(self.population[place])
            if not self._bad(candidate, epoch):
                return candidate
        raise UserError(
            f"An image of {self.shards.root} can't be used ({self.reasons[sample]}), nor can {CANDIDATES} others in "
            f"its place: see with `python -m pipeline.shards verify {self.shards.root}` what is wrong with the shards."
        )

    def add(self, bad: dict[int, str], until: int | None = None) -> None:
        """Write down samples that turned out to be bad, each with one sentence that says why.

        Args:
            until: the epoch after which they are tried again; None for never.
        """
        for sample in bad:
            self._tried_after.pop(sample, None)
            if until is not None:
                self._tried_after[sample] = until
        bad = {sample: reason for sample, reason in bad.items() if sample not in self.reasons}
        rows = []
        for sample, reason in bad.items():
            shard = int(np.searchsorted(self.shards.shard_starts, sample, side="right")) - 1
            file, key = (
                self.shards.manifest["shards"][shard]["file"],
                self.shards.index["key"][sample].decode(errors="replace"),
            )
            rows.append(json.dumps({"shard": file, "key": key, "reason": reason}))
        self.reasons |= bad
        if self.path is None:
            return
        # other ranks, the evaluation and earlier parts of the run write there too
        known = set(self.path.read_text(errors="replace").splitlines()) if self.path.exists() else set()
        with self.path.open("a") as file:
            file.write("".join(f"{row}\n" for row in rows if row not in known))  # in one piece

    def count(self, replaced: int, epoch: int) -> None:
        """Add the replacements of a batch.

        Raises:
            UserError: this process alone replaced more than `check` allows.
        """
        self.replaced += replaced
        self.check(self.replaced, epoch)

    def check(self, replaced: int, epoch: int) -> None:
        """Compare a number of replacements up to this epoch, of one process or the sum over all, with the limit.

        The limit grows by whole epochs, not by batches. Otherwise an allowed share of bad images would stop a run
        whose order, or whose division among the ranks, happens to put many of them first.

        Raises:
            UserError: they are more than `max_bad` of the samples.
        """
        samples = len(self) * (epoch + 1)
        if replaced > self.max_bad * samples:
            where = f", listed in {self.path}" if self.path is not None else ""
            last = ""
            for sample, reason in reversed(self.reasons.items()):  # other ranks may have met all of them
                last = f", the last {self.shards.index['key'][sample].decode(errors='replace')} ({reason})"
                break
            raise UserError(
                f"{replaced} of {samples} images of {self.shards.root} were bad{where}{last}, which is more than "
                f"--loader.max-bad {self.max_bad:g} allows: run `python -m pipeline.shards verify {self.shards.root}` to "
                "find damaged shards and copy them again, or raise --loader.max-bad."
            )
