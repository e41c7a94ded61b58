"""SimCLR: images -> features h -> projection z, with an online linear probe on h."""

import torch
from torch import Tensor, nn


class SimCLR(nn.Module):
    """Encoder f, projection head g (arXiv 2002.05709, figure 2) and an online linear probe.

    Args:
        encoder: (N, C, H, W) -> h (N, features).
        head: h (N, features) -> z (N, out).
        features: width of h.
        classes: number of classes of the probe; 0 for no probe.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, features: int, classes: int = 0):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.probe = nn.Linear(features, classes) if classes else None

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode and project both views of every image in one pass, so that batch norm sees them together.

        Args:
            views: (2B, C, H, W).

        Returns:
            z (2B, out), and the probe's logits (2B, classes) or None. The probe reads a detached h: it learns from the
            encoder, but does not train it.
        """
        h = self.encoder(views)  # (2B, features)
        z = self.head(h)  # (2B, out)
        if self.probe is None:
            return z, None
        with torch.autocast(h.device.type, enabled=False):  # bf16 rounding would make classes tie
            return z, self.probe(h.detach().to(self.probe.weight.dtype))  # (2B, classes)
