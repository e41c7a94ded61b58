"""Images inside a page, without files next to it."""

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor

QUALITY = 85


def data_uri(image: np.ndarray, side: int) -> str:
    """WebP image as a data URI, shrunk so that its longer side is at most `side` pixels.

    Args:
        image: (H, W, 3) uint8 RGB.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()


def to_images(views: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Undo the normalization: views (n, 3, S, S) -> (n, S, S, 3) uint8."""
    levels = views.detach().float().cpu().permute(0, 2, 3, 1).numpy() * np.array(std) + np.array(mean)
    return np.clip(np.rint(levels * 255), 0, 255).astype(np.uint8)
