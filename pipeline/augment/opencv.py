"""Augmentation with OpenCV in host threads: the fastest backend on machines without a GPU.

OpenCV releases the global interpreter lock inside its calls, so plain threads use all cores and nothing is pickled.
Each step rounds to whole levels of the image's own depth, 8 or 16 bits, as PIL does for 8 bits. Views of 8-bit RGB
images are rendered by one compiled function (compiled.py), which is faster at every size; the functions below render
those of images with other channels or 16 bits. Images with one channel are (H, W) arrays after the crop, because
OpenCV drops a last dimension of 1.
"""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from ..images.files import DecodeError, contains
from ..images.pixel_format import RGB8, PixelFormat, decode_pixels
from . import compiled
from .config import AugmentConfig
from .params import BRIGHTNESS, CONTRAST, LUMA, SATURATION, AugmentParams, affine_jitter

SLICE, SLICE_PIXELS = 16, 2**18
"""Largest number of images, and of pixels of one view of each, that a thread takes at once."""
DECODED_BYTES = 2**19
"""Size of decoded images from which on they are augmented before the thread decodes more: they are still in the
second-level cache, and small images share the overhead of a call of the compiled function."""
KEPT_BATCHES = 8
"""Largest number of unused batches whose memory is kept for reuse; a loader has about five batches in flight."""


class OpenCVBackend:
    """Augmentation backend on host threads; see `Backend` for the interface.

    Args:
        config: augmentation options.
        device: device to which the views are copied.
        batch_size: not used; part of the common signature.
        views: V, number of views per image.
        workers: number of threads.
        dtype: of the views, float32 or bfloat16.
        pixel_format: format of the images, with any number of channels.
    """

    image_device = torch.device("cpu")
    calls_at_once = 2

    def __init__(
        self,
        config: AugmentConfig,
        device: torch.device,
        batch_size: int,
        views: int,
        workers: int,
        dtype: torch.dtype = torch.float32,
        pixel_format: PixelFormat = RGB8,
    ):
        cv2.setNumThreads(1)  # one image per thread balances better than one image on all cores
        self.config, self.device, self.views = config, device, views
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="views")
        self.workers, self.dtype, self.pixel_format = workers, dtype, pixel_format
        self.unused: list[np.ndarray] = []  # memory of earlier batches
        self.compiled = self.normalize = None
        if pixel_format == RGB8:
            self.compiled = compiled.CompiledViews(config)
        else:
            self.normalize = Normalize(config, dtype, pixel_format)
            use_one_core_each(self.pool, workers)

    def __call__(self, images: list[bytes | np.ndarray], params: AugmentParams) -> torch.Tensor:
        """Augment V views of n images; see `Backend`."""
        n = len(images)
        batch = self._batch(self.views * n)
        out = (batch.view(torch.uint16) if self.dtype == torch.bfloat16 else batch).numpy()  # NumPy has no bfloat16
        if self.compiled:
            step = max(1, min(SLICE, SLICE_PIXELS // self.config.size**2, -(-n // (4 * self.workers))))
            write = partial(self.compiled, self.compiled.table(params), out)
        else:
            step, maps = 1, affine_jitter(params) if self.config.jitter == "affine" else None
            write = partial(self._write, params, maps, out)
        parts = [slice(first, min(first + step, n)) for first in range(0, n, step)]
        remaining = iter(parts)  # shared by the threads, because images and cores differ in speed
        jobs = [self.pool.submit(self._augment, images, write, remaining) for _ in range(min(self.workers, len(parts)))]
        for job in jobs:
            job.result()
        return batch.permute(0, 3, 1, 2).to(self.device, non_blocking=True)

    def close(self) -> None:
        """End the threads and free the memory."""
        self.pool.shutdown()
        self.unused.clear()

    def _batch(self, rows: int) -> torch.Tensor:
        """Uninitialized (rows, S, S, C), in memory that nothing else uses."""
        shape = (rows, self.config.size, self.config.size, self.pixel_format.channels)
        if self.device.type == "cuda":
            return torch.empty(shape, dtype=self.dtype, pin_memory=True)
        if self.device.type != "cpu":  # the device may still be copying an earlier batch
            return torch.empty(shape, dtype=self.dtype)
        # Page faults of fresh memory cost as much time as normalizing a view, so memory is reused once its batch is
        # released: every tensor over it, and every array made from one, keeps `lent` alive.
        memory = self.unused.pop() if self.unused else None
        if memory is None or len(memory) < rows:
            stored = np.uint16 if self.dtype == torch.bfloat16 else np.float32
            memory = np.empty(shape, stored)  # numpy requests huge pages, torch does not
        lent = memory[:rows]
        weakref.finalize(lent, _reuse, self.unused, memory).atexit = False
        return torch.from_numpy(lent).view(self.dtype)

    def _augment(self, images: list[bytes | np.ndarray], write: Callable, remaining: Iterator[slice]) -> None:
        """Decode and augment the `remaining` images, and write their views into the batch."""
        for part in remaining:
            decoded, size = [], 0
            for i in range(part.start, part.stop):
                image = decode_pixels(images[i], self.pixel_format) if isinstance(images[i], bytes) else images[i]
                if image is None:
                    raise DecodeError("the image can't be decoded", i)
                decoded.append(image)
                size += image.nbytes
                if size >= DECODED_BYTES or i == part.stop - 1:
                    write(slice(i + 1 - len(decoded), i + 1), decoded)
                    decoded, size = [], 0

    def _write(
        self, params: AugmentParams, maps: tuple | None, out: np.ndarray, part: slice, images: list[np.ndarray]
    ) -> None:
        """Write all views of `images`, a part of the batch, into `out` (V n, S, S, C) by calls of OpenCV."""
        for i, image in enumerate(images, part.start):
            if not contains(*image.shape[:2], params.crop[:, i]):
                raise DecodeError("the image is smaller than its index says", i)
            for v in range(self.views):
                view = resized_crop(image, params, v, i, self.config.size)
                view = (color if self.pixel_format.channels == 3 else intensity)(view, params, v, i, maps)
                view = blur(view, float(params.sigma[v, i]), self.config.blur_window)
                self.normalize(view, out[v * params.flip.shape[1] + i])


def use_one_core_each(pool: ThreadPoolExecutor, workers: int) -> None:
    """Start all threads of a pool, so that operations of torch in them do not start threads of their own."""
    started, threads_of_caller = Barrier(workers + 1), torch.get_num_threads()

    def prepare() -> None:
        torch.get_num_threads()  # the first use in a thread replaces its number by the last one that was set anywhere
        torch.set_num_threads(1)
        started.wait()  # a waiting thread takes no second task, so that the pool starts all threads

    try:
        for _ in range(workers):
            pool.submit(prepare)
        started.wait()
    finally:
        started.abort()  # after a failed start, waiting threads would keep the process alive
        torch.set_num_threads(threads_of_caller)


def _reuse(unused: list[np.ndarray], memory: np.ndarray) -> None:
    if len(unused) < KEPT_BATCHES:
        unused.append(memory)


def resized_crop(image: np.ndarray, params: AugmentParams, v: int, i: int, size: int) -> np.ndarray:
    """Crop, resize and flip view v of image i: (H, W, C) -> (S, S, C), or (S, S) for one channel, of the same dtype."""
    top, left, height, width = params.crop[v, i].tolist()
    window = image[top : top + height, left : left + width]
    view = _resize(window, size)
    return cv2.flip(view, 1) if params.flip[v, i] else view


def color(view: np.ndarray, params: AugmentParams, v: int, i: int, maps: tuple | None) -> np.ndarray:
    """Apply jitter and grayscale to view v of image i.

    Args:
        view: (S, S, 3) RGB, uint16.
        maps: `affine_jitter(params)`, None for the exact jitter.

    Returns:
        The same shape and dtype.
    """
    if maps is None:
        view = _jitter(view, params, v, i)
        # cv2.cvtColor rounds its weights to 15 bits, for 16 bits an error of up to 1.5 levels
        return cv2.transform(view, np.tile(LUMA, (3, 1))) if params.gray[v, i] else view
    matrix, mean_weight = (values[v, i] for values in maps)  # with the grayscale
    offset = float(mean_weight) * _mean_gray(view)
    return cv2.transform(view, np.column_stack([matrix, np.full(3, offset, np.float32)]))  # rounds and clips


def intensity(view: np.ndarray, params: AugmentParams, v: int, i: int, maps: tuple | None) -> np.ndarray:
    """Apply brightness and contrast to view v of image i, in place of `color` for images that are not RGB.

    All channels change by the same factors, each around its own mean for contrast, as in SSL4EO-S12 (arXiv 2211.07044,
    `RandomContrast` of its code) for satellite images with 13 channels. Saturation, hue and grayscale have no meaning
    for other channels than red, green and blue; torchvision's do not change gray images either.

    Args:
        view: (S, S, C), or (S, S) for one channel; uint8 or uint16.
        maps: as for `color`; only whether it is None matters.

    Returns:
        The same shape and dtype.
    """
    brightness, contrast = float(params.brightness[v, i]), float(params.contrast[v, i])
    if maps is not None:
        return _scale_channels(view, brightness * contrast, brightness * (1 - contrast))
    for operation in params.order[v, i].tolist():
        if operation == BRIGHTNESS:
            view = _scale_channels(view, brightness, 0.0)
        elif operation == CONTRAST:
            view = _scale_channels(view, contrast, 1 - contrast)
    return view


def blur(view: np.ndarray, sigma: float, window: int) -> np.ndarray:
    """Blur (S, S, C) or (S, S) with a Gaussian of standard deviation `sigma` in pixels; 0 for no blur."""
    if sigma == 0:
        return view
    # A narrow blur does not need the whole window: the weights beyond 4 sigma (16 bits: 6 sigma) contribute less than
    # 1/20 of a level.
    reach = 4 if view.dtype == np.uint8 else 6
    kernel = cv2.getGaussianKernel(min(window, 2 * int(np.ceil(reach * sigma)) + 1), sigma, cv2.CV_32F)
    # twice as fast as cv2.GaussianBlur, which also rounds its weights for 8-bit images
    return cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


class Normalize:
    """Normalization of a view into the batch: (S, S, C), or (S, S) for one channel -> (S, S, C) float32.

    With dtype bfloat16, the output is uint16 and holds the bit patterns of the rounded float32 values.
    """

    def __init__(self, config: AugmentConfig, dtype: torch.dtype, pixel_format: PixelFormat):
        self.dtype = dtype
        mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
        self.table = self.map = None
        if pixel_format.bits == 16:
            self.map = np.column_stack([np.diag(1 / (pixel_format.white * std)), -mean / std])
            return
        levels = np.arange(256, dtype=np.float32)[:, None]
        table = torch.from_numpy(((levels / 255 - mean) / std)[None]).to(dtype)  # (1, 256, C): level, channel -> value
        self.table = (table.view(torch.uint16) if dtype == torch.bfloat16 else table).numpy()

    def __call__(self, view: np.ndarray, out: np.ndarray) -> None:
        if self.table is not None:
            cv2.LUT(view, self.table, dst=out)
        elif self.dtype == torch.bfloat16:
            values = torch.from_numpy(cv2.transform(view.astype(np.float32), self.map))
            out[:] = values.to(self.dtype).view(torch.uint16).numpy().reshape(out.shape)
        else:
            cv2.transform(view.astype(np.float32), self.map, dst=out)


def _resize(window: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, C) of any depth to (S, S, C), or (S, S) for one channel, rounding once.

    OpenCV lacks antialiased bicubic interpolation, here with a = -0.5 as in PIL and torchvision. In float32, torch's is
    wrong by up to a level of 16 bits, because it rounds the places of the weights.
    """
    pixels = torch.from_numpy(window.astype(np.float64))[None].permute(0, 3, 1, 2)
    view = interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)[0]
    view = view.permute(1, 2, 0).numpy().clip(0, np.iinfo(window.dtype).max)
    view = np.rint(view, out=view).astype(window.dtype, order="C")
    return view[..., 0] if view.shape[2] == 1 else view


def _jitter(view: np.ndarray, params: AugmentParams, v: int, i: int) -> np.ndarray:
    """Apply the exact jitter to (S, S, 3) uint16, in the order of the view; each operation rounds and clips."""
    for operation in params.order[v, i].tolist():
        if operation == BRIGHTNESS:
            view = _scale(view, float(params.brightness[v, i]), 0.0)
        elif operation == CONTRAST:
            factor = float(params.contrast[v, i])
            view = _scale(view, factor, (1 - factor) * _mean_gray(view))
        elif operation == SATURATION:
            view = _saturate(view, float(params.saturation[v, i]))
        else:
            view = _shift_hue(view, float(params.hue[v, i]))
    return view


def _scale(view: np.ndarray, factor: float, offset: float) -> np.ndarray:
    return view if factor == 1 else cv2.addWeighted(view, factor, view, 0, offset)  # rounds and clips


def _scale_channels(view: np.ndarray, factor: float, mean_weight: float) -> np.ndarray:
    """Return factor * x + mean_weight * mean of the channel for (S, S, C) or (S, S)."""
    if factor == 1 and mean_weight == 0:
        return view
    mean = cv2.meanStdDev(view)[0]  # (C, 1); cv2.mean is limited to four channels
    return cv2.transform(view, np.hstack([factor * np.eye(len(mean)), mean_weight * mean]))  # rounds and clips


def _mean_gray(view: np.ndarray) -> float:
    """Mean gray of (S, S, 3) RGB."""
    return float(np.dot(cv2.mean(view)[:3], LUMA))


def _saturate(view: np.ndarray, factor: float) -> np.ndarray:
    return view if factor == 1 else cv2.transform(view, factor * np.eye(3) + (1 - factor) * LUMA)  # rounds once


def _shift_hue(view: np.ndarray, turns: float) -> np.ndarray:
    if turns == 0:
        return view
    hsv = cv2.cvtColor(view.astype(np.float32), cv2.COLOR_RGB2HSV)  # the hue in degrees
    hsv[..., 0] = (hsv[..., 0] + 360 * turns) % 360
    return np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)).clip(0, 65535).astype(np.uint16)
