from loss.ntxent import nt_xent

__all__ = ["nt_xent"]
