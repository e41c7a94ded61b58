"""Distillation: a student learns the probabilities that its teacher gives to the classes."""

from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between both softmaxes (arXiv 2006.10029, section 2, equation 2), averaged over the images.

        P_tau(y | x) = exp(f(x)[y] / tau) / sum_y' exp(f(x)[y'] / tau)
        L = - mean_x sum_y P_tau^teacher(y | x) log P_tau^student(y | x)

    Args:
        student, teacher: (B, C) logits, B and C >= 1; no gradient goes to the teacher's.
        temperature: tau of both, positive.

    Returns:
        () float32. As in the equation there is no factor tau^2, which arXiv 1503.02531 and the official code's
        notebook have: the gradient grows as tau falls.
    """
    if student.ndim != 2 or student.shape != teacher.shape or 0 in student.shape:
        raise ValueError(
            "student and teacher must hold logits (B, C) of the same images and classes; got shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    target = (teacher.detach().float() / temperature).softmax(1)
    return -(target * log_softmax(student.float() / temperature, 1)).sum(1).mean()


def labeled_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy summed over the images that have a label and divided by the number of all, () float32.

    Next to `distillation` it has the weight of equation 3, whose sums run over labeled and over all images.

    Args:
        logits: (B, C), B and C >= 1. label: (B,) int64, -1 for none.
    """
    if logits.ndim != 2 or 0 in logits.shape or label.shape != logits.shape[:1]:
        raise ValueError(
            "logits (B, C) and label (B,) must be of the same images; got shapes "
            f"{tuple(logits.shape)} and {tuple(label.shape)}"
        )
    return cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum") / len(label)
