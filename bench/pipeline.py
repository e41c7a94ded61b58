"""Images per second of the pipeline, two views of 224 px under the full augmentation, next to decoding and to peers.

    python bench/pipeline.py                   bench/results/pipeline.csv, docs/pipeline.png, docs/benchmarks.md
    python bench/pipeline.py --quick           few images and rounds, no file written
    python bench/pipeline.py --data SHARDS     a shard set of your own instead of the rendered photographs
    make bench                                 installs the peers first

The upper bound is decoding every image once with libjpeg-turbo in as many threads: no pipeline that decodes is faster.
All candidates take turns, and a ratio is the median over the rounds, so a slow moment of the machine affects both
sides. There are two kinds of shards: the original images, and the same images resized to a short side of 256. Backends
and peers receive encoded images from memory and use the same number of threads or worker processes. The stages of each
backend are timed separately, see `bench/stages.py`.

`loader` is the whole path from the shards with the OpenCV backend, and `ratio_to_backend` compares it with that backend
on the same batches: images that are all distinct, with encoded images and parameters already in memory. Both are timed
in steady state, after their threads have started, and so are the peers. Other rows repeat a few images.

On a GPU, the backends leave their views there, and Kornia and DALI augment there (DALI and nvJPEG also decode there);
decoding alone and the peers stay on the host.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.harness import SteadyState, csv_name, environment, interleave, percentiles_ms, show, write_rows
from bench.stages import Candidate, Prepared, dali_stages, kornia_stages, opencv_stages
from common import UserError
from engine.session import keep_freed_memory
from pipeline.augment.backend import create_backend
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import draw_params
from pipeline.images.files import decode
from pipeline.images.pixel_format import RGB8
from pipeline.loader import LoaderConfig, ViewLoader
from pipeline.loader.sampler import ShardSampler
from pipeline.shards.dataset import ShardSet, open_shards
from pipeline.shards.reader import Reader

BATCH = 32
REPEATED = 4 * BATCH
"""Images of the candidates that repeat a few."""
STEADY_BATCH = 128
"""Images per batch of loader and OpenCV backend in steady state, the smallest batch of a preset."""
SKIPPED, TIMED = 5, 8
"""Batches of a steady state before and while it is timed; with those prepared ahead, at most `DISTINCT` images."""
DISTINCT = 16 * STEADY_BATCH
"""Images of loader and OpenCV backend, encoded about 200 MB: more than caches hold."""
GPU_BATCH = 256
"""Images per call of Kornia and DALI on a GPU."""
STAGES = {"dali": dali_stages, "kornia": kornia_stages}
console = Console()


def photograph(number: int) -> bytes:
    """Render a substitute for a photograph, 500 x 400 or upright, about 0.1 MB: noise of all scales and hard edges."""
    random = np.random.default_rng(number)
    height, width = (400, 500) if number % 3 else (500, 400)
    image = np.full((height, width, 3), random.uniform(60, 190, 3), np.float32)
    for octave in range(8):
        cells = random.normal(0, 42 / 1.5**octave, (2 ** (octave + 1) + 1, 2 ** (octave + 1) + 1, 3))
        cells = 0.35 * cells + 0.65 * cells.mean(-1, keepdims=True)  # most detail of a photograph is in its gray
        image += cv2.resize(cells.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        center = (random.uniform(0, 1, 2) * (width, height)).astype(int).tolist()
        axes, angle = random.integers(8, 120, 2).tolist(), random.uniform(0, 180)
        shape = cv2.ellipse(image.copy(), center, axes, angle, 0, 360, random.uniform(0, 255, 3).tolist(), -1)
        image = cv2.addWeighted(image, 0.4, shape, 0.6, 0)
    return encode(np.clip(image + random.normal(0, 8, image.shape), 0, 255).astype(np.uint8))


def encode(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 BGR as JPEG of quality 95."""
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def with_short_side(encoded: bytes, side: int) -> bytes:
    """Resize a JPEG such that its short side has `side` pixels."""
    pixels = decode(encoded)[..., ::-1]
    scale = side / min(pixels.shape[:2])
    size = [round(length * scale) for length in pixels.shape[1::-1]]
    return encode(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC))


def make_shards(images: list[bytes], folder: Path) -> ShardSet:
    """Convert JPEGs to a shard set by the command of the converter."""
    (folder / "images").mkdir(parents=True)
    for number, image in enumerate(images):
        (folder / "images" / f"{number:06d}.jpg").write_bytes(image)
    command = [sys.executable, "-m", "pipeline.convert", "folder", str(folder / "images"), str(folder)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True)
    return open_shards(str(folder / "train"))


def backends(data: Prepared, config: AugmentConfig, device: torch.device) -> Iterator[Candidate]:
    """Kornia and DALI as a whole, with both kinds of jitter."""
    for name, count in counts(data, device).items():
        for jitter in ("exact", "affine"):
            backend = create_backend(name, replace(config, jitter=jitter), device, count, 2, data.threads)
            ((encoded, params),) = data.batches(count, count)
            yield Candidate(name, "all", jitter, count, lambda b=backend, e=encoded, p=params: b(e, p))


def counts(data: Prepared, device: torch.device) -> dict[str, int]:
    """Number of images per call of Kornia and DALI if they are installed, depending on their speed."""
    images = len(data.samples)
    limits = {"kornia": BATCH // 2, "dali": 2 * BATCH} if device.type == "cpu" else dict.fromkeys(STAGES, GPU_BATCH)
    dali = find_spec("nvidia") and find_spec("nvidia.dali")
    installed = {"kornia": bool(find_spec("kornia")), "dali": bool(dali)}
    return {name: min(limits[name], images) for name, found in installed.items() if found}


@dataclass(frozen=True)
class Streams:
    """Endless batches of views of a shard set, from its files and from memory; both yield the same views."""

    shards: ShardSet
    config: AugmentConfig
    batch: int
    threads: int
    device: torch.device

    def loader(self) -> Generator[torch.Tensor, None, None]:
        """Views of a loader, which reads the files."""
        options = LoaderConfig(backend="opencv", workers=self.threads, resident="off")
        loader = ViewLoader(self.shards, self.config, options, batch_size=self.batch, seed=0, device=self.device)
        try:
            while True:
                yield from (batch.views for batch in loader)
        finally:
            loader.close()

    def backend(self, batches: list[tuple]) -> Generator[torch.Tensor, None, None]:
        """Views that the backend alone makes of `batches`, its arguments."""
        backend = create_backend("opencv", self.config, self.device, self.batch, 2, self.threads)
        try:
            for encoded, params in batches:
                yield backend(encoded, params)
        finally:
            backend.close()

    def batches(self, count: int) -> Iterator[tuple]:
        """The first batches of the loader, as arguments of the backend."""
        reader = Reader(self.shards)
        for epoch, samples, _ in islice(ShardSampler(self.shards.shard_starts, self.batch, 0).plan(0, 0), count):
            height, width = (self.shards.index[side][samples] for side in ("height", "width"))
            yield reader(samples), draw_params(self.config, 0, epoch, samples, height, width)


def steady_states(shards: ShardSet, config: AugmentConfig, threads: int, device: torch.device) -> Iterator[Candidate]:
    """OpenCV backend and loader on the same distinct images."""
    batch = min(STEADY_BATCH, len(shards))
    timed = max(1, min(TIMED, len(shards) // batch - SKIPPED))
    for jitter in ("exact", "affine"):
        streams = Streams(shards, replace(config, jitter=jitter), batch, threads, device)
        batches = list(streams.batches(SKIPPED + timed))
        for name, start in (("opencv", lambda s=streams, b=batches: s.backend(b)), ("loader", streams.loader)):
            yield Candidate(name, "all", jitter, timed * batch, SteadyState(start, SKIPPED, timed, device))


class Photographs(Dataset):
    """Data set of a typical torchvision user: PIL decodes, and a random transform produces the views.

    Args:
        encoded: images, which repeat.
        length: number of samples.
        transform: of one view or, with `both`, of an image to a list of two.
    """

    def __init__(self, encoded: list[bytes], length: int, transform: Callable, both: bool):
        self.encoded, self.length, self.transform, self.both = encoded, length, transform, both

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(self.encoded[i % len(self.encoded)])).convert("RGB")
        return self.transform(image) if self.both else [self.transform(image), self.transform(image)]


def torchvision_views(config: AugmentConfig) -> Callable:
    """Build torchvision's transform of one view."""
    s, bicubic = config.jitter_strength, transforms.InterpolationMode.BICUBIC
    jitter = transforms.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    blur = transforms.GaussianBlur(config.blur_window, config.blur_sigma)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(config.size, config.crop_area, config.crop_aspect, interpolation=bicubic),
            transforms.RandomHorizontalFlip(config.flip_p),
            transforms.RandomApply([jitter], config.jitter_p),
            transforms.RandomGrayscale(config.gray_p),
            transforms.RandomApply([blur], config.blur_p),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )


def drained(loader: DataLoader) -> Generator[list[torch.Tensor], None, None]:
    """Batches of a loader; when closed, wait for the rest, which its workers would compute during the next turn."""
    batches = iter(loader)
    try:
        yield from batches
    finally:
        for _ in batches:
            pass


def peers(data: Prepared, config: AugmentConfig) -> Iterator[Candidate]:
    """SimCLR views of other libraries, in a DataLoader with as many workers as the backends have threads."""
    found = {"torchvision": (torchvision_views(config), False)}
    if find_spec("lightly"):
        from lightly.transforms import SimCLRTransform

        found["lightly"] = (SimCLRTransform(input_size=config.size), True)
    count, batch = min(2 * BATCH, len(data.samples)), BATCH // 2  # equal work for every worker
    timed, ahead = count // batch, 2 * data.threads  # prefetch_factor of a DataLoader
    for name, (transform, both) in found.items():
        loader = DataLoader(
            Photographs(data.encoded[:count], (ahead + timed + ahead) * batch, transform, both),
            batch,
            num_workers=data.threads,
            persistent_workers=True,
            multiprocessing_context="spawn",  # forking a process with threads may deadlock
        )
        stream = SteadyState(partial(drained, loader), ahead, timed, torch.device("cpu"))
        yield Candidate(name, "all", "exact", timed * batch, stream)


def measure(
    shards: ShardSet, kind: str, config: AugmentConfig, threads: int, seconds: float, device: torch.device
) -> list[dict]:
    """Time all candidates in turns; returns one row per candidate."""
    config = config.for_images(RGB8, {})
    data = Prepared(shards, config, threads, BATCH, REPEATED if device.type == "cpu" else GPU_BATCH)
    candidates = [
        *opencv_stages(data, config, device),
        *(stage for name, count in counts(data, device).items() for stage in STAGES[name](data, config, count, device)),
        *backends(data, config, device),
        *steady_states(shards, config, threads, device),
        *(others := list(peers(data, config))),
    ]
    times = interleave({i: candidate.call for i, candidate in enumerate(candidates)}, seconds, device)
    per_image = [[t / c.images for t in times[i]] for i, c in enumerate(candidates)]
    floor = next(per_image[i] for i, c in enumerate(candidates) if c.stage == "decode")
    best = min((per_image[candidates.index(peer)] for peer in others), key=statistics.median)
    backend = {
        c.jitter: per_image[i] for i, c in enumerate(candidates) if c.implementation == "opencv" and c.stage == "all"
    }
    mean_kb = sum(map(len, data.encoded)) / len(data.encoded) / 1000
    return [
        environment(device)
        | {"shards": kind, "mean_kb": round(mean_kb, 1), "workers": threads, "implementation": c.implementation}
        | {"jitter": c.jitter, "stage": c.stage, "images": c.images}
        | {"images_per_s": round(1 / statistics.median(per_image[i]), 1)}
        | percentiles_ms(times[i])
        | {"ratio_to_decode": _ratio(floor, per_image[i]), "ratio_to_best_peer": _ratio(best, per_image[i])}
        | ({"ratio_to_backend": _ratio(backend[c.jitter], per_image[i])} if c.implementation == "loader" else {})
        for i, c in enumerate(candidates)
    ]


def _ratio(reference: list[float], own: list[float]) -> float:
    """Speed as a multiple of the reference, the median over the rounds."""
    return round(statistics.median(r / o for r, o in zip(reference, own, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images and rounds, no file written")
    parser.add_argument("--seconds", type=float, default=120, help="approximate time per kind of shards (default: 120)")
    parser.add_argument(
        "--threads", type=int, default=2, help="threads or worker processes of every candidate (default: 2)"
    )
    available = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=available, choices=["cpu", "cuda"], help="device of the views")
    parser.add_argument("--data", help="folder or URL of a shard set, instead of rendered photographs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)  # Kornia's
    keep_freed_memory()  # as train.py does
    device = torch.device(arguments.device)
    count, seconds = (BATCH, 0) if arguments.quick else (DISTINCT, arguments.seconds)
    try:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.threads) as threads:
            if arguments.data:
                given = open_shards(arguments.data)
                images = Reader(given)(np.arange(min(count, len(given))))
            else:
                images = list(threads.map(photograph, range(count)))
            rows = []
            for kind in ("original", "short side 256"):
                console.print(f"{kind}: {len(images)} images ...")
                kept = images if kind == "original" else list(threads.map(lambda i: with_short_side(i, 256), images))
                shards = make_shards(kept, Path(folder, kind))
                rows += measure(shards, kind, AugmentConfig(), arguments.threads, seconds, device)
    except UserError as error:
        sys.exit(str(error))
    ratios = ("ratio_to_decode", "ratio_to_best_peer", "ratio_to_backend")
    show(rows, ("shards", "implementation", "jitter", "stage", "images_per_s", *ratios))
    if not arguments.quick:
        from bench.plot import fill_loader_table, fill_views_table, plot_pipeline

        written = [write_rows(csv_name("pipeline", device), rows)]
        if device.type == "cpu":
            written += [plot_pipeline(), fill_loader_table(), fill_views_table()]
        console.print(f"written: {', '.join(map(str, written))}")
    console.print(
        "Not measured: reading from a disk or object store (these reads come from the page cache); FFCV (it has no hue "
        "jitter, grayscale or blur, so it does not support these views)."
        + (" No GPU was measured." if device.type == "cpu" else "")
        + ("" if find_spec("lightly") else " lightly is not installed.")
        + ("" if {"dali"} & {row["implementation"] for row in rows} else " DALI is not installed.")
    )


if __name__ == "__main__":
    main()
