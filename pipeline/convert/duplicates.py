"""Sources without exact copies."""

import hashlib
from dataclasses import replace

from ..common import progress_bar
from ..images import DecodeError
from .base import Source


def without_copies(source: Source) -> Source:
    """Leave out every image with the bytes of an earlier one; the first one keeps its class. Reads all images."""
    first: dict[bytes, str] = {}
    kept, left_out = [], list(source.left_out)
    with progress_bar(len(source.items), f"{source.name}: copies") as update:
        for label, key, address in source.items:
            update(advance=1)
            try:
                digest = hashlib.sha256(source.read(*address)).digest()
            except (DecodeError, OSError):  # the conversion lists it
                digest = key.encode()
            if (other := first.setdefault(digest, key)) != key:
                left_out.append((key, f"a copy of {other}"))
            else:
                kept.append((label, key, address))
    return replace(source, items=kept, left_out=left_out)
