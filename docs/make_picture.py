"""Draws docs/views.png, textures and the two views that SimCLR makes of each: `python -m docs.make_picture`."""

import cv2
import numpy as np
import torch

from pipeline.augment.opencv import OpenCVBackend
from pipeline.augment.params import draw_params
from pipeline.convert import textures
from presets import textures as preset

COLUMNS, SIDE, GAP = 10, 72, 6


def main() -> None:
    numbers = np.arange(20, 20 + COLUMNS)  # one image of every class
    encoded = [textures.render(0, "train", int(number)) for number in numbers]
    recipe, side = preset().views, np.full(COLUMNS, textures.SIDE)
    backend = OpenCVBackend(recipe, torch.device("cpu"), COLUMNS, 2, 1)
    views = backend(encoded, draw_params(recipe, 0, 0, numbers, side, side)).permute(0, 2, 3, 1).numpy()
    levels = np.clip((views * recipe.std + recipe.mean) * 255, 0, 255).astype(np.uint8)
    images = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) for jpeg in encoded]
    canvas = np.full((3 * SIDE + 4 * GAP, COLUMNS * (SIDE + GAP) + GAP, 3), 255, np.uint8)
    for row, tiles in enumerate((images, levels[:COLUMNS], levels[COLUMNS:])):
        for column, tile in enumerate(tiles):
            top, left = GAP + row * (SIDE + GAP), GAP + column * (SIDE + GAP)
            canvas[top : top + SIDE, left : left + SIDE] = cv2.resize(tile, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    cv2.imwrite("docs/views.png", canvas[..., ::-1])


if __name__ == "__main__":
    main()
