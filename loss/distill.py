"""Distillation: a student learns the probabilities that its teacher gives to the classes."""

from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between both softmaxes (arXiv 2006.10029, section 2, equation 2), averaged over the images.

        P_tau(y | x) = exp(f(x)[y] / tau) / sum_y' exp(f(x)[y'] / tau)
        L = - mean_x sum_y P_tau^teacher(y | x) log P_tau^student(y | x)

    Args:
        student, teacher: (B, C) logits; no gradient goes to the teacher's.
        temperature: tau of both.

    Returns:
        () float32. As in the equation there is no factor tau^2, which arXiv 1503.02531 and the official code's
        notebook have: the gradient grows as tau falls.
    """
    target = (teacher.detach().float() / temperature).softmax(1)
    return -(target * log_softmax(student.float() / temperature, 1)).sum(1).mean()


def labelled_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy summed over the images that have a label and divided by the number of all, () float32.

    So that beside `distillation` it has the weight of equation 3, whose sums run over labelled and over all images.

    Args:
        logits: (B, C). label: (B,) int64, -1 for none.
    """
    return cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum") / len(label)
