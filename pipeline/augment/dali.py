"""The recipe as one NVIDIA DALI graph, on a GPU or on the CPU.

Every random choice comes in through external sources, so DALI draws nothing. A sample goes through an operation only
if its parameters ask for it: DALI's conditional execution splits the batch, so that the four jitter operations in each
sample's own order cost about as much as in one fixed order. The affine jitter is one operator, `color_twist`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..common import UserError
from ..images import DecodeError, contains, decode, decodes_alike, ppm
from .config import AugmentConfig
from .params import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION, AugmentParams

try:
    from nvidia.dali import fn, math, pipeline_def, types
except ImportError as error:
    raise UserError("The DALI backend needs NVIDIA DALI (Linux only): pip install nvidia-dali-cuda120") from error

NOTHING = 255  # in a place of the jitter: leave the image as it is


class DaliBackend:
    """Encoded images -> normalized views, decoded and augmented by DALI.

    Args:
        device: of the views; "cuda" decodes with nvJPEG and augments on that GPU, "cpu" does all on the host.
        batch_size: most images in one call.
        views: views per image.
        workers: host threads of DALI.
    """

    def __init__(self, recipe: AugmentConfig, device: torch.device, batch_size: int, views: int, workers: int):
        self._device = torch.device(device)
        gpu = self._device.type == "cuda"
        device_id = (torch.cuda.current_device() if self._device.index is None else self._device.index) if gpu else None
        self._jitter = recipe.jitter
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")  # started at the first use
        self._pipeline = view_graph(recipe, gpu, views, batch_size=batch_size, num_threads=workers, device_id=device_id)
        self._pipeline.build()

    def __call__(self, encoded: list[bytes], parameters: AugmentParams) -> Tensor:
        """(V*n, 3, S, S) float32, channels-last, on the device; row v*n + i is view v of image i.

        On a GPU the result is ordered on the calling thread's current CUDA stream; the host does not wait for it.

        Raises:
            DecodeError: an image can't be decoded or is smaller than its crop; `args[1]` is its place in `encoded`.
        """
        try:
            return self._run(self._readable(encoded), parameters)
        except RuntimeError as error:
            if "decoders.image" not in str(error) and "fn.slice" not in str(error):  # slice: smaller than its crop
                raise
            # DALI does not say which image it refuses, and refuses some damaged ones that the other backends decode.
            images = list(self._threads.map(decode, encoded))
            for i, image in enumerate(images):
                if image is None or not contains(*image.shape[:2], parameters.crop[:, i]):
                    raise DecodeError("DALI can't decode an image of this batch", i) from error
            return self._run([ppm(image) for image in images], parameters)

    def _run(self, encoded: list[bytes], parameters: AugmentParams) -> Tensor:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        inputs = {"encoded": [np.frombuffer(file, np.uint8) for file in encoded]}
        inputs |= graph_inputs(parameters, self._jitter)
        outputs = self._pipeline.run(stream, **inputs)
        # The capsules keep DALI's buffers alive, and DALI frees them in the order of `stream`: only `cat` copies.
        views = torch.cat([torch.from_dlpack(output.as_tensor()) for output in outputs])  # (V*n, S, S, 3)
        return views.permute(0, 3, 1, 2)  # NHWC in memory is what torch calls channels-last

    def _readable(self, encoded: list[bytes]) -> list[bytes]:
        """`encoded`, where images that DALI refuses or decodes differently are decoded on the host and made PPMs."""
        others = [i for i, file in enumerate(encoded) if not decodes_alike(file)]
        readable = list(encoded)
        for i, pixels in zip(others, self._threads.map(decode, [encoded[i] for i in others]), strict=True):
            if pixels is None:
                raise DecodeError("the image can't be decoded", i)
            readable[i] = ppm(pixels)
        return readable

    def close(self) -> None:
        """Ends DALI's threads and frees its memory."""
        self._threads.shutdown()
        self._pipeline = None


def graph_inputs(parameters: AugmentParams, jitter: str) -> dict[str, np.ndarray]:
    """The external sources of the graph but for the images: name -> array whose first dimension is the batch."""
    inputs = {}
    for view in range(len(parameters.flip)):
        one = {
            "corner": parameters.crop[view, :, :2],
            "extent": parameters.crop[view, :, 2:],
            "sigma": parameters.sigma[view],
            "flip": parameters.flip[view].astype(np.int32),
        }
        one |= (_exact_inputs if jitter == "exact" else _affine_inputs)(parameters, view)
        inputs |= {
            f"{name}_{view}": np.ascontiguousarray(array) for name, array in one.items()
        }  # DALI knows no strides
    return inputs


def _exact_inputs(parameters: AugmentParams, view: int) -> dict[str, np.ndarray]:
    order, hue = parameters.order[view], parameters.hue[view]
    brightness, contrast = parameters.brightness[view], parameters.contrast[view]
    saturation = parameters.saturation[view]
    # The three affine operations in the sample's own order; each has a place before the hue shift and one after
    # it and takes the right one, or neither where its factor is 1.
    affine = order[order != HUE].reshape(-1, 3)  # (n, 3)
    factors = np.select(
        [affine == BRIGHTNESS, affine == CONTRAST], [brightness[:, None], contrast[:, None]], saturation[:, None]
    )
    before = np.arange(3) < (order == HUE).argmax(1)[:, None]  # (n, 3)
    places = {}
    for place in range(3):
        places[f"before{place}"] = np.where(before & (factors != 1), affine, NOTHING)[:, place]
        places[f"after{place}"] = np.where(~before & (factors != 1), affine, NOTHING)[:, place]
    # See _shift_hue: the distance of red, green and blue along the color wheel, moved into -6..0 sixths of a turn.
    wheel = (np.array([2, 0, -2]) + 6 * hue[:, None]) % 6 - 6  # (n, 3)
    return places | {
        "brightness": brightness,
        "contrast": contrast,
        "pull": ((1 - contrast)[:, None] * LUMA).astype(np.float32),  # (n, 3)
        "saturation": saturation,
        "shifted": hue != 0,
        "wheel": wheel.astype(np.float32),
        "gray": parameters.gray[view],
    }


def _affine_inputs(parameters: AugmentParams, view: int) -> dict[str, np.ndarray]:
    brightness, contrast = parameters.brightness[view], parameters.contrast[view]
    saturation, hue = parameters.saturation[view], parameters.hue[view]
    saturation = np.where(parameters.gray[view], 0, saturation).astype(np.float32)
    pull = brightness * (1 - contrast)
    return {
        "changed": parameters.jittered[view] | parameters.gray[view],
        "gain": brightness * contrast,
        "pull": (pull[:, None] * LUMA).astype(np.float32),  # (n, 3)
        "saturation": saturation,
        "degrees": 360 * hue,
    }


@pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)  # depth 1: a run returns what was just fed to it
def view_graph(recipe, gpu, views):
    """The graph: one output (S, S, 3) float32, normalized, per view."""
    image = decoded(gpu)
    outputs = []
    for view in range(views):
        x = resized_crop(image, recipe, view)
        x = blurred(colored(x, recipe, gpu, view), recipe, view)
        outputs.append(packed(x, recipe, view))
    return tuple(outputs)


def decoded(gpu):
    """(H, W, 3) uint8 RGB."""
    return fn.decoders.image(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # nvJPEG then upsamples chroma as libjpeg-turbo does
    )


def resized_crop(image, recipe, view):
    """(H, W, 3) uint8 -> (S, S, 3) float32 in 0..255, as are all that follow."""
    # Not resize's own region of interest: its filter reads pixels from outside the window.
    corner = fn.external_source(name=f"corner_{view}", dtype=types.INT32, ndim=1)
    extent = fn.external_source(name=f"extent_{view}", dtype=types.INT32, ndim=1)
    x = fn.slice(image, start=corner, shape=extent, axes=[0, 1])  # (h, w, 3) uint8
    size = [recipe.size, recipe.size]
    return _clip(fn.resize(x, size=size, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.FLOAT))


def colored(x, recipe, gpu, view):
    """Jitter and grayscale."""
    return _exact_jitter(x, gpu, view) if recipe.jitter == "exact" else _affine_jitter(x, gpu, view)


def blurred(x, recipe, view):
    sigma = _scalar(f"sigma_{view}", types.FLOAT)
    if sigma > 0.0:
        x = fn.gaussian_blur(x, sigma=sigma, window_size=recipe.blur_window)
    return x


def packed(x, recipe, view):
    """Flipped and normalized."""
    return fn.crop_mirror_normalize(
        x,
        mirror=_scalar(f"flip_{view}", types.INT32),  # the flip commutes with all since the crop, and is free here
        mean=[255 * m for m in recipe.mean],
        std=[255 * s for s in recipe.std],
        output_layout="HWC",
        dtype=types.FLOAT,
    )


def _exact_jitter(x, gpu, view):
    brightness = _scalar(f"brightness_{view}", types.FLOAT)
    saturation = _scalar(f"saturation_{view}", types.FLOAT)
    # Contrast and hue are arithmetic on the device, unlike the named arguments, which DALI takes from the host.
    contrast = _scalar(f"contrast_{view}", types.FLOAT)
    pull = fn.external_source(name=f"pull_{view}", dtype=types.FLOAT, ndim=1)
    wheel = fn.external_source(name=f"wheel_{view}", dtype=types.FLOAT, ndim=1)
    if gpu:
        contrast, pull, wheel = contrast.gpu(), pull.gpu(), wheel.gpu()
    for place in range(3):
        x = _adjust(x, _scalar(f"before{place}_{view}", types.UINT8), brightness, contrast, pull, saturation)
    if _scalar(f"shifted_{view}", types.BOOL):
        x = _shift_hue(x, wheel)
    for place in range(3):
        x = _adjust(x, _scalar(f"after{place}_{view}", types.UINT8), brightness, contrast, pull, saturation)
    if _scalar(f"gray_{view}", types.BOOL):
        x = fn.color_twist(x, saturation=0.0)
    return x


def _affine_jitter(x, gpu, view):
    """`pipeline.augment.params.affine_jitter`: the matrix by color_twist, which composes it alike, and the pull of the mean."""
    gain, saturation, degrees = (_scalar(f"{name}_{view}", types.FLOAT) for name in ("gain", "saturation", "degrees"))
    pull = fn.external_source(name=f"pull_{view}", dtype=types.FLOAT, ndim=1)
    if gpu:
        pull = pull.gpu()
    if _scalar(f"changed_{view}", types.BOOL):
        offset = _pulled_mean(x, pull)
        x = _clip(fn.color_twist(x, brightness=gain, saturation=saturation, hue=degrees) + offset)
    return x


def _scalar(name, dtype):
    return fn.external_source(name=name, dtype=dtype, ndim=0)


def _clip(x):
    return math.clamp(x, 0.0, 255.0)


def _adjust(x, operation, brightness, contrast, pull, saturation):
    if operation == BRIGHTNESS:
        x = _clip(fn.color_twist(x, brightness=brightness))
    elif operation == SATURATION:
        x = _clip(fn.color_twist(x, saturation=saturation))
    elif operation == CONTRAST:
        x = _clip(x * contrast + _pulled_mean(x, pull))
    return x


def _pulled_mean(x, pull):
    """The mean color of x (S, S, 3) weighted by pull (3,): a scalar."""
    return fn.reductions.sum(fn.reductions.mean(x, axes=[0, 1]) * pull)


def _shift_hue(x, wheel):
    """Turns the HSV hue: each channel is value - chroma * T(hue + its place on the wheel), T a periodic trapezoid.

    In sixths of a turn T(k) is 0 at k = 0, rises to 1 at k = 1, falls from k = 3 to 0 at k = 4; |d - 2| below is its
    distance from the middle of the plateau folded into one period, so no modulo is needed.
    """
    red, green, blue = x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3]
    value = math.max(math.max(red, green), blue)
    chroma = value - math.min(math.min(red, green), blue)
    # The hue plus 1, times the chroma: not negative, so the channel that is not the largest drops out as 0.
    from_red = (red == value) * (green - blue + chroma)
    from_green = (green == value) * (blue - red + 3.0 * chroma)
    from_blue = (blue == value) * (red - green + 5.0 * chroma)
    hue = math.max(math.max(from_red, from_green), from_blue) / math.max(chroma, 1e-6)  # (S, S, 1) in 0..6
    distance = math.abs(math.abs(hue + wheel) - 3.0)  # (S, S, 3)
    return fn.reshape(value - chroma * math.clamp(distance - 1.0, 0.0, 1.0), layout="HWC")
