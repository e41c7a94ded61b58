"""Built-in data set that needs no download: ten classes of procedural textures, rendered from (seed, split, number).

A class is a *pattern*; colors, scale, orientation, phase, lighting and noise are drawn per image. Nearest neighbors in
pixel space therefore share colors rather than a class, and an encoder must learn what the SimCLR views have in common.
"""

from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock

from ..common import UserError
from ..philox import uniforms
from ..shards.dataset import open_shards
from .base import Source
from .writer import write_split

NAME = "textures-1"
"""Name of the data set; another one as soon as other images are rendered."""
SIDE = 40
"""Height and width in pixels."""
SPLITS = {"train": 4000, "test": 1000}
"""Split -> number of images."""


def _bricks(x, y, u):
    row = np.floor(y / 4)
    column = (x / 10 + 0.5 * (row % 2)) % 1
    mortar = np.minimum(np.minimum(column, 1 - column) * 2.5, np.minimum((y / 4) % 1, 1 - (y / 4) % 1))
    return 12 * (mortar - 0.14)


def _scales(x, y, u):
    """Overlapping rows of half discs, each row shifted by half a disc."""
    height = np.full(x.shape, -2.0)
    for row in (0, 1):
        down = y / np.pi - row
        across = x / (2 * np.pi) + 0.5 * ((np.floor(down / 2) * 2 + row) % 2)
        distance = np.hypot((across % 1 - 0.5) * 2, (down % 2) / 1.2)
        height = np.maximum(height, 3 * np.cos(3.3 * np.pi * distance) * (distance < 1.1) - 1.0)
    return height


def _cells(x, y, u):
    nearest = np.full((2, *x.shape), np.inf)
    for point in (u[:64].reshape(32, 2) - 0.5) * 28:
        distance = np.hypot(x - point[0], y - point[1])
        nearest = np.sort(np.concatenate([nearest, distance[None]]), 0)[:2]
    return 4 * (nearest[1] - nearest[0]) - 2


def _clouds(x, y, u):
    field = np.zeros_like(x)
    for wave in range(12):
        angle, phase, octave = 2 * np.pi * u[3 * wave], 2 * np.pi * u[3 * wave + 1], 0.2 * 2 ** (2 * u[3 * wave + 2])
        field += np.sin(octave * (x * np.cos(angle) + y * np.sin(angle)) + phase) / octave
    return 0.4 * field


def _grain(x, y, u):
    """Grains of random gray, one or two pixels wide, hashed from their position."""
    column, row = np.floor(x * 1.1), np.floor(y * 1.1)
    return 6 * ((np.sin(column * 12.9898 + row * 78.233 + 100 * u[0]) * 43758.5453) % 1) - 3


PATTERNS = {
    "bricks": _bricks,
    "cells": _cells,
    "checkerboard": lambda x, y, u: 4 * np.sin(0.65 * x) * np.sin(0.65 * y),
    "clouds": _clouds,
    "dots": lambda x, y, u: 3 * (np.cos(x) + np.cos(y)) - 2.5,
    "grain": _grain,
    "grid": lambda x, y, u: 8 * np.maximum(np.cos(0.7 * x), np.cos(0.7 * y)) - 7,
    "scales": _scales,
    "stripes": lambda x, y, u: np.sin(x),
    "zigzag": lambda x, y, u: np.sin(x + 2.5 * np.abs((y / np.pi) % 2 - 1)),
}
"""Class -> height of its pattern at the points x, y (radians), with uniform random numbers u."""
CLASSES = list(PATTERNS)


def render(seed: int, split: str, number: int) -> bytes:
    """Render image `number` of a split as JPEG; its class is `CLASSES[number % 10]`."""
    stream = list(SPLITS).index(split)
    u = uniforms(seed, 0, np.array([number]), stream, 128)[0]
    grid = (np.arange(SIDE) - SIDE * (0.25 + 0.5 * u[0:2, None])) * 2 * np.pi / (7 + 6 * u[2])  # px per period: 7..13
    x, y = grid[0][None, :], grid[1][:, None]
    angle = np.pi / 3 * (u[3] - 0.5)
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    height = PATTERNS[CLASSES[number % len(CLASSES)]](x, y, u[20:])
    mix = 1 / (1 + np.exp(-(1.5 + 3 * u[4]) * height))  # soft to hard edges
    dark, light = _two_colors(u[6:12])
    image = dark + (light - dark) * mix[..., None]  # (SIDE, SIDE, 3)
    slope = (u[12:14] - 0.5) * 0.8 / SIDE
    light = 1 + slope[0] * (np.arange(SIDE)[None, :] - SIDE / 2) + slope[1] * (np.arange(SIDE)[:, None] - SIDE / 2)
    noise = uniforms(seed, 1, np.arange(number * SIDE, (number + 1) * SIDE), stream, SIDE * 3).reshape(SIDE, SIDE, 3)
    image = image * light[..., None] + (noise - 0.5) * (0.05 + 0.15 * u[14])
    _, encoded = cv2.imencode(".jpg", np.clip(image * 255, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return encoded.tobytes()


def _two_colors(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a dark and a light color, at least 0.35 of the range apart so that the pattern stays visible."""
    dark, light = sorted((u[:3], u[3:]), key=np.mean)
    push = max(0.0, 0.35 - (light.mean() - dark.mean())) / 2
    return np.clip(dark - push, 0, 1), np.clip(light + push, 0, 1)


def textures_source(split: str, seed: int = 0) -> Source:
    """Source of one split of the textures."""
    items = [
        (CLASSES[number % len(CLASSES)], f"{split}-{number:06d}", (seed, split, number))
        for number in range(SPLITS[split])
    ]
    return Source(NAME, items, render, CLASSES, encodes=True)


def ensure_textures(out: Path) -> None:
    """Render the built-in data set to OUT/train and OUT/test unless it exists.

    Of several processes, one renders and the others wait. Nothing that exists is ever overwritten.

    Raises:
        UserError: the folder holds other data, or can't be written.
    """
    if not _missing(out):  # possibly in a folder that only others may write
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock").acquire()
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}); run in another folder, or use --data.") from error
    with lock:
        for split in _missing(out):
            write_split(textures_source(split), out, split)


def _missing(out: Path) -> list[str]:
    """Splits that are not rendered yet; UserError if the folder holds other data than the textures of this version."""
    missing = [split for split in SPLITS if not (out / split).exists()]
    for split in SPLITS.keys() - missing:
        try:
            name = open_shards(str(out / split)).manifest.get("name")
        except UserError as error:  # damaged or without an index, so it may hold anything
            raise _foreign(out / split, out) from error
        if name != NAME:
            raise _foreign(out / split, out)
    if any(out.glob("*.tar")):
        raise _foreign(out, out)
    return missing


def _foreign(folder: Path, out: Path) -> UserError:
    return UserError(
        f"{folder} does not hold the built-in textures and is not overwritten; use --data {out} to train on it, or "
        "move it elsewhere to train on the textures."
    )
