"""The bottleneck block of SimCLR v2: two branches of 3x3 kernels, mixed channel by channel as the image asks for.

Selective kernels are Li et al. 2019 (arXiv 1903.06586, section 3.1). SimCLR v2's are simpler than theirs: both branches
are plain 3x3 convolutions, without groups or dilation, made as one convolution of twice the width; with them go the
stem and the shortcuts of ResNet-D (He et al. 2018, arXiv 1812.01187, figure 2). timm's `skresnet*` differ: a 3x3 and a
dilated branch, each on half of the input.
"""

from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

REDUCTION, LEAST = 16, 32
"""r and L of arXiv 1903.06586, equation 4: from how many channels the mixture is decided."""


class SelectiveKernels(nn.Module):
    """(N, C_in, H, W) -> (N, C, H', W'), normalized and rectified; the names are those of arXiv 1903.06586.

    Args:
        conv: the 3x3 convolution whose place it takes, with C_in, C, stride, padding and dilation.
        norm_layer: makes a batch norm of so many channels.
    """

    def __init__(self, conv: nn.Conv2d, norm_layer: type[nn.Module] = nn.BatchNorm2d):
        super().__init__()
        channels = conv.out_channels
        d = max(channels // REDUCTION, LEAST)  # equation 4
        self.conv = nn.Conv2d(conv.in_channels, 2 * channels, 3, conv.stride, conv.padding, conv.dilation, bias=False)
        self.bn = norm_layer(2 * channels)
        self.act = nn.ReLU(inplace=True)
        self.reduce = nn.Conv2d(channels, d, 1, bias=False)  # W
        self.reduce_bn = norm_layer(d)
        self.select = nn.Conv2d(d, 2 * channels, 1, bias=False)  # A above B

    def attention(self, u: Tensor) -> Tensor:
        """Both branches (N, 2C, H, W) -> how much of each (N, 2, C, 1, 1), which sums to 1 over the two."""
        s = u.mean((2, 3), keepdim=True).unflatten(1, (2, -1)).sum(1)  # (N, C, 1, 1); eq. 1, 2: pooled, then added
        z = self.act(self.reduce_bn(self.reduce(s)))  # (N, d, 1, 1); eq. 3
        return self.select(z).unflatten(1, (2, -1)).softmax(1)  # eq. 5

    def forward(self, x: Tensor) -> Tensor:
        u = self.act(self.bn(self.conv(x)))  # (N, 2C, H', W')
        # autocast leaves the softmax in fp32, which would double the size of all that follows
        a, b = self.attention(u).to(u.dtype).unbind(1)  # (N, C, 1, 1) each
        u1, u2 = u.chunk(2, dim=1)  # (N, C, H', W') each
        return a * u1 + b * u2  # eq. 6


class Smoothing(nn.Module):
    """Mean over 2x2 pixels at stride 1, of those inside the image: (N, C, H, W) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        # windows begin one pixel before the image; without the first of each axis they end one after it
        return avg_pool2d(x, 2, stride=1, padding=1, count_include_pad=False)[..., 1:, 1:]


class SelectiveKernelBottleneck(Bottleneck):
    """timm's bottleneck with selective kernels in the place of its 3x3 convolution, its batch norm and its ReLU.

    It is for a ResNet with `avg_down=True`, whose strided shortcuts pool 2x2 pixels before their 1x1 convolution. The
    official code pools in the first stage's shortcut too, at stride 1, where ResNet-D and timm have none.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, **kwargs):
        super().__init__(inplanes, planes, stride, downsample, **kwargs)
        self.conv2 = SelectiveKernels(self.conv2, kwargs.get("norm_layer", nn.BatchNorm2d))
        self.bn2, self.act2 = nn.Identity(), nn.Identity()
        if downsample is not None and stride == 1:
            self.downsample[0] = Smoothing()
