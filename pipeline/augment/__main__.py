"""Command line of the augmentation.

python -m pipeline.augment preview --data SHARDS --out grid.png   contact sheet of images and their views
python -m pipeline.augment preview --help                         every option
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import tyro

from ..common import UserError, check_range
from ..data import open_data
from ..images.files import DecodeError
from ..images.pixel_format import decode_pixels
from ..loader.config import LoaderConfig
from ..pictures import to_pictures
from ..shards.dataset import ShardSet
from ..shards.reader import Reader
from .backend import create_backend
from .config import AugmentConfig
from .params import BRIGHTNESS, CONTRAST, HUE, AugmentParams, draw_params

GAP, LINE = 8, 14
"""Distance between tiles and height of a line of text, in pixels."""
TILE = 208
"""Smallest side of a tile in pixels, so that the text below it fits; smaller views are enlarged."""
LARGEST = 4096
"""Largest side of a view in pixels."""
INITIALS = "BCSH"


@dataclass(frozen=True)
class PreviewConfig:
    """Draw a contact sheet: a row per image, with the original and two views by each backend."""

    data: str
    """Folder or URL of shards, or a folder, zip or tar of images, which is converted once, as train.py does."""
    out: Path
    """Image file to write, .png or .jpg."""
    backend: tuple[Literal["opencv", "kornia", "dali"], ...] = ("opencv",)
    """Augmentation backends to compare."""
    samples: int = 6
    """Number of images, from the beginning of the shards."""
    seed: int = 0
    """Seed of the views."""
    views: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check_range("--samples", self.samples, 1, 10**6)
        check_range("--views.size", self.views.size, 8, LARGEST)
        if self.views.size_schedule:
            raise UserError("The preview shows views of one size; omit --views.size-schedule and use --views.size.")


def main() -> None:
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            {"preview": PreviewConfig}, prog=f"python -m {__package__}", description="Tools for the augmentation."
        )
        shards, _ = open_data(config.data, LoaderConfig())
        sheet = contact_sheet(shards, config.views, config.backend, config.samples, config.seed)
        save_image(sheet, config.out)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError:
        sys.exit("The image does not fit into memory; use fewer --samples or a smaller --views.size.")
    except (UserError, OSError) as error:  # an OSError names its file
        sys.exit(str(error))
    print(f"{config.out}: {sheet.shape[1]}x{sheet.shape[0]} pixels.")


def contact_sheet(
    shards: ShardSet, config: AugmentConfig, backends: tuple[str, ...], samples: int, seed: int
) -> np.ndarray:
    """Draw original and views of the first images, with the augmentation parameters below each view.

    Letters denote brightness, contrast, saturation and hue, in the order of application. Images of any format are shown
    as `pipeline.pictures` describes.

    Args:
        samples: number of rows; fewer if the shard set has fewer images.
        seed: seed of the views.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        UserError: unknown backend, or an image can't be read or decoded.
    """
    config = config.for_images(shards.pixel_format, shards.manifest.get("statistics", {}))
    chosen = np.arange(min(samples, len(shards)))
    encoded, rows = Reader(shards)(chosen), shards.index[chosen]
    params = draw_params(config, seed, 0, chosen, rows["height"], rows["width"])
    views = {name: _views(name, shards, config, encoded, params) for name in backends}
    columns = [(name, v) for name in backends for v in range(2)]

    side = max(TILE, config.size)
    height = GAP + LINE + len(chosen) * (side + 3 * LINE + 2 * GAP)
    sheet = np.full((height, GAP + (1 + len(columns)) * (side + GAP), 3), 255, np.uint8)
    for column, title in enumerate(["original", *(f"{name}, view {v + 1}" for name, v in columns)]):
        _write(sheet, title, GAP + column * (side + GAP), LINE)
    for i in range(len(chosen)):
        top = GAP + LINE + i * (side + 3 * LINE + 2 * GAP)
        pixels = torch.from_numpy(decode_pixels(encoded[i], shards.pixel_format)).permute(2, 0, 1)
        image = to_pictures(pixels[None], shards.pixel_format)[0].numpy()  # (H, W, 3)
        scale = side / max(image.shape[:2])
        size = [max(round(length * scale), 1) for length in image.shape[1::-1]]
        tiles = [cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)]
        texts = [[rows["key"][i].decode(), f"{image.shape[1]}x{image.shape[0]}, sample {chosen[i]}"]]
        for name, v in columns:
            tiles.append(cv2.resize(views[name][v, i], (side, side), interpolation=cv2.INTER_NEAREST))
            texts.append(describe(params, v, i, shards.pixel_format.channels == 3))
        for column, (tile, lines) in enumerate(zip(tiles, texts, strict=True)):
            left = GAP + column * (side + GAP)
            sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
            for number, line in enumerate(lines, 1):
                _write(sheet, line, left, top + side + number * LINE)
    return sheet


def describe(params: AugmentParams, v: int, i: int, color: bool = True) -> list[str]:
    """Describe the parameters of view v of image i in three short lines; `color` is whether the image is RGB."""
    top, left, height, width = params.crop[v, i].tolist()
    flip = " flipped" if params.flip[v, i] else ""
    jitter = "no jitter"
    if params.jittered[v, i]:
        factors = [getattr(params, name)[v, i] for name in ("brightness", "contrast", "saturation", "hue")]
        jitter = " ".join(
            f"{INITIALS[operation]}{factors[operation]:{'+.3f' if operation == HUE else '.2f'}}"
            for operation in params.order[v, i].tolist()
            if color or operation in (BRIGHTNESS, CONTRAST)
        )
    sigma = float(params.sigma[v, i])
    effects = (["gray"] if color and params.gray[v, i] else []) + ([f"blur {sigma:.2f} px"] if sigma else [])
    return [f"{width}x{height} at {left},{top}{flip}", jitter, ", ".join(effects) or "no gray, no blur"]


def save_image(sheet: np.ndarray, path: Path) -> None:
    """Write (height, width, 3) uint8 RGB in the format of the file's extension.

    Raises:
        UserError: unknown extension, too large an image for the format, or the file can't be written.
    """
    try:
        encodes, encoded = cv2.imencode(path.suffix or ".", sheet[..., ::-1])
    except cv2.error as error:
        raise UserError(f"{path} does not name an image; use a name that ends in .png or .jpg.") from error
    if not encodes:
        size = f"{sheet.shape[1]} x {sheet.shape[0]} pixels"
        raise UserError(f"An image of {size} is too large for {path.suffix}; use .png or fewer --samples.")
    try:
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}); use another folder.") from error


def _views(
    name: str, shards: ShardSet, config: AugmentConfig, encoded: list[bytes], params: AugmentParams
) -> np.ndarray:
    """Pictures of the views by one backend: (2, n, S, S, 3) uint8."""
    images = shards.pixel_format
    backend = create_backend(name, config, torch.device("cpu"), len(encoded), views=2, workers=1, pixel_format=images)
    try:
        views = backend(encoded, params)
    except DecodeError as error:
        raise UserError(f"An image of {shards.root} can't be decoded; copy the shards again.") from error
    finally:
        backend.close()
    pairs = views.unflatten(0, (2, -1)).transpose(0, 1)  # (n, 2, C, S, S)
    return to_pictures(pairs, images, config).transpose(0, 1).numpy()


def _write(sheet: np.ndarray, text: str, left: int, bottom: int) -> None:
    cv2.putText(sheet, text[:40], (left, bottom - 3), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)


if __name__ == "__main__":
    main()
