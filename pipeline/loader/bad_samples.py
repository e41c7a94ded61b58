"""Unreadable samples: replace them, record them, and stop the run if there are too many."""

import json
import threading
from pathlib import Path

import numpy as np

from ..common import PIPELINE, UserError
from ..philox import uniforms
from ..shards.dataset import ShardSet
from ..shards.reader import ReadFailure

REPLACEMENT_STREAM = 2**32 - 4
"""Random number stream of replacements, distinct from those of sampler, views and conversion."""
CANDIDATES = 16
UNDECODABLE = ReadFailure("the image can't be decoded")


class BadSampleTracker:
    """Replacements for samples that cannot be read or decoded, so that a few of them do not stop a run.

    The replacement is a function of (seed, epoch, sample): every rank and every resumed run chooses the same one. A
    sample known to be bad is not read again, unless the failure was transient; then it is retried in the next epoch.

    Args:
        shards: shard set of the samples.
        seed: seed of the run.
        max_bad: largest fraction of an epoch's samples that may be replaced, per epoch started.
        path: `bad_samples.jsonl`, one row {"shard", "key", "reason"} per bad sample; None to keep no file.
        population: (n,) int64, samples from which replacements are drawn; None for all.
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
        self._retry_after: dict[int, int] = {}  # sample -> epoch
        self._adding = threading.Lock()
        self.replaced = 0
        """Number of replacements by this process; in a resumed run, rank 0 starts from the total of all ranks."""

    def __len__(self) -> int:
        """Number of samples in an epoch."""
        return len(self.shards) if self.population is None else len(self.population)

    def choose(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Replace every sample that is known to be bad; `samples` and the result are (n,) int64.

        Raises:
            UserError: all candidates for a replacement are bad as well.
        """
        if not self.reasons:
            return samples
        return np.array([self._replacement(int(sample), epoch) for sample in samples], np.int64)

    def _is_bad(self, sample: int, epoch: int) -> bool:
        return sample in self.reasons and epoch <= self._retry_after.get(sample, epoch)

    def _replacement(self, sample: int, epoch: int) -> int:
        if not self._is_bad(sample, epoch):
            return sample
        drawn = uniforms(self.seed, epoch, np.array([sample]), REPLACEMENT_STREAM, CANDIDATES)[0]
        for i in (drawn * len(self)).astype(np.int64).tolist():
            candidate = i if self.population is None else int(self.population[i])
            if not self._is_bad(candidate, epoch):
                return candidate
        raise UserError(
            f"An image of {self.shards.root} can't be used ({self.reasons[sample]}), nor can {CANDIDATES} "
            f"replacements; use `python -m {PIPELINE}.shards verify {self.shards.root}` to find the damaged shards."
        )

    def add(self, failures: dict[int, ReadFailure], epoch: int) -> None:
        """Record samples that failed in an epoch; those with a transient failure are retried after it.

        Args:
            failures: sample -> why it cannot be used.
        """
        with self._adding:  # batches are augmented in several threads
            rows = []
            for sample, failure in failures.items():
                self._retry_after.pop(sample, None)
                if failure.transient:
                    self._retry_after[sample] = epoch
                if sample in self.reasons:
                    continue
                self.reasons[sample] = failure.reason
                shard = int(np.searchsorted(self.shards.shard_starts, sample, side="right")) - 1
                file = self.shards.manifest["shards"][shard]["file"]
                rows.append(json.dumps({"shard": file, "key": self._key(sample), "reason": failure.reason}))
            if self.path is None:
                return
            # other ranks, the evaluation and earlier parts of the run append to the same file
            known = set(self.path.read_text(errors="replace").splitlines()) if self.path.exists() else set()
            with self.path.open("a") as file:
                # one write, so that rows stay whole
                file.write("".join(f"{row}\n" for row in rows if row not in known))

    def _key(self, sample: int) -> str:
        return self.shards.index["key"][sample].decode(errors="replace")

    def count(self, replaced: int, epoch: int) -> None:
        """Add the number of replacements in a batch.

        Raises:
            UserError: this process alone has replaced more than `check` allows.
        """
        self.replaced += replaced
        self.check(self.replaced, epoch)

    def check(self, replaced: int, epoch: int) -> None:
        """Compare the number of replacements up to and including an epoch with the limit.

        The limit grows by whole epochs, not by batches. Otherwise an allowed fraction of bad images would stop a run
        whose order, or whose distribution over ranks, happens to put many of them first.

        Args:
            replaced: number of replacements by one process, or the sum over all.

        Raises:
            UserError: more than `max_bad` of the samples were replaced.
        """
        samples = len(self) * (epoch + 1)
        if replaced > self.max_bad * samples:
            listed = f", listed in {self.path}" if self.path is not None else ""
            last = ""
            if self.reasons:  # empty if only other ranks have seen bad samples
                sample, reason = next(reversed(self.reasons.items()))
                last = f", the last one {self._key(sample)} ({reason})"
            raise UserError(
                f"{replaced} of {samples} images of {self.shards.root} were bad{listed}{last}, which is more than "
                f"--loader.max-bad {self.max_bad:g} allows; use `python -m {PIPELINE}.shards verify "
                f"{self.shards.root}` to find damaged shards and copy them again, or raise --loader.max-bad."
            )
