import math

import numpy as np
import torch

from evaluation.report.representation import plane, rankme


def test_rank_of_equal_singular_values_is_their_number_and_of_copies_is_one():
    orthonormal = torch.linalg.qr(torch.randn(64, 24, generator=torch.Generator().manual_seed(0))).Q
    assert math.isclose(rankme(3 * orthonormal), 24, rel_tol=1e-4)
    assert math.isclose(rankme(torch.ones(50, 24)), 1, rel_tol=1e-3)


def test_rank_is_the_exponential_of_the_entropy_of_the_singular_values():
    p = torch.tensor([0.5, 0.25, 0.25])
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).Q
    assert math.isclose(rankme(torch.diag(p) @ rotation), 2**1.5, rel_tol=1e-4)  # entropy of 1.5 bits


def test_the_map_separates_clusters_and_repeats():
    centers = torch.eye(16)[:2].repeat_interleave(30, 0)
    features = centers + 0.05 * torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    points = plane(features)
    first, second = points[:30], points[30:]
    assert points.shape == (60, 2)
    within = max(np.linalg.norm(part - part.mean(0), axis=1).mean() for part in (first, second))
    assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * within
    np.testing.assert_array_equal(points, plane(features))


def test_four_images_have_no_map():
    assert plane(torch.randn(4, 8)).shape == (0, 2)
