"""All backends on the very same views: against each other, and against torchvision on PIL images as most train with.

The tests of each backend hold it to the definition in float64; here are the bounds that a recipe can count on.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from pipeline.augment.backend import create_backend
from pipeline.augment.config import AugmentConfig
from pipeline.augment.params import AugmentParams, center_crop, draw_params
from pipeline.images import DecodeError, inspect
from tests.pipeline.augment import reference_views as reference

CPU = torch.device("cpu")
BACKENDS = ["opencv", "kornia", *(["dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else [])]
COLOUR = ("brightness", "contrast", "saturation", "hue", "gray")
RECIPE = AugmentConfig(size=112)
SIZES = ((180, 240), (256, 200), (131, 301), (112, 112), (375, 500))


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    return reference.photographs(10, seed=21, sizes=SIZES)


def views_of(name: str, recipe: AugmentConfig, encoded: list[bytes], parameters: AugmentParams) -> torch.Tensor:
    """(V*n, 3, S, S) float64 in levels 0..255."""
    backend = create_backend(name, recipe, CPU, len(encoded), len(parameters.flip), 2)
    try:
        return reference.denormalize(backend(encoded, parameters), recipe)
    finally:
        backend.close()


def worst_view(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest of the views' mean absolute differences, in levels."""
    return (a - b).abs().mean((1, 2, 3)).max().item()


def torchvision_on_pil(encoded: list[bytes], parameters: AugmentParams, recipe: AugmentConfig) -> torch.Tensor:
    """Every step on a PIL image, rounded to whole levels in between: the exact recipe as it is usually run."""

    def view(v: int, i: int) -> torch.Tensor:
        top, left, height, width = parameters.crop[v, i].tolist()
        size = [recipe.size, recipe.size]
        image = Image.fromarray((reference.decode(encoded[i]) * 255).round().byte().permute(1, 2, 0).numpy())
        image = F.resized_crop(image, top, left, height, width, size, F.InterpolationMode.BICUBIC)
        image = F.hflip(image) if parameters.flip[v, i] else image
        for operation in parameters.order[v, i]:
            name = COLOUR[operation]
            amount = float(getattr(parameters, name)[v, i])
            if amount != reference.IDENTITY[name]:  # PIL's way to HSV and back is no identity, whatever the hue
                image = getattr(F, f"adjust_{name}")(image, amount)
        image = F.rgb_to_grayscale(image, 3) if parameters.gray[v, i] else image
        if sigma := float(parameters.sigma[v, i]):
            image = F.gaussian_blur(image, recipe.blur_window, sigma)
        return F.pil_to_tensor(image).double()

    return torch.stack([view(v, i) for v, i in np.ndindex(parameters.flip.shape)])


# levels of 255, mean over all views; the hue is a byte for PIL, and truncated, which is what the larger bound is for
@pytest.mark.parametrize(
    ("kept", "bound"),
    [((), 1), (("flip",), 1), (("sigma",), 1), (COLOUR, 2), (("flip", *COLOUR, "sigma"), 2)],
    ids=["crop", "flip", "blur", "color", "all"],
)
def test_against_torchvision_on_pil_images(photographs, kept, bound):
    drawn = reference.drawn_parameters(photographs, RECIPE, seed=22)
    parameters = reference.keep_only(drawn, *kept)
    expected = torchvision_on_pil(photographs, parameters, RECIPE)
    for name in BACKENDS:
        assert (views_of(name, RECIPE, photographs, parameters) - expected).abs().mean() < bound, name


@pytest.mark.parametrize(
    "kept", [(), ("sigma",), COLOUR, ("flip", *COLOUR, "sigma")], ids=["crop", "blur", "color", "all"]
)
@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_backends_agree(photographs, jitter, kept):
    recipe = AugmentConfig(size=112, jitter=jitter)
    parameters = reference.keep_only(reference.drawn_parameters(photographs, recipe, seed=23), *kept)
    views = {name: views_of(name, recipe, photographs, parameters) for name in BACKENDS}
    # Rounded to whole levels the crop is off by 0.25 on average, which brightness and contrast multiply by up to 1.8
    # each; the host's hue comes in steps of 1/256 turn besides.
    bound = 0.5 if "hue" not in kept else 2 if jitter == "exact" else 1
    for a, b in combinations(BACKENDS, 2):
        assert worst_view(views[a], views[b]) < bound, (a, b)


def test_the_two_kinds_of_jitter_differ(photographs):
    """The bounds above would notice one in place of the other."""
    parameters = reference.keep_only(reference.drawn_parameters(photographs, RECIPE, seed=23), *COLOUR)
    for name in BACKENDS:
        exact, affine = (
            views_of(name, AugmentConfig(size=112, jitter=j), photographs, parameters) for j in ("exact", "affine")
        )
        assert worst_view(exact, affine) > 5, name


def unusual_images() -> dict[str, bytes]:
    """Kinds of images that decoders are known to disagree about."""
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
    images["BMP of 16 bits"] = bmp[:28] + b"\x10" + bmp[29:]  # the pixels are read as others, and half of them unused
    several = {"save_all": True, "append_images": [picture.rotate(90)]}
    images |= {f"{form} of two frames": reference.encode(picture, form, **several) for form in ("TIFF", "WEBP", "PNG")}
    return images


def test_backends_agree_on_unusual_images():
    """In windows as large as the views, so that nothing but decoding can make a difference."""
    images = unusual_images()
    assert {inspect(encoded)[1:] for encoded in images.values()} == {(90, 120)}
    recipe = AugmentConfig(size=64)
    drawn = draw_params(recipe, 3, 0, np.arange(len(images)), *np.repeat([[90], [120]], len(images), 1))
    parameters = reference.keep_only(replace(drawn, crop=np.broadcast_to(np.int32([20, 40, 64, 64]), drawn.crop.shape)))
    encoded = list(images.values())
    views = {name: views_of(name, recipe, encoded, parameters).unflatten(0, (2, -1)) for name in BACKENDS}
    for a, b in combinations(BACKENDS, 2):
        largest = (views[a] - views[b]).abs().amax((0, 2, 3, 4))
        for name, levels in zip(images, largest.tolist(), strict=True):
            assert levels < (1.01 if "16 bits" in name else 0.01), (name, a, b)  # 16 bits are rounded or truncated


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [(90, 240), (900, 900)])
def test_an_image_smaller_than_its_index_is_named(name, size):
    """As with a damaged index: neither another crop in silence nor the end of the run."""
    encoded = [reference.encode(reference.smooth_field(1, i, 90, 120), "JPEG") for i in range(3)]
    heights, widths = np.array([(90, 120), size, (90, 120)]).T
    recipe = AugmentConfig(size=32, crop_area=(0.9, 1.0))
    parameters = draw_params(recipe, 0, 0, np.arange(3), heights, widths)
    backend = create_backend(name, recipe, CPU, 3, 2, 2)
    with pytest.raises(DecodeError) as error:
        backend(encoded, parameters)
    assert error.value.args[1] == 1
    assert backend(encoded[:1], reference.take(parameters, slice(0, 1))).shape == (2, 3, 32, 32)
    backend.close()


def in_parts(encoded: list[bytes], size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, len(encoded), size))


@pytest.mark.parametrize("jitter", ["exact", "affine"])
@pytest.mark.parametrize("name", BACKENDS)
def test_central_views_and_a_partial_last_batch(photographs, name, jitter):
    """What an evaluation does: one view per image, ten images in batches of four, four and two."""
    recipe = AugmentConfig(size=112, jitter=jitter)
    width, height = np.array([F.get_image_size(reference.decode(file)) for file in photographs]).T
    parameters = center_crop(recipe, height, width)
    backend = create_backend(name, recipe, CPU, 4, 1, 2)
    parts = [backend(photographs[part], reference.take(parameters, part)).clone() for part in in_parts(photographs, 4)]
    backend.close()
    assert [tuple(part.shape) for part in parts] == [(n, 3, 112, 112) for n in (4, 4, 2)]
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
    expected = reference.reference_views(photographs, parameters, recipe)
    assert worst_view(reference.denormalize(torch.cat(parts), recipe), expected) < 0.5
