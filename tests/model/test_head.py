import pytest
import torch
from torch import nn

from common import UserError
from model import HeadConfig, SimCLR, projection_head


@pytest.mark.parametrize(("version", "layers"), [("v1", 2), ("v2", 3)])
def test_layers_and_widths(version, layers):
    head = projection_head(HeadConfig(version, hidden=96, out=16), features=48)
    linear = [module for module in head if isinstance(module, nn.Linear)]
    norms = [module for module in head if isinstance(module, nn.BatchNorm1d)]
    assert [layer.out_features for layer in linear] == [96] * (layers - 1) + [16]
    assert len(norms) == layers, "batch norm follows every layer, including the last"
    assert sum(isinstance(module, nn.ReLU) for module in head) == layers - 1
    assert isinstance(head[-1], nn.BatchNorm1d), "a ReLU after the last layer would confine z to one orthant"
    assert not head[-1].bias.requires_grad and head[0].bias is None


def test_head_matches_its_equation():
    head = projection_head(HeadConfig("v1", hidden=8, out=4), features=6)
    h = torch.randn(32, 6, dtype=torch.float64)
    head.double()

    def standardize(x):
        return (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)

    expected = standardize(torch.relu(standardize(h @ head.fc1.weight.T)) @ head.fc2.weight.T)
    torch.testing.assert_close(head(h), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "--head.hidden is 0; it must be at least 1"),
        ({"out": 2**18}, "--head.out is 262144; .*most"),
    ],
)
def test_widths_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        HeadConfig(**options)


def test_online_probe_does_not_train_the_encoder():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x.mean((2, 3))

    head = projection_head(HeadConfig("v1", hidden=8, out=4), features=3)
    simclr = SimCLR(Mean(), head, features=3, classes=5)
    z, logits = simclr(torch.randn(6, 3, 8, 8))
    assert z.shape == (6, 4) and logits.shape == (6, 5)
    logits.square().sum().backward()
    assert simclr.encoder.scale.grad is None and simclr.probe.weight.grad is not None
    assert SimCLR(Mean(), head, features=3).probe is None
