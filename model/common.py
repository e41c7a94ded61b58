"""Helpers shared by all rooms: the module `common` in the checkout, `streamclr.common` once installed."""

if __package__ == "model":
    from common import UserError, available_cores, check_range, file_sha256, progress_bar, replacing, save_tensors
else:
    from ..common import UserError, available_cores, check_range, file_sha256, progress_bar, replacing, save_tensors

OPERATOR_NAMESPACE = __package__.split(".")[0]
"""Namespace of this package's custom operators. torch refuses to register a name twice, and one process may import both
`model` from the checkout and `streamclr.model`."""

__all__ = [
    "OPERATOR_NAMESPACE",
    "UserError",
    "available_cores",
    "check_range",
    "file_sha256",
    "progress_bar",
    "replacing",
    "save_tensors",
]
