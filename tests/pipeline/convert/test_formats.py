"""Conversion of images beyond 8-bit RGB: one format per set, its statistics, and every source and option."""

import sys

import numpy as np
import pytest

from common import UserError
from pipeline.convert import photos
from pipeline.convert.__main__ import main
from pipeline.convert.folder import folder_source
from pipeline.convert.writer import write_split
from pipeline.data import open_data
from pipeline.images.pixel_format import RGB8, PixelFormat, decode_pixels
from pipeline.loader import LoaderConfig
from pipeline.shards.dataset import open_shards, open_splits
from pipeline.shards.verify import show
from tests.pipeline.deep_images import levels, npy, png16, tiff_pages
from tests.pipeline.image_sets import contents, pictures, rejected, write_folder

GRAY16 = PixelFormat(1, 16)


def scans(each: int = 3) -> dict[str, bytes]:
    """16-bit PNGs of 12 bits in three classes."""
    return {f"class_{n % 3}/scan_{n}.png": png16(levels(20, 24, seed=n) >> 4, 0) for n in range(3 * each)}


def spectra(count: int = 6) -> dict[str, bytes]:
    """Arrays of five channels, of which each has other levels."""
    scale = np.array([1, 2, 4, 8, 16])
    return {f"{n}.npy": npy((levels(20, 24, 5, seed=n) // scale).astype(np.uint16)) for n in range(count)}


def run(monkeypatch, *arguments) -> str | None:
    """Error of the command; None if it succeeds."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments), "--workers", "1"])
    try:
        main()
    except SystemExit as error:
        return error.code
    return None


@pytest.mark.parametrize("files", [scans(), spectra()], ids=["gray", "five channels"])
def test_statistics_are_those_of_the_images_own_depth(tmp_path, files):
    source = folder_source(
        write_folder(tmp_path / "in", files | {"class_0/cut.png": scans()["class_0/scan_0.png"][:-9]})
    )
    shards = write_split(source, tmp_path / "out", "train", samples_per_shard=4)
    assert {content for _, content in contents(shards).values()} == set(files.values())
    assert rejected(shards) == {"class_0/cut": "a damaged or truncated PNG"}
    pixels = np.stack([decode_pixels(content, shards.pixel_format) for content in files.values()]) / 65535
    channels = pixels.shape[3]
    assert shards.pixel_format == PixelFormat(channels, 16) and shards.manifest["pixels"] == {
        "channels": channels,
        "bits": 16,
    }
    for name in "mean", "std":
        expected = getattr(pixels, name)((0, 1, 2))
        np.testing.assert_allclose(shards.manifest["statistics"][name], expected, atol=6e-9)  # rounded to eight digits
    (totals, *_), problems = show(shards.root)
    rows = dict(zip(*(column.cells for column in totals.columns), strict=True))
    assert rows["pixels"] == str(shards.pixel_format) and not problems
    assert rows["mean"].endswith(f"(in 0..1, {len(files)} images)") and rows["mean"].count(",") == channels


MIXED = scans() | {"class_0/photo.jpg": pictures()["class_0/image_0.jpg"], "class_1/spectrum.npy": spectra()["0.npy"]}
COUNTS = (  # --bits 8 would leave five channels
    r"^in \(train\) mixes kinds of images \(gray, 16 bits: 9; RGB, 8 bits: 1; 5 channels, 16 bits: 1\); "
    r"separate them\.$"
)


@pytest.mark.parametrize(
    "options", [{}, {"samples_per_shard": 1}, {"workers": 2, "threads": True, "samples_per_shard": 4}]
)
def test_mixed_formats_are_refused_with_their_numbers(tmp_path, options):
    """Seen in the first shard, or only when all of them are complete; damaged images do not count."""
    source = folder_source(write_folder(tmp_path / "in", MIXED | {"class_2/cut.png": b"\x89PNG"}))
    with pytest.raises(UserError, match=COUNTS):
        write_split(source, tmp_path / "out", "train", **options)
    assert not any((tmp_path / "out").iterdir())


def test_a_part_refuses_mixed_formats_of_the_whole_source(tmp_path):
    source = folder_source(write_folder(tmp_path / "in", MIXED))
    for part in (1, 2), (2, 2):
        with pytest.raises(UserError, match=COUNTS):
            write_split(source, tmp_path / "out", "train", part=part, samples_per_shard=6)
    assert not (tmp_path / "out" / "train").exists()


def test_options_decide_how_files_are_read(tmp_path, monkeypatch):
    """--bits 8 after a refusal in the same folder, and pages as channels."""
    files = scans() | {"class_0/photo.jpg": pictures()["class_0/image_0.jpg"]}
    folder = write_folder(tmp_path / "in", files)
    assert "with --bits 8, which reads every image file as 8-bit RGB." in run(
        monkeypatch, "folder", folder, tmp_path / "out"
    )
    assert run(monkeypatch, "folder", folder, tmp_path / "out", "--bits", "8") is None
    reduced = open_shards(f"{tmp_path}/out/train")
    assert reduced.pixel_format == RGB8 and reduced.manifest["made_by"]["bits"] == 8
    assert {content for _, content in contents(reduced).values()} == set(files.values())
    refused = run(monkeypatch, "folder", folder, tmp_path / "out")
    assert "its bits is 8 instead of None" in refused
    pages = write_folder(tmp_path / "pages", {f"{n}.tif": tiff_pages(levels(20, 24, 4, seed=n)) for n in range(3)})
    for split, options, channels in ("train", ["--pages-as-channels"], 4), ("test", [], 1):
        assert run(monkeypatch, "folder", pages, tmp_path / split, "--short-side", "10", *options) is None
        shards = open_shards(f"{tmp_path}/{split}/train")
        assert shards.pixel_format == PixelFormat(channels, 16) and set(shards.index["height"]) == {10}


def test_splits_of_different_formats_are_refused(tmp_path):
    for split, files in ("train", scans()), ("test", pictures()):
        write_split(folder_source(write_folder(tmp_path / split / "in", files)), tmp_path / "out", split)
    with pytest.raises(UserError, match=r"test are RGB, 8 bits, but those of .*train are gray, 16 bits; convert both"):
        open_splits(str(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["png", "npy", "dcm"])
def test_a_folder_is_data(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(photos, "_leases", {})
    if kind == "dcm":
        pytest.importorskip("pydicom")
        from tests.pipeline.deep_images import dicom

        files = {f"{n}.dcm": dicom(levels(20, 24, seed=n)[..., 0] >> 4, stored=12) for n in range(4)}
    else:
        files = scans() if kind == "png" else spectra()
    folder = write_folder(tmp_path / "in", files)
    train, _ = open_data(str(folder), LoaderConfig(cache_dir=str(tmp_path / "cache")))
    assert train.pixel_format == (PixelFormat(5, 16) if kind == "npy" else GRAY16)
    assert train.manifest["rejected"] == 0 and len(train.manifest["statistics"]["mean"]) == train.pixel_format.channels
