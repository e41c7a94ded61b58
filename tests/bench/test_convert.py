"""Converter benchmark: what it measures and reports."""

import pytest

from bench import convert
from pipeline.convert.shard_writer import ShardWriter
from pipeline.images.files import decode


def test_images_have_the_typical_size_of_imagenet():
    images = [convert.photograph(number) for number in range(3)]
    assert len(set(images)) == 3 and {decode(image).shape for image in images} == {(375, 500, 3)}
    assert 90_000 < sum(map(len, images)) / 3 < 130_000
    assert convert.photograph(0) == images[0]


def test_both_runs_process_every_image(monkeypatch):
    decoded, written = [], []
    write = ShardWriter.write
    monkeypatch.setattr(convert, "DISTINCT", 2)
    monkeypatch.setattr(convert, "decode_only", lambda images, count, workers: decoded.append((len(images), count)))
    monkeypatch.setattr(ShardWriter, "write", lambda self, *args: written.append(len(args[1])) or write(self, *args))
    rows = convert.measure(count=3, workers=1, seconds=0.0)
    assert decoded == [(2, 3)] * 4 and written == [3] * 4  # once to warm up, then three times
    assert [row["what"] for row in rows] == ["decode only", "convert, verified"] and rows[0]["of_decoding"] == 1
    for row in rows:
        assert row["images_per_s"] == pytest.approx(3000 / row["median_ms"], rel=0.01, abs=1)


def test_decode_only_decodes_every_image():
    images = [convert.photograph(number) for number in range(2)]
    convert.decode_only(images, 5, workers=1)
    with pytest.raises(AssertionError):
        convert.decode_only([images[0], images[1][:-100]], 5, workers=1)
