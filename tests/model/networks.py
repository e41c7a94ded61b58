"""Encoders that several tests build."""

from torch import nn

from model import EncoderConfig, EncoderSpec, encoder_spec


def spec(name: str, size: int, stem: str = "auto", **options) -> EncoderSpec:
    """Spec of an encoder for views of `size` pixels."""
    return encoder_spec(EncoderConfig(name, stem, **options), size)


def randomize_batchnorm(*modules: nn.Module) -> None:
    """Fill scales, shifts and running statistics as training does, so that none of them is 0 or 1."""
    for module in (layer for root in modules for layer in root.modules()):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
