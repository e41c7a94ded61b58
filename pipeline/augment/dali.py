"""Augmentation with NVIDIA DALI, as one graph on a GPU or on the CPU.

All random numbers enter through external sources, so DALI draws none. An operation is applied only to samples whose
parameters require it: DALI's conditional execution splits the batch, so applying the four jitter operations in the
order of each sample costs about as much as in one fixed order. The affine jitter is one operator, `color_twist`.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..common import UserError
from ..images.files import DecodeError, contains, decode, decodes_alike, ppm
from ..images.pixel_format import RGB8, PixelFormat
from .config import AugmentConfig
from .gpu import CHUNK, augment_in_chunks, check_rgb8, refusal, warn_once
from .params import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION, AugmentParams

try:
    from nvidia.dali import fn, math, pipeline_def, types
except ImportError as error:
    raise UserError(
        "The DALI backend needs NVIDIA DALI (Linux only); run `pip install nvidia-dali-cuda120` or use another backend."
    ) from error

NO_OPERATION = 255
REFUSALS = re.compile(
    r"nvImageCodec failure: '#(2|3|4|9|10|12|13|14|18|19)'"  # of nvimgcodecStatus_t: damaged, unsupported or no codec
    r"|Failed to decode sample|Slice can't be placed out of bounds"  # slice: a crop outside the image
)
"""Errors of DALI that are due to an image."""


class DaliBackend:
    """Augmentation backend on DALI; see `Backend` for the interface.

    Args:
        config: augmentation options.
        device: device of the views; "cuda" decodes with nvJPEG and augments on that GPU, "cpu" runs all on the host.
        batch_size: largest number of images per call.
        views: V, number of views per image.
        workers: number of DALI's threads on the host.
        dtype: of the views, float32 or bfloat16; they are computed in float32.
        pixel_format: format of the images, which must be 8-bit RGB.

    Raises:
        UserError: another format.
    """

    image_device, calls_at_once = None, 1

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
        check_rgb8("DALI", pixel_format)
        self._device = torch.device(device)
        gpu = self._device.type == "cuda"
        device_id = (torch.cuda.current_device() if self._device.index is None else self._device.index) if gpu else None
        self._config, self._dtype, batch_size = config, dtype, min(batch_size, CHUNK)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")  # starts threads when first used
        self._pipeline = view_graph(config, gpu, views, batch_size=batch_size, num_threads=workers, device_id=device_id)
        self._pipeline.build()

    def __call__(self, encoded: list[bytes], params: AugmentParams) -> Tensor:
        """Augment V views of n images; see `Backend`."""
        return augment_in_chunks(self._augment, encoded, params, self._config, self._device, self._dtype)

    def _augment(self, encoded: list[bytes], params: AugmentParams, out: Tensor) -> None:
        for rows, view in zip(out, self._views(encoded, params), strict=True):
            rows.copy_(view)

    def _views(self, encoded: list[bytes], params: AugmentParams) -> list[Tensor]:
        try:
            return self._run(self._readable(encoded), params)
        except RuntimeError as error:
            reason = refusal(error, REFUSALS)
            # DALI does not report which image failed, and fails on damaged ones that the other backends decode
            images = list(self._threads.map(decode, encoded))
            for i, image in enumerate(images):
                if image is None or not contains(*image.shape[:2], params.crop[:, i]):
                    raise DecodeError("DALI can't decode an image of this batch", i) from error
            warn_once(f"DALI can't decode some images ({reason}); batches with them are decoded on the host.")
            return self._run([ppm(image) for image in images], params)

    def _run(self, encoded: list[bytes], params: AugmentParams) -> list[Tensor]:
        """Run the graph; returns the V views, (n, 3, S, S) float32 each."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        inputs = {"encoded": [np.frombuffer(file, np.uint8) for file in encoded]}
        inputs |= graph_inputs(params, self._config.jitter)
        outputs = self._pipeline.run(stream, **inputs)
        # DLPack capsules keep DALI's buffers alive, and DALI frees them in the order of `stream`: no copy
        return [torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]

    def _readable(self, encoded: list[bytes]) -> list[bytes]:
        """Replace images that DALI cannot decode, or decodes differently, by PPMs decoded on the host."""
        others = [i for i, file in enumerate(encoded) if not decodes_alike(file)]
        readable = list(encoded)
        for i, pixels in zip(others, self._threads.map(decode, [encoded[i] for i in others]), strict=True):
            if pixels is None:
                raise DecodeError("the image can't be decoded", i)
            readable[i] = ppm(pixels)
        return readable

    def close(self) -> None:
        """End DALI's threads and free its memory."""
        self._threads.shutdown()
        self._pipeline = None


def graph_inputs(params: AugmentParams, jitter: str) -> dict[str, np.ndarray]:
    """External sources of the graph except for the images: name -> array of n samples."""
    inputs = {}
    for view in range(len(params.flip)):
        one = {
            "corner": params.crop[view, :, :2],
            "extent": params.crop[view, :, 2:],
            "sigma": params.sigma[view],
            "flip": params.flip[view].astype(np.int32),
        }
        one |= (_exact_inputs if jitter == "exact" else _affine_inputs)(params, view)
        # DALI ignores strides
        inputs |= {f"{name}_{view}": np.ascontiguousarray(array) for name, array in one.items()}
    return inputs


def _exact_inputs(params: AugmentParams, view: int) -> dict[str, np.ndarray]:
    order, hue = params.order[view], params.hue[view]
    brightness, contrast = params.brightness[view], params.contrast[view]
    saturation = params.saturation[view]
    # The three operations besides hue, in the order of the sample. Each has a slot before the hue shift and one after
    # it, and occupies one of them, or none if its factor is 1.
    affine = order[order != HUE].reshape(-1, 3)  # (n, 3)
    factors = np.select(
        [affine == BRIGHTNESS, affine == CONTRAST], [brightness[:, None], contrast[:, None]], saturation[:, None]
    )
    before = np.arange(3) < (order == HUE).argmax(1)[:, None]  # (n, 3)
    slots = {}
    for slot in range(3):
        slots[f"before{slot}"] = np.where(before & (factors != 1), affine, NO_OPERATION)[:, slot]
        slots[f"after{slot}"] = np.where(~before & (factors != 1), affine, NO_OPERATION)[:, slot]
    # see _shift_hue: shifted position of red, green and blue on the color wheel, in -6..0 sixths of a turn
    wheel = (np.array([2, 0, -2]) + 6 * hue[:, None]) % 6 - 6  # (n, 3)
    return slots | {
        "brightness": brightness,
        "contrast": contrast,
        "mean_weight": ((1 - contrast)[:, None] * LUMA).astype(np.float32),  # (n, 3)
        "saturation": saturation,
        "shifted": hue != 0,
        "wheel": wheel.astype(np.float32),
        "gray": params.gray[view],
    }


def _affine_inputs(params: AugmentParams, view: int) -> dict[str, np.ndarray]:
    brightness, contrast = params.brightness[view], params.contrast[view]
    saturation, hue = params.saturation[view], params.hue[view]
    saturation = np.where(params.gray[view], 0, saturation).astype(np.float32)
    mean_weight = brightness * (1 - contrast)
    return {
        "changed": params.jittered[view] | params.gray[view],
        "gain": brightness * contrast,
        "mean_weight": (mean_weight[:, None] * LUMA).astype(np.float32),  # (n, 3)
        "saturation": saturation,
        "degrees": 360 * hue,
    }


@pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)  # depth 1: a run returns its own inputs
def view_graph(config, gpu, views):
    """DALI graph with one output (S, S, 3) float32, normalized, per view."""
    image = decoded(gpu)
    outputs = []
    for view in range(views):
        x = resized_crop(image, config, view)
        x = blurred(colored(x, config, gpu, view), config, view)
        outputs.append(normalized(x, config, view))
    return tuple(outputs)


def decoded(gpu):
    """Decode the images to (H, W, 3) uint8 RGB."""
    return fn.decoders.image(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # makes nvJPEG upsample chroma like libjpeg-turbo
    )


def resized_crop(image, config, view):
    """Crop and resize: (H, W, 3) uint8 -> (S, S, 3) float32 in 0..255, the format of all later stages."""
    # not the region of interest of fn.resize, whose filter reads pixels outside the crop
    corner = fn.external_source(name=f"corner_{view}", dtype=types.INT32, ndim=1)
    extent = fn.external_source(name=f"extent_{view}", dtype=types.INT32, ndim=1)
    x = fn.slice(image, start=corner, shape=extent, axes=[0, 1])  # (h, w, 3) uint8
    size = [config.size, config.size]
    return _clip(fn.resize(x, size=size, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.FLOAT))


def colored(x, config, gpu, view):
    """Apply jitter and grayscale."""
    return _exact_jitter(x, gpu, view) if config.jitter == "exact" else _affine_jitter(x, gpu, view)


def blurred(x, config, view):
    """Apply Gaussian blur."""
    sigma = _scalar(f"sigma_{view}", types.FLOAT)
    if sigma > 0.0:
        x = fn.gaussian_blur(x, sigma=sigma, window_size=config.blur_window)
    return x


def normalized(x, config, view):
    """Flip and normalize."""
    return fn.crop_mirror_normalize(
        x,
        mirror=_scalar(f"flip_{view}", types.INT32),  # commutes with all stages after the crop, and is free here
        mean=[255 * m for m in config.mean],
        std=[255 * s for s in config.std],
        output_layout="HWC",
        dtype=types.FLOAT,
    )


def _exact_jitter(x, gpu, view):
    brightness = _scalar(f"brightness_{view}", types.FLOAT)
    saturation = _scalar(f"saturation_{view}", types.FLOAT)
    # contrast and hue are arithmetic on the device; DALI reads the arguments of its operators on the host
    contrast = _scalar(f"contrast_{view}", types.FLOAT)
    mean_weight = fn.external_source(name=f"mean_weight_{view}", dtype=types.FLOAT, ndim=1)
    wheel = fn.external_source(name=f"wheel_{view}", dtype=types.FLOAT, ndim=1)
    if gpu:
        contrast, mean_weight, wheel = contrast.gpu(), mean_weight.gpu(), wheel.gpu()
    for slot in range(3):
        x = _adjust(x, _scalar(f"before{slot}_{view}", types.UINT8), brightness, contrast, mean_weight, saturation)
    if _scalar(f"shifted_{view}", types.BOOL):
        x = _shift_hue(x, wheel)
    for slot in range(3):
        x = _adjust(x, _scalar(f"after{slot}_{view}", types.UINT8), brightness, contrast, mean_weight, saturation)
    if _scalar(f"gray_{view}", types.BOOL):
        x = fn.color_twist(x, saturation=0.0)
    return x


def _affine_jitter(x, gpu, view):
    """Apply `params.affine_jitter`; color_twist composes the same matrix."""
    gain, saturation, degrees = (_scalar(f"{name}_{view}", types.FLOAT) for name in ("gain", "saturation", "degrees"))
    mean_weight = fn.external_source(name=f"mean_weight_{view}", dtype=types.FLOAT, ndim=1)
    if gpu:
        mean_weight = mean_weight.gpu()
    if _scalar(f"changed_{view}", types.BOOL):
        offset = _weighted_mean(x, mean_weight)
        x = _clip(fn.color_twist(x, brightness=gain, saturation=saturation, hue=degrees) + offset)
    return x


def _scalar(name, dtype):
    return fn.external_source(name=name, dtype=dtype, ndim=0)


def _clip(x):
    return math.clamp(x, 0.0, 255.0)


def _adjust(x, operation, brightness, contrast, mean_weight, saturation):
    if operation == BRIGHTNESS:
        x = _clip(fn.color_twist(x, brightness=brightness))
    elif operation == SATURATION:
        x = _clip(fn.color_twist(x, saturation=saturation))
    elif operation == CONTRAST:
        x = _clip(x * contrast + _weighted_mean(x, mean_weight))
    return x


def _weighted_mean(x, weight):
    """Scalar product of the mean color of x (S, S, 3) and weight (3,)."""
    return fn.reductions.sum(fn.reductions.mean(x, axes=[0, 1]) * weight)


def _shift_hue(x, wheel):
    """Shift the HSV hue: each channel is value - chroma * T(hue + its position on the wheel), T a periodic trapezoid.

    In sixths of a turn, T(k) is 0 at k = 0, rises to 1 at k = 1, and falls from k = 3 to 0 at k = 4. The distance below
    is measured from the middle of the plateau and folded into one period, so no modulo is needed.
    """
    red, green, blue = x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3]
    value = math.max(math.max(red, green), blue)
    chroma = value - math.min(math.min(red, green), blue)
    # (hue + 1) * chroma, which is never negative, so max() below ignores the channels that are not the largest
    from_red = (red == value) * (green - blue + chroma)
    from_green = (green == value) * (blue - red + 3.0 * chroma)
    from_blue = (blue == value) * (red - green + 5.0 * chroma)
    hue = math.max(math.max(from_red, from_green), from_blue) / math.max(chroma, 1e-6)  # (S, S, 1) in 0..6
    distance = math.abs(math.abs(hue + wheel) - 3.0)  # (S, S, 3)
    return fn.reshape(value - chroma * math.clamp(distance - 1.0, 0.0, 1.0), layout="HWC")
