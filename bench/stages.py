"""The stages of each backend by themselves: decode, geometry, color, blur, pack, each fed with what comes before it.

They are the backends' own functions, in as many threads, on both views of the same images. What a backend gains by
doing several at once (caches, one pass over memory) is not in them: the sum of the stages is not the time of the whole.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from common import UserError
from pipeline.augment import opencv as opencv
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import AugmentParams, draw_params
from pipeline.images import decode
from pipeline.shards.dataset import ShardSet
from pipeline.shards.reader import Reader


@dataclass(frozen=True)
class Candidate:
    """One call that is timed, and what it does."""

    implementation: str
    stage: str
    jitter: str
    images: int
    """That one call processes."""
    call: Callable[[], object]


class Prepared:
    """The images of a shard set, in memory and in whole batches, with drawn parameters of two views each."""

    def __init__(self, shards: ShardSet, recipe: AugmentConfig, threads: int, batch: int):
        self.shards, self.threads = shards, threads
        self.samples = np.arange(len(shards) // batch * batch)
        if not len(self.samples):
            raise UserError(f"{shards.root} holds {len(shards)} images: give a shard set of at least {batch}.")
        self.encoded = Reader(shards)(self.samples)
        rows = shards.index[self.samples]
        self.drawn = draw_params(recipe, 0, 0, self.samples, rows["height"], rows["width"])

    def batches(self, count: int, batch: int) -> Iterator[tuple[list[bytes], AugmentParams]]:
        """The first `count` images in batches, as a backend takes them."""
        for first in range(0, count, batch):
            part = slice(first, min(first + batch, count))
            yield self.encoded[part], AugmentParams(**{name: v[:, part] for name, v in vars(self.drawn).items()})


def host_stages(data: Prepared, recipe: AugmentConfig) -> Iterator[Candidate]:
    """Reading, which all backends share, and the stages of the OpenCV backend, for all images."""
    threads = ThreadPoolExecutor(data.threads)
    n, drawn, size = len(data.samples), data.drawn, recipe.size
    images = list(threads.map(decode, data.encoded))
    views = list(np.ndindex(drawn.flip.shape))  # (v, i)
    resized = {(v, i): opencv.resized_crop(images[i], drawn, v, i, size) for v, i in views}
    out = np.zeros((len(views), size, size, 3), np.float32)
    maps, affine = opencv.affine_maps(drawn), replace(recipe, jitter="affine")
    pack, affine_pack = opencv.Pack(recipe), opencv.Pack(affine)
    reader = Reader(data.shards)

    def every(work: Callable) -> Callable[[], object]:
        return lambda: list(threads.map(lambda number: work(number, *views[number]), range(len(views))))

    yield Candidate("opencv", "read", "", n, lambda: reader(data.samples))
    yield Candidate("opencv", "decode", "", n, lambda: list(threads.map(decode, data.encoded)))
    for stage, jitter, work in (
        ("geometry", "", lambda _, v, i: opencv.resized_crop(images[i], drawn, v, i, size)),
        ("color", "exact", lambda _, v, i: opencv.color(resized[v, i], drawn, v, i, None)),
        ("color", "affine", lambda _, v, i: opencv.color(resized[v, i], drawn, v, i, maps)),
        ("blur", "", lambda _, v, i: opencv.blur(resized[v, i], float(drawn.sigma[v, i]), recipe.blur_window)),
        ("pack", "exact", lambda number, v, i: pack(resized[v, i], out[number])),
        ("pack", "affine", lambda number, v, i: affine_pack(resized[v, i], out[number])),
    ):
        yield Candidate("opencv", stage, jitter, n, every(work))


def kornia_stages(data: Prepared, recipe: AugmentConfig, count: int) -> Iterator[Candidate]:
    """Of the Kornia backend, for one batch of `count` images; on a CPU it decodes as the OpenCV backend does."""
    from pipeline.augment import kornia as kornia

    ((encoded, drawn),) = data.batches(count, count)
    images = [torch.from_numpy(decode(file)).permute(2, 0, 1) for file in encoded]
    resized = kornia.resized_crops(images, drawn, recipe.size)  # the other stages work in place, so on copies of it
    affine = replace(recipe, jitter="affine")
    for stage, jitter, work in (
        ("geometry", "", lambda: kornia.resized_crops(images, drawn, recipe.size)),
        ("color", "exact", lambda: kornia.color(resized.clone(), drawn, recipe)),
        ("color", "affine", lambda: kornia.color(resized.clone(), drawn, affine)),
        ("blur", "", lambda: kornia.blur(resized.clone(), drawn, recipe)),
        ("pack", "", lambda: kornia.pack(resized.clone(), recipe)),
    ):
        yield Candidate("kornia", stage, jitter, count, work)


def dali_stages(data: Prepared, recipe: AugmentConfig, count: int) -> Iterator[Candidate]:
    """Of the DALI backend on the CPU, for one batch of `count` images: a graph for each stage.

    Its decoder's row is called "decode by DALI", since "decode" is the floor.
    """
    from nvidia.dali import fn, pipeline_def, types

    from pipeline.augment import dali as dali

    ((encoded, drawn),) = data.batches(count, count)
    affine = replace(recipe, jitter="affine")

    @pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)
    def graph(stage, recipe, kind):
        outputs = []
        for view in range(2):
            x = fn.external_source(name=f"x_{view}", dtype=kind, ndim=3, layout="HWC", no_copy=True)
            outputs.append(stage(x, recipe, view))
        return tuple(outputs)

    @pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)
    def decoding():
        return dali.decoded(False)

    def color(x, recipe, view):
        return dali.colored(x, recipe, False, view)

    def candidate(stage: str, jitter: str, pipeline, inputs: dict) -> Candidate:
        pipeline.build()
        return Candidate("dali", stage, jitter, count, lambda: pipeline.run(**inputs))

    files = {"encoded": [np.frombuffer(file, np.uint8) for file in encoded]}
    images = [decode(file) for file in encoded]
    views = [[opencv.resized_crop(image, drawn, v, i, recipe.size) for i, image in enumerate(images)] for v in (0, 1)]
    views = [[view.astype(np.float32) for view in of_all] for of_all in views]
    options = {"batch_size": count, "num_threads": data.threads, "device_id": None}
    exact_inputs, affine_inputs = (dali.graph_inputs(drawn, jitter) for jitter in ("exact", "affine"))
    geometry, blur, pack = ("corner", "extent"), ("sigma",), ("flip",)
    others = (*geometry, *blur, *pack)

    def some(inputs: dict, names: tuple[str, ...]) -> dict:
        return {key: value for key, value in inputs.items() if key[:-2] in names}  # key: name_view

    def colors(inputs: dict) -> dict:
        return {key: value for key, value in inputs.items() if key[:-2] not in others}

    yield candidate("decode by DALI", "", decoding(**options), files)
    x = {"x_0": images, "x_1": images}
    crop = graph(dali.resized_crop, recipe, types.UINT8, **options)
    yield candidate("geometry", "", crop, x | some(exact_inputs, geometry))
    x = {"x_0": views[0], "x_1": views[1]}
    for stage, jitter, work, how, inputs in (
        ("color", "exact", color, recipe, colors(exact_inputs)),
        ("color", "affine", color, affine, colors(affine_inputs)),
        ("blur", "", dali.blurred, recipe, some(exact_inputs, blur)),
        ("pack", "", dali.packed, recipe, some(exact_inputs, pack)),
    ):
        yield candidate(stage, jitter, graph(work, how, types.FLOAT, **options), x | inputs)
