"""Views whose size changes during a run: options, parameters, and one backend at a time."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from common import UserError
from pipeline.augment.backend import EpochBackends, create_backend
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import draw_params

GROWING = AugmentConfig(size=32, size_schedule=("16:2", "24:1"), mean=(0.5,), std=(0.25,))


def test_sizes_of_the_epochs():
    phases = [GROWING.at_epoch(epoch) for epoch in range(5)]
    assert [phase.size for phase in phases] == [16, 16, 24, 32, 32]
    assert all(phase.size_schedule == () and phase.mean == (0.5,) for phase in phases)
    assert phases[3] == phases[4] == AugmentConfig(size=32, mean=(0.5,), std=(0.25,)) == GROWING.full_size
    assert phases[0].blur_sigma == (0.05, 1.0) and phases[2].blur_sigma == pytest.approx((0.075, 1.5), rel=1e-15)


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ("16", "pairs SIZE:EPOCHS of whole numbers, such as 128:30 160:40"),
        ("16:0", "pairs SIZE:EPOCHS"),
        ("16:1.5", "pairs SIZE:EPOCHS"),
        ("16:1 :2", "pairs SIZE:EPOCHS"),
        ("-16:1", "pairs SIZE:EPOCHS"),
        ("24:1 16:1", "in ascending order of sizes, each size once"),
        ("16:1 16:1", "in ascending order of sizes, each size once"),
        ("7:1", "of sizes from 8 pixels to less than --views.size (32)"),
        ("16:1 32:1", "of sizes from 8 pixels to less than --views.size (32)"),
    ],
)
def test_invalid_schedules_are_one_sentence(schedule, reason):
    message = re.escape(f"--views.size-schedule is {schedule}; it must be {reason}")
    with pytest.raises(UserError, match=f"^{message}.*\\.$"):
        AugmentConfig(size=32, size_schedule=tuple(schedule.split()))
    AugmentConfig(size=32, size_schedule=("8:1", "31:1"))


def test_a_schedule_may_fill_the_run_but_not_exceed_it():
    GROWING.check_epochs(4)
    GROWING.check_epochs(3)
    with pytest.raises(UserError, match=r"covers 3 epochs, but --epochs is 2; .*use --epochs 3 or more\.$"):
        GROWING.check_epochs(2)


def test_parameters_are_those_of_full_size_except_for_the_scale_of_the_blur():
    sample, height, width = np.arange(200), np.full(200, 50), np.full(200, 70)
    plain = draw_params(GROWING.full_size, 1, 2, sample, height, width)
    for epoch, ratio in ((0, 0.5), (2, 0.75), (3, 1)):
        params = draw_params(GROWING.at_epoch(epoch), 1, 2, sample, height, width)
        for name, values in vars(plain).items():
            if name == "sigma":
                # three roundings to float32 of numbers from 0 to 2
                np.testing.assert_allclose(params.sigma, ratio * values.astype(np.float64), rtol=3e-7)
            else:
                np.testing.assert_array_equal(getattr(params, name), values)
    assert (plain.sigma > 0).sum() > 100


class CountedBackend:
    """Backend that only notes its size and whether it is open."""

    image_device, calls_at_once = torch.device("cpu"), 2

    def __init__(self, size: int):
        self.size, self.open = size, True

    def __call__(self, images, params) -> int:
        assert self.open
        time.sleep(params)
        assert self.open
        return self.size

    def close(self) -> None:
        self.open = False


def test_one_backend_exists_at_a_time():
    created = []

    def create(config: AugmentConfig) -> CountedBackend:
        assert not any(backend.open for backend in created)
        created.append(CountedBackend(config.size))
        return created[-1]

    backends = EpochBackends(GROWING, create)
    assert backends.image_device == torch.device("cpu") and backends.calls_at_once == 2 and len(created) == 1
    with ThreadPoolExecutor(2) as threads:  # those of an earlier size still use their backend
        sizes = list(threads.map(lambda epoch: backends(epoch, [], 0.01), (0, 0, 1, 2, 3, 4)))
    assert sizes == [16, 16, 16, 24, 32, 32] and len(created) >= 3
    backends.close()
    assert not any(backend.open for backend in created)


def test_an_unavailable_backend_is_refused_at_once():
    def create(config):
        return create_backend("triton", config, torch.device("cpu"), 2, 2, 1)

    with pytest.raises(UserError, match="not available on cpu"):
        EpochBackends(GROWING, create)
