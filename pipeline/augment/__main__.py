"""A contact sheet of originals and their views: `python -m pipeline.augment preview --data SHARDS --out grid.png`."""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from ..common import UserError
from ..images import DecodeError, decode
from ..shards.dataset import ShardSet, open_splits
from ..shards.reader import Reader
from .backend import create_backend
from .config import AugmentConfig
from .params import HUE, AugmentParams, draw_params

GAP, LINE = 8, 14  # pixels between tiles, and of a line of text
TILE = 208
"""Side of a tile at least, so that the text below it has room; smaller views are shown enlarged."""
LARGEST = 4096
INITIALS = "BCSH"


def describe(parameters: AugmentParams, v: int, i: int) -> list[str]:
    """The parameters of view v of image i in three short lines."""
    top, left, height, width = parameters.crop[v, i].tolist()
    flip = " flipped" if parameters.flip[v, i] else ""
    if parameters.jittered[v, i]:
        factors = [getattr(parameters, name)[v, i] for name in ("brightness", "contrast", "saturation", "hue")]
        jitter = " ".join(
            f"{INITIALS[operation]}{factors[operation]:{'+.3f' if operation == HUE else '.2f'}}"
            for operation in parameters.order[v, i].tolist()
        )
    else:
        jitter = "no jitter"
    sigma = float(parameters.sigma[v, i])
    effects = (["gray"] if parameters.gray[v, i] else []) + ([f"blur {sigma:.2f} px"] if sigma else [])
    return [f"{width}x{height} at {left},{top}{flip}", jitter, ", ".join(effects) or "no gray, no blur"]


def contact_sheet(shards: ShardSet, recipe: AugmentConfig, backends: list[str], samples: int, seed: int) -> np.ndarray:
    """(height, width, 3) uint8 RGB: a row per image, its original and two views by every backend, parameters below.

    The jitter's letters are brightness, contrast, saturation and hue in the order of their turn.

    Raises:
        UserError: there is no such backend, or an image can't be read or decoded.
    """
    chosen = np.arange(min(samples, len(shards)))
    encoded, rows = Reader(shards)(chosen), shards.index[chosen]
    drawn = draw_params(recipe, seed, 0, chosen, rows["height"], rows["width"])
    views = {name: _views(name, shards, recipe, encoded, drawn) for name in backends}
    side = max(TILE, recipe.size)
    sheet = np.full(
        (GAP + LINE + len(chosen) * (side + 3 * LINE + 2 * GAP), GAP + (1 + 2 * len(backends)) * (side + GAP), 3),
        255,
        np.uint8,
    )
    titles = ["original", *(f"{name}, view {v + 1}" for name in backends for v in range(2))]
    for column, title in enumerate(titles):
        _write(sheet, title, GAP + column * (side + GAP), LINE)
    for i in range(len(chosen)):
        top = GAP + LINE + i * (side + 3 * LINE + 2 * GAP)
        image = decode(encoded[i])
        scale = side / max(image.shape[:2])
        size = [max(round(length * scale), 1) for length in image.shape[1::-1]]
        tiles = [cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)]
        texts = [[rows["key"][i].decode(), f"{image.shape[1]}x{image.shape[0]}, sample {chosen[i]}"]]
        for name in backends:
            for v in range(2):
                tiles.append(cv2.resize(views[name][v, i], (side, side), interpolation=cv2.INTER_NEAREST))
                texts.append(describe(drawn, v, i))
        for column, (tile, lines) in enumerate(zip(tiles, texts, strict=True)):
            left = GAP + column * (side + GAP)
            sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
            for number, line in enumerate(lines, 1):
                _write(sheet, line, left, top + side + number * LINE)
    return sheet


def _views(
    name: str, shards: ShardSet, recipe: AugmentConfig, encoded: list[bytes], parameters: AugmentParams
) -> np.ndarray:
    """(2, n, S, S, 3) uint8 by one backend, no longer normalized."""
    backend = create_backend(name, recipe, torch.device("cpu"), len(encoded), 2, 1)
    try:
        views = backend(encoded, parameters)
    except DecodeError as error:
        raise UserError(f"An image of {shards.root} can't be decoded: copy the shards again.") from error
    finally:
        backend.close()
    levels = views.unflatten(0, (2, -1)).permute(0, 1, 3, 4, 2).numpy() * recipe.std + recipe.mean
    return np.clip(np.rint(levels * 255), 0, 255).astype(np.uint8)


def _write(sheet: np.ndarray, text: str, left: int, bottom: int) -> None:
    cv2.putText(sheet, text[:40], (left, bottom - 3), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (0, 0, 0), 1, cv2.LINE_AA)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.augment", description=__doc__)
    preview = parser.add_subparsers(dest="command", required=True).add_parser("preview", help="draw a contact sheet")
    preview.add_argument("--data", required=True, help="shards: a folder or URL with train/, or one shard set")
    preview.add_argument("--out", required=True, type=Path, help="the picture to write, .png or .jpg")
    preview.add_argument("--backend", nargs="+", default=["opencv"], help="one or more of host, kornia, dali")
    preview.add_argument("--samples", type=int, default=6, help="images, from the first on (default: 6)")
    preview.add_argument("--seed", type=int, default=0, help="of the views (default: 0)")
    preview.add_argument("--size", type=int, default=224, help="side of a view in pixels (default: 224)")
    preview.add_argument("--jitter", default="exact", help="exact or affine (default: exact)")
    arguments = parser.parse_args()
    try:
        for option, value, least in (("samples", arguments.samples, 1), ("size", arguments.size, 8)):
            if value < least:
                raise UserError(f"--{option} is {value}: give at least {least}.")
        if arguments.size > LARGEST:
            raise UserError(f"--size is {arguments.size}: give at most {LARGEST}.")
        recipe = AugmentConfig(size=arguments.size, jitter=arguments.jitter)
        shards, _ = open_splits(arguments.data)
        sheet = contact_sheet(shards, recipe, arguments.backend, arguments.samples, arguments.seed)
        _save(sheet, arguments.out)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError:
        sys.exit("The picture does not fit into the memory: give fewer --samples or a smaller --size.")
    except (UserError, OSError) as error:  # an OSError names its file
        sys.exit(str(error))
    print(f"{arguments.out}: {sheet.shape[1]}x{sheet.shape[0]} pixels.")


def _save(sheet: np.ndarray, path: Path) -> None:
    try:
        encodes, encoded = cv2.imencode(path.suffix or ".", sheet[..., ::-1])
    except cv2.error as error:
        raise UserError(f"{path} does not name a picture: use a name that ends in .png or .jpg.") from error
    if not encodes:
        size = f"{sheet.shape[1]} x {sheet.shape[0]} pixels"
        raise UserError(f"A picture of {size} is too large for {path.suffix}: use .png or fewer --samples.")
    try:
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): choose another place.") from error


if __name__ == "__main__":
    main()
