"""What the loss takes from the module `common` of the checkout, which is `streamclr.common` once installed."""

if __package__ == "loss":
    from common import UserError, check_range, has_c_compiler
else:
    from ..common import UserError, check_range, has_c_compiler

OPERATOR_NAMESPACE = __package__.split(".")[0]
"""Namespace of this package's custom operators. torch refuses to register a name twice, and one process may import both
`loss` from the checkout and `streamclr.loss`."""

__all__ = ["OPERATOR_NAMESPACE", "UserError", "check_range", "has_c_compiler"]
