"""Views by OpenCV in host threads: for machines without a GPU, where it outruns every other backend.

OpenCV releases the interpreter's lock inside its calls, so plain threads use all cores and nothing is pickled.
The arithmetic is that of 8-bit image libraries: each step rounds to whole levels, as PIL does.
"""

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from ..images import DecodeError, contains, decode
from .config import AugmentConfig
from .params import BRIGHTNESS, CONTRAST, LUMA, SATURATION, AugmentParams, affine_jitter

SMALL = 40
"""Up to so many pixels a side, two matrix products resize in less time than one call of torch takes to get going."""
KEPT_BATCHES = 8
"""The memory of at most so many batches waits to be used again; a loader has about five in flight."""


class OpenCVBackend:
    """Encoded images to normalized views on the host, then to `device`.

    Args:
        recipe: the fixed part of the augmentation.
        device: where the views are handed over.
        batch_size: not needed here; part of the backends' common signature.
        views: V, views per image.
        workers: threads.
    """

    def __init__(self, recipe: AugmentConfig, device: torch.device, batch_size: int, views: int, workers: int):
        cv2.setNumThreads(1)  # the threads are ours: one image each is better balanced than one image on all cores
        self.recipe, self.device, self.views = recipe, device, views
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="views")
        self.workers = workers
        self.unused: list[np.ndarray] = []  # memory of earlier batches
        self.pack = Pack(recipe)

    def __call__(self, encoded: list[bytes], parameters: AugmentParams) -> torch.Tensor:
        """Decode every image once and make its views.

        Returns:
            (V n, 3, S, S) float32, channels-last; row v n + i is view v of image i.

        Raises:
            DecodeError: an image can't be decoded or is smaller than its crop; `args[1]` is its place in `encoded`.
        """
        n = len(encoded)
        batch = self._batch(self.views * n)
        out = batch.numpy()
        maps = affine_maps(parameters) if self.recipe.jitter == "affine" else None
        left = iter(range(n))  # each thread takes the next when it is done: images differ in size, and cores in load
        jobs = [
            self.pool.submit(self._render, encoded, parameters, maps, out, left) for _ in range(min(self.workers, n))
        ]
        for job in jobs:
            job.result()
        return batch.permute(0, 3, 1, 2).to(self.device, non_blocking=True)

    def close(self) -> None:
        self.pool.shutdown()
        self.unused.clear()

    def _batch(self, rows: int) -> torch.Tensor:
        """(rows, S, S, 3) float32 to be written, in memory that nobody else uses."""
        shape = (rows, self.recipe.size, self.recipe.size, 3)
        if self.device.type == "cuda":
            return torch.empty(shape, dtype=torch.float32, pin_memory=True)
        if self.device.type != "cpu":  # the device may still be copying from an earlier batch
            return torch.from_numpy(np.empty(shape, np.float32))
        # Fresh pages cost the kernel as much time as packing a view takes, so a batch that nobody holds any more is
        # written again: every tensor over it, and every array made of one, keeps `lent` alive.
        memory = self.unused.pop() if self.unused else None
        if memory is None or len(memory) < rows:
            memory = np.empty(shape, np.float32)  # by numpy, which asks the kernel for huge pages as torch does not
        lent = memory[:rows]
        weakref.finalize(lent, _take_back, self.unused, memory).atexit = False
        return torch.from_numpy(lent)

    def _render(
        self, encoded: list[bytes], parameters: AugmentParams, maps: tuple | None, out: np.ndarray, left: Iterator[int]
    ) -> None:
        window = self.recipe.blur_window
        for i in left:
            image = decode(encoded[i])
            if image is None:
                raise DecodeError("the image can't be decoded", i)
            if not contains(*image.shape[:2], parameters.crop[:, i]):
                raise DecodeError("the image is smaller than its index says", i)
            for v in range(self.views):
                view = resized_crop(image, parameters, v, i, self.recipe.size)
                view = color(view, parameters, v, i, maps)
                self.pack(blur(view, float(parameters.sigma[v, i]), window), out[v * len(encoded) + i])


def _take_back(unused: list[np.ndarray], memory: np.ndarray) -> None:
    if len(unused) < KEPT_BATCHES:
        unused.append(memory)


def resized_crop(image: np.ndarray, parameters: AugmentParams, v: int, i: int, size: int) -> np.ndarray:
    """Window and flip of view v of image i: (H, W, 3) uint8 RGB -> (S, S, 3) uint8."""
    top, left, height, width = parameters.crop[v, i].tolist()
    view = _resize(image[top : top + height, left : left + width], size)
    return cv2.flip(view, 1) if parameters.flip[v, i] else view


def affine_maps(parameters: AugmentParams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `color` takes for `AugmentConfig.jitter = "affine"`: matrices and pulls of `affine_jitter`, and who needs them."""
    return *affine_jitter(parameters), parameters.jittered


def color(view: np.ndarray, parameters: AugmentParams, v: int, i: int, maps: tuple | None) -> np.ndarray:
    """Jitter and grayscale of view v of image i: (S, S, 3) uint8 -> the same, or (S, S) where it drops the color.

    Args:
        maps: `affine_maps(parameters)`, or None for the exact jitter.
    """
    gray = parameters.gray[v, i]
    if maps is None:
        view = _jitter(view, parameters, v, i)
        return _gray(view) if gray else view
    view = _gray(view) if gray else view
    matrix, pull, jittered = (values[v, i] for values in maps)
    if not jittered:
        return view
    offset = float(pull) * _mean_gray(view)
    if gray:
        return cv2.addWeighted(view, float(matrix[0].sum()), view, 0, offset)  # the rows of the matrix are equal
    return cv2.transform(view, np.column_stack([matrix, np.full(3, offset, np.float32)]))  # rounds and clips


def blur(view: np.ndarray, sigma: float, window: int) -> np.ndarray:
    """Gaussian blur of (S, S, 3) or (S, S) uint8; sigma 0 for none."""
    if sigma == 0:
        return view
    # beyond 4 sigma a Gaussian's weights are below 1/20 of a level, so a narrow blur needs no wide window
    kernel = cv2.getGaussianKernel(min(window, 2 * int(np.ceil(4 * sigma)) + 1), sigma, cv2.CV_32F)
    # half the time of cv2.GaussianBlur, which on 8 bits also rounds its weights
    return cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


class Pack:
    """Normalizes a view into its place in the batch: (S, S, 3) or (S, S) uint8 -> (S, S, 3) float32."""

    def __init__(self, recipe: AugmentConfig):
        mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
        levels = np.arange(256, dtype=np.float32)[:, None]
        self.table = ((levels / 255 - mean) / std)[None]  # (1, 256, 3): level and channel -> value
        # The same as a map of colors takes two thirds of the time, but rounds the last bit otherwise: not for the
        # exact recipe, whose views stay what they have always been.
        self.map = np.column_stack([np.diag(1 / (255 * std)), -mean / std]) if recipe.jitter == "affine" else None

    def __call__(self, view: np.ndarray, out: np.ndarray) -> None:
        if view.ndim == 2:
            view = cv2.cvtColor(view, cv2.COLOR_GRAY2RGB)
        if self.map is None:
            cv2.LUT(view, self.table, dst=out)
        else:
            cv2.transform(view.astype(np.float32), self.map, dst=out)


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


def _jitter(view: np.ndarray, parameters: AugmentParams, v: int, i: int) -> np.ndarray:
    """The exact jitter: each operation rounds and clips."""
    for operation in parameters.order[v, i].tolist():
        if operation == BRIGHTNESS:
            view = _scale(view, float(parameters.brightness[v, i]), 0.0)
        elif operation == CONTRAST:
            view = _scale(view, float(parameters.contrast[v, i]), None)
        elif operation == SATURATION:
            view = _saturate(view, float(parameters.saturation[v, i]))
        else:
            view = _shift_hue(view, float(parameters.hue[v, i]))
    return view


def _scale(view: np.ndarray, factor: float, center: float | None) -> np.ndarray:
    """factor * x + (1 - factor) * center; the center of contrast (None) is the view's mean gray."""
    if factor == 1:
        return view
    if center is None:
        center = _mean_gray(view)
    return cv2.addWeighted(view, factor, view, 0, (1 - factor) * center)  # rounds and clips


def _mean_gray(view: np.ndarray) -> float:
    """Of (S, S, 3) RGB, or of what is gray already."""
    mean = cv2.mean(view)
    return mean[0] if view.ndim == 2 else float(np.dot(mean[:3], LUMA))


def _gray(view: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)


def _saturate(view: np.ndarray, factor: float) -> np.ndarray:
    if factor == 1:
        return view
    return cv2.addWeighted(view, factor, cv2.cvtColor(_gray(view), cv2.COLOR_GRAY2RGB), 1 - factor, 0)


def _shift_hue(view: np.ndarray, turns: float) -> np.ndarray:
    if turns == 0:
        return view
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)  # FULL: the wheel has 256 steps, so a shift wraps by itself
    shift = np.zeros((len(view[0]), 3), np.uint8)
    shift[:, 0] = round(turns * 256) % 256
    lines = hsv.reshape(len(hsv), -1)
    lines += shift.ravel()  # whole lines: adding to every third byte takes five times as long
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
