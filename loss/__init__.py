from loss.distill import distillation, labelled_cross_entropy
from loss.ntxent import nt_xent

__all__ = ["distillation", "labelled_cross_entropy", "nt_xent"]
