"""Stages of each backend, timed separately: decode, geometry, color, blur and normalize.

Each stage is the backend's own function, applied to the output of the previous one, with the same number of threads
and on both views of the same images. Gains from combining stages (caches, one pass over memory) are not included: the
sum of the stages is not the time of the whole. Kornia and DALI run on the device of the benchmark; OpenCV's backend,
reading and decoding stay on the host, and on a GPU its views are copied to it.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numba import njit

from common import UserError
from pipeline.augment import compiled, opencv
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import AugmentParams, draw_params
from pipeline.images.files import decode
from pipeline.shards.dataset import ShardSet
from pipeline.shards.reader import Reader


@dataclass(frozen=True)
class Candidate:
    """One function to time."""

    implementation: str
    stage: str
    jitter: str
    images: int
    """Number of images per call."""
    call: Callable[[], object]


class Prepared:
    """First images of a shard set in memory, in whole batches, with the augmentation parameters of two views each.

    Args:
        count: largest number of images.
    """

    def __init__(self, shards: ShardSet, config: AugmentConfig, threads: int, batch: int, count: int):
        self.shards, self.threads = shards, threads
        self.samples = np.arange(min(count, len(shards)) // batch * batch)
        if not len(self.samples):
            raise UserError(f"{shards.root} holds {len(shards)} images; use a shard set of at least {batch}.")
        self.encoded = Reader(shards)(self.samples)
        rows = shards.index[self.samples]
        self.params = draw_params(config, 0, 0, self.samples, rows["height"], rows["width"])

    def batches(self, count: int, batch: int) -> Iterator[tuple[list[bytes], AugmentParams]]:
        """Yield the first `count` images in batches, as arguments of a backend."""
        for first in range(0, count, batch):
            part = slice(first, min(first + batch, count))
            yield self.encoded[part], AugmentParams(**{name: v[:, part] for name, v in vars(self.params).items()})


@njit(nogil=True)
def _resize(view, image, levels):
    compiled._resized_crop(view, image.ctypes.data, image.strides[0], levels)


@njit(nogil=True)
def _color(view, levels, affine):
    if view.recolor:
        if affine:
            compiled._recolor(levels.reshape(3, -1), view)
        else:
            compiled._jitter(levels.reshape(3, -1), view)


@njit(nogil=True)
def _blur(view, levels, window):
    if view.sigma > 0:
        compiled._blur(levels, view.sigma, window)


@njit(nogil=True)
def _normalize(levels, scale, offset, out):
    compiled._normalize(levels, scale, offset, out)


def _decode_and_drop(encoded: bytes) -> None:
    """Decode an image and free it at once, as every pipeline does; new memory for each of a batch costs page faults."""
    decode(encoded)


def opencv_stages(data: Prepared, config: AugmentConfig, device: torch.device) -> Iterator[Candidate]:
    """Stages of the OpenCV backend, and reading and decoding, the common lower bound, for all images."""
    threads = ThreadPoolExecutor(data.threads)
    n, params, size = len(data.samples), data.params, config.size
    images = list(map(np.ascontiguousarray, threads.map(decode, data.encoded)))
    renderer = compiled.CompiledViews(replace(config, jitter="affine"))  # whose table suits both kinds of jitter
    views = renderer.table(params).reshape(-1)  # view v of image i is v n + i
    resized = np.zeros((len(views), 3, size, size), np.uint8)
    out = np.zeros((len(views), size, size, 3), np.float32)
    reader = Reader(data.shards)
    yield Candidate("opencv", "read", "", n, lambda: reader(data.samples))
    yield Candidate("opencv", "decode", "", n, lambda: list(threads.map(_decode_and_drop, data.encoded)))
    scale, offset, window = renderer.scale, renderer.offset, config.blur_window
    for stage, jitter, work in (  # colors and blur change a copy, which takes about 1% of the time
        ("geometry", "", lambda i: _resize(views[i], images[i % n], resized[i])),
        ("color", "exact", lambda i: _color(views[i], resized[i].copy(), False)),
        ("color", "affine", lambda i: _color(views[i], resized[i].copy(), True)),
        ("blur", "", lambda i: _blur(views[i], resized[i].copy(), window)),
        ("normalize", "", lambda i: _normalize(resized[i], scale, offset, out[i].view(np.uint16))),
    ):
        list(map(work, range(len(views))))  # compiles, and prepares the input of the later stages
        yield Candidate("opencv", stage, jitter, n, lambda work=work: list(threads.map(work, range(len(views)))))
    if device.type == "cuda":
        pinned = torch.from_numpy(out).pin_memory()
        yield Candidate("opencv", "copy", "", n, lambda: pinned.to(device, non_blocking=True))


def kornia_stages(data: Prepared, config: AugmentConfig, count: int, device: torch.device) -> Iterator[Candidate]:
    """Stages of the Kornia backend, for one batch of `count` images; on a CPU it decodes like the OpenCV backend.

    Its decoder on a GPU is called "decode by nvJPEG", since "decode" is the common lower bound.
    """
    from pipeline.augment import decoding, kornia

    ((encoded, params),) = data.batches(count, count)
    if device.type == "cuda":
        yield Candidate("kornia", "decode by nvJPEG", "", count, lambda: decoding.decode_on_gpu(encoded, device))
    images = [torch.from_numpy(decode(file)).to(device).permute(2, 0, 1) for file in encoded]
    resized = kornia.resized_crops(images, params, config.size)  # later stages work in place, on copies of it
    affine = replace(config, jitter="affine")
    for stage, jitter, work in (
        ("geometry", "", lambda: kornia.resized_crops(images, params, config.size)),
        ("color", "exact", lambda: kornia.color(resized.clone(), params, config)),
        ("color", "affine", lambda: kornia.color(resized.clone(), params, affine)),
        ("blur", "", lambda: kornia.blur(resized.clone(), params, config)),
        ("normalize", "", lambda: kornia.normalize(resized.clone(), config)),
    ):
        yield Candidate("kornia", stage, jitter, count, work)


def dali_stages(data: Prepared, config: AugmentConfig, count: int, device: torch.device) -> Iterator[Candidate]:
    """Stages of the DALI backend, for one batch of `count` images: one graph per stage, with its inputs on the device.

    Its decoder is called "decode by DALI", since "decode" is the common lower bound.
    """
    from pipeline.augment import dali

    ((encoded, params),) = data.batches(count, count)
    gpu = device.type == "cuda"
    images = [decode(file) for file in encoded]
    views = [[opencv.resized_crop(image, params, v, i, config.size) for i, image in enumerate(images)] for v in (0, 1)]
    views = [[view.astype(np.float32) for view in batch] for batch in views]
    if gpu:
        images = [torch.from_numpy(image).to(device) for image in images]
        views = [[torch.from_numpy(view).to(device) for view in batch] for batch in views]
    exact_inputs, affine_inputs = (dali.graph_inputs(params, jitter) for jitter in ("exact", "affine"))
    crop, blur, flip = ("corner", "extent"), ("sigma",), ("flip",)

    def select(inputs: dict, names: tuple[str, ...]) -> dict:
        return {key: value for key, value in inputs.items() if key[:-2] in names}  # key: name_view

    def colors(inputs: dict) -> dict:
        return {key: value for key, value in inputs.items() if key[:-2] not in (*crop, *blur, *flip)}

    x = {"x_0": views[0], "x_1": views[1]}
    inputs = {
        ("decode by DALI", ""): {"encoded": [np.frombuffer(file, np.uint8) for file in encoded]},
        ("geometry", ""): {"x_0": images, "x_1": images} | select(exact_inputs, crop),
        ("color", "exact"): x | colors(exact_inputs),
        ("color", "affine"): x | colors(affine_inputs),
        ("blur", ""): x | select(exact_inputs, blur),
        ("normalize", ""): x | select(exact_inputs, flip),
    }
    options = {
        "batch_size": count,
        "num_threads": data.threads,
        "device_id": torch.cuda.current_device() if gpu else None,
    }
    for (stage, jitter), pipeline in dali_graphs(config, gpu, options).items():
        pipeline.build()

        def call(pipeline=pipeline, given=inputs[stage, jitter]) -> object:
            return pipeline.run(torch.cuda.current_stream(device) if gpu else None, **given)

        yield Candidate("dali", stage, jitter, count, call)


def dali_graphs(config: AugmentConfig, gpu: bool, options: dict) -> dict[tuple[str, str], object]:
    """(stage, jitter) -> DALI pipeline, not built yet; images of both views enter as x_0 and x_1.

    `options` are the batch size, number of threads and device of every pipeline.
    """
    from nvidia.dali import fn, pipeline_def, types

    from pipeline.augment import dali

    @pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)
    def graph(stage, config, kind):
        outputs = []
        for view in range(2):
            place = "gpu" if gpu else "cpu"
            x = fn.external_source(name=f"x_{view}", dtype=kind, ndim=3, layout="HWC", no_copy=True, device=place)
            outputs.append(stage(x, config, view))
        return tuple(outputs)

    @pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)
    def decoding():
        return dali.decoded(gpu)

    def color(x, config, view):
        return dali.colored(x, config, gpu, view)

    return {
        ("decode by DALI", ""): decoding(**options),
        ("geometry", ""): graph(dali.resized_crop, config, types.UINT8, **options),
        ("color", "exact"): graph(color, replace(config, jitter="exact"), types.FLOAT, **options),
        ("color", "affine"): graph(color, replace(config, jitter="affine"), types.FLOAT, **options),
        ("blur", ""): graph(dali.blurred, config, types.FLOAT, **options),
        ("normalize", ""): graph(dali.normalized, config, types.FLOAT, **options),
    }
