"""Helpers shared by all rooms: the module `common` in the checkout, `streamclr.common` once installed."""

if __package__ == "pipeline":
    from common import *  # noqa: F403
else:
    from ..common import *  # noqa: F403
