"""Sources without exact copies."""

import hashlib
from dataclasses import replace

from ..common import progress_bar
from ..images.files import DecodeError
from .base import Source


def without_copies(sources: dict[str, Source]) -> dict[str, Source]:
    """Leave out every image with the bytes of an earlier one, and of the train split those of another split.

    Args:
        sources: split -> source. All images are read.
    """
    first: dict[bytes, str] = {}
    kept = {}
    for split in sorted(sources, key="train".__eq__):  # last, because what is evaluated on stays
        items, left_out = [], list(sources[split].left_out)
        with progress_bar(len(sources[split].items), f"{split}: looking for copies") as update:
            for label, key, address in sources[split].items:
                update(advance=1)
                try:
                    digest = hashlib.sha256(sources[split].read(*address)).digest()
                except (DecodeError, OSError):  # which the conversion lists
                    digest = b""
                if digest in first:
                    left_out.append((key, f"a copy of {first[digest]}"))
                    continue
                items.append((label, key, address))
                if digest:
                    first[digest] = f"{split}: {key}"
        kept[split] = replace(sources[split], items=items, left_out=left_out)
    return {split: kept[split] for split in sources}
