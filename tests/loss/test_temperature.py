"""The learned temperature: its gradient, steps and range."""

import math

import pytest
import torch

from common import UserError
from loss import LossConfig, Temperature, nt_xent
from tests.loss.cases import trained_like


def learned(initial):
    return Temperature(LossConfig(temperature=initial, learn_temperature=True))


def test_a_constant_temperature_is_a_number_without_parameters():
    temperature = Temperature(LossConfig(temperature=0.2))
    assert temperature() == 0.2 and not temperature.state_dict()


@pytest.mark.parametrize("decoupled", [False, True])
def test_steps_go_down_the_slope_of_the_loss_and_stay_the_same_size(decoupled):
    """Adam's first step is the learning rate against the sign of the gradient, here checked by finite differences."""
    z, temperature = trained_like(8, 16), learned(0.3)
    optimizer = temperature.optimizer()
    loss = nt_xent(z, temperature(), decoupled=decoupled)
    loss.backward()
    lower, higher = (nt_xent(z, 0.3 * math.exp(step), decoupled=decoupled) for step in (-1e-5, 1e-5))
    slope = ((higher - lower) / 2e-5).item()  # dL / d log tau
    assert temperature.log_scale.grad.item() == pytest.approx(-slope, rel=1e-5)
    optimizer.step()
    assert math.log(temperature().item() / 0.3) == pytest.approx(-math.copysign(1e-3, slope), rel=1e-3)


@pytest.mark.parametrize(("initial", "bound", "direction"), [(0.01005, 0.01, 1), (0.995, 1, -1)])
def test_the_temperature_stops_at_its_bounds_and_returns(initial, bound, direction):
    temperature = learned(initial)
    optimizer = temperature.optimizer()
    seen = []
    for gradient in [-direction] * 20 + [20 * direction] * 20:
        temperature.log_scale.grad = torch.tensor(float(gradient))
        optimizer.step()
        seen.append(temperature().item())
    assert seen[19] == pytest.approx(bound, rel=1e-6)
    assert min(seen) >= 0.01 * (1 - 1e-6) and max(seen) <= 1
    assert abs(math.log(seen[-1] / bound)) > 5e-3


def test_the_temperature_does_not_decay():
    temperature = learned(0.5)
    temperature.log_scale.grad = torch.tensor(0.0)
    temperature.optimizer().step()
    assert temperature().item() == 0.5


@pytest.mark.parametrize(("initial", "message"), [(0.005, "is 0.005; it must be at least 0.01"), (2, "at most 1.0")])
def test_the_initial_temperature_is_within_the_range(initial, message):
    LossConfig(temperature=initial)
    with pytest.raises(UserError, match=rf"^--loss\.temperature with --loss\.learn-temperature .*{message}"):
        learned(initial)
