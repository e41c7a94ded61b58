"""Gradient caching: the gradient of the whole batch, computed in slices."""

import copy
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from timm.layers.evo_norm import EvoNorm2dB0
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from common import UserError
from engine.grad_cache import cached_backward, check_micro_batch, equal_slices
from loss import LossConfig, Temperature, nt_xent
from model import synchronize_batchnorm
from model.batchnorm import SyncBatchNorm
from tests.ranks import run_ranks


class Net(nn.Module):
    """Small encoder, projection head, probe and temperature; float64, so that differences are not rounding."""

    def __init__(self, norm=nn.Identity, dropout=0.0):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout))
        self.head, self.probe = nn.Linear(6 * 16, 5), nn.Linear(6 * 16, 4)
        self.temperature = Temperature(LossConfig(temperature=0.2, learn_temperature=True))
        self.double()

    def forward(self, views):
        h = self.encoder(views)
        return self.head(h), self.probe(h.detach())


class FakeSession:
    """The two contexts of a session that gradient caching needs."""

    def autocast(self):
        return nullcontext()

    def no_sync(self, model):
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


contrast = partial(nt_xent, impl="reference")


def whole(net, views, label):
    z, logits = net(views)
    loss = contrast(z, net.temperature())
    (loss + cross_entropy(logits, label.repeat(2))).backward()
    return loss.detach()


def probe_of(label):
    """Auxiliary loss and metrics of `cached_backward` for a probe on `label`."""

    def probe(logits, part):
        part_label = label[part].repeat(2)
        loss = cross_entropy(logits, part_label, reduction="sum") / (2 * len(label))
        return loss, (logits.argmax(1) == part_label).double().sum() / (2 * len(label)), loss.detach()

    return probe


def sliced(net, views, label, micro_batch):
    temperature = getattr(net, "module", net).temperature()  # DDP has none
    return cached_backward(FakeSession(), net, views, micro_batch, contrast, probe_of(label), temperature)[0]


def make(norm=nn.Identity, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return Net(norm, dropout), torch.randn(22, 3, 6, 6, dtype=torch.float64), torch.randint(4, (11,))


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 10, 11])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d], ids=["no norm", "frozen statistics"])
def test_gradient_equals_that_of_the_whole_batch(norm, micro_batch):
    net, views, label = make(norm)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    other = copy.deepcopy(net)
    loss = whole(net, views, label)
    torch.testing.assert_close(sliced(other, views, label, micro_batch), loss, rtol=1e-12, atol=0)
    for expected, actual in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-13)


def test_metrics_are_summed_over_the_slices():
    net, views, label = make()
    with torch.no_grad():
        logits = net(views)[1]
    loss, metrics = cached_backward(FakeSession(), net, views, 4, contrast, probe_of(label), 0.2)
    assert not loss.requires_grad and metrics.shape == (2,)
    accuracy = (logits.argmax(1) == label.repeat(2)).double().mean()
    torch.testing.assert_close(metrics, torch.stack([accuracy, cross_entropy(logits, label.repeat(2))]))


def test_plain_accumulation_gives_another_gradient():
    """The comparison can fail: with each slice contrasted only with itself, the gradient differs widely."""
    net, views, label = make()
    other = copy.deepcopy(net)
    whole(net, views, label)
    for first in range(0, 11, 4):
        part = slice(first, min(first + 4, 11))
        own = torch.cat([views[part], views[11 + part.start : 11 + part.stop]])
        (contrast(other(own)[0], 0.2) * (part.stop - part.start) / 11).backward()
    gradients = [torch.cat([w.grad.flatten() for w in each.head.parameters()]) for each in (net, other)]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def test_batch_norm_statistics_move_as_far_as_for_one_batch():
    net, views, label = make(nn.BatchNorm2d)
    norm, before = net.encoder[1], net.encoder[1].running_mean.clone()
    with torch.no_grad():
        means = [
            net.encoder[0](torch.cat([views[a:b], views[11 + a : 11 + b]])).mean((0, 2, 3))
            for a, b in ((0, 3), (3, 7), (7, 11))
        ]
    sliced(net, views, label, 4)
    step = 1 - (1 - 0.1) ** (1 / 3)
    expected = before
    for mean in means:
        expected = (1 - step) * expected + step * mean
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-12, atol=1e-15)
    kept = (1 - step) ** 3
    assert kept == pytest.approx(0.9)
    assert norm.momentum == 0.1 and norm.track_running_stats


def test_evonorm_statistics_move_as_far_as_for_one_batch():
    """EvoNorm has a running variance but is not a batch norm of torch."""
    net, views, label = make(EvoNorm2dB0)
    with torch.no_grad():
        variances = [
            net.encoder[0](torch.cat([views[a:b], views[11 + a : 11 + b]])).var((0, 2, 3))
            for a, b in ((0, 3), (3, 7), (7, 11))
        ]
    sliced(net, views, label, 4)
    step, expected = 1 - (1 - 0.1) ** (1 / 3), torch.ones(6, dtype=torch.float64)
    for variance in variances:
        expected = (1 - step) * expected + step * variance
    # timm computes the variances in float32
    torch.testing.assert_close(net.encoder[1].running_var, expected, rtol=1e-6, atol=0)
    assert net.encoder[1].momentum == 0.1


@pytest.mark.parametrize(("images", "micro_batch"), [(11, 4), (16, 5), (16, 16), (16, 17), (7, 1), (1, 1), (4097, 64)])
def test_slices_cover_the_batch_and_have_equal_sizes(images, micro_batch):
    slices = equal_slices(images, micro_batch)
    sizes = [len(range(images)[part]) for part in slices]
    assert [image for part in slices for image in range(images)[part]] == list(range(images))
    assert max(sizes) <= micro_batch and max(sizes) - min(sizes) <= 1
    assert len(slices) == math.ceil(images / micro_batch)


def test_both_passes_draw_the_same_dropout():
    """Otherwise dL/dz belongs to other projections, and gradients are far from finite differences."""
    net, views, label = make(dropout=0.5)
    torch.manual_seed(7)
    sliced(net, views, label, 4)
    weight, direction = net.head.weight, torch.randn_like(net.head.weight)
    step = 1e-6
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(net)
        moved.head.weight.data += sign * step * direction
        torch.manual_seed(7)
        values.append(sliced(moved, views, label, 4).item())
    slope = (values[0] - values[1]) / (2 * step)
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_statistics_are_restored_after_an_error():
    net, views, label = make(nn.BatchNorm2d)
    before = net.encoder[1].running_var.clone()
    with pytest.raises(ZeroDivisionError):
        cached_backward(FakeSession(), net, views, 4, lambda z, temperature: 1 / 0, probe_of(label), 0.2)
    assert torch.equal(net.encoder[1].running_var, before) and net.encoder[1].num_batches_tracked == 0
    assert net.encoder[1].track_running_stats and net.encoder[1].momentum == 0.1
    assert math.isfinite(sliced(net, views, label, 4).item())


def sliced_on_a_rank(rank, world_size, norms):
    return [_sliced_on_a_rank(rank, world_size, norm) for norm in norms]


def _sliced_on_a_rank(rank, world_size, norm):
    net, views, label = make(norm)
    net = synchronize_batchnorm(net)
    images = range(rank, 8, world_size)
    rows = torch.tensor([*images, *(11 + image for image in images)])
    model, synchronized = DistributedDataParallel(net, broadcast_buffers=False), []
    model.register_comm_hook(None, lambda _, bucket: synchronized.append(1) or _mean(bucket, world_size))

    probe = probe_of(label[list(images)])
    cached_backward(FakeSession(), model, views[rows], 2, nt_xent, probe, net.temperature())
    return [w.grad for w in net.parameters()], dict(net.named_buffers()), len(synchronized)


def _mean(bucket, world_size):
    work = torch.distributed.all_reduce(bucket.buffer().div_(world_size), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def test_slices_on_two_ranks_equal_one_process(tmp_path):
    """With batch norm they equal one process with slices, each of which joins the slices of all ranks."""
    norms = nn.Identity, nn.BatchNorm2d
    ranks = run_ranks(2, tmp_path, sliced_on_a_rank, norms)
    for number, norm in enumerate(norms):
        net, views, label = make(norm)
        sliced(net, torch.cat([views[:8], views[11:19]]), label[:8], 8 if norm is nn.Identity else 4)
        for rank in ranks:
            gradients, buffers, synchronized = rank[number]
            assert synchronized == 1, "gradients are averaged once per step, not once per slice"
            for expected, actual in zip(net.parameters(), gradients, strict=True):
                torch.testing.assert_close(actual, expected.grad, rtol=1e-10, atol=1e-13)
            for name, expected in net.named_buffers():
                torch.testing.assert_close(buffers[name], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("micro_batch", "world_size"), [(0, 1), (16, 1), (2, 1), (1, 2)])
def test_valid_micro_batches(micro_batch, world_size):
    check_micro_batch(micro_batch, 16, world_size)


@pytest.mark.parametrize(("micro_batch", "batch_size", "use"), [(1, 16, 3), (2, 3, 3), (1, 2, 2)])
def test_slices_of_one_image_are_refused(micro_batch, batch_size, use):
    with pytest.raises(UserError, match=rf"--micro-batch {micro_batch} .* use --micro-batch {use} or more"):
        check_micro_batch(micro_batch, batch_size, world_size=1)
    check_micro_batch(use, batch_size, world_size=1)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_compiled_slices(one_rank, monkeypatch):
    """Complete graphs in the first step only; restored statistics and momenta compile nothing again.

    Slices of 1, 2 and 2 images need a graph for the first size, one for any size, and one for any size with gradients.

    One process is enough, because operators and DDP are those of several; more would compile the same once more.
    """
    gradients, counts = [], []
    for compiled in (False, True):
        net, views, label = make(nn.BatchNorm2d)
        net.head = nn.Linear(6 * 16, 2000).double()  # more than one bucket of DDP, at which compiled graphs are split
        with monkeypatch.context() as patch:
            patch.setattr(dist, "get_world_size", lambda: 2)
            net = synchronize_batchnorm(net)
        assert isinstance(net.encoder[1], SyncBatchNorm)
        torch._dynamo.reset()
        counters.clear()
        if compiled:
            net.compile(backend="aot_eager")
        model = DistributedDataParallel(net, broadcast_buffers=False)
        for _ in range(3):
            net.zero_grad()
            sliced(model, views[:10], label[:5], 2)
            counts.append((counters["stats"]["unique_graphs"], counters["frames"]["ok"], len(counters["graph_break"])))
        gradients.append([w.grad for w in net.parameters()])
    assert counts[3][0] == 3 and counts[3][2] == 0 and len(set(counts[3:])) == 1
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
