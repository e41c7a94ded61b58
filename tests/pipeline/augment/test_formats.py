"""Views of images with 1 to 16 channels and 8 or 16 bits: float64 references, refusals, and 8-bit RGB as it was."""

import colorsys
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from torch import Tensor

from common import UserError
from pipeline.augment import opencv
from pipeline.augment.__main__ import GAP, LINE, TILE, contact_sheet, describe
from pipeline.augment.backend import choose_backend, create_backend
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import BRIGHTNESS, CONTRAST, LUMA, AugmentParams, center_crop, draw_params
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.images.files import DecodeError
from pipeline.images.pixel_format import RGB8, PixelFormat
from pipeline.shards.dataset import ShardSet
from tests.pipeline.augment import reference_views as reference
from tests.pipeline.image_sets import write_folder
from tests.pipeline.loaders import center_crops, view_loader

CPU = torch.device("cpu")
GRAY16, RGB16, MANY16, FOUR8 = PixelFormat(1, 16), PixelFormat(3, 16), PixelFormat(8, 16), PixelFormat(4, 8)
FORMATS = [pytest.param(f, id=str(f)) for f in (GRAY16, RGB16, MANY16, FOUR8)]
SIZES = ((60, 80), (80, 44), (31, 47), (24, 24))
SIZE = 24
LEVEL, HUE_LEVEL = 0.52, 0.55
"""A value rounded to a whole level is at most half a level away. The rest is float32, whose spacing near white of 16
bits is 1/256 level: the roundings of a blur add up to five of them, those of OpenCV's HSV and back to a dozen."""


def noise(pixel_format: PixelFormat, seed: int, sizes=SIZES, smallest: int = 0, largest: int | None = None) -> list:
    """An array per size, uniform from `smallest` to `largest` (default: white): hard edges and full range."""
    random = np.random.default_rng(seed)
    high = (pixel_format.white if largest is None else largest) + 1
    return [random.integers(smallest, high, (*size, pixel_format.channels), pixel_format.dtype) for size in sizes]


def encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def draw(images: list, config: AugmentConfig, *kept: str, seed: int = 2) -> AugmentParams:
    height, width = np.array([image.shape[:2] for image in images]).T
    return reference.keep_only(draw_params(config, seed, 0, np.arange(len(images)), height, width), *kept)


def views_in_levels(images: list, params: AugmentParams, config: AugmentConfig, pixel_format: PixelFormat) -> Tensor:
    """Views of the OpenCV backend, (V, n, C, S, S) float64 in levels."""
    plain = replace(config, mean=(0,), std=(1,))
    backend = create_backend("opencv", plain, CPU, len(images), len(params.flip), 2, pixel_format=pixel_format)
    views = backend([encode(image) for image in images], params)
    backend.close()
    assert views.is_contiguous(memory_format=torch.channels_last)
    return views.double().unflatten(0, params.flip.shape) * pixel_format.white


def expected_view(image: np.ndarray, params: AugmentParams, at: tuple[int, int], config: AugmentConfig) -> Tensor:
    """(C, S, S) float64 in levels, not rounded, and clipped as the operations are."""
    white, rgb = np.iinfo(image.dtype).max, image.shape[2] == 3
    x = torch.from_numpy(image.astype(np.float64) / white).permute(2, 0, 1)
    size, bicubic = [config.size, config.size], F.InterpolationMode.BICUBIC
    x = F.resized_crop(x, *params.crop[at].tolist(), size, bicubic, antialias=True).clamp(0, 1)
    x = F.hflip(x) if params.flip[at] else x
    b, c, s = (float(getattr(params, name)[at]) for name in ("brightness", "contrast", "saturation"))
    gray = torch.from_numpy(LUMA)[:, None, None]

    def scaled(x: Tensor, factor: float, mean_weight: float) -> Tensor:
        mean = (gray * x).sum(0).mean() if rgb else x.mean((1, 2), keepdim=True)
        return factor * x + mean_weight * mean

    if config.jitter == "affine" and not rgb:
        x = scaled(x, b * c, b * (1 - c)).clamp(0, 1)
    else:
        for operation in params.order[at].tolist():
            if operation == BRIGHTNESS:
                x = (b * x).clamp(0, 1)
            elif operation == CONTRAST:
                x = scaled(x, c, 1 - c).clamp(0, 1)
            elif rgb and operation == 2:
                x = (s * x + (1 - s) * (gray * x).sum(0)).clamp(0, 1)
            elif rgb and params.hue[at]:
                x = turn_hue(x, float(params.hue[at]))
    x = (gray * x).sum(0).expand(3, -1, -1) if rgb and params.gray[at] else x
    sigma = float(params.sigma[at])
    return white * (reference.blurred(x, config.blur_window, sigma) if sigma else x)


def turn_hue(x: Tensor, turns: float) -> Tensor:
    """Hue shift of (3, S, S) by Python's color wheel, because torchvision's computes in float32."""
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in x.flatten(1).T.tolist()]
    return torch.tensor([colorsys.hsv_to_rgb((h + turns) % 1, s, v) for h, s, v in hsv], dtype=x.dtype).T.view_as(x)


def deviations(images: list, params: AugmentParams, config: AugmentConfig, pixel_format: PixelFormat) -> Tensor:
    """Absolute deviation from the reference in levels: (V, n, C, S, S)."""
    views = views_in_levels(images, params, config, pixel_format)
    for at in np.ndindex(params.flip.shape):
        views[at] -= expected_view(images[at[1]], params, at, config)
    return views.abs()


@pytest.mark.parametrize("pixel_format", FORMATS)
def test_geometry_is_exact(pixel_format):
    """Crops are enlarged and shrunk, to sizes on both sides of the limit below which 8-bit RGB takes another path."""
    for size in SIZE, 48:
        config, images = AugmentConfig(size=size), noise(pixel_format, 1)
        params = draw(images, config, "flip")
        assert deviations(images, params, config, pixel_format).max() < LEVEL
        center = center_crop(config, *np.array([image.shape[:2] for image in images]).T)
        assert deviations(images, center, config, pixel_format).max() < LEVEL


@pytest.mark.parametrize("kept", ["sigma", "brightness", "contrast", "saturation", "hue", "gray"])
@pytest.mark.parametrize("pixel_format", FORMATS)
def test_each_operation_is_exact(pixel_format, kept):
    """Of images that have the size of the views, which resizing leaves as they are."""
    count, size = (1, 160) if kept == "sigma" else (6, SIZE)  # there, the window is larger than this blur needs
    images, whole = noise(pixel_format, 2, ((size, size),) * count), {"crop_area": (1, 1), "crop_aspect": (1, 1)}
    for jitter in ("exact", "affine") if pixel_format.channels != 3 and kept != "sigma" else ("exact",):
        config = AugmentConfig(size=size, **whole, jitter=jitter, blur_p=1, blur_sigma=(1.5, 1.5))
        params = draw(images, config, kept)
        unchanged = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double().expand(2, -1, -1, -1, -1)
        if kept in ("saturation", "hue", "gray") and pixel_format.channels != 3:
            assert torch.allclose(views_in_levels(images, params, config, pixel_format), unchanged, atol=0.01, rtol=0)
            continue
        found = deviations(images, params, config, pixel_format)
        assert found.max() < (HUE_LEVEL if kept == "hue" else LEVEL)
        assert (views_in_levels(images, params, config, pixel_format) - unchanged).abs().mean() > LEVEL


@pytest.mark.parametrize("jitter", ["exact", "affine"])
@pytest.mark.parametrize("pixel_format", [f for f in FORMATS if f.values[0].channels != 3])
def test_all_operations_without_colors(pixel_format, jitter):
    """Each operation multiplies the rounding of the earlier ones by its gain and adds its own."""
    config, images = AugmentConfig(size=SIZE, jitter=jitter), noise(pixel_format, 3)
    params = draw(images, config, "flip", "brightness", "contrast", "saturation", "hue", "gray", "sigma")
    found = deviations(images, params, config, pixel_format).amax((2, 3, 4))
    for at in np.ndindex(params.flip.shape):
        b, c = float(params.brightness[at]), float(params.contrast[at])
        gains = {BRIGHTNESS: b, CONTRAST: c + abs(1 - c)}  # of a pixel, and of the mean
        bound = LEVEL
        if jitter == "affine":
            bound = b * gains[CONTRAST] * bound + LEVEL
        else:
            for operation in params.order[at].tolist():
                bound = gains[operation] * bound + LEVEL if operation in gains else bound
        assert found[at] < bound + LEVEL * (params.sigma[at] > 0)


@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_all_operations_on_16_bit_colors(jitter):
    """Against the views of the upper 8 bits, with the bounds that these have against the float64 reference."""
    config = AugmentConfig(size=SIZE, jitter=jitter)
    pictures = [np.asarray(reference.smooth_field(4, i, *size)) for i, size in enumerate(SIZES)]
    images = [image.astype(np.uint16) * 257 for image in pictures]  # 255 -> 65535
    params = draw(images, config, "flip", "brightness", "contrast", "saturation", "hue", "gray", "sigma")
    expected = reference.reference_views([_png(image) for image in pictures], params, config)
    views = views_in_levels(images, params, config, RGB16).flatten(0, 1) / 257
    # torchvision weights red by 0.2989 in the exact jitter, which the mean gray of contrast multiplies
    assert (views - expected).abs().max() < {"exact": 0.2, "affine": 0.02}[jitter]
    assert (views - expected).abs().mean() < {"exact": 0.02, "affine": 0.005}[jitter]


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pixel_format", [GRAY16, RGB16, MANY16], ids=str)
def test_the_lower_byte_survives(pixel_format, dtype):
    """Images that differ only below 8 bits have other views, as different as their pixels are in units of std."""
    one, two = (noise(pixel_format, seed, ((SIZE, SIZE),), 0x4200, 0x42FF) for seed in (6, 7))
    assert np.array_equal(one[0] >> 8, two[0] >> 8)
    measured = {
        "mean": [image.mean() / 65535 for image in one[0].T],
        "std": [image.std() / 65535 for image in one[0].T],
    }
    config = AugmentConfig(size=SIZE, crop_area=(1, 1), crop_aspect=(1, 1)).for_images(pixel_format, measured)
    backend = create_backend("opencv", config, CPU, 1, 1, 1, dtype, pixel_format)
    params = center_crop(config, np.array([SIZE]), np.array([SIZE]))
    first, second = (backend([encode(image)], params).float() for (image,) in (one, two))
    backend.close()
    expected = [torch.from_numpy((image.astype(float) - image.mean((0, 1))) / image.std((0, 1))) for image in one]
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-4  # bfloat16 has 8 bits
    assert torch.allclose(first[0].permute(1, 2, 0).double(), expected[0], rtol=0, atol=tolerance)
    assert (first - second).abs().mean() > 1


@pytest.mark.parametrize("jitter", ["exact", "affine"])
@pytest.mark.parametrize("pixel_format", [*FORMATS, pytest.param(PixelFormat(1, 8), id="gray, 8 bits")])
def test_bfloat16_views_are_the_rounded_float32_views(pixel_format, jitter):
    images = noise(pixel_format, 8)
    config = AugmentConfig(size=SIZE, jitter=jitter, mean=(0.4,), std=(0.2,))
    encoded, params = [encode(image) for image in images], draw_params(config, 1, 0, np.arange(4), *np.array(SIZES).T)
    views = []
    for dtype in (torch.float32, torch.bfloat16):
        backend = create_backend("opencv", config, CPU, 4, 2, 2, dtype, pixel_format)
        views.append(backend(encoded, params))
        backend.close()
    assert views[1].dtype == torch.bfloat16 and torch.equal(views[1], views[0].to(torch.bfloat16))


def test_8_bit_rgb_keeps_its_own_path(monkeypatch):
    """Nothing for other formats touches its views, which stay fast."""
    for name in ("resized_crop", "color", "intensity", "blur", "Normalize"):
        monkeypatch.setattr(opencv, name, lambda *_: pytest.fail("called"))
    encoded = reference.photographs(4, seed=1)
    for size, jitter in ((32, "exact"), (64, "affine"), (224, "exact")):
        config = AugmentConfig(size=size, jitter=jitter)
        backend = create_backend("opencv", config, CPU, 4, 2, 1, pixel_format=RGB8)
        assert backend(encoded, reference.random_params(encoded, config, seed=2)).shape == (8, 3, size, size)
        backend.close()


def test_torch_uses_one_core_in_each_thread_of_the_backend(monkeypatch):
    """The caller's number, which threads started later inherit, stays."""
    threads, used = torch.get_num_threads(), []

    def interpolate(*args, **options):
        used.append(torch.get_num_threads())
        return torch.nn.functional.interpolate(*args, **options)

    monkeypatch.setattr(opencv, "interpolate", interpolate)
    images, config = noise(GRAY16, 1), AugmentConfig(size=SIZE)
    try:
        torch.set_num_threads(3)
        views_in_levels(images, draw(images, config), config, GRAY16)
        with ThreadPoolExecutor(1) as later:
            assert torch.get_num_threads() == later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(threads)
    assert used == [1] * 2 * len(images)


@pytest.mark.parametrize(("name", "title"), [("kornia", "Kornia"), ("dali", "DALI"), ("triton", "Triton")])
def test_other_backends_refuse_other_formats(name, title):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is available for Linux only")
    elif name == "triton":
        pytest.importorskip("triton")
    for pixel_format, shown in ((GRAY16, "gray, 16 bits"), (FOUR8, "4 channels, 8 bits")):
        with pytest.raises(UserError) as error:
            create_backend(name, AugmentConfig(mean=(0,), std=(1,)), CPU, 1, 2, 1, pixel_format=pixel_format)
        expected = f"The {title} backend supports 8-bit RGB images only, not {shown}; use --loader.backend opencv."
        assert str(error.value) == expected


@pytest.mark.parametrize(("device", "size", "threads"), [("cuda", 32, 16), ("cuda", 224, 1), ("mps", 224, 1)])
def test_auto_chooses_opencv_for_other_formats(device, size, threads):
    """Where it would choose another backend for 8-bit RGB, or DALI is missing."""
    choice = choose_backend("auto", torch.device(device), size, threads, MANY16)
    assert choice == ("opencv", "the only one for images of this kind: 8 channels, 16 bits")


@pytest.mark.parametrize("wrong", [PixelFormat(1, 8), RGB16], ids=str)
def test_an_image_of_another_format_is_reported(wrong):
    config = AugmentConfig(size=SIZE, mean=(0,), std=(1,))
    images = [encode(image) for image in noise(GRAY16, 9)]
    backend, params = (
        create_backend("opencv", config, CPU, 4, 2, 2, pixel_format=GRAY16),
        draw(noise(GRAY16, 9), config),
    )
    images[2] = encode(noise(wrong, 9)[2])
    with pytest.raises(DecodeError) as error:
        backend(images, params)
    assert error.value.args[1] == 2
    backend.close()


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> ShardSet:
    """Eight scans of 12 bits in 16-bit gray PNGs, with the mean and std that a conversion measures."""
    root = tmp_path_factory.mktemp("scans")
    files = {
        f"{i % 2}/{i}.png": cv2.imencode(".png", image)[1].tobytes()
        for i, image in enumerate(noise(GRAY16, 10, 2 * SIZES, largest=4095))
    }
    shards = write_split(folder_source(write_folder(root / "in", files)), root / "out", "train")
    shards.manifest["pixels"] = GRAY16._asdict()
    shards.manifest["statistics"] = {"mean": [0.03124], "std": [0.018]}
    return shards


def test_loaders_pass_the_format_on(scans):
    """Views have one channel and, normalized as measured, mean 0 and standard deviation 1, about."""
    config = AugmentConfig(size=SIZE, jitter_p=0, blur_p=0).for_images(scans.pixel_format, scans.manifest["statistics"])
    loader = view_loader(scans, config, batch_size=8, seed=0, device=CPU, epochs=1)
    batch = next(iter(loader))
    loader.close()
    (crops,) = center_crops(scans, config, np.arange(8), batch_size=8, device=CPU)
    assert loader.backend_name.startswith("opencv (the fastest on a CPU)")
    assert batch.views.shape == (16, 1, SIZE, SIZE) and crops.views.shape == (8, 1, SIZE, SIZE)
    for views in (batch.views, crops.views):  # shrinking noise reduces its standard deviation
        assert abs(views.mean()) < 0.1 and 0.5 < views.std() < 1.1


def test_preview_of_scans(scans):
    """In gray, windowed, without the operations that have no effect."""
    sheet = contact_sheet(scans, AugmentConfig(size=SIZE), ("opencv",), 2, 0)
    tiles = sheet[GAP + LINE : GAP + LINE + TILE, GAP:].astype(int)
    assert (tiles == tiles[..., :1]).all()
    for first, last in ((0, 1), (1, 3)):  # the original, and both views, which share a window
        shown = tiles[:, first * (TILE + GAP) : last * (TILE + GAP) - GAP]
        assert (shown == 0).any() and shown[shown < 255].max() > 250  # the rest of a tile is white
    params = draw_params(AugmentConfig(jitter_p=1, gray_p=1), 0, 0, np.arange(1), np.array([40]), np.array([40]))
    _, jitter, effects = describe(params, 0, 0, color=False)
    assert sorted(part[0] for part in jitter.split()) == ["B", "C"] and effects.startswith(("blur", "no gray, no blur"))
