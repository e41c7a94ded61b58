"""Conversions that are killed, repeated, split among workers and jobs, or out of disk space give the same bytes."""

import errno
import functools
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common import UserError
from pipeline.convert import __main__ as convert
from pipeline.convert import writer
from pipeline.convert.base import Source
from pipeline.convert.folder import folder_source
from pipeline.convert.imagenet import imagenet_sources
from pipeline.convert.pixels import cifar_sources
from pipeline.convert.webdataset import webdataset_source
from pipeline.convert.writer import shards_written, write_split
from pipeline.shards.dataset import open_shards, open_splits
from tests.pipeline.augment.reference_views import encode, smooth_field
from tests.pipeline.image_sets import (
    ROOT,
    cifar_files,
    contents,
    damaged,
    digests,
    pictures,
    rejected,
    run_here,
    run_module,
    write_folder,
    write_imagenet,
    write_tar,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Twenty images in seven shards of three; two images are unreadable."""
    files = pictures(classes=3, each=6)
    files |= {"class_0/cut.jpg": damaged()["truncated"], "class_1/text.jpg": damaged()["text"]}
    return write_folder(tmp_path_factory.mktemp("images") / "in", files)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory) -> dict[str, str]:
    """Digests of an uninterrupted conversion in one process."""
    out = tmp_path_factory.mktemp("undisturbed")
    write_split(folder_source(images), out, "train", samples_per_shard=3)
    found = digests(out / "train")
    assert len(found) >= 7 * 2 + 2
    return found


def only_the_split(out: Path) -> bool:
    return [path.name for path in out.iterdir()] == ["train"]


SLOW_CONVERSION = """
import os, sys, time
from dataclasses import dataclass, replace
from pathlib import Path
from pipeline.convert import __main__ as convert
from pipeline.convert import writer

def hang(*_):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(60)

@dataclass(frozen=True)
class Slow:
    read: object
    at: str
    seconds: float
    def __call__(self, name, size):
        if self.at in ("all", name):
            os.write(1, b"%d\\n" % os.getpid())
            time.sleep(self.seconds)
        return self.read(name, size)

if __name__ == "__main__":  # main(), but slow at image AT, or hanging at the last rename
    at, seconds = sys.argv.pop(1), float(sys.argv.pop(1))
    folder_source, rename = convert.sources.folder_source, os.replace
    def slow_source(*arguments):
        source = folder_source(*arguments)
        return replace(source, read=Slow(source.read, at, seconds))
    convert.sources.folder_source = slow_source
    if at == "rename":
        os.replace = lambda a, b: hang() if str(a).endswith("/shards") else rename(a, b)
    convert.main()
"""


def start(folder: Path, at: str, seconds: float, images: Path, out: Path, workers: int) -> subprocess.Popen:
    """Start a slow conversion into shards of three in a new process group; it prints the id of each waiting process."""
    program = folder / "program.py"  # a file, which spawned processes can import
    program.write_text(SLOW_CONVERSION)
    arguments = ["folder", images, out, "--shard-size", "3", "--workers", workers]
    return subprocess.Popen(
        [str(part) for part in (sys.executable, program, at, seconds, *arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def killed(images: Path, out: Path, moment: str) -> None:
    """Start a conversion and kill it during the third shard or before the last rename."""
    source = folder_source(images)
    if moment == "shard":
        shards = write_split(source, out.parent / "order", "train", samples_per_shard=3)
        moment = next(name for _, key, (name, _) in source.items if key == shards.index["key"][7].decode())
    with start(out.parent, moment, 60, images, out, workers=1) as process:
        assert int(process.stdout.readline()) == process.pid
        process.kill()
    assert process.returncode == -signal.SIGKILL


def times(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


@pytest.mark.parametrize("moment", ["shard", "rename"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_resumes(images, undisturbed, tmp_path, moment, workers):
    out = tmp_path / "out"
    killed(images, out, moment)
    for root in out, out / "train":  # the unfinished set is not opened
        with pytest.raises(UserError, match="No shards at"):
            open_splits(str(root))
    whole = times(out / ".train.partial" / "shards")
    assert len(whole) == shards_written(out, "train") == (2 if moment == "shard" else 7)
    assert moment == "rename" or (out / ".train.partial" / "work" / "train-000002.tar").exists()
    write_split(folder_source(images), out, "train", samples_per_shard=3, workers=workers)
    assert digests(out / "train") == undisturbed and only_the_split(out)
    again = times(out / "train")
    assert {name: again[name] for name in whole} == whole, "a whole shard was written again"


def test_a_truncated_shard_is_written_again(images, undisturbed, tmp_path):
    """After a power failure, a file may be shorter than what was written."""
    killed(images, tmp_path / "out", "shard")
    os.truncate(tmp_path / "out" / ".train.partial" / "shards" / "train-000001.tar", 100)
    write_split(folder_source(images), tmp_path / "out", "train", samples_per_shard=3)
    assert digests(tmp_path / "out" / "train") == undisturbed


def test_a_split_is_on_the_disk_before_it_is_in_place(images, tmp_path, monkeypatch):
    """Otherwise a power failure could leave empty tars in a finished set."""
    synced, in_place, rename = set(), set(), os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))

    def replaced(old: Path, new: Path) -> None:
        if Path(new).name == "train":
            in_place.update(synced)
        rename(old, new)

    monkeypatch.setattr(os, "replace", replaced)
    write_split(folder_source(images), tmp_path, "train", samples_per_shard=3)
    written = [tmp_path / "train", *(tmp_path / "train").iterdir()]
    assert len(written) > 7 * 2 and {path.stat().st_ino for path in written} <= in_place
    assert tmp_path.stat().st_ino in synced


def test_another_plan_is_refused(images, tmp_path):
    killed(images, tmp_path / "out", "shard")
    files = {name: content for name, content in pictures().items() if not name.startswith("class_0")}
    other = folder_source(write_folder(tmp_path / "other" / "in", files))
    same = folder_source(images)
    cases = {
        "seed is 0 instead of 1": (same, {"seed": 1}),
        "samples per shard is 3 instead of 4": (same, {"samples_per_shard": 4}),
        "short side is None instead of 16": (same, {"short_side": 16}),
        "verify is None instead of False": (same, {"verify": False}),
        "it has other classes": (other, {}),
        "its source lists other images": (folder_source(write_folder(tmp_path / "longer" / "in", longer(images))), {}),
    }
    renamed = replace(same, name="other")
    cases["its name is in instead of other"] = renamed, {}
    before = digests(tmp_path / "out" / ".train.partial" / "shards")
    for difference, (source, options) in cases.items():
        message = f"unfinished conversion with another plan .*{difference}.*; use the same options to resume it"
        with pytest.raises(UserError, match=message):
            write_split(source, tmp_path / "out", "train", **{"samples_per_shard": 3} | options)
    assert digests(tmp_path / "out" / ".train.partial" / "shards") == before


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"cut'])
def test_an_invalid_plan_without_shards_is_written_again(images, undisturbed, tmp_path, text):
    (tmp_path / "out" / ".train.partial").mkdir(parents=True)
    (tmp_path / "out" / ".train.partial" / "plan.json").write_text(text)
    write_split(folder_source(images), tmp_path / "out", "train", samples_per_shard=3)
    assert digests(tmp_path / "out" / "train") == undisturbed


@pytest.mark.parametrize("text", ["", '{"cut', "[]", None])
def test_a_lost_plan_stops_the_conversion(images, tmp_path, text):
    """Mixing the shards of two plans would duplicate some images and drop others."""
    source = folder_source(images)
    assert write_split(source, tmp_path, "train", samples_per_shard=3, part=(1, 2)) is None
    partial = tmp_path / ".train.partial"
    (partial / "plan.json").unlink() if text is None else (partial / "plan.json").write_text(text)
    before = digests(partial / "shards")
    for seed in 0, 1:
        with pytest.raises(UserError, match=r"plan.json can't be read, but shards .*; delete .*train.partial to start"):
            write_split(source, tmp_path, "train", seed, samples_per_shard=3)
    assert digests(partial / "shards") == before


def test_the_plan_is_written_atomically(images, tmp_path, monkeypatch):
    def cut(path: Path, text: str, *_) -> None:
        with open(path, "w") as file:
            file.write(text[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        write_split(folder_source(images), tmp_path, "train", samples_per_shard=3)
    assert not (tmp_path / ".train.partial" / "plan.json").exists()


def test_shards_of_a_deleted_plan_are_not_used(images, undisturbed, tmp_path):
    """A job that still runs when its folder is deleted writes a shard to the folder of the next plan."""
    source = folder_source(images)
    for seed in 1, 0:
        assert write_split(source, tmp_path / str(seed), "train", seed, samples_per_shard=3, part=(seed + 1, 3)) is None
    old, new = (tmp_path / str(seed) / ".train.partial" for seed in (1, 0))
    for name in "work/train-000001.json", "shards/train-000001.tar", "shards/train-000001.index.npy":
        os.replace(old / name, new / name)
    write_split(source, tmp_path / "0", "train", samples_per_shard=3)
    assert digests(tmp_path / "0" / "train") == undisturbed


def copy_of(images: Path, folder: Path) -> Path:
    shutil.copytree(images, folder, copy_function=shutil.copy2)
    return folder


@pytest.mark.parametrize(
    "form", ["folder", "tar", "webdataset", "imagenet tar", "imagenet folder", "validation", "cifar"]
)
def test_parts_of_a_modified_source_are_refused(tmp_path, form):
    """Names and sizes are unchanged."""
    files = {f"n{i % 2}/n{i % 2}_{i}.jpg": encode(smooth_field(0, i, 16, 16), "BMP") for i in range(8)}
    if form == "folder":
        path, touched = write_folder(tmp_path / "in", files), tmp_path / "in" / "n1" / "n1_5.jpg"
    elif form == "imagenet tar":
        path = touched = write_imagenet(tmp_path / "in.tar", files)
    elif form == "imagenet folder":
        path = write_folder(tmp_path / "in", {f"train/{name}": content for name, content in files.items()})
        touched = path / "train" / "n1" / "n1_5.jpg"
    elif form == "cifar":
        path = touched = write_tar(tmp_path / "cifar.tar.gz", cifar_files(10, 2)[0], "w:gz")
    else:
        flat = {name.partition("/")[2]: content for name, content in files.items()}
        path = touched = write_tar(tmp_path / "in.tar", files if form == "tar" else flat)
    (tmp_path / "labels").write_text("".join(f"n{i % 2}_{i}.jpg n{i % 2}\n" for i in range(8)))

    def source() -> Source:
        if form in ("folder", "tar"):
            return folder_source(path)
        if form == "webdataset":
            return webdataset_source(path)
        if form == "cifar":
            return cifar_sources(path)["train"]
        if form == "validation":
            return imagenet_sources(path, tmp_path / "labels")["val"]
        return imagenet_sources(path)["train"]

    assert write_split(source(), tmp_path / "out", "train", samples_per_shard=2, part=(1, 2)) is None
    before = digests(tmp_path / "out" / ".train.partial" / "shards")
    status = touched.stat()
    os.utime(touched, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"the files of its source have other modification times.*delete it to start"):
        write_split(source(), tmp_path / "out", "train", samples_per_shard=2, part=(2, 2))
    assert digests(tmp_path / "out" / ".train.partial" / "shards") == before
    os.utime(touched, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert write_split(source(), tmp_path / "out", "train", samples_per_shard=2, part=(2, 2))


def test_modification_times_do_not_change_the_bytes(images, undisturbed, tmp_path):
    copy = copy_of(images, tmp_path / "in")
    os.utime(copy / "class_0" / "image_0.jpg", (0, 0))
    write_split(folder_source(copy), tmp_path, "train", samples_per_shard=3)
    assert digests(tmp_path / "train") == undisturbed


def test_splits_written_in_parts_have_the_same_labels(tmp_path):
    """Neither split is complete when the other is started; val lacks the first class."""
    files = pictures()
    val = {name: content for name, content in files.items() if not name.startswith("class_0")}
    train_source = folder_source(write_folder(tmp_path / "train", files))
    val_source = folder_source(write_folder(tmp_path / "val", val))
    for part in (1, 2), (2, 2):
        for split, source in ("train", train_source), ("val", val_source):
            write_split(source, tmp_path / "out", split, samples_per_shard=2, part=part)
    train, test = open_splits(str(tmp_path / "out"))
    assert train.classes == test.classes == ["class_0", "class_1", "class_2"]
    assert {key: label for key, (label, _) in contents(test).items()} == {
        name.rsplit(".", 1)[0]: name.split("/")[0] for name in val
    }


def test_classes_missing_from_an_unfinished_split_are_refused(tmp_path):
    train = folder_source(write_folder(tmp_path / "train", pictures()))
    val = folder_source(write_folder(tmp_path / "val", pictures(classes=2)))
    assert write_split(val, tmp_path / "out", "val", samples_per_shard=2, part=(1, 2)) is None
    with pytest.raises(UserError, match=r"train has classes that .*\.val\.partial does not have \(class_2\)"):
        write_split(train, tmp_path / "out", "train", samples_per_shard=2)
    assert not list((tmp_path / "out").glob(".train.partial/*"))


def test_two_splits_started_at_the_same_time(tmp_path, monkeypatch):
    """Each of them looks for the plan of the other one before it exists."""
    train = folder_source(write_folder(tmp_path / "train", pictures()))
    val = folder_source(write_folder(tmp_path / "val", pictures(classes=2)))
    assert write_split(train, tmp_path / "out", "train", samples_per_shard=2, part=(1, 2)) is None
    look, seen = writer._other_classes, []
    monkeypatch.setattr(writer, "_other_classes", lambda *names: look(*names) if seen else seen.append(names) or ())
    with pytest.raises(UserError, match=r"Another split was started in .* at the same time; run the same"):
        write_split(val, tmp_path / "out", "val", samples_per_shard=2)
    shards = write_split(val, tmp_path / "out", "val", samples_per_shard=2)
    assert shards.classes == ["class_0", "class_1", "class_2"]
    assert write_split(val, tmp_path / "other", "val", samples_per_shard=2, part=(1, 2)) is None
    seen.clear()
    for _ in range(2):  # nothing is left that would block the other split
        with pytest.raises(UserError, match=r"train has classes that .*\.val\.partial does not have"):
            write_split(train, tmp_path / "other", "train", samples_per_shard=2)
    assert write_split(val, tmp_path / "other", "val", samples_per_shard=2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [emptied, cut, zeroed, flipped])
@pytest.mark.parametrize("suffix", ["tar", "index.npy", "json"])
@pytest.mark.parametrize("part", [(1, 2), (2, 2)], ids=["its own part", "the other part"])
def test_a_shard_damaged_after_writing_is_written_again(images, undisturbed, tmp_path, harm, suffix, part):
    source = folder_source(images)
    assert write_split(source, tmp_path, "train", samples_per_shard=3, part=(1, 2)) is None
    partial = tmp_path / ".train.partial"
    harm(partial / ("work" if suffix == "json" else "shards") / f"train-000002.{suffix}")
    first = write_split(source, tmp_path, "train", samples_per_shard=3, part=part)
    if first is None:  # without the record, only its own part writes the shard
        assert part == (1, 2) or suffix in ("json", "tar")
        write_split(source, tmp_path, "train", samples_per_shard=3, part=(3 - part[0], 2))
    assert digests(tmp_path / "train") == undisturbed and only_the_split(tmp_path)


def test_intact_shards_are_not_written_again(images, undisturbed, tmp_path):
    source = folder_source(images)
    assert write_split(source, tmp_path, "train", samples_per_shard=3, part=(1, 2)) is None
    whole = times(tmp_path / ".train.partial" / "shards")
    write_split(source, tmp_path, "train", samples_per_shard=3)
    assert {name: times(tmp_path / "train")[name] for name in whole} == whole
    assert digests(tmp_path / "train") == undisturbed


def longer(images: Path) -> dict[str, bytes]:
    """The same names, with one byte more in one file."""
    files = {path.relative_to(images).as_posix(): path.read_bytes() for path in sorted(images.rglob("*.*"))}
    return files | {"class_0/image_0.jpg": files["class_0/image_0.jpg"] + b"\0"}


def test_a_complete_split_is_not_changed(images, undisturbed, tmp_path):
    command = ["pipeline.convert", "folder", images, tmp_path, "--shard-size", "3", "--workers", "1"]
    first = run_here(*command)
    before = times(tmp_path / "train")
    second = run_here(*command)
    assert second.returncode == 0 and second.stdout == first.stdout and times(tmp_path / "train") == before
    assert digests(tmp_path / "train") == undisturbed
    refused = run_here(*command, "--seed", "1")
    assert refused.returncode == 1 and "exists already (its seed is 0 instead of 1); delete it" in refused.stderr


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_write_the_same_bytes(images, undisturbed, tmp_path, workers):
    shards = write_split(folder_source(images), tmp_path, "train", samples_per_shard=3, workers=workers)
    assert digests(tmp_path / "train") == undisturbed and only_the_split(tmp_path)
    assert rejected(shards).keys() == {"class_0/cut", "class_1/text"}


def test_parts_in_sequence(images, undisturbed, tmp_path):
    command = ["pipeline.convert", "folder", images, tmp_path, "--shard-size", "3", "--workers", "1", "--part"]
    for part, written in (("2/3", 2), ("3/3", 4)):
        result = run_module(*command, part)
        assert result.returncode == 0 and f"train: {written} of 7 shards are written" in result.stdout
        assert not (tmp_path / "train").exists()
    last = run_module(*command, "1/3")
    assert "18 images of 3 classes in 7 shards, 2 left out." in last.stdout
    assert digests(tmp_path / "train") == undisturbed and only_the_split(tmp_path)
    late = run_module(*command, "2/3")  # as when a job is queued again
    assert late.returncode == 0 and late.stdout == last.stdout


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/3/3"])
def test_invalid_parts_are_refused(monkeypatch, capsys, part):
    monkeypatch.setattr(sys, "argv", ["convert", "folder", "in", "out", "--part", part])
    with pytest.raises(SystemExit) as ended:
        convert.main()
    assert ended.value.code == 2 and f"{part} is not I/N with I from 1 to N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [(name, 0, "least 1") for name in ("--shard-size", "--workers", "--short-side", "--quality")]
    + [("--seed", -1, "least 0"), ("--seed", 2**64, f"most {2**64 - 1}"), ("--quality", 101, "most 100")],
)
def test_numbers_out_of_range_are_refused(monkeypatch, option, value, bound):
    monkeypatch.setattr(sys, "argv", ["convert", "folder", "in", "out", f"{option}={value}"])
    with pytest.raises(SystemExit) as ended:
        convert.main()
    assert ended.value.code == f"{option} is {value}; it must be at {bound}."


def test_concurrent_parts(images, undisturbed, tmp_path):
    """Three jobs, one of them started twice; the last one completes the split."""
    command = [sys.executable, "-m", "pipeline.convert", "folder", images, tmp_path, "--shard-size", "3"]
    jobs = [
        subprocess.Popen([*command, "--workers", "1", "--part", part], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for part in ("1/3", "2/3", "2/3", "3/3")
    ]
    outputs = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4
    assert any("18 images" in output for output in outputs)
    assert digests(tmp_path / "train") == undisturbed and only_the_split(tmp_path)


def test_a_shard_locked_by_another_process_is_skipped(images, undisturbed, tmp_path):
    held = tmp_path / ".train.partial" / "work" / "train-000004.lock"
    held.parent.mkdir(parents=True)
    with writer.FileLock(held):
        assert write_split(folder_source(images), tmp_path, "train", samples_per_shard=3) is None
    assert shards_written(tmp_path, "train") == 6
    write_split(folder_source(images), tmp_path, "train", samples_per_shard=3)
    assert digests(tmp_path / "train") == undisturbed


def test_workers_end_with_a_killed_main_process(images, tmp_path):
    with start(tmp_path, "all", 60, images, tmp_path / "out", workers=2) as process:
        workers = {int(process.stdout.readline()) for _ in range(2)}
        assert len(workers) == 2 and process.pid not in workers
        process.kill()
        process.stdout.read()  # ends when the last worker has closed it


def test_error_of_a_killed_worker(tmp_path):
    killing = Source("in", [("a", f"a/{number}", ()) for number in range(2)], functools.partial(os._exit, 9))
    with pytest.raises(UserError, match="A worker process was killed, possibly because memory ran out; use fewer"):
        write_split(killing, tmp_path, "train", samples_per_shard=1, workers=2)


def test_an_interrupt_keeps_finished_shards(images, undisturbed, tmp_path):
    source, done = folder_source(images), []

    def interrupt(name: str, size: int) -> bytes:
        done.append(name)
        if len(done) == 8:
            raise KeyboardInterrupt
        return source.read(name, size)

    with pytest.raises(KeyboardInterrupt):
        write_split(replace(source, read=interrupt), tmp_path, "train", samples_per_shard=3)
    partial = tmp_path / ".train.partial"
    assert not list((partial / "work").glob("*.tar")) and len(list((partial / "shards").glob("*.tar"))) == 2
    write_split(source, tmp_path, "train", samples_per_shard=3)
    assert digests(tmp_path / "train") == undisturbed


def test_ctrl_c_prints_no_traceback(images, tmp_path):
    """The main process stops both workers in the middle of a shard; no partial shard is left."""
    with start(tmp_path, "all", 0.2, images, tmp_path / "out", workers=2) as process:
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors == b"Interrupted; run the same command again to resume.\n"
    assert not list((tmp_path / "out" / ".train.partial" / "work").glob("*.tar"))


UNWRITABLE = (
    "free some space or use a folder with write permission, and run the same command again, which keeps the finished "
    "shards."
)


def test_a_folder_that_may_not_be_entered(images, tmp_path, monkeypatch):
    """As root, tests can enter every folder."""
    exists = Path.exists

    def refusing(path):
        if path == tmp_path / "out" / "train":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refusing)
    with pytest.raises(UserError, match=f"^{tmp_path}/out can't be written .Permission denied.; {UNWRITABLE}$"):
        write_split(folder_source(images), tmp_path / "out", "train")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk(images, undisturbed, tmp_path, workers):
    """The size of files is limited, as by a quota or a full disk."""
    command = [sys.executable, "-m", "pipeline.convert", "folder", images, tmp_path, "--shard-size", "3"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    full = subprocess.run(
        [*command, "--workers", workers], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, timeout=60
    )
    assert full.returncode == 1 and full.stdout == ""
    assert full.stderr == f"{tmp_path} can't be written (File too large); {UNWRITABLE}\n"
    partial = tmp_path / ".train.partial"
    assert not (tmp_path / "train").exists() and not list(partial.rglob("*.tar"))
    write_split(folder_source(images), tmp_path, "train", samples_per_shard=3)
    assert digests(tmp_path / "train") == undisturbed


def test_a_full_file_system(images, undisturbed, tmp_path):
    """A disk of 80 kB, then of 1 MB, where the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        source = folder_source(images)
        with pytest.raises(UserError, match=rf"No space left on device\); {UNWRITABLE}"):
            write_split(source, disk / "out", "train", samples_per_shard=3)
        partial = disk / "out" / ".train.partial"
        assert not list((partial / "work").glob("*.tar")), "the unfinished shard takes no space"
        whole = times(partial / "shards")
        assert 1 <= len(whole) == shards_written(disk / "out", "train") < 7
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        write_split(source, disk / "out", "train", samples_per_shard=3)
        assert digests(disk / "out" / "train") == undisturbed
        again = times(disk / "out" / "train")
        assert {name: again[name] for name in whole} == whole
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(UserError, match=rf"Read-only file system\); {UNWRITABLE}"):
            write_split(source, disk / "other", "train")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder(images, tmp_path, monkeypatch, capsys, code):
    def refuse(path: Path, *_, **__) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(sys, "argv", ["convert", "folder", str(images), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        convert.main()
    assert ended.value.code == f"{tmp_path / 'out'} can't be written ({os.strerror(code)}); {UNWRITABLE}"


def test_a_file_in_place_of_the_folder(images, tmp_path):
    (tmp_path / "out").write_text("a file")
    result = run_here("pipeline.convert", "folder", images, tmp_path / "out")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert f"{tmp_path / 'out'} can't be written (Not a directory)" in result.stderr


def test_a_shard_without_a_readable_image_is_left_out(tmp_path):
    files = pictures(classes=1, each=4) | {f"class_0/text_{n}.jpg": b"text" for n in range(8)}
    shards = write_split(folder_source(write_folder(tmp_path / "in", files)), tmp_path, "train", samples_per_shard=1)
    assert len(shards) == len(shards.manifest["shards"]) == 4 and shards.manifest["rejected"] == 8
    assert len(list((tmp_path / "train").glob("*.tar"))) == 4 and len(contents(open_shards(shards.root))) == 4


def test_progress_on_a_terminal(images, tmp_path):
    """A bar with rates and remaining time on a terminal; nothing otherwise."""
    command = [sys.executable, "-m", "pipeline.convert", "folder", str(images), str(tmp_path), "--workers", "1"]
    quiet = subprocess.run([*command, "--split", "quiet"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "images/s" not in quiet.stderr
    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "150", "TERM": "xterm"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        seen, until = b"", time.monotonic() + 60
        while time.monotonic() < until:
            if select.select([main], [], [], 0.1)[0]:
                try:
                    seen += os.read(main, 4096)
                except OSError:  # on Linux: the other end is closed
                    break
    os.close(main)
    text = seen.decode()
    assert process.returncode == 0 and "in train" in text
    assert "20/20" in text and "images/s" in text and "MB/s" in text and "0:00:00" in text
