"""All backends on the very same views: against each other, and against torchvision on PIL images as most train with.

The tests of each backend hold it to the definition in float64; here are the bounds that a recipe can count on.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import combinations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from pipeline.loader import make_backend
from pipeline.recipe import Recipe, ViewParameters, central_view
from tests.pipeline import reference_views as reference

CPU = torch.device("cpu")
BACKENDS = ["host", "kornia", *(["dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else [])]
COLOUR = ("brightness", "contrast", "saturation", "hue", "gray")
RECIPE = Recipe(size=112)
SIZES = ((180, 240), (256, 200), (131, 301), (112, 112), (375, 500))


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    return reference.photographs(10, seed=21, sizes=SIZES)


def views_of(name: str, recipe: Recipe, encoded: list[bytes], parameters: ViewParameters) -> torch.Tensor:
    """(V*n, 3, S, S) float64 in levels 0..255."""
    backend = make_backend(name, recipe, CPU, len(encoded), len(parameters.flip), 2)
    try:
        return reference.denormalise(backend(encoded, parameters), recipe)
    finally:
        backend.close()


def worst_view(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest of the views' mean absolute differences, in levels."""
    return (a - b).abs().mean((1, 2, 3)).max().item()


def torchvision_on_pil(encoded: list[bytes], parameters: ViewParameters, recipe: Recipe) -> torch.Tensor:
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
    ids=["crop", "flip", "blur", "colour", "all"],
)
def test_against_torchvision_on_pil_images(photographs, kept, bound):
    drawn = reference.drawn_parameters(photographs, RECIPE, seed=22)
    parameters = reference.keep_only(drawn, *kept)
    expected = torchvision_on_pil(photographs, parameters, RECIPE)
    for name in BACKENDS:
        assert (views_of(name, RECIPE, photographs, parameters) - expected).abs().mean() < bound, name


@pytest.mark.parametrize(
    "kept", [(), ("sigma",), COLOUR, ("flip", *COLOUR, "sigma")], ids=["crop", "blur", "colour", "all"]
)
@pytest.mark.parametrize("jitter", ["exact", "affine"])
def test_backends_agree(photographs, jitter, kept):
    recipe = Recipe(size=112, jitter=jitter)
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
            views_of(name, Recipe(size=112, jitter=j), photographs, parameters) for j in ("exact", "affine")
        )
        assert worst_view(exact, affine) > 5, name


def in_parts(encoded: list[bytes], size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, len(encoded), size))


@pytest.mark.parametrize("jitter", ["exact", "affine"])
@pytest.mark.parametrize("name", BACKENDS)
def test_central_views_and_a_partial_last_batch(photographs, name, jitter):
    """What an evaluation does: one view per image, ten images in batches of four, four and two."""
    recipe = Recipe(size=112, jitter=jitter)
    width, height = np.array([F.get_image_size(reference.decode(file)) for file in photographs]).T
    parameters = central_view(recipe, height, width)
    backend = make_backend(name, recipe, CPU, 4, 1, 2)
    parts = [backend(photographs[part], reference.take(parameters, part)).clone() for part in in_parts(photographs, 4)]
    backend.close()
    assert [tuple(part.shape) for part in parts] == [(n, 3, 112, 112) for n in (4, 4, 2)]
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
    expected = reference.reference_views(photographs, parameters, recipe)
    assert worst_view(reference.denormalise(torch.cat(parts), recipe), expected) < 0.5
