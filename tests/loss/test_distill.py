"""Distillation losses compared with equations 2 and 3 of SimCLR v2 (arXiv 2006.10029)."""

import math

import pytest
import torch
from torch import Tensor

from loss import distillation, labeled_cross_entropy

EPS = 2**-24  # half an ulp of float32, in which both losses are computed


def logits(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """float32 from N(0, spread^2)."""
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(row: list[float], tau: float) -> list[float]:
    """P_tau of one image, in plain Python."""
    exponentials = [math.exp(f / tau) for f in row]
    return [e / sum(exponentials) for e in exponentials]


def distillation_in_loops(student: Tensor, teacher: Tensor, tau: float) -> float:
    """Equation 2 in plain Python, averaged over the images, in float64."""
    total = 0.0
    for f_student, f_teacher in zip(student.tolist(), teacher.tolist(), strict=True):
        p_student, p_teacher = probabilities(f_student, tau), probabilities(f_teacher, tau)
        total -= sum(p * math.log(q) for p, q in zip(p_teacher, p_student, strict=True))
    return total / len(student)


def gradient_in_loops(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """dL/df_student[y] = (P_student(y) - P_teacher(y)) / (tau B), (B, C) float64."""
    rows = [
        [(q - p) / (tau * len(student)) for p, q in zip(probabilities(t, tau), probabilities(s, tau), strict=True)]
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def loss_and_gradient(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    loss = distillation(student, teacher, tau)
    loss.backward()
    return loss.detach(), student.grad


def rounding(*logits: Tensor, tau: float) -> float:
    """Bound on the error of a log-probability in float32, and on the relative error of a probability.

    f / tau has an error of two half ulps, one of them from tau. Subtracting the maximum of the row, which has the same
    error, rounds a number of up to twice its size. The sum of C exponentials rounds C times, its logarithm once.
    """
    largest = max(f.abs().max().item() for f in logits) / tau
    c = logits[0].shape[1]
    return EPS * (2 * 2 * largest + 2 * largest + c + math.log(c) + 4)


def close_to(expected: float, *logits: Tensor, tau: float):
    """Tolerance of the mean of sum_y p log q: p and log q have errors of `rounding`, every addition half an ulp."""
    b, c = logits[0].shape
    return pytest.approx(expected, rel=0, abs=rounding(*logits, tau=tau) * (1 + expected) + EPS * (b + c) * expected)


# ---- equation 2


@pytest.mark.parametrize(("b", "c"), [(1, 2), (5, 7), (16, 100)])
@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0])
def test_equals_equation_2_in_loops(b, c, tau):
    student, teacher = logits(b, c, seed=1), logits(b, c, seed=2)
    loss, gradient = loss_and_gradient(student, teacher, tau)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == close_to(distillation_in_loops(student, teacher, tau), student, teacher, tau=tau)
    allowed = 2 * rounding(student, teacher, tau=tau) / (tau * b)  # that of both probabilities
    torch.testing.assert_close(gradient.double(), gradient_in_loops(student, teacher, tau), rtol=0, atol=allowed)


def test_two_images_by_hand():
    """tau = 1/2 doubles the logits, and exp(2 ln x) = x^2.

    Teacher (ln 2, 0) and (0, 0):          P = (4/5, 1/5) and (1/2, 1/2)
    student (0, ln 2) and (ln 3, 0):       P = (1/5, 4/5) and (9/10, 1/10)
        image 1: 4/5 ln 5 + 1/5 ln(5/4) = ln 5 - 1/5 ln 4
        image 2: 1/2 ln(10/9) + 1/2 ln 10 = ln 10 - ln 3
    Their mean is (ln 50 - ln 3 - 0.4 ln 2) / 2. The gradient, (P_student - P_teacher) / (1/2 * 2), is (-3/5, 3/5) and
    (2/5, -2/5).
    """
    student = torch.tensor([[0, math.log(2)], [math.log(3), 0]])
    teacher = torch.tensor([[math.log(2), 0], [0, 0]])
    loss, gradient = loss_and_gradient(student, teacher, 0.5)
    assert loss.item() == pytest.approx(1.2680759222680291, rel=8 * EPS)
    torch.testing.assert_close(gradient, torch.tensor([[-0.6, 0.6], [0.4, -0.4]]), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_minimal_when_the_student_equals_the_teacher(tau):
    teacher = logits(6, 10)
    loss, gradient = loss_and_gradient(teacher, teacher, tau)
    entropies = [-sum(p * math.log(p) for p in probabilities(row, tau) if p) for row in teacher.tolist()]
    assert loss.item() == close_to(sum(entropies) / 6, teacher, tau=tau)
    torch.testing.assert_close(gradient, torch.zeros(6, 10), rtol=0, atol=2 * rounding(teacher, tau=tau) / (6 * tau))
    for seed in range(1, 6):
        other = distillation(teacher + tau * logits(6, 10, seed=seed, spread=0.3), teacher, tau)
        assert other > loss and other.item() != close_to(loss.item(), teacher, tau=tau)


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(4, 5, seed=1).requires_grad_(), logits(4, 5, seed=2).requires_grad_()
    distillation(student, teacher, 1.0).backward()
    assert student.grad.any() and teacher.grad is None


def test_only_the_ratio_of_logits_and_temperature_matters():
    """tau = 1/4 equals logits times 4 exactly, because both are powers of two; there is no factor tau^2."""
    student, teacher = logits(6, 10, seed=1), logits(6, 10, seed=2)
    loss, gradient = loss_and_gradient(student, teacher, 0.25)
    scaled_loss, scaled_gradient = loss_and_gradient(4 * student, 4 * teacher, 1.0)
    assert torch.equal(loss, scaled_loss) and torch.equal(gradient, 4 * scaled_gradient)


def test_a_high_temperature_makes_all_classes_equal():
    """To first order in 1 / tau the loss is log C."""
    loss, gradient = loss_and_gradient(logits(6, 10, seed=1), logits(6, 10, seed=2), 1e6)
    assert loss.item() == pytest.approx(math.log(10), rel=1e-5)
    assert gradient.abs().max() < 1e-6 / 6


def test_a_low_temperature_makes_the_teachers_class_the_label():
    student, teacher = logits(6, 10, seed=1), logits(6, 10, seed=2)
    gap = teacher.topk(2).values
    tau = (gap[:, 0] - gap[:, 1]).min().item() / 40  # the other nine have at most 9 exp(-40) = 4e-17 of the probability
    expected = torch.nn.functional.cross_entropy(student.double() / tau, teacher.argmax(1)).item()
    assert distillation(student, teacher, tau).item() == close_to(expected, student, teacher, tau=tau)


def test_a_constant_added_to_all_logits_of_an_image_changes_nothing():
    student, teacher = logits(6, 10, seed=1), logits(6, 10, seed=2)
    moved, moved_teacher = student + 8 * torch.arange(6)[:, None], teacher - 8 * torch.arange(6)[:, None]
    expected = distillation_in_loops(student, teacher, 1.0)
    assert distillation(moved, moved_teacher, 1.0).item() == close_to(expected, moved, moved_teacher, tau=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_computed_in_float32(dtype):
    student, teacher = logits(6, 10, seed=1).to(dtype), logits(6, 10, seed=2).to(dtype)
    loss, gradient = loss_and_gradient(student, teacher, 0.1)
    expected, expected_gradient = loss_and_gradient(student.float(), teacher.float(), 0.1)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert gradient.dtype == dtype and torch.equal(gradient, expected_gradient.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distillation(student, teacher, 0.1), expected)


def test_large_logits_neither_overflow_nor_vanish():
    """exp(1e5) is out of range, but a student that prefers the wrong class by 1e4 at tau 0.1 has a loss of 1e5."""
    teacher, student = torch.tensor([[1e4, 0.0, -1e30]]), torch.tensor([[0.0, 1e4, -1e30]])
    loss, gradient = loss_and_gradient(student, teacher, 0.1)
    assert loss.item() == pytest.approx(1e5, rel=4 * EPS)
    torch.testing.assert_close(gradient, torch.tensor([[-10.0, 10.0, 0.0]]), rtol=4 * EPS, atol=0)


def test_a_class_with_teacher_probability_zero_contributes_nothing():
    student, teacher = logits(4, 5, seed=1), logits(4, 5, seed=2)
    without = teacher.index_fill(1, torch.tensor([3]), -math.inf)
    loss, gradient = loss_and_gradient(student, without, 1.0)
    assert loss.item() == close_to(distillation_in_loops(student, without, 1.0), student, teacher, tau=1.0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_nan_and_inf_make_the_loss_nan(bad, whose):
    """The step is then skipped instead of applying a wrong gradient."""
    both = {"student": logits(4, 5, seed=1), "teacher": logits(4, 5, seed=2)}
    both[whose][2, 3] = bad
    loss, gradient = loss_and_gradient(**both, tau=1.0)
    assert loss.isnan() and gradient.isnan().any()


# ---- the labeled part of equation 3


def labeled_in_loops(f: Tensor, label: list[int]) -> float:
    total = 0.0
    for row, y in zip(f.tolist(), label, strict=True):
        if y >= 0:
            total -= math.log(probabilities(row, 1.0)[y])
    return total / len(label)


@pytest.mark.parametrize("label", [[3, 0, 6, 1], [-1, 2, -1, -1], [5, -1, 5, -1]])
def test_labeled_images_are_summed_and_divided_by_all_images(label):
    f = logits(4, 7).requires_grad_()
    loss = labeled_cross_entropy(f, torch.tensor(label))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == close_to(labeled_in_loops(f, label), f, tau=1.0)
    for row, gradient, y in zip(f.tolist(), f.grad, label, strict=True):
        expected = [(p - (k == y)) / 4 * (y >= 0) for k, p in enumerate(probabilities(row, 1.0))]
        assert gradient.tolist() == pytest.approx(expected, rel=0, abs=2 * rounding(f, tau=1.0) / 4)


def test_three_images_by_hand():
    """P = (3/4, 1/4) with label 0, (1/2, 1/2) without, (1/10, 9/10) with label 0: (ln(4/3) + ln 10) / 3."""
    f = torch.tensor([[math.log(3), 0], [0, 0], [0, math.log(9)]])
    loss = labeled_cross_entropy(f, torch.tensor([0, -1, 0]))
    assert loss.item() == pytest.approx(math.log(40 / 3) / 3, rel=8 * EPS)


def test_a_batch_without_labels_has_zero_loss_and_gradient():
    f = logits(4, 7).requires_grad_()
    loss = labeled_cross_entropy(f, torch.full((4,), -1))
    loss.backward()
    assert loss == 0 and torch.equal(f.grad, torch.zeros(4, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_labeled_16_bit_logits_are_computed_in_float32(dtype):
    f, label = logits(4, 7).to(dtype), torch.tensor([1, -1, 6, 0])
    expected = labeled_cross_entropy(f.float(), label)
    assert expected.dtype == torch.float32 and torch.equal(labeled_cross_entropy(f, label), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(labeled_cross_entropy(f, label), expected)


def test_large_labeled_logits_do_not_overflow():
    f = torch.tensor([[1e4, 0.0, -1e30], [0.0, 1e4, -1e30]], requires_grad=True)
    loss = labeled_cross_entropy(f, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(5e3, rel=4 * EPS)
    assert torch.equal(f.grad, torch.tensor([[0.5, -0.5, 0], [0, 0, 0]]))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_weighted_sum_is_equation_3(share):
    """Both sums, over labeled images and over all images, are divided by the number of all images."""
    student, teacher, label, tau = logits(6, 5, seed=1), logits(6, 5, seed=2), [2, -1, -1, 4, -1, 0], 0.5
    labeled_sum = sum(-math.log(probabilities(student[i].tolist(), 1.0)[y]) for i, y in enumerate(label) if y >= 0)
    taught_sum = 6 * distillation_in_loops(student, teacher, tau)
    expected = (share * labeled_sum + (1 - share) * taught_sum) / 6
    labeled, taught = labeled_cross_entropy(student, torch.tensor(label)), distillation(student, teacher, tau)
    total = share * labeled + (1 - share) * taught
    assert total.item() == close_to(expected, student, teacher, tau=tau)


# ---- invalid arguments


@pytest.mark.parametrize(
    ("student", "teacher"), [((6, 5), (6, 1)), ((6, 1), (6, 5)), ((6, 5), (1, 5)), ((5,), (5,)), ((0, 5), (0, 5))]
)
def test_logits_of_different_shapes_are_refused(student, teacher):
    """Broadcasting would return a number."""
    with pytest.raises(ValueError, match=r"of the same images and classes; got shapes"):
        distillation(torch.zeros(student), torch.zeros(teacher), 1.0)


@pytest.mark.parametrize("tau", [0, -1.0, math.nan])
def test_a_temperature_must_be_positive(tau):
    with pytest.raises(ValueError, match="temperature must be positive; got"):
        distillation(logits(6, 5), logits(6, 5), tau)


@pytest.mark.parametrize(("f", "label"), [((6, 5), (3,)), ((6, 5), (6, 5)), ((5,), ()), ((0, 5), (0,))])
def test_labels_of_a_different_shape_are_refused(f, label):
    with pytest.raises(ValueError, match=r"must be of the same images; got shapes"):
        labeled_cross_entropy(torch.zeros(f), torch.zeros(label, dtype=torch.int64))
