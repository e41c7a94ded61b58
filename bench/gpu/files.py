"""Image files that decoders on a GPU treat differently: truncated, gray and CMYK JPEGs."""

import io
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from bench.gpu.checks import Case, Outcome, Setup, imports

LEVELS = 1.5
"""Largest mean difference of two decoders or backends, in levels of 255."""


def example_files() -> dict[str, bytes]:
    """Photographs as JPEG: whole, gray, CMYK, and cut off in the header, early, in the middle and late."""
    from PIL import Image

    from bench.pipeline import photograph

    found = {"color": photograph(0), "color, upright": photograph(3)}
    with Image.open(io.BytesIO(found["color"])) as image:
        for mode, name in (("L", "gray"), ("CMYK", "CMYK")):
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, "JPEG", quality=95)
            found[name] = buffer.getvalue()
    whole = found["color"]
    for percent in (0.1, 10, 50, 90):
        found[f"truncated at {percent}%"] = whole[: int(percent / 100 * len(whole))]
    found["without its last two bytes"] = whole[:-2]
    return found


def image_files(setup: Setup) -> Iterator[Case]:
    """Every backend accepts, refuses and renders the files like OpenCV's; what nvJPEG alone does is reported."""
    examples = example_files()
    if setup.small:
        examples = {name: examples[name] for name in ("gray", "CMYK", "truncated at 50%")}
    if setup.device.type == "cuda":
        for name, file in examples.items():
            yield Case(f"nvJPEG, {name}", partial(decode_by_nvjpeg, file, setup.device))
    backends = {"kornia": "kornia", "dali": "nvidia.dali"}
    if setup.device.type == "cuda":  # photographs take minutes in the interpreter
        backends["triton"] = "triton"
    for backend, module in backends.items():
        if imports(module):
            for name, file in examples.items():
                yield Case(f"{backend}, {name}", partial(compare_with_opencv, setup, backend, file))


def decode_by_nvjpeg(file: bytes, device: torch.device) -> Iterator[Outcome]:
    from torchvision.io import ImageReadMode, decode_jpeg

    from pipeline.images.files import decode

    expected = decode(file)
    on_host = "the host refuses it" if expected is None else "the host decodes it"
    try:
        pixels = decode_jpeg([torch.frombuffer(bytearray(file), dtype=torch.uint8)], ImageReadMode.RGB, device)[0]
    except RuntimeError as error:
        yield Outcome("refused", 1, float("inf"), f"{on_host}, nvJPEG: {str(error).splitlines()[0][:100]}")
        return
    difference = 0.0
    if expected is not None:
        difference = np.abs(pixels.permute(1, 2, 0).cpu().numpy().astype(int) - expected).mean().item()
    yield Outcome("mean difference in levels", difference, float("inf"), f"{on_host}, nvJPEG decodes it")


def compare_with_opencv(setup: Setup, name: str, file: bytes) -> Iterator[Outcome]:
    from bench.pipeline import photograph
    from pipeline.augment.backend import create_backend
    from pipeline.augment.config import AugmentConfig
    from pipeline.augment.params import draw_params
    from pipeline.images.files import DecodeError
    from pipeline.images.pixel_format import RGB8

    config = AugmentConfig(size=64).for_images(RGB8, {})
    params = draw_params(config, 0, 0, np.arange(2), np.array([400, 400]), np.array([400, 400]))  # fits upright ones
    found = []
    for which, device in (("opencv", torch.device("cpu")), (name, setup.device)):
        backend = create_backend(which, config, device, 2, 2, 2)
        try:
            found.append(backend([photograph(1), file], params).float().cpu())
        except DecodeError:
            found.append(None)
        finally:
            backend.close()
    expected, views = found
    yield Outcome("refused by one of them", float((expected is None) != (views is None)), 0)
    if expected is not None and views is not None:
        std = torch.tensor(config.std)[:, None, None]
        yield Outcome("mean difference in levels", (255 * std * (views - expected)).abs().mean().item(), LEVELS)
