"""Helpers shared by all rooms: the module `common` in the checkout, `streamclr.common` once installed."""

if __package__ == "pipeline":
    from common import (
        UserError,
        available_cores,
        check_range,
        compiled,
        file_sha256,
        has_c_compiler,
        progress_bar,
        replacing,
    )
else:
    from ..common import (
        UserError,
        available_cores,
        check_range,
        compiled,
        file_sha256,
        has_c_compiler,
        progress_bar,
        replacing,
    )

__all__ = [
    "UserError",
    "available_cores",
    "check_range",
    "compiled",
    "file_sha256",
    "has_c_compiler",
    "progress_bar",
    "replacing",
]
