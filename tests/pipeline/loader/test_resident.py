"""Tests of resident images: the batches of a run without them, one read per image, memory, and when they are used."""

import threading
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError
from pipeline.augment.config import AugmentConfig
from pipeline.augment.kornia import KorniaBackend
from pipeline.augment.params import draw_params
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.loader import resident
from pipeline.loader.resident import PixelStore, create_store, find_store
from pipeline.shards.dataset import ShardSet, open_shards
from pipeline.shards.reader import Reader
from tests.pipeline.deep_images import levels, npy
from tests.pipeline.image_sets import pictures, write_folder
from tests.pipeline.loaders import center_crops, damage, view_loader
from tests.pipeline.web_server import cache_at, serving

CPU = torch.device("cpu")
CONFIG = AugmentConfig(size=16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> ShardSet:
    """Thirty labeled images in five shards."""
    root = tmp_path_factory.mktemp("shards")
    return write_split(folder_source(write_folder(root / "in", pictures(each=10))), root / "out", "train", 0, 6)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Samples that were read, in order."""
    original, samples = Reader.read, []

    def record(self, wanted, stop=None):
        samples.extend(wanted.tolist())
        return original(self, wanted, stop)

    monkeypatch.setattr(Reader, "read", record)
    return samples


def loader(shards: ShardSet, **options):
    defaults = {"batch_size": 10, "seed": 0, "device": CPU, "backend": "opencv", "workers": 2, "max_bad": 0.5}
    return view_loader(shards, CONFIG, **defaults | options)


def batches_of(shards: ShardSet, count: int, start: tuple[int, int] = (0, 0), **options) -> tuple[list, int]:
    """`count` batches from (epoch, step) on, and how many images were replaced."""
    one = loader(shards, **options)
    one.load_state_dict(one.state_dict() | {"epoch": start[0], "step": start[1]})
    batches = []
    while len(batches) < count:
        batches += islice(one, count - len(batches))
    one.close()
    return batches, one.bad_samples.replaced


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def damaged(whole, tmp_path_factory) -> ShardSet:
    """The set with images that can't be decoded or read, and two whose index names a larger and a smaller size."""
    damaged = damage(whole, tmp_path_factory.mktemp("damaged") / "set", [3, 17, 18])
    detected = damage(damaged, tmp_path_factory.mktemp("detected") / "set", [9], detected=True)
    index = np.array(damaged.index)
    index["height"][5] *= 2
    index["width"][12] -= 3
    return replace(detected, index=index)


@pytest.mark.parametrize(("backend", "ranks"), [("opencv", 1), ("opencv", 2), ("kornia", 1)])
def test_batches_are_those_of_a_run_that_loads(damaged, tmp_path, backend, ranks):
    """Three epochs; bad images, their replacements and the list of them included; also resumed within the second."""
    for rank in range(ranks):
        options = {"rank": rank, "world_size": ranks, "backend": backend}
        files = {how: tmp_path / f"{how}-{rank}" for how in ("off", "on")}
        loaded, kept = (batches_of(damaged, 9, resident=how, bad_samples_file=files[how], **options) for how in files)
        assert_same(loaded[0], kept[0])
        assert loaded[1] == kept[1] > 0
        assert sorted(files["off"].read_text().splitlines()) == sorted(files["on"].read_text().splitlines())
        assert_same(loaded[0][4:], batches_of(damaged, 5, (1, 1), resident="on", **options)[0])


def test_every_image_is_read_once(whole, read):
    one = loader(whole, resident="on", prefetch=0)  # batches that are prepared at the same time may read it twice
    filling = [one.filling, *(one.filling for _ in one)]
    assert filling[0] == "0% resident" and filling[1] < filling[2] < "99% resident" and filling[3] == ""
    list(one)
    assert sorted(read) == list(range(30)) and one.filling == ""
    rows = whole.index
    assert len(one.store.pixels) == (rows["height"].astype(int) * rows["width"]).sum() * 3
    (image,) = one.store.images(np.array([read[0]]))
    assert np.shares_memory(image, one.store.pixels.numpy()) and one.store.offset[read[0]] >= 0
    one.close()


def test_a_rank_reads_what_it_needs(whole, read):
    """Half of the images in an epoch; the other ones when an epoch brings them to this rank."""
    one = loader(whole, resident="on", rank=1, world_size=2, prefetch=0)
    seen = [torch.cat([batch.index for batch in one]).tolist() for _ in range(2)]
    assert read == seen[0] + [sample for sample in seen[1] if sample not in seen[0]] and len(seen[0]) == 15
    one.close()


def test_images_are_not_changed(whole):
    one = loader(whole, resident="on", prefetch=0)
    list(one)
    before = one.store.pixels.clone()
    list(one)
    assert torch.equal(one.store.pixels, before)
    one.close()


def test_evaluation_uses_the_images_of_the_loader(whole, read):
    samples = np.arange(0, 30, 2)
    options = {"batch_size": 4, "device": CPU, "backend": "opencv"}
    expected = list(center_crops(whole, CONFIG, samples, **options))
    one = loader(whole, resident="on", prefetch=0)
    read.clear()
    for _ in range(2):
        assert_same(list(center_crops(whole, CONFIG, samples, **options)), expected)
    assert sorted(read) == samples.tolist()
    list(one)
    assert sorted(read) == list(range(30))
    list(center_crops(whole, CONFIG, samples, resident="off", **options))
    list(center_crops(open_shards(whole.root), CONFIG, samples, **options))  # another set, though of the same files
    assert len(read) == 30 + 2 * len(samples)
    one.close()
    assert find_store(whole, CPU) is one.store and find_store(whole, torch.device("cuda")) is None
    del one
    assert find_store(whole, CPU) is None  # freed


def test_loaders_of_the_same_samples_share_the_images(whole, read, monkeypatch):
    """Also where a second store would not fit; other samples have a store of their own."""
    some = {"samples": np.arange(20), "resident": "on", "prefetch": 0}
    one = loader(whole, **some)
    list(one)
    one.close()
    with monkeypatch.context() as full:
        full.setattr(resident, "available_memory", lambda: 0)
        two = loader(whole, **some | {"seed": 1, "samples": np.arange(20)})
        assert two.store is one.store and resident.fits(whole, np.arange(20), CPU)
    list(two)
    assert sorted(read) == list(range(20))
    others = loader(whole, resident="on"), loader(whole, **some | {"samples": np.arange(10, 30)})
    assert len({id(each.store) for each in (one, *others)}) == 3
    for each in (two, *others):
        each.close()


def test_only_the_samples_of_a_subset_are_kept(whole, read):
    chosen = np.array([1, 4, 9, 12, 25])
    one = loader(whole, resident="on", samples=chosen, batch_size=5, prefetch=0)
    list(one)
    list(one)
    assert sorted(read) == chosen.tolist()
    crops = list(center_crops(whole, CONFIG, np.arange(10), batch_size=10, device=CPU, backend="opencv"))
    assert sorted(read[5:]) == [0, 2, 3, 5, 6, 7, 8] and crops[0].index.tolist() == list(range(10))
    assert (one.store.offset >= 0).sum() == 5
    one.close()


def test_threads_that_need_the_same_images_store_them_once(whole):
    store = PixelStore(whole, CPU)
    readers = [resident.ResidentReader(Reader(whole), store, 2) for _ in range(3)]
    found: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda i=i, reader=reader: found.update({i: reader.read(np.arange(30))}))
        for i, reader in enumerate(readers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for reader in readers:
        reader.close()
    assert len(found) == 3 and store.filled == 1 and sorted(store.offset.tolist())[0] == 0
    sizes = whole.index["height"].astype(int) * whole.index["width"] * 3
    order = np.argsort(store.offset)
    assert np.array_equal(store.offset[order], np.cumsum(sizes[order]) - sizes[order])
    expected = [resident.decode_pixels(encoded, whole.pixel_format) for encoded in Reader(whole)(np.arange(30))]
    assert all(map(np.array_equal, store.images(np.arange(30)), expected))


def test_a_remote_set_is_fetched_once(whole, tmp_path, read):
    """When all images are resident, the shards are neither fetched nor held, so the server may disappear."""
    with serving(Path(whole.root)) as server:
        cache = cache_at(tmp_path)
        one = loader(open_shards(server.url, cache), cache=cache, resident="on", prefetch=0)
        list(one)
        assert sorted(read) == list(range(30))
    local, _ = batches_of(whole, 6, resident="off")
    assert_same(list(one), local[3:])
    one.close()


def test_images_of_five_channels_and_16_bits(tmp_path):
    files = {f"{n}.npy": npy(levels(20 + n, 24, 5, seed=n)) for n in range(6)}
    shards = write_split(folder_source(write_folder(tmp_path / "in", files)), tmp_path / "out", "train", 0, 4)
    augment = CONFIG.for_images(shards.pixel_format, shards.manifest["statistics"])
    options = {"batch_size": 3, "seed": 0, "device": CPU, "epochs": 2}
    loaded, kept = (view_loader(shards, augment, resident=how, **options) for how in ("off", "on"))
    for _ in range(2):
        assert_same(list(loaded), list(kept))
    assert len(kept.store.pixels) == sum(20 + n for n in range(6)) * 24 * 5 * 2
    assert {image.dtype for image in kept.store.images(np.arange(6))} == {np.dtype(np.uint16)}
    for each in loaded, kept:
        each.close()


def test_on_a_gpu_an_image_is_available_when_its_copy_has_ended(whole, monkeypatch):
    """With memory of the host in place of the GPU's, and streams that record; Kornia accepts the tensors."""
    done = []
    store_stream = SimpleNamespace(
        wait_stream=done.append,
        record_event=lambda: SimpleNamespace(synchronize=lambda: done.append(int((store.offset >= 0).sum()))),
    )
    cuda = SimpleNamespace(
        Stream=lambda device: store_stream,
        current_stream=lambda device: "stream of the allocation",
        stream=lambda stream: nullcontext(done.append(stream)),
    )

    def empty(size, dtype, device):
        return torch.empty(size, dtype=dtype)

    monkeypatch.setattr(resident, "torch", SimpleNamespace(cuda=cuda, uint8=torch.uint8, empty=empty))
    monkeypatch.setattr(resident, "pinned", lambda array, device: torch.from_numpy(array))
    store = PixelStore(whole, SimpleNamespace(type="cuda"))
    samples = np.arange(3)
    encoded = Reader(whole)(samples)
    decoded = [resident.decode_pixels(image, whole.pixel_format) for image in encoded]
    images = [store.add(sample, pixels) for sample, pixels in enumerate(decoded)]
    assert done == ["stream of the allocation", store_stream, 0, store_stream, 1, store_stream, 2]
    assert all(isinstance(image, torch.Tensor) for image in images + store.images(samples))
    assert all(map(np.array_equal, store.images(samples), decoded))
    params = draw_params(CONFIG, 0, 0, samples, whole.index["height"][:3], whole.index["width"][:3])
    backend = KorniaBackend(CONFIG.for_images(whole.pixel_format, {}), CPU, 3, 2, 1)
    assert torch.equal(backend([images[0], encoded[1], images[2]], params), backend(encoded, params))
    backend.close()


def test_auto_takes_a_quarter_of_the_memory_of_each_process(whole, monkeypatch):
    needed = resident.decoded_bytes(whole, None)

    def is_kept(available: int, processes: int = 1, epochs: int | None = 2, device=CPU) -> bool:
        monkeypatch.setattr(resident, "available_memory", lambda: available)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        return create_store("auto", whole, None, device, epochs) is not None

    assert is_kept(4 * needed) and not is_kept(4 * needed - 1)
    assert is_kept(8 * needed, 2) and not is_kept(8 * needed - 2, 2)
    assert is_kept(4 * needed, epochs=None) and not is_kept(4 * needed, epochs=1)  # every image is decoded once anyway
    assert not is_kept(4 * needed, device=None)  # DALI
    assert create_store("off", whole, None, CPU, 2) is None


def test_auto_takes_a_quarter_of_a_gpu(monkeypatch):
    memory = {"free": 90, "total": 100}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: tuple(memory.values()))
    cuda = torch.device("cuda")
    assert resident.memory_bytes(cuda, whole=False) == 25 and resident.memory_bytes(cuda, whole=True) == 90
    memory["free"] = 20
    assert resident.memory_bytes(cuda, whole=False) == 20


def test_the_backend_is_chosen_for_images_that_fit_into_a_quarter_of_a_gpu(whole, monkeypatch):
    class Asked(Exception):
        pass

    def choose_backend(*_, fits_device):
        raise Asked(fits_device)

    def fits(total, **options):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total, total))
        with pytest.raises(Asked) as asked:
            loader(whole, device=torch.device("cuda"), **{"epochs": 2} | options)
        return asked.value.args[0]

    monkeypatch.setattr("pipeline.loader.loader.choose_backend", choose_backend)
    needed = resident.decoded_bytes(whole, None)
    assert fits(4 * needed) and fits(4 * needed, resident="on") and not fits(4 * needed - 1)
    assert not fits(4 * needed, resident="off") and not fits(4 * needed, epochs=1)


def test_on_is_refused_where_it_is_impossible(whole, monkeypatch):
    monkeypatch.setattr(resident, "available_memory", lambda: 10_000)
    with pytest.raises(UserError, match=r"take \S+ GB, more than the 1e-05 GB of memory that are available to each"):
        loader(whole, resident="on")
    with pytest.raises(UserError, match=r"backend decodes the images itself.*use --loader\.backend opencv or"):
        create_store("on", whole, None, None, 2)
    assert create_store("auto", whole, None, CPU, 2) is None


@pytest.mark.parametrize(
    ("limit", "usage", "cached"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_what_a_container_has_left_counts_as_memory(tmp_path, monkeypatch, limit, usage, cached):
    monkeypatch.setattr(resident, "CONTROL_GROUP", tmp_path)
    host = resident.available_memory()
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / usage).write_text("700000\n")
    (tmp_path / usage).with_name("memory.stat").write_text(f"anon 600000\nfile 90000\n{cached} 80000\n")
    (tmp_path / limit).write_text("max\n")
    assert 0.5 < resident.available_memory() / host < 2 and resident.machine_memory() > 1e9
    (tmp_path / limit).write_text("1000000\n")
    assert resident.available_memory() == 380_000 and resident.machine_memory() == 1_000_000


def test_the_run_says_what_it_keeps(whole):
    kept, loaded = loader(whole, resident="on"), loader(whole, resident="off", backend="auto")
    assert kept.backend_name == f"opencv, images resident ({len(kept.store.pixels) / 1e6:,.0f} MB)"
    assert loaded.backend_name == "opencv (the fastest on a CPU)" and loaded.filling == "" and loaded.store is None
    for each in kept, loaded:
        each.close()
