"""The queue of past projections: loss and gradients with it, what it holds, masks and blocks."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from loss import NegativeQueue, create_queue, distributed, nt_xent, nt_xent_and_append
from loss import queue as queue_module
from loss.cpu.workers import Workers
from loss.queue import log_sums
from tests.loss.cases import loss_and_gradients, trained_like

IMPLS = ["blockwise", "reference"]
DECOUPLED = pytest.mark.parametrize("decoupled", [False, True])


def past_of(n, d, length, filled, dtype=torch.float64):
    """A queue whose entries look like the anchors of `trained_like(n, d)` and often belong to the same samples."""
    queue = NegativeQueue(length, d).to(dtype)
    generator = torch.Generator().manual_seed(7)
    like = trained_like(n, d)[torch.randint(2 * n, (filled,), generator=generator)]
    entries = like + torch.randn(filled, d, dtype=torch.float64, generator=generator)
    queue.z[:filled] = normalize(entries).to(dtype)
    queue.sample[:filled] = torch.randint(2 * n, (filled,), generator=generator)
    queue.count += filled
    return queue


def denominators_in_loops(z, tau, decoupled, queue, sample):
    """The loss in plain Python: -s_ip + log of the sum over the batch and over entries of other samples."""
    z = normalize(z).tolist()
    n = len(z) // 2
    entries = list(zip(queue.z.tolist(), queue.sample.tolist(), strict=True))

    def weight(a, b):
        return math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / tau)

    losses = []
    for i, anchor in enumerate(z):
        p = (i + n) % (2 * n)
        total = sum(weight(anchor, z[j]) for j in range(2 * n) if j != i and not (decoupled and j == p))
        total += sum(weight(anchor, entry) for entry, owner in entries if owner not in (-1, sample[i % n].item()))
        losses.append(math.log(total) - math.log(weight(anchor, z[p])))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("filled", [0, 11, 30])
@DECOUPLED
def test_equals_the_sum_over_batch_and_entries_of_other_samples(impl, filled, decoupled):
    queue, sample = past_of(5, 7, 30, filled), torch.tensor([3, 0, 9, 4, 3])
    assert not filled or set(queue.sample[:filled].tolist()) & set(sample.tolist()), "something must be masked"
    z = trained_like(5, 7)
    actual = nt_xent(z, 0.3, impl=impl, decoupled=decoupled, queue=queue, sample=sample)
    expected = denominators_in_loops(z, 0.3, decoupled, queue, sample)
    assert actual.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@DECOUPLED
@pytest.mark.parametrize("block", [(2, 3), (4, 16), (5, 64)])
@pytest.mark.parametrize("tau", [0.005, 0.1])
def test_gradients_equal_autograd_of_the_reference(monkeypatch, decoupled, block, tau):
    monkeypatch.setattr(queue_module, "CPU_BLOCK", block)
    z, sample = trained_like(9, 16), torch.arange(9)
    options = {"queue": past_of(9, 16, 40, 37), "sample": sample}
    truth, actual = (
        loss_and_gradients(z, tau, None, partial(nt_xent, impl=impl, **options), decoupled)
        for impl in ("reference", "blockwise")
    )
    for ours, true in zip(actual[:2], truth[:2], strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-13 / tau)
    torch.testing.assert_close(actual[2], truth[2], rtol=1e-6, atol=0)  # a float32 temperature
    without = loss_and_gradients(z, tau, "reference", decoupled=decoupled)
    assert (without[1] - truth[1]).norm() > 1e-3 * truth[1].norm(), "the queue must matter"


@DECOUPLED
def test_gradient_equals_finite_differences(decoupled, monkeypatch):
    """Of the part that is the derivative of the loss: the queue counted once."""
    monkeypatch.setattr("loss.ntxent.twice", lambda z: z)
    z = trained_like(3, 5).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = {"impl": "blockwise", "queue": past_of(3, 5, 9, 9), "sample": torch.arange(3)}
    compute = partial(nt_xent, decoupled=decoupled, **options)
    assert torch.autograd.gradcheck(compute, (z, temperature))


@DECOUPLED
@pytest.mark.parametrize("tau", [0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_that_of_the_similarities(dtype, tau, decoupled):
    z, queue = trained_like(33, 48).to(dtype), past_of(33, 48, 3000, 2900, torch.float32)
    results = []
    for x, impl in ((z.double(), "reference"), (z, "blockwise")):
        compute = partial(nt_xent, impl=impl, queue=queue, sample=torch.arange(33))
        results.append(loss_and_gradients(x, torch.tensor(tau).item(), None, compute, decoupled))
    ulp = 2**-23 / tau  # of a similarity
    rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0  # of dL/dz, once
    # scalars may be small by cancellation: the errors of their terms count
    bounds = (2 * ulp, 0), (0, 4 * ulp + rounding), (2 * ulp / tau, 4 * ulp)
    for true, ours, (absolute, relative) in zip(*results, bounds, strict=True):
        assert (ours - true).norm() <= absolute + relative * true.norm()


@DECOUPLED
@pytest.mark.parametrize("impl", ["blockwise", "reference"])
def test_the_gradient_is_that_of_a_batch_completed_by_the_queue(impl, decoupled):
    """Seven images at equal angles, so that all rows have the same denominator; three of them are the batch."""
    rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    images = (torch.eye(9, dtype=torch.float64)[:7] + 0.1) @ rotation
    z, n = images.repeat(2, 1), 3
    whole_loss, whole, _ = loss_and_gradients(z, 0.2, impl, decoupled=decoupled)
    queue = NegativeQueue(8, 9).double()
    queue.append(images[n:].repeat(2, 1), torch.arange(n, 7))
    compute = partial(nt_xent, impl=impl, queue=queue, sample=torch.arange(n))
    loss, grad, _ = loss_and_gradients(images[:n].repeat(2, 1), 0.2, impl, compute, decoupled)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
    assert whole.norm() > 1e-3
    torch.testing.assert_close(grad * n / 7, whole.unflatten(0, (2, 7))[:, :n].flatten(0, 1), rtol=1e-12, atol=1e-14)


def test_a_queue_without_negatives_changes_nothing(monkeypatch):
    monkeypatch.setattr("loss.cpu.one_pass.MAX_ROWS", 0)
    z, queue = trained_like(6, 16, torch.float32), NegativeQueue(50, 16)
    expected = loss_and_gradients(z, 0.05, "blockwise")
    compute = partial(nt_xent, queue=queue, sample=torch.zeros(6, dtype=torch.int64))
    assert all(map(torch.equal, loss_and_gradients(z, 0.05, None, compute), expected)), "no entry is filled"
    queue.append(z, torch.zeros(6, dtype=torch.int64))
    assert all(map(torch.equal, loss_and_gradients(z, 0.05, None, compute), expected)), "all are of the same sample"


def test_zero_rows_get_no_gradient_and_nan_makes_the_loss_nan():
    z, queue = trained_like(6, 16, torch.float32), past_of(6, 16, 50, 50, torch.float32)
    compute = partial(nt_xent, queue=queue, sample=torch.arange(6))
    z[2] = 0
    loss, grad, _ = loss_and_gradients(z, 0.1, None, compute)
    assert loss.isfinite() and grad.isfinite().all() and not grad[2].any() and grad.any()
    z[2] = math.nan
    loss, grad, _ = loss_and_gradients(z, 0.1, None, compute)
    assert loss.isnan() and grad[2].isnan().all()


def test_the_last_projections_are_kept_in_order():
    """Batches of 8 rows in a queue of 20, which wraps around at other places each time."""
    queue, rows, samples = NegativeQueue(20, 6), [], []
    for step in range(7):
        z, sample = trained_like(4, 6, torch.float32, seed=step), torch.arange(4) + 10 * step
        queue.append(z.requires_grad_(), sample)
        rows += normalize(z.detach()).unbind()
        samples += sample.repeat(2).tolist()
        kept = min(len(rows), 20)
        newest = [(queue.count.item() - 1 - age) % 20 for age in range(kept)]
        torch.testing.assert_close(queue.z[newest], torch.stack(rows[::-1][:kept]))
        assert queue.sample[newest].tolist() == samples[::-1][:kept]
        assert (queue.sample == -1).sum() == 20 - kept
    assert not queue.z.requires_grad


def test_the_first_quarter_of_a_run_is_left_out():
    queue = create_queue(8, 6, steps=11, device=torch.device("cpu"))  # the first two batches of three samples
    kept = []
    for step in range(4):
        queue.append(trained_like(3, 6, torch.float32, seed=step), 3 * step + torch.arange(3))
        kept.append(set(queue.sample.tolist()))
    assert kept == [{-1}, {-1}, {-1, 6, 7, 8}, {7, 8, 9, 10, 11}] and queue.count == 24
    assert create_queue(0, 6, steps=11, device=torch.device("cpu")) is None


def test_a_batch_larger_than_the_queue_leaves_its_last_rows():
    queue, z = NegativeQueue(5, 6), trained_like(4, 6, torch.float32)
    queue.append(z, torch.arange(4))
    torch.testing.assert_close(queue.z, normalize(z)[-5:])
    assert queue.sample.tolist() == [3, 0, 1, 2, 3]


def test_a_batch_that_is_not_finite_is_left_out():
    queue, bad = NegativeQueue(12, 6), trained_like(4, 6, torch.float32)
    bad[3, 2] = math.inf
    queue.append(trained_like(4, 6, torch.float32), torch.arange(4))
    before = copy.deepcopy(queue.state_dict())
    queue.append(bad, torch.arange(4))
    assert all(torch.equal(before[name], each) for name, each in queue.state_dict().items())


@pytest.mark.parametrize("impl", IMPLS)
def test_entries_appended_before_the_backward_pass_do_not_change_it(impl):
    z, sample, gradients = trained_like(4, 6, torch.float32).requires_grad_(), torch.arange(4), []
    for append in (False, True):
        queue = past_of(4, 6, 12, 12, torch.float32)
        loss = nt_xent(z, 0.1, impl=impl, queue=queue, sample=sample)
        if append:
            queue.append(z, sample)
        gradients += torch.autograd.grad(loss, z)
    assert torch.equal(*gradients)


def test_the_queue_gathers_over_the_ranks_of_the_loss(monkeypatch):
    groups = []
    monkeypatch.setattr(distributed, "participants", groups.append)
    nt_xent_and_append(trained_like(4, 6), 0.1, torch.arange(4), NegativeQueue(12, 6), group="some of the ranks")
    assert groups == 2 * ["some of the ranks"]


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest result of an operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_is_larger_than_a_block():
    rows, length, width = 64, 65_536, 4  # the queue is larger than a block, so that a copy of it would be found
    z, past = trained_like(rows // 2, width, torch.float32), torch.zeros(length, width)
    with LargestTensor() as largest:
        inputs = torch.tensor(0.1), torch.arange(rows // 2), past, torch.zeros(length, dtype=torch.int64)
        queue_module._log_sums(Workers(1), z, *inputs, True)
    assert largest.elements == rows * queue_module.CPU_BLOCK[1] < length * width < rows * length / 8


def test_operator_passes_opcheck_and_compiles():
    z, temperature = trained_like(3, 10, torch.bfloat16).requires_grad_(), torch.tensor(0.1, requires_grad=True)
    queue, sample = past_of(3, 10, 12, 12, torch.float32), torch.arange(3)
    torch.library.opcheck(queue_module.log_sums, (z, temperature, sample, queue.z, queue.sample, True))
    z = z.detach()
    torch.library.opcheck(queue_module.log_sums, (z, torch.tensor(0.1), sample, queue.z, queue.sample, False))

    def step(z, temperature, decoupled):
        return nt_xent(2 * z, temperature, queue=queue, sample=sample)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, true in zip(*(loss_and_gradients(z, 0.1, None, each) for each in (compiled, step)), strict=True):
        torch.testing.assert_close(ours, true)


def test_double_backward_is_refused():
    z = trained_like(3, 10).requires_grad_()
    queue = past_of(3, 10, 12, 12)
    sums = log_sums(z, torch.tensor(0.1), torch.arange(3), queue.z, queue.sample, True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(sums.sum(), z, create_graph=True)


@pytest.mark.parametrize(
    ("width", "sample", "message"),
    [
        (6, torch.arange(4), r"queue must hold projections of z's width .*\(N, 5\) on cpu; got \(9, 6\) on cpu"),
        (5, None, "sample must hold an int64 index on cpu for each of 4 samples"),
        (5, torch.arange(8), "for each of 4 samples"),
        (5, torch.arange(4.0), "an int64 index"),
    ],
)
def test_queue_and_samples_must_fit(width, sample, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.ones(8, 5), 0.1, queue=NegativeQueue(9, width), sample=sample)


def test_an_empty_queue_is_refused():
    with pytest.raises(ValueError, match="length and width must be at least 1, not 0 and 5; use queue=None"):
        NegativeQueue(0, 5)
