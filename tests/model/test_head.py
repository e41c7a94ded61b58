import pytest
import torch
from torch import nn

from model import SimCLR, projection_head


@pytest.mark.parametrize(("version", "layers"), [("v1", 2), ("v2", 3)])
def test_layers_widths_and_where_relu_stands(version, layers):
    head = projection_head(version, 48, 96, 16)
    linear = [module for module in head if isinstance(module, nn.Linear)]
    norms = [module for module in head if isinstance(module, nn.BatchNorm1d)]
    assert [layer.out_features for layer in linear] == [96] * (layers - 1) + [16]
    assert len(norms) == layers, "batch norm after every layer, the last included"
    assert sum(isinstance(module, nn.ReLU) for module in head) == layers - 1
    assert isinstance(head[-1], nn.BatchNorm1d), "no ReLU after the last layer: z must be able to point anywhere"
    assert not head[-1].bias.requires_grad and head[0].bias is None


def test_head_is_what_its_equation_says():
    head = projection_head("v1", 6, 8, 4)
    h = torch.randn(32, 6, dtype=torch.float64)
    head.double()

    def standardize(x):
        return (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)

    expected = standardize(torch.relu(standardize(h @ head.fc1.weight.T)) @ head.fc2.weight.T)
    torch.testing.assert_close(head(h), expected)


def test_the_probe_does_not_teach_the_encoder():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x.mean((2, 3))

    simclr = SimCLR(Mean(), projection_head("v1", 3, 8, 4), features=3, classes=5)
    z, scores = simclr(torch.randn(6, 3, 8, 8))
    assert z.shape == (6, 4) and scores.shape == (6, 5)
    scores.square().sum().backward()
    assert simclr.encoder.scale.grad is None and simclr.probe.weight.grad is not None
    assert SimCLR(Mean(), projection_head("v1", 3, 8, 4), features=3).probe is None
