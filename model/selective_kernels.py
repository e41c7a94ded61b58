"""Bottleneck block of SimCLR v2: two branches of 3x3 kernels, mixed per image and channel by an attention.

Selective kernels are from arXiv 1903.06586, section 3.1. SimCLR v2 simplifies them: both branches are plain 3x3
convolutions without groups or dilation, computed as one convolution of twice the width. They are combined with the stem
and the shortcuts of ResNet-D (arXiv 1812.01187, figure 2). timm's `skresnet*` differ: a 3x3 and a dilated branch, each
on half of the input channels.
"""

from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

REDUCTION, MIN_CHANNELS = 16, 32
"""r and L of arXiv 1903.06586, equation 4: the attention has max(channels / r, L) hidden channels."""


class SelectiveKernels(nn.Module):
    """Selective kernel convolution with batch norm and ReLU: (N, C_in, H, W) -> (N, C, H', W').

    Symbols in the code are those of arXiv 1903.06586.

    Args:
        conv: the 3x3 convolution to replace; determines C_in, C, stride, padding and dilation.
        norm_layer: batch norm class, called with the number of channels.
    """

    def __init__(self, conv: nn.Conv2d, norm_layer: type[nn.Module] = nn.BatchNorm2d):
        super().__init__()
        channels = conv.out_channels
        d = max(channels // REDUCTION, MIN_CHANNELS)  # eq. 4
        self.conv = nn.Conv2d(conv.in_channels, 2 * channels, 3, conv.stride, conv.padding, conv.dilation, bias=False)
        self.bn = norm_layer(2 * channels)
        self.act = nn.ReLU(inplace=True)
        self.reduce = nn.Conv2d(channels, d, 1, bias=False)  # W
        self.reduce_bn = norm_layer(d)
        self.select = nn.Conv2d(d, 2 * channels, 1, bias=False)  # A and B

    def attention(self, u: Tensor) -> Tensor:
        """Weights of the two branches: u (N, 2C, H, W) -> (N, 2, C, 1, 1), which sum to 1 over the branches."""
        s = u.mean((2, 3), keepdim=True).unflatten(1, (2, -1)).sum(1)  # (N, C, 1, 1); eq. 1, 2: pooled, then added
        z = self.act(self.reduce_bn(self.reduce(s)))  # (N, d, 1, 1); eq. 3
        return self.select(z).unflatten(1, (2, -1)).softmax(1)  # eq. 5

    def forward(self, x: Tensor) -> Tensor:
        u = self.act(self.bn(self.conv(x)))  # (N, 2C, H', W')
        # autocast computes the softmax in fp32; without the cast the following activations would be fp32 as well
        a, b = self.attention(u).to(u.dtype).unbind(1)  # (N, C, 1, 1) each
        u1, u2 = u.chunk(2, dim=1)  # (N, C, H', W') each
        return a * u1 + b * u2  # eq. 6


class AvgPool2x2(nn.Module):
    """2x2 average pooling at stride 1 that keeps the size: (N, C, H, W) -> (N, C, H, W).

    Windows that reach beyond the bottom or right edge average only the pixels inside the image.
    """

    def forward(self, x: Tensor) -> Tensor:
        # padding=1 pads all four sides; dropping the first row and column leaves the bottom and right padding
        return avg_pool2d(x, 2, stride=1, padding=1, count_include_pad=False)[..., 1:, 1:]


class SelectiveKernelBottleneck(Bottleneck):
    """timm's bottleneck with `SelectiveKernels` in place of its 3x3 convolution, batch norm and ReLU.

    Requires a ResNet with `avg_down=True`, whose strided shortcuts pool 2x2 pixels before their 1x1 convolution. As in
    the official code, the shortcut of the first stage pools too, at stride 1; ResNet-D and timm do not pool there.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, **kwargs):
        super().__init__(inplanes, planes, stride, downsample, **kwargs)
        self.conv2 = SelectiveKernels(self.conv2, kwargs.get("norm_layer", nn.BatchNorm2d))
        self.bn2, self.act2 = nn.Identity(), nn.Identity()
        if downsample is not None and stride == 1:
            self.downsample[0] = AvgPool2x2()
