"""Tests of the prefetcher: the number of batches in memory, and the precision of the views."""

import threading
import time
import weakref
from itertools import count, islice

import numpy as np
import pytest
import torch

from model import EncoderConfig, create_encoder, encoder_spec
from pipeline.augment.config import AugmentConfig
from pipeline.loader import prefetch
from pipeline.shards.dataset import open_shards
from tests.pipeline.loaders import center_crops, view_loader

CPU = torch.device("cpu")
CONFIG = AugmentConfig(size=32)


@pytest.fixture(scope="module")
def shards(original):
    return open_shards(str(original))


def loader(shards, **options):
    return view_loader(shards, CONFIG, **{"batch_size": 2, "seed": 0, "device": CPU, "backend": "opencv"} | options)


class LiveBatches:
    """Counts batches of views from the start of their augmentation until their memory is released."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()

    def change(self, by: int) -> None:
        with self.lock:
            self.now += by
            self.most = max(self.most, self.now)

    def counting(self, backend):
        def augment(epoch, encoded, params):
            self.change(1)
            views = backend(epoch, encoded, params)
            weakref.finalize(views, self.change, -1)
            return views

        augment.close, augment.calls_at_once = backend.close, backend.calls_at_once
        return augment


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_batches_in_memory(shards, ahead, monkeypatch):
    """While a step runs, `ahead` more batches are prepared; one more exists when the step takes the next."""
    whole, live = loader(shards, prefetch=ahead), LiveBatches()
    whole.prefetcher.backends = live.counting(whole.prefetcher.backends)
    steps = (batch for _ in range(3) for batch in whole)
    for batch in islice(steps, 12):
        assert len(batch.index) == 2
        deadline = time.monotonic() + 60
        while live.now < ahead + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)  # time for a batch too many
        assert live.now == ahead + 1
    assert live.most <= ahead + 2
    del batch
    steps.close()
    whole.close()
    assert live.now == 0


def test_parameters_are_drawn_while_an_earlier_batch_is_augmented(shards, monkeypatch):
    """Otherwise the threads of the backend are idle in the meantime."""
    whole, drawn, in_time = loader(shards, prefetch=2), threading.Semaphore(0), []
    draw, backends = whole.prefetcher.draw, whole.prefetcher.backends

    def counted(epoch, samples):
        drawn.release()
        return draw(epoch, samples)

    def augment(epoch, images, params):
        if not in_time:  # the first of three batches, all of which are planned already
            in_time.extend(drawn.acquire(timeout=60) for _ in range(3))
        return backends(epoch, images, params)

    augment.close, augment.calls_at_once = backends.close, 1
    monkeypatch.setattr(whole.prefetcher, "draw", counted)
    monkeypatch.setattr(whole.prefetcher, "backends", augment)
    next(iter(whole))
    whole.close()
    assert in_time == [True] * 3


def test_a_batch_starts_while_the_one_before_is_augmented(shards):
    """Otherwise all threads but one are idle while the last image of a batch is augmented."""
    whole, calls, second, in_time = loader(shards, prefetch=2), count(), threading.Event(), []
    backends = whole.prefetcher.backends

    def augment(epoch, images, params):
        if next(calls) == 0:
            in_time.append(second.wait(timeout=60))
        second.set()
        return backends(epoch, images, params)

    augment.close, augment.calls_at_once = backends.close, backends.calls_at_once
    whole.prefetcher.backends = augment
    next(iter(whole))
    whole.close()
    assert in_time == [True]


@pytest.mark.parametrize("backend", ["opencv", "kornia"])
def test_bfloat16_batches(shards, backend):
    """Training and evaluation batches are the rounded float32 ones, with the same labels and samples."""

    def batches(dtype):
        whole = loader(shards, backend=backend, dtype=dtype, epochs=1)
        options = {"batch_size": 5, "device": CPU, "backend": backend, "dtype": dtype}
        yield from (*whole, *center_crops(shards, CONFIG, np.arange(7), **options))
        whole.close()

    for full, half in zip(batches(torch.float32), batches(torch.bfloat16), strict=True):
        assert full.views.dtype == torch.float32 and half.views.dtype == torch.bfloat16
        assert torch.equal(half.views, full.views.to(torch.bfloat16))
        assert half.views.nbytes * 2 == full.views.nbytes
        assert torch.equal(half.label, full.label) and torch.equal(half.index, full.index)


def test_labels_reach_the_device_through_pinned_memory(shards, monkeypatch):
    """For `copy_to` on a CUDA device see tests/pipeline/augment/test_kornia.py."""
    copied = []
    monkeypatch.setattr(prefetch, "copy_to", lambda device, array: copied.append(array) or torch.from_numpy(array))
    whole = loader(shards, prefetch=0)
    label = next(iter(whole)).label
    whole.close()
    assert len(copied) == 1 and np.array_equal(label, copied[0])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_bfloat16_views_change_nothing_for_an_encoder_in_bfloat16(name):
    """Its first layer would round float32 views; batch norm's statistics and gradients included."""
    torch.manual_seed(0)
    encoder = create_encoder(encoder_spec(EncoderConfig(name), 32)).to(memory_format=torch.channels_last)
    start = {key: value.clone() for key, value in encoder.state_dict().items()}
    views = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    results = []
    for given in views, views.to(torch.bfloat16):
        encoder.load_state_dict(start)
        with torch.autocast("cpu", torch.bfloat16):
            h = encoder.train()(given)
        encoder.zero_grad()
        h.float().square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            frozen = encoder.eval()(given)
        gradients = [weight.grad for weight in encoder.parameters() if weight.grad is not None]
        results.append([h.detach(), frozen, *gradients, *encoder.state_dict().values()])
    assert len(results[0]) > 20
    for full, half in zip(*results, strict=True):
        assert torch.equal(full, half)
