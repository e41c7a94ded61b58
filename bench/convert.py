"""Speed of the converter compared with processes that only decode.

    python -m bench.convert            writes bench/results/convert.csv

Both use the same rendered JPEGs of ImageNet's typical size and the same number of processes. The decoders hold them in
memory and decode them in color; the converter reads them from a tar, decodes each in gray (`--verify`), which takes
less time, hashes them and writes shards and indexes. Both times include starting the processes, and the two alternate.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

import cv2
import numpy as np

from common import available_cores
from pipeline.convert.sources import Source, folder_source
from pipeline.convert.writer import SAMPLES_PER_SHARD, write_split
from pipeline.images.files import decode

HEIGHT, WIDTH = 375, 500
QUALITY = 95
DISTINCT = 64
"""Number of different images; the tar repeats their pixels in other files."""


def photograph(number: int) -> bytes:
    """Render a JPEG of about 110 kB, ImageNet's average: octaves of noise with amplitude decreasing with frequency."""
    random = np.random.default_rng(number)
    image = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for octave in range(1, 9):
        noise = random.normal(0, 1, (3 * 2**octave // 2 + 1, 2 * 2**octave + 1, 3)).astype(np.float32)
        gray = noise.mean(axis=2, keepdims=True)  # the color of photographs varies less than their brightness
        image += 42 * 0.82 ** (octave - 1) * cv2.resize(1.5 * gray + 0.3 * noise, (WIDTH, HEIGHT))
    _, encoded = cv2.imencode(".jpg", np.clip(image, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return encoded.tobytes()


def write_source(path: Path, images: list[bytes], count: int) -> Path:
    """Write a tar of class folders with `count` images."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"class_{number % 10}/image_{number}.jpg")
            jpeg = images[number % len(images)]
            comment = b"\xff\xfe\x00\x0a" + b"%08d" % number  # after the start of image: no two files are copies
            file = jpeg[:2] + comment + jpeg[2:]
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
    return path


_held: list[bytes] = []


def _hold(images: list[bytes]) -> None:
    cv2.setNumThreads(1)
    _held[:] = images


def _decode_held(count: int) -> int:
    return sum(decode(_held[number % len(_held)]) is not None for number in range(count))


def decode_only(images: list[bytes], count: int, workers: int) -> None:
    """Decode `count` images in processes, 1024 per task, like the shards of the converter."""
    context = multiprocessing.get_context("spawn")
    tasks = [min(SAMPLES_PER_SHARD, count - first) for first in range(0, count, SAMPLES_PER_SHARD)]
    with ProcessPoolExecutor(workers, context, _hold, (images,)) as pool:
        assert sum(pool.map(_decode_held, tasks)) == count


def convert(source: Source, workers: int, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        write_split(source, Path(out), "train", workers=workers)


def measure(count: int, workers: int, seconds: float) -> list[dict]:
    """Measure both in alternation; return one row for each."""
    # imported here because the worker processes import this module and do not need torch
    import torch

    from bench.harness import environment, interleave, percentiles_ms

    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        images = [photograph(number) for number in range(DISTINCT)]
        source = folder_source(write_source(Path(folder, "images.tar"), images, count))
        functions = {
            "decode only": lambda: decode_only(images, count, workers),
            "convert, verified": lambda: convert(source, workers, Path(folder)),
        }
        cpu: dict[str, list[float]] = {name: [] for name in functions}
        timed = {name: _with_cpu_time(function, cpu[name]) for name, function in functions.items()}
        times = interleave(timed, seconds, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        environment(device)
        | {"what": name, "workers": workers, "images": count, "image_kb": round(mean(map(len, images)) / 1000, 1)}
        | percentiles_ms(times[name])
        | {
            "images_per_s": round(count / medians[name]),
            "of_decoding": round(medians["decode only"] / medians[name], 3),
            "cpu_ms_per_image": round(1000 * statistics.median(cpu[name][1:]) / count, 4),  # without the warm-up run
        }
        for name in functions
    ]


def _with_cpu_time(function: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    """Also record the CPU time (s) of all processes, which depends less on other load on the machine."""

    def timed() -> None:
        before = os.times()
        function()
        after = os.times()
        seconds.append(
            sum(after[:4]) - sum(before[:4])
        )  # user and system time of this process and of finished child processes

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8192, help="images per run (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="number of processes (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="approximate total time (default: %(default)s)")
    arguments = parser.parse_args()
    from bench.harness import write_rows

    rows = measure(arguments.images, arguments.workers, arguments.seconds)
    for row in rows:
        summary = f"{row['images_per_s']} images/s, {row['of_decoding']} of decoding, {row['cpu_ms_per_image']} CPU ms"
        print(f"{row['what']}: {summary}")
    print(f"written: {write_rows('convert', rows)}")


if __name__ == "__main__":
    main()
