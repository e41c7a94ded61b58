"""Views by OpenCV in host threads: for machines without a GPU, where it outruns every other backend.

OpenCV releases the interpreter's lock inside its calls, so plain threads use all cores and nothing is pickled.
The arithmetic is that of 8-bit image libraries: each step rounds to whole levels, as PIL does.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from pipeline.images import DecodeError, decode
from pipeline.recipe import BRIGHTNESS, CONTRAST, SATURATION, Recipe, ViewParameters

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as PIL and torchvision weigh R, G and B
SMALL = 40
"""Up to so many pixels a side, two matrix products resize in less time than one call of torch takes to get going."""


class HostBackend:
    """Encoded images to normalised views on the host, then to `device`.

    Args:
        recipe: the fixed part of the augmentation.
        device: where the views are handed over.
        batch_size: not needed here; part of the backends' common signature.
        views: V, views per image.
        workers: threads.
    """

    def __init__(self, recipe: Recipe, device: torch.device, batch_size: int, views: int, workers: int):
        cv2.setNumThreads(1)  # the threads are ours: one image each is better balanced than one image on all cores
        self.recipe, self.device, self.views = recipe, device, views
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="views")
        self.workers = workers
        mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
        levels = np.arange(256, dtype=np.float32)[:, None]
        self.normalised = ((levels / 255 - mean) / std)[None]  # (1, 256, 3): level and channel -> value

    def __call__(self, encoded: list[bytes], parameters: ViewParameters) -> torch.Tensor:
        """Decode every image once and make its views.

        Returns:
            (V n, 3, S, S) float32, channels-last; row v n + i is view v of image i.

        Raises:
            DecodeError: an image can't be decoded; `args[1]` is its place in `encoded`.
        """
        n, size = len(encoded), self.recipe.size
        shape = (self.views * n, size, size, 3)
        if self.device.type == "cuda":
            batch = torch.empty(shape, dtype=torch.float32, pin_memory=True)
        else:  # numpy asks the kernel for huge pages, torch does not: half the time of touching fresh memory
            batch = torch.from_numpy(np.empty(shape, np.float32))
        out = batch.numpy()
        jobs = [
            self.pool.submit(self._chunk, encoded, parameters, out, range(first, n, self.workers))
            for first in range(min(self.workers, n))
        ]
        for job in jobs:
            job.result()
        return batch.permute(0, 3, 1, 2).to(self.device, non_blocking=True)

    def close(self) -> None:
        self.pool.shutdown()

    def _chunk(self, encoded: list[bytes], parameters: ViewParameters, out: np.ndarray, members: range) -> None:
        for i in members:
            image = decode(encoded[i])
            if image is None:
                raise DecodeError("the image can't be decoded", i)
            for v in range(self.views):
                view = render_view(image, parameters, v, i, self.recipe)
                cv2.LUT(view, self.normalised, dst=out[v * len(encoded) + i])


def render_view(image: np.ndarray, parameters: ViewParameters, v: int, i: int, recipe: Recipe) -> np.ndarray:
    """View v of image i: (H, W, 3) uint8 RGB -> (S, S, 3) uint8, everything but the normalisation."""
    top, left, height, width = parameters.crop[v, i].tolist()
    view = _resize(image[top : top + height, left : left + width], recipe.size)
    if parameters.flip[v, i]:
        view = cv2.flip(view, 1)
    for operation in parameters.order[v, i].tolist():
        if operation == BRIGHTNESS:
            view = _scale(view, float(parameters.brightness[v, i]), 0.0)
        elif operation == CONTRAST:
            view = _scale(view, float(parameters.contrast[v, i]), None)
        elif operation == SATURATION:
            view = _saturate(view, float(parameters.saturation[v, i]))
        else:
            view = _shift_hue(view, float(parameters.hue[v, i]))
    if parameters.gray[v, i]:
        view = _gray(view)
    if sigma := float(parameters.sigma[v, i]):
        # beyond 4 sigma a Gaussian's weights are below 1/20 of a level, so a narrow blur needs no wide window
        kernel = cv2.getGaussianKernel(min(recipe.blur_window, 2 * int(np.ceil(4 * sigma)) + 1), sigma, cv2.CV_32F)
        # half the time of cv2.GaussianBlur, which on 8 bits also rounds its weights
        view = cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    return view


def _resize(window: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) -> (S, S, 3) uint8, antialiased bicubic with a = -0.5 as in PIL and torchvision; OpenCV has none."""
    height, width, _ = window.shape
    if max(height, width, size) <= SMALL:
        wide = window.reshape(height, -1).astype(np.float32) @ _columns(width, size)  # (H, 3 W) -> (H, 3 S)
        view = _weights(height, size) @ wide  # (S, 3 S)
        return cv2.convertScaleAbs(np.maximum(view, 0, out=view)).reshape(size, size, 3)
    # not [None], whose stride does not count as channels-last: torch would then answer with planes
    pixels = torch.from_numpy(np.ascontiguousarray(window).reshape(1, height, width, 3)).permute(0, 3, 1, 2)
    # on 8 bits this takes one thread, torch's SIMD code, and less time than cv2.INTER_AREA
    view = interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return view.permute(0, 2, 3, 1).numpy()[0]


@lru_cache
def _weights(length: int, size: int) -> np.ndarray:
    """(size, length) float32: row i weighs the pixels of a line of `length` that make pixel i of the resized one."""
    unit = torch.eye(length, dtype=torch.float64)[None, None]
    rows = interpolate(unit, (size, length), mode="bicubic", antialias=True, align_corners=False)
    return rows[0, 0].float().numpy()


@lru_cache
def _columns(length: int, size: int) -> np.ndarray:
    """(3 length, 3 size) float32: `_weights` for a line of interleaved channels, to be multiplied from the right."""
    return np.ascontiguousarray(np.kron(_weights(length, size).T, np.eye(3, dtype=np.float32)))


def _scale(view: np.ndarray, factor: float, centre: float | None) -> np.ndarray:
    """factor * x + (1 - factor) * centre; the centre of contrast (None) is the view's mean gray."""
    if factor == 1:
        return view
    if centre is None:
        centre = float(np.dot(cv2.mean(view)[:3], LUMA))
    return cv2.addWeighted(view, factor, view, 0, (1 - factor) * centre)  # rounds and clips


def _gray(view: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _saturate(view: np.ndarray, factor: float) -> np.ndarray:
    return view if factor == 1 else cv2.addWeighted(view, factor, _gray(view), 1 - factor, 0)


def _shift_hue(view: np.ndarray, turns: float) -> np.ndarray:
    if turns == 0:
        return view
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)  # FULL: the wheel has 256 steps, so a shift wraps by itself
    hsv[..., 0] += np.uint8(round(turns * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
