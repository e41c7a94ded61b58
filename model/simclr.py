"""SimCLR: images -> representation h -> projection z, and class scores of an online probe beside them."""

import torch
from torch import nn


class SimCLR(nn.Module):
    """Encoder f and projection head g of arXiv 2002.05709, figure 2.

    Args:
        encoder: (N, 3, H, W) -> h (N, features).
        head: h -> z.
        features: width of h.
        classes: how many the online linear probe tells apart; 0 for no probe.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, features: int, classes: int = 0):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.probe = nn.Linear(features, classes) if classes else None

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            views: (2B, 3, H, W), both views in one pass so that batch norm sees them together.

        Returns:
            z (2B, out), and the probe's scores (2B, classes) from h without its graph: the probe learns from the
            encoder, never the other way round.
        """
        h = self.encoder(views)  # (2B, features)
        z = self.head(h)  # (2B, out)
        if self.probe is None:
            return z, None
        with torch.autocast(h.device.type, enabled=False):  # classes would tie in bf16
            return z, self.probe(h.detach().to(self.probe.weight.dtype))
