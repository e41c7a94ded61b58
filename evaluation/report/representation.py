"""Numbers and a map that describe a representation without labels."""

import numpy as np
import torch
from torch import Tensor


def rankme(features: Tensor) -> float:
    """Effective rank of a representation: RankMe (arXiv 2210.02885, equations 1 and 2).

    The exponential of the entropy of the singular values, divided by their sum. It is at most min(n, D).

    Args:
        features: (n, D) float.
    """
    singular = torch.linalg.svdvals(features.double().cpu())
    p = singular / singular.sum().clamp_min(1e-300) + 1e-7
    return float((-(p * p.log()).sum()).exp())


def plane(features: Tensor) -> np.ndarray:
    """Map features (n, D) to points (n, 2) of a plane by t-SNE on cosine distances, deterministically.

    Fewer than five features have no meaningful map and give (0, 2).
    """
    if len(features) < 5:
        return np.zeros((0, 2))
    from sklearn.manifold import TSNE  # takes a second to import

    tsne = TSNE(metric="cosine", init="random", perplexity=min(30, (len(features) - 1) / 3), random_state=0)
    return tsne.fit_transform(features.float().cpu().numpy())
