"""What all tests of the pipeline share."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from tests.pipeline.image_sets import pictures, write_folder
from tests.pipeline.web_server import write_set

# the same examples in every run, and no limit of time for each: the machine may be busy
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For tensors this small, torch's threads cost more in waiting for each other than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Twelve images in three shards of a train split; one image has no class."""
    root = tmp_path_factory.mktemp("original")
    files = pictures()
    files["alone.jpg"] = files.pop("class_2/image_11.jpg")
    write_split(folder_source(write_folder(root / "in", files)), root / "out", "train", samples_per_shard=5)
    return root / "out" / "train"


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Twenty shards: more than are read at once."""
    root = tmp_path_factory.mktemp("many") / "train"
    write_set(root, shards=20)
    return root
