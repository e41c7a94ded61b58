"""A loader whose views grow during the run: same order and parameters, sizes by epoch, exact resumption."""

from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.augment.config import AugmentConfig
from pipeline.loader.prefetch import Batch
from pipeline.shards.dataset import open_shards
from tests.pipeline.loaders import center_crops, view_loader

PLAIN = AugmentConfig(size=32)
GROWING = AugmentConfig(size=32, size_schedule=("16:1", "24:1"))
EPOCHS, STEPS, BATCH = 4, 3, 4


@pytest.fixture(scope="module")
def shards(original):
    return open_shards(str(original))


def run(shards, augment: AugmentConfig, start: int = 0, stop: int = EPOCHS * STEPS, **options) -> list[Batch]:
    """Batches `start` to `stop` of a run of four epochs of three steps."""
    common = {"seed": 0, "batch_size": BATCH, "device": torch.device("cpu"), "backend": "opencv", "epochs": EPOCHS}
    loader = view_loader(shards, augment, **common | {"samples": np.arange(STEPS * BATCH)} | options)
    loader.load_state_dict(loader.state_dict() | {"epoch": start // STEPS, "step": start % STEPS})
    batches = list(islice((batch for _ in range(EPOCHS) for batch in loader), stop - start))
    loader.close()
    return batches


@pytest.fixture(scope="module")
def growing(shards):
    return run(shards, GROWING)


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_order_and_sizes(shards, growing):
    plain = run(shards, PLAIN)
    assert len(growing) == len(plain) == EPOCHS * STEPS
    assert all(torch.equal(a.index, b.index) for a, b in zip(growing, plain, strict=True))
    assert [batch.views.shape[-1] for batch in growing] == [16] * STEPS + [24] * STEPS + [32] * 2 * STEPS
    assert all(map(same, growing[2 * STEPS :], plain[2 * STEPS :])), "after the schedule, the views are the plain ones"


def test_views_of_a_phase_are_those_of_a_run_of_that_size(shards, growing):
    """With the blur of that size, whose standard deviation is in pixels of the view."""
    for epoch, size in enumerate((16, 24)):
        alone = AugmentConfig(size=size, blur_sigma=tuple(sigma * size / 32 for sigma in PLAIN.blur_sigma))
        part = slice(epoch * STEPS, (epoch + 1) * STEPS)
        assert all(map(same, growing[part], run(shards, alone, part.start, part.stop)))


@pytest.mark.parametrize("ahead", [0, 1, 5])
@pytest.mark.parametrize("start", [1, 3, 5, 7])
def test_resuming_in_any_phase(shards, growing, start, ahead):
    """Also at the beginning of a phase; five batches ahead reach into the next phase, and one beyond it."""
    again = run(shards, GROWING, start, prefetch=ahead, workers=2)
    assert len(again) == EPOCHS * STEPS - start and all(map(same, again, growing[start:]))


def test_stopping_next_to_a_change_of_size(shards, growing):
    """Batches of the next size are ready by then; the position is that of the batches handed over."""
    first = run(shards, GROWING, 0, STEPS, prefetch=4)
    rest = run(shards, GROWING, STEPS, prefetch=4)
    assert all(map(same, [*first, *rest], growing))


@pytest.mark.parametrize("options", [{"resident": "off"}, {"resident": "on"}, {"dtype": torch.bfloat16}])
def test_resident_images_and_bfloat16(shards, growing, options):
    for batch, expected in zip(run(shards, GROWING, **options), growing, strict=True):
        assert torch.equal(batch.views, expected.views.to(options.get("dtype", torch.float32)))


def test_ranks_share_the_batches(shards, growing):
    ranks = [run(shards, GROWING, rank=rank, world_size=2) for rank in range(2)]
    for expected, *shares in zip(growing, *ranks, strict=True):
        views = torch.cat([share.views.unflatten(0, (2, -1)) for share in shares], 1).flatten(0, 1)
        assert torch.equal(views, expected.views)


@pytest.mark.parametrize("backend", ["kornia", "dali"])
def test_other_backends_change_their_size(shards, growing, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    for batch, expected in zip(run(shards, GROWING, 2, 7, backend=backend), growing[2:7], strict=True):
        assert batch.views.shape == expected.views.shape
        # in standard deviations; backends differ by less than a level of 255 in the mean, see test_backends.py
        assert (batch.views - expected.views).abs().mean() < 1 / 255 / 0.225


def test_evaluation_has_full_size(shards):
    crops = [
        next(iter(center_crops(shards, augment, np.arange(4), batch_size=4, device=torch.device("cpu"))))
        for augment in (GROWING, PLAIN)
    ]
    assert same(*crops) and crops[0].views.shape[-1] == 32


def test_the_name_of_the_backend_states_the_schedule(shards):
    loader = view_loader(shards, GROWING, batch_size=2, seed=0, device=torch.device("cpu"), epochs=1)
    assert loader.backend_name == "opencv (the fastest on a CPU), 16 px for 1 epoch, 24 px for 1 epoch, then 32 px"
    loader.close()
    filled = view_loader(shards, GROWING, batch_size=2, seed=0, device=torch.device("cpu"), epochs=2)
    assert "16 px for 1 epoch, 24 px for 1 epoch, images resident" in filled.backend_name
    filled.close()
