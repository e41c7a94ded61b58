"""Splits whose tars are in one folder, on a local disk, in memory, and on a local imitation of the Hugging Face Hub."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
import pytest
import torch

from common import UserError
from pipeline.augment.config import AugmentConfig
from pipeline.data import open_data
from pipeline.loader.config import LoaderConfig
from pipeline.shards import index
from pipeline.shards.dataset import open_shards, open_splits, split_roots
from pipeline.shards.index import ensure_index, index_shards
from pipeline.shards.reader import Reader
from pipeline.shards.verify import show, verify
from tests.pipeline.image_sets import pictures, run_here, tar_bytes
from tests.pipeline.loaders import view_loader
from tests.pipeline.web_server import cache_at

OWNER, NAME = "someone", "photos-wds"
URL = f"hf://datasets/{OWNER}/{NAME}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMCLR_CACHE", str(tmp_path / "cache"))


def tars() -> dict[str, bytes]:
    """Three training tars of four images in three classes, and two validation tars of three in two classes."""
    images = list(pictures(each=6).values())
    labels = [number % 3 for number in range(12)] + [0, 1, 1, 0, 1, 0]
    files = {}
    for split, first, count, size in (("train", 0, 3, 4), ("validation", 12, 2, 3)):
        for tar in range(count):
            members = {}
            for number in range(first + tar * size, first + (tar + 1) * size):
                about = {"label": labels[number], "width": 1}
                members[f"n{number:04d}.cls"] = str(labels[number]).encode()
                members[f"n{number:04d}.{'png' if number == 2 else 'jpg'}"] = images[number]
                members[f"n{number:04d}.json"] = json.dumps(about).encode()
            files[f"photos-{split}-{tar:04d}.tar"] = tar_bytes(members)
    return files


class Hub(ThreadingHTTPServer):
    """The part of the Hub's interface that `HfFileSystem` uses to list and read one data set, here of `tars()`."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.gated, self.requests = files, False, Counter()
        self.drops = Counter()
        """Number of times that the connection still breaks in the middle of a file."""


class HubHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        repo = f"{OWNER}/{NAME}"
        resolve = f"/datasets/{repo}/resolve/main/"
        self.server.requests[path.rpartition("/")[2]] += 1
        if path in (f"/api/datasets/{repo}", f"/api/datasets/{repo}/revision/main"):
            self.answer({"id": repo, "sha": "0" * 40, "private": False, "siblings": []})
        elif path == f"/api/datasets/{repo}/tree/main":
            files = self.server.files.items()
            self.answer([{"type": "file", "path": n, "size": len(c), "oid": f"{len(c):040x}"} for n, c in files])
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.server.files:
            if self.server.gated:
                self.send_error_code(403, "GatedRepo")
            else:
                self.send_range(self.server.files[path.removeprefix(resolve)])
        elif path.startswith((f"/api/datasets/{repo}/", resolve)):
            self.send_error_code(404, "EntryNotFound")
        else:
            self.send_error_code(401, "RepoNotFound")

    do_HEAD = do_GET

    def answer(self, content: object) -> None:
        self.send_content(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_error_code(self, status: int, code: str) -> None:
        self.send_content(status, b"", {"X-Error-Code": code, "X-Error-Message": f"the answer is {code}"})

    def send_range(self, content: bytes) -> None:
        if not (span := self.headers.get("Range")):
            self.send_content(200, content, {})
            return
        first, last = span.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1 if last else None]
        extent = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self.send_content(206, part, {"Content-Range": extent})

    def send_content(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        name = unquote(self.path).rpartition("/")[2]
        if self.server.drops[name] > 0:
            self.server.drops[name] -= 1
            content = content[: len(content) // 2]
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A Hub on this machine, at the address that huggingface_hub takes by default."""
    from huggingface_hub import HfFileSystem, constants

    server = Hub(tars())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    HfFileSystem.clear_instance_cache()
    yield server
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def write(url: str, files: dict[str, bytes]) -> str:
    """Write files to a folder of any file system; returns its URL."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(path, exist_ok=True)
    for name, content in files.items():
        fs.pipe_file(f"{path}/{name}", content)
    return url


@pytest.fixture(params=["hub", "memory", "local"])
def root(request, tmp_path) -> Iterator[str]:
    """The same tars on the Hub, in fsspec's memory and in a local folder."""
    if request.param == "hub":
        request.getfixturevalue("hub")
        yield URL
    elif request.param == "memory":
        yield write("memory://photos-wds", tars())
        fsspec.filesystem("memory").rm("/photos-wds", recursive=True)
    else:
        yield write(str(tmp_path / "photos-wds"), tars())


def test_splits_in_one_folder_are_indexed_on_first_use(root, tmp_path, caplog):
    """The validation split gets the classes of the train split, although it holds only two of three."""
    train, test = open_data(root, LoaderConfig())
    assert train.root == test.root == root and (len(train), len(test)) == (12, 6)
    assert train.classes == test.classes == ["0", "1", "2"]
    assert train.index["label"].tolist() == [0, 1, 2] * 4 and test.index["label"].tolist() == [0, 1, 1, 0, 1, 0]
    assert (train.manifest["name"], train.manifest["split"], test.manifest["split"]) == ("photos-wds", "train", "val")
    assert train.index_root.startswith(str(tmp_path / "cache")) and train.index_root != test.index_root
    assert len(caplog.messages) == 2 and all("indexed for its first use" in text for text in caplog.messages)
    caplog.clear()
    again, _ = open_data(root, LoaderConfig())
    assert np.array_equal(again.index, train.index) and not caplog.messages
    assert Reader(train)(np.arange(12)) == list(pictures(each=6).values())[:12]
    assert verify(root) == {f"{root}/*-train-*.tar": [], f"{root}/*-validation-*.tar": []}
    assert len(show(root)[0]) == 8 and show(root)[1] == []


def test_views_equal_those_of_one_folder_per_split(hub, tmp_path, monkeypatch):
    """Each tar is fetched by one request to index it, and by one to train on it."""
    monkeypatch.setattr("pipeline.shards.remote.CHUNK_BYTES", 7000)  # several per tar
    folder = write(str(tmp_path / "set" / "train"), {n: c for n, c in tars().items() if "train" in n})
    index_shards(folder)

    def views(shards) -> list[torch.Tensor]:
        loader = view_loader(shards, AugmentConfig(size=16), batch_size=4, seed=1, device=torch.device("cpu"),
                            backend="opencv", epochs=1)  # fmt: skip
        found = [batch.views for batch in loader]
        loader.close()
        return found

    expected = views(open_splits(str(tmp_path / "set"))[0])
    for found, wanted in zip(views(open_data(URL, LoaderConfig())[0]), expected, strict=True):
        assert torch.equal(found, wanted)
    assert {count for name, count in hub.requests.items() if "-train-" in name} == {2}


def test_broken_connections_are_resumed(hub, tmp_path):
    """The content of the tars is compared through the checksums of their images."""
    hub.drops["photos-train-0001.tar"] = 3
    ensure_index(URL, cache_at(tmp_path))
    train, _ = open_splits(URL, cache_at(tmp_path))
    assert Reader(train)(np.arange(12)) == list(pictures(each=6).values())[:12]
    assert hub.drops["photos-train-0001.tar"] == 0


def test_interrupted_indexing_resumes_with_the_next_tar(hub, tmp_path, monkeypatch):
    """A tar that has changed in the meantime is read again."""
    read, allowed, read_tar = [], [2], index._read_tar

    def counting(fs, path, *options):
        if len(read) == allowed[0]:
            raise KeyboardInterrupt
        read.append(path.rpartition("/")[2])
        return read_tar(fs, path, *options)

    monkeypatch.setattr(index, "_read_tar", counting)
    with pytest.raises(KeyboardInterrupt):
        ensure_index(URL, cache_at(tmp_path))
    assert read == ["photos-train-0000.tar", "photos-train-0001.tar"]
    with pytest.raises(UserError, match=r"have no index; run `python -m pipeline.shards index hf://datasets/.*` first"):
        open_splits(URL, cache_at(tmp_path))
    hub.files["photos-train-0001.tar"] = tar_bytes({"new.jpg": pictures()["class_0/image_0.jpg"], "new.cls": b"2"})
    fsspec.filesystem("hf").invalidate_cache()
    read, allowed[0] = [], 10
    ensure_index(URL, cache_at(tmp_path))
    assert read == ["photos-train-0001.tar", "photos-train-0002.tar", *sorted(tars())[3:]]
    train, _ = open_splits(URL, cache_at(tmp_path))
    assert [key.decode() for key in train.index["key"][4:6]] == ["new", "n0008"]
    assert not list(Path(train.index_root).glob("*.partial"))


def test_new_tars_are_noticed(tmp_path):
    root, files = str(tmp_path / "set"), tars()
    write(root, {name: content for name, content in files.items() if "train-0002" not in name})
    assert len(open_data(root, LoaderConfig())[0]) == 8
    write(root, files)
    assert len(open_data(root, LoaderConfig())[0]) == 12


def test_classes_in_json_members(tmp_path):
    """A .cls member takes precedence, without a remark; what is not a number is no class."""
    image = pictures()["class_0/image_0.jpg"]
    files = {"a.jpg": image, "a.json": b'{"label": 3}', "b.json": b'{"label": 4}', "b.jpg": image, "b.cls": b"1"}
    odd = {"c": b'{"label": "owl"}', "d": b"[1]", "e": b"not json", "f": b'{"label": -1}', "g": b'{"label": true}'}
    for key, text in odd.items():
        files |= {f"{key}.jpg": image, f"{key}.json": text}
    write(str(tmp_path / "set"), {"x.tar": tar_bytes(files)})
    shards = index_shards(str(tmp_path / "set"))
    assert shards.index["label"].tolist() == [3, 1, -1, -1, -1, -1, -1] and shards.manifest["left_out"] == []


def test_other_folders_are_opened_as_before(tmp_path):
    """Names of one split only, an indexed folder, and folders train/ and test/."""
    files = tars()
    only = write(str(tmp_path / "only"), {name: content for name, content in files.items() if "validation" in name})
    assert split_roots(only) == [only]
    one = write(str(tmp_path / "one"), files)
    assert len(split_roots(one)) == 2
    (tmp_path / "one" / "dataset.json").write_text("{}")
    assert split_roots(one) == [one]
    write(str(tmp_path / "folders" / "train"), files)
    assert split_roots(str(tmp_path / "folders")) == [f"{tmp_path}/folders/train"]


def test_command_indexes_every_split(tmp_path, monkeypatch):
    unlabeled = tar_bytes({"a.jpg": pictures()["class_0/image_0.jpg"]})
    root = write(str(tmp_path / "set"), tars() | {"photos-test-0.tar": unlabeled})
    result = run_here("pipeline.shards", "index", root)
    assert result.returncode == 0 and result.stdout.split("\n") == [
        "12 images in 3 shards indexed.", "6 images in 2 shards indexed.", "1 images in 1 shards indexed.", ""
    ], result.stderr  # fmt: skip
    train, test = open_splits(root)
    assert (len(train), len(test)) == (12, 6)
    monkeypatch.chdir(tmp_path)
    assert open_shards("set/*-test-*.tar").classes == ["0", "1", "2"]  # a relative path has the same index


def test_missing_and_gated_data_sets_are_reported(hub, tmp_path):
    missing = f"hf://datasets/{OWNER}/nothing"
    with pytest.raises(UserError, match=rf"^No shards at {missing}; correct the name, or log in with `hf auth login`"):
        open_data(missing, LoaderConfig())
    hub.gated = True
    with pytest.raises(UserError, match=r"can't be read \(the answer is GatedRepo\); check .* needs `hf auth login`"):
        open_data(URL, LoaderConfig())
    assert hub.requests["photos-train-0000.tar"] == 1  # without retries
    hub.shutdown()
    hub.server_close()
    fsspec.filesystem("hf").invalidate_cache()
    with pytest.raises(UserError, match=r"can't be read after 6 attempts \(.*\); check the connection"):
        ensure_index(URL, cache_at(tmp_path))
