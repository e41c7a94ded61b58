"""Images inside a page, without files next to it."""

import base64
import io

import numpy as np
from PIL import Image

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
