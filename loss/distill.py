"""Distillation losses: a student learns the class probabilities of a teacher."""

from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between a teacher's and a student's softmax (SimCLR v2, arXiv 2006.10029, section 2, equation 2).

        P_tau(y | x) = exp(f(x)[y] / tau) / sum_y' exp(f(x)[y'] / tau)
        L = - mean_x sum_y P_tau^teacher(y | x) log P_tau^student(y | x)

    Args:
        student: (B, C) logits, B and C >= 1.
        teacher: (B, C) logits of the same images, which receive no gradient.
        temperature: tau of both softmaxes, positive.

    Returns:
        () float32, averaged over the images. As in the equation, there is no factor tau^2, unlike in arXiv 1503.02531
        and the official notebook: the gradient grows as tau decreases.

    Raises:
        ValueError: the shapes differ or are empty, or temperature is not positive.
    """
    if student.ndim != 2 or student.shape != teacher.shape or 0 in student.shape:
        raise ValueError(
            "student and teacher must hold logits (B, C) of the same images and classes; got shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}.")
    target = (teacher.detach().float() / temperature).softmax(1)
    return -(target * log_softmax(student.float() / temperature, 1)).sum(1).mean()


def labeled_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy summed over the labeled images and divided by the number of all images.

    Added to `distillation`, it has the weight of equation 3 of SimCLR v2 (arXiv 2006.10029, section 2), which sums over
    labeled images here and over all images there.

    Args:
        logits: (B, C), B and C >= 1.
        label: (B,) int64; -1 for unlabeled images.

    Returns:
        () float32.

    Raises:
        ValueError: the shapes do not match or are empty.
    """
    if logits.ndim != 2 or 0 in logits.shape or label.shape != logits.shape[:1]:
        raise ValueError(
            "logits (B, C) and label (B,) must be of the same images; got shapes "
            f"{tuple(logits.shape)} and {tuple(label.shape)}."
        )
    return cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum") / len(label)
