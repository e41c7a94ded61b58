"""Helpers shared by all rooms: the module `common` in the checkout, `streamclr.common` once installed."""

if __package__ == "engine":
    from common import (
        UserError,
        available_cores,
        check_range,
        compiled,
        file_sha256,
        progress_bar,
        replacing,
        save_tensors,
    )
else:
    from ..common import (
        UserError,
        available_cores,
        check_range,
        compiled,
        file_sha256,
        progress_bar,
        replacing,
        save_tensors,
    )

__all__ = [
    "UserError",
    "available_cores",
    "check_range",
    "compiled",
    "file_sha256",
    "progress_bar",
    "replacing",
    "save_tensors",
]
