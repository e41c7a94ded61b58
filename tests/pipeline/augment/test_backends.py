"""Views of every backend against the float64 reference, the other backends, and torchvision on PIL images."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from pipeline.augment import gpu
from pipeline.augment.backend import create_backend
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import ORDERS, AugmentParams, center_crop, draw_params
from pipeline.images.files import DecodeError
from pipeline.images.prepare import prepare
from tests.pipeline.augment import reference_views as reference

CPU = torch.device("cpu")
NAMES = ("opencv", "kornia", "dali")
"""Columns of the bounds below."""
BACKENDS = [name for name in NAMES if name != "dali" or (find_spec("nvidia") and find_spec("nvidia.dali"))]
JITTER = ("brightness", "contrast", "saturation", "hue")
COLOR = (*JITTER, "gray")
ALL = ("flip", *COLOR, "sigma")
SMALL = {jitter: AugmentConfig(size=64, jitter=jitter) for jitter in ("exact", "affine")}
EXACT = SMALL["exact"]
CONFIG = AugmentConfig(size=112)


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return reference.photographs(12, seed=1)


@pytest.fixture(scope="module")
def backends():
    """(name, jitter) -> backend with two views of 64 px and up to twelve images, created when first used."""

    class Backends(dict):
        def __missing__(self, key):
            name, jitter = key
            self[key] = create_backend(name, SMALL[jitter], CPU, 12, 2, 2)
            return self[key]

    backends = Backends()
    yield backends
    for backend in backends.values():
        backend.close()


@pytest.fixture(params=BACKENDS)
def backend(request, backends):
    """Backend with the exact jitter."""
    backend = backends[request.param, "exact"]
    backend.name = request.param
    return backend


# ---- against the float64 reference

# Bounds on the mean and the largest deviation of each of `NAMES`, in levels of 255.
# opencv: rounding to whole levels costs 0.25 on average and 0.5 at most after resizing, after every operation of the
#   exact jitter and once for the affine one, and once each for gray and blur; strong factors multiply earlier rounding.
# kornia: weights red by 0.299, torchvision's exact jitter by 0.2989, which matters wherever gray is involved.
# dali: float32 and a YIQ matrix rounded to three places; its bicubic interpolation repeats the last pixel of an
#   enlarged crop, where torchvision drops its weight.
BOUNDS = {
    "exact": {
        (): ((0.26, 0.51), (0.001, 0.01), (0.01, 1.5)),
        ("flip",): ((0.26, 0.51), (0.001, 0.01), (0.01, 1.5)),
        ("brightness",): ((0.3, 1.5), (0.001, 0.01), (0.01, 2)),
        ("contrast",): ((0.3, 1.5), (0.02, 0.1), (0.02, 2)),
        ("saturation",): ((0.3, 1.8), (0.02, 0.1), (0.1, 2)),
        ("hue",): ((0.3, 2.2), (0.001, 0.01), (0.01, 2)),
        JITTER: ((0.42, 6), (0.02, 0.2), (0.1, 3)),
        ("gray",): ((0.27, 1.1), (0.01, 0.1), (0.05, 1.5)),
        ("sigma",): ((0.26, 1.1), (0.001, 0.01), (0.01, 1.5)),
        ALL: ((0.37, 6), (0.02, 0.2), (0.1, 3)),
    },
    "affine": {
        ("brightness",): ((0.3, 1.5), (0.001, 0.01), (0.01, 2)),
        ("contrast",): ((0.3, 1.5), (0.001, 0.01), (0.02, 2)),
        ("saturation",): ((0.3, 1.8), (0.001, 0.01), (0.1, 2)),
        ("hue",): ((0.31, 2.2), (0.001, 0.01), (0.1, 2)),
        JITTER: ((0.3, 3.5), (0.001, 0.01), (0.1, 3)),
        ("gray",): ((0.27, 1.1), (0.001, 0.01), (0.05, 1.5)),
        COLOR: ((0.3, 3.5), (0.001, 0.01), (0.1, 3)),
        ALL: ((0.28, 2.5), (0.001, 0.01), (0.1, 3)),
    },
}
CASES = [
    pytest.param(name, jitter, kept, *bounds, id=f"{name}-{jitter}-{'+'.join(kept) or 'crop'}")
    for jitter, cases in BOUNDS.items()
    for kept, of_all in cases.items()
    for name, bounds in zip(NAMES, of_all, strict=True)
    if name in BACKENDS
]


@pytest.mark.parametrize(("name", "jitter", "kept", "mean", "largest"), CASES)
def test_views_match_the_reference(backends, images, name, jitter, kept, mean, largest):
    config = SMALL[jitter]
    params = reference.keep_only(reference.random_params(images, config, seed=2), *kept)
    views = backends[name, jitter](images, params)
    assert views.shape == (24, 3, 64, 64) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    found = reference.deviation(views, reference.reference_views(images, params, config), config)
    assert found[0] < mean and found[1] < largest


def test_jitter_order_is_per_sample(backend, images):
    """A backend that applies another order, or one order to all samples, would fail the bounds above."""
    params = reference.keep_only(reference.random_params(images, EXACT, seed=2), *JITTER)
    assert len({tuple(order) for order in params.order.reshape(-1, 4)}) > 6
    expected = reference.reference_views(images, params, EXACT)
    for order in (params.order[..., ::-1], np.broadcast_to(ORDERS[0], params.order.shape)):
        views = backend(images, replace(params, order=order))
        assert reference.deviation(views, expected, EXACT)[0] > 1


SIGNS = np.where(np.arange(12) % 2, 1, -1).astype(np.float32) * np.array([[1], [-1]], np.float32)
FACTORS = dict.fromkeys(("brightness", "contrast", "saturation"), 1 + 0.8 * SIGNS)


@pytest.mark.parametrize(
    ("changed", "bounds"),
    [
        ({"brightness": 1 + SIGNS}, (0.3, 0.01, 0.01)),
        ({"contrast": 1 + SIGNS}, (0.35, 0.02, 0.02)),
        ({"saturation": 1 + SIGNS}, (0.45, 0.02, 0.15)),
        ({"hue": 0.5 * SIGNS}, (0.35, 0.01, 0.02)),
        ({**FACTORS, "hue": 0.5 * SIGNS}, (0.7, 0.1, 0.1)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_extreme_factors(backend, images, changed, bounds):
    """Strengths at the ends of their ranges, where clipping and the wrap of the color wheel matter most."""
    params = replace(reference.keep_only(reference.random_params(images, EXACT, seed=3)), **changed)
    mean, _ = reference.deviation(backend(images, params), reference.reference_views(images, params, EXACT), EXACT)
    assert mean < bounds[NAMES.index(backend.name)]


def test_a_batch_may_be_smaller_than_batch_size(backend, images):
    params = reference.random_params(images, EXACT, seed=4)
    whole = backend(images, params).view(2, 12, 3, 64, 64)
    for part in slice(0, 1), slice(3, 10), slice(0, 12):
        views = backend(images[part], reference.select(params, part))
        torch.testing.assert_close(views, whole[:, part].flatten(0, 1), rtol=0, atol=0)


def test_chunks_of_a_batch(backend, images, monkeypatch):
    """Batches above 256 images are augmented in chunks, here above five, without a difference to the views."""
    params = reference.random_params(images, EXACT, seed=4)
    whole = backend(images, params)
    monkeypatch.setattr(gpu, "CHUNK", 5)
    assert torch.equal(backend(images, params), whole)
    with pytest.raises(DecodeError) as error:
        backend([*images[:7], b"damaged", *images[8:]], params)
    assert error.value.args[1] == 7


@pytest.mark.parametrize("jitter", ["exact", "affine"])
@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_views_are_the_rounded_float32_views(backends, images, name, jitter):
    params = reference.random_params(images, SMALL[jitter], seed=4)
    expected = backends[name, jitter](images, params).to(torch.bfloat16)
    half = create_backend(name, SMALL[jitter], CPU, 12, 2, 2, torch.bfloat16)
    views = half(images, params)
    half.close()
    assert views.dtype == torch.bfloat16 and views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, expected)


def test_views_survive_later_calls(backend, images):
    views = backend(images, reference.random_params(images, EXACT, seed=4))
    before = views.clone()
    for seed in range(3):
        backend(images, reference.random_params(images, EXACT, seed))
    assert torch.equal(views, before)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_single_view(images, name):
    backend = create_backend(name, EXACT, CPU, 4, 1, 1)
    params = reference.random_params(images[:4], EXACT, seed=4, views=1)
    views = backend(images[:4], params)
    backend.close()
    assert views.shape == (4, 3, 64, 64)
    mean, _ = reference.deviation(views, reference.reference_views(images[:4], params, EXACT), EXACT)
    assert mean < {"opencv": 0.4, "kornia": 0.02, "dali": 0.1}[name]


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "head"])
def test_a_damaged_image_is_reported_and_the_next_call_works(backend, images, damage):
    half, head = images[1][: len(images[1]) // 2], images[1][:80]
    damaged = {"empty": b"", "text": b"not an image at all", "cut": half, "head": head}[damage]
    params = reference.select(reference.random_params(images, EXACT, seed=6), slice(0, 3))
    before = backend(images[:3], params)
    with pytest.raises(DecodeError, match=r"can't (be )?decode") as error:
        backend([images[0], damaged, images[2]], params)
    assert error.value.args[1] == 1
    assert torch.equal(backend(images[:3], params), before)


def test_every_truncated_jpeg_is_refused(backend):
    """Cut anywhere, also inside the marker at its end; a thumbnail's marker does not count."""
    picture = reference.smooth_field(7, 0, 40, 56)
    exif = reference.encode(picture.resize((16, 16)), "JPEG")
    jpegs = [
        reference.encode(picture, "JPEG", exif=b"Exif\0\0" + exif),
        reference.encode(picture, "JPEG", progressive=True, subsampling=0),
        reference.encode(picture.convert("L"), "JPEG", restart_marker_rows=1),
        reference.encode(picture.convert("CMYK"), "JPEG"),
    ]
    for jpeg in jpegs:
        params = reference.random_params([jpeg], EXACT, seed=6)
        backend([jpeg], params)
        for length in [*range(2, len(jpeg), 97), *range(len(jpeg) - 5, len(jpeg))]:
            with pytest.raises(DecodeError):
                backend([jpeg[:length]], params)


def test_formats_and_color_models(backend):
    picture = reference.smooth_field(7, 0, 90, 120)
    exif = picture.getexif()
    exif[0x0112] = 6  # rotation by a quarter turn, to be ignored
    encoded = [
        *(reference.encode(picture, form) for form in ("PNG", "WEBP", "BMP", "TIFF")),
        reference.encode(picture.convert("L"), "JPEG"),
        reference.encode(picture.convert("L"), "PNG"),
        reference.encode(picture.convert("CMYK"), "JPEG"),
        reference.encode(picture.convert("RGBA"), "PNG"),
        reference.encode(picture, "JPEG", progressive=True, subsampling=2),
        reference.encode(picture, "JPEG", exif=exif),
        reference.encode(picture.convert("P"), "PNG"),
    ]
    if backend.name == "dali":
        encoded.pop()  # its bound is tight enough for smooth pictures only; a palette has hard edges
    params = reference.keep_only(reference.random_params(encoded, EXACT, seed=8))
    expected = reference.reference_views(encoded, params, EXACT)
    mean, largest = reference.deviation(backend(encoded, params), expected, EXACT)
    # OpenCV decodes CMYK one level differently from PIL
    bounds = {"opencv": (0.4, 6), "kornia": (0.1, 1.5), "dali": (0.02, 1.5)}[backend.name]
    assert mean < bounds[0] and largest < bounds[1]


# ---- against each other and against torchvision


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    return reference.photographs(10, seed=21, sizes=((180, 240), (256, 200), (131, 301), (112, 112), (375, 500)))


def views_of(name: str, config: AugmentConfig, encoded: list[bytes], params: AugmentParams) -> torch.Tensor:
    """Views by a backend: (V n, 3, S, S) float64 in levels 0..255."""
    backend = create_backend(name, config, CPU, len(encoded), len(params.flip), 2)
    try:
        return reference.denormalize(backend(encoded, params), config)
    finally:
        backend.close()


def worst_view(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest mean absolute difference of a view, in levels."""
    return (a - b).abs().mean((1, 2, 3)).max().item()


def torchvision_on_pil(encoded: list[bytes], params: AugmentParams, config: AugmentConfig) -> torch.Tensor:
    """Views by torchvision's transforms on PIL images, which round to whole levels after each step."""

    def view(v: int, i: int) -> torch.Tensor:
        top, left, height, width = params.crop[v, i].tolist()
        size = [config.size, config.size]
        image = Image.fromarray((reference.decode(encoded[i]) * 255).round().byte().permute(1, 2, 0).numpy())
        image = F.resized_crop(image, top, left, height, width, size, F.InterpolationMode.BICUBIC)
        image = F.hflip(image) if params.flip[v, i] else image
        for operation in params.order[v, i]:
            name = COLOR[operation]
            amount = float(getattr(params, name)[v, i])
            if amount != reference.IDENTITY[name]:  # PIL's conversion to HSV and back is not lossless
                image = getattr(F, f"adjust_{name}")(image, amount)
        image = F.rgb_to_grayscale(image, 3) if params.gray[v, i] else image
        if sigma := float(params.sigma[v, i]):
            image = F.gaussian_blur(image, config.blur_window, sigma)
        return F.pil_to_tensor(image).double()

    return torch.stack([view(v, i) for v, i in np.ndindex(params.flip.shape)])


# mean over all views in levels of 255; larger with color, because PIL truncates the hue to 8 bits
@pytest.mark.parametrize(
    ("kept", "bound"),
    [((), 1), (("flip",), 1), (("sigma",), 1), (COLOR, 2), (("flip", *COLOR, "sigma"), 2)],
    ids=["crop", "flip", "blur", "color", "all"],
)
def test_views_match_torchvision_on_pil_images(photographs, kept, bound):
    drawn = reference.random_params(photographs, CONFIG, seed=22)
    params = reference.keep_only(drawn, *kept)
    expected = torchvision_on_pil(photographs, params, CONFIG)
    for name in BACKENDS:
        assert (views_of(name, CONFIG, photographs, params) - expected).abs().mean() < bound, name


@pytest.mark.parametrize(
    "kept", [(), ("sigma",), COLOR, ("flip", *COLOR, "sigma")], ids=["crop", "blur", "color", "all"]
)
@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_backends_agree(photographs, jitter, kept):
    config = AugmentConfig(size=112, jitter=jitter)
    params = reference.keep_only(reference.random_params(photographs, config, seed=23), *kept)
    views = {name: views_of(name, config, photographs, params) for name in BACKENDS}
    # rounding to whole levels costs 0.25 on average, which brightness and contrast multiply by up to 1.8 each
    bound = 0.5 if "hue" not in kept else 2 if jitter == "exact" else 1
    for a, b in combinations(BACKENDS, 2):
        assert worst_view(views[a], views[b]) < bound, (a, b)


def test_exact_and_affine_jitter_differ(photographs):
    """The bounds above can tell one from the other."""
    params = reference.keep_only(reference.random_params(photographs, CONFIG, seed=23), *COLOR)
    for name in BACKENDS:
        exact, affine = (
            views_of(name, AugmentConfig(size=112, jitter=j), photographs, params) for j in ("exact", "affine")
        )
        assert worst_view(exact, affine) > 5, name


def unusual_images() -> dict[str, bytes]:
    """Image variants on which decoders are known to disagree."""
    picture = reference.smooth_field(9, 0, 90, 120)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 120).astype(np.uint8), (90, 1)))
    transparent = picture.copy()
    transparent.putalpha(alpha)
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    images = {f"TIFF of orientation {n}": reference.encode(picture, "TIFF", tiffinfo={274: n}) for n in range(2, 9)}
    exif = Image.Exif()
    exif[274] = 6
    for form in "JPEG", "PNG", "WEBP":
        images[f"{form} of orientation 6"] = reference.encode(picture, form, exif=exif)
    for form in "PNG", "TIFF", "WEBP", "BMP":
        images[f"{form} with alpha"] = reference.encode(transparent, form)
    for form in "PNG", "TIFF", "BMP":
        for mode in "1", "P":
            images[f"{form} of mode {mode}"] = reference.encode(picture.convert(mode), form)
    for form in "PNG", "TIFF":
        images[f"{form} of 16 bits"] = reference.encode(deep, form)
    for mode in "CMYK", "YCbCr", "LAB":
        images[f"TIFF of mode {mode}"] = reference.encode(picture.convert(mode), "TIFF")
    cmyk = reference.encode(picture.convert("CMYK"), "JPEG")
    adobe = cmyk.index(b"Adobe")
    images["CMYK JPEG"] = cmyk
    images["CMYK JPEG without Adobe's marker"] = cmyk[:adobe] + b"Other" + cmyk[adobe + 5 :]
    images["YCCK JPEG"] = cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :]
    jpeg = reference.encode(picture, "JPEG")
    images["JPEG with bytes between its segments"] = jpeg[:20] + b"\x01\x02\x03" + jpeg[20:]  # DALI refuses it
    bmp = reference.encode(picture, "BMP")
    images["BMP of 16 bits"] = bmp[:28] + b"\x10" + bmp[29:]  # pixels are misread, and half of them unused
    several = {"save_all": True, "append_images": [picture.rotate(90)]}
    images |= {f"{form} of two frames": reference.encode(picture, form, **several) for form in ("TIFF", "WEBP", "PNG")}
    return images


def test_backends_agree_on_unusual_images():
    """Crops have the size of the views, so that only decoding can differ."""
    images = unusual_images()
    assert {prepare(encoded).form[1:] for encoded in images.values()} == {(90, 120)}
    config = AugmentConfig(size=64)
    drawn = draw_params(config, 3, 0, np.arange(len(images)), *np.repeat([[90], [120]], len(images), 1))
    params = reference.keep_only(replace(drawn, crop=np.broadcast_to(np.int32([20, 40, 64, 64]), drawn.crop.shape)))
    encoded = list(images.values())
    views = {name: views_of(name, config, encoded, params).unflatten(0, (2, -1)) for name in BACKENDS}
    for a, b in combinations(BACKENDS, 2):
        largest = (views[a] - views[b]).abs().amax((0, 2, 3, 4))
        for name, levels in zip(images, largest.tolist(), strict=True):
            assert levels < (1.01 if "16 bits" in name else 0.01), (name, a, b)  # 16 bits are rounded or truncated


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [(90, 240), (900, 900)])
def test_an_image_smaller_than_its_index_is_reported(name, size):
    """A damaged index must neither change the crop silently nor end the run."""
    encoded = [reference.encode(reference.smooth_field(1, i, 90, 120), "JPEG") for i in range(3)]
    heights, widths = np.array([(90, 120), size, (90, 120)]).T
    config = AugmentConfig(size=32, crop_area=(0.9, 1.0))
    params = draw_params(config, 0, 0, np.arange(3), heights, widths)
    backend = create_backend(name, config, CPU, 3, 2, 2)
    with pytest.raises(DecodeError) as error:
        backend(encoded, params)
    assert error.value.args[1] == 1
    assert backend(encoded[:1], reference.select(params, slice(0, 1))).shape == (2, 3, 32, 32)
    backend.close()


def in_parts(encoded: list[bytes], size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, len(encoded), size))


@pytest.mark.parametrize("jitter", ["exact", "affine"])
@pytest.mark.parametrize("name", BACKENDS)
def test_center_crops_and_a_partial_last_batch(photographs, name, jitter):
    """One view per image, ten images in batches of four, four and two, as in an evaluation."""
    config = AugmentConfig(size=112, jitter=jitter)
    width, height = np.array([F.get_image_size(reference.decode(file)) for file in photographs]).T
    params = center_crop(config, height, width)
    backend = create_backend(name, config, CPU, 4, 1, 2)
    parts = [backend(photographs[part], reference.select(params, part)).clone() for part in in_parts(photographs, 4)]
    backend.close()
    assert [tuple(part.shape) for part in parts] == [(n, 3, 112, 112) for n in (4, 4, 2)]
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
    expected = reference.reference_views(photographs, params, config)
    assert worst_view(reference.denormalize(torch.cat(parts), config), expected) < 0.5
