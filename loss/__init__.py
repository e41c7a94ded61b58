from .distill import distillation, labeled_cross_entropy
from .ntxent import nt_xent

__all__ = ["distillation", "labeled_cross_entropy", "nt_xent"]
