"""StreamCLR as an installed package: `streamclr.loss`, `streamclr.model`, `streamclr.pipeline`, `streamclr.evaluation`.

In a checkout the same folders are top-level packages, so that scripts read `from loss import nt_xent`.
"""

__version__ = "0.2.0"
