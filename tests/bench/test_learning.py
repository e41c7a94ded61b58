"""Accuracy over wall-clock time: the clock, the choice of a peer's loader, and a race of seconds on a few textures."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from bench import contenders, learning, plot
from bench.contenders import Clock, Entry, ImagesInMemory
from bench.train_step import texture
from common import UserError
from engine import session
from pipeline.convert import textures
from pipeline.convert.sources import folder_source
from pipeline.convert.writer import write_split
from pipeline.shards import open_shards

CPU = torch.device("cpu")
TINY = ["--encoder.width", "0.125", "--batch-size", "16", "--head.hidden", "16"]
FILE = """
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18
import torch, torchvision
import torchvision.transforms as transforms

BATCH_SIZE, N_EPOCHS, N_CPU_WORKERS = 24, 1000, 16
BASE_LR = 0.03
views = transforms.Compose([transforms.RandomCrop(32), transforms.ToTensor()])
train = CIFAR10(root=".", train=True, transform=lambda image: (views(image), views(image)))
loader = DataLoader(train, batch_size=BATCH_SIZE, shuffle=True, num_workers=N_CPU_WORKERS)
backbone = resnet18(weights=None)
width = backbone.fc.in_features
backbone.conv1 = torch.nn.Conv2d(3, 64, 3)
backbone.fc = torch.nn.Identity()
optimizer = SGD(backbone.parameters(), lr=BASE_LR)
scheduler = CosineAnnealingLR(optimizer, T_max=N_EPOCHS)

def loss_of(z, temperature=0.5):
    return (z / temperature).square().mean()

device = "cuda"
backbone.to(device)
for epoch in range(N_EPOCHS):
    for (first, second), _ in loader:
        optimizer.zero_grad()
        loss_of(torch.cat([backbone(first.to(device)), backbone(second.to(device))])).backward()
        optimizer.step()
    scheduler.step()
torch.save(backbone, "never reached")
raise AssertionError("the evaluation of the file started")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """48 textures to train on and 20 to test on, as shards."""
    folder = tmp_path_factory.mktemp("learning")
    for split, count in {"train": 48, "test": 20}.items():
        for number in range(count):
            place = folder / "images" / split / textures.CLASSES[number % 10]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:06d}.jpg").write_bytes(texture(number + 1000 * (split == "test")))
        write_split(folder_source(folder / "images" / split), folder, split)
    return folder


@pytest.fixture
def take(monkeypatch):
    """`bench.contenders.run` in this process, on one thread because the tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(session, "available_cores", lambda: 1)

    def run(entry, folder):
        AcceleratorState._reset_state(reset_partial_state=True)
        return json.loads(json.dumps(contenders.run(replace(entry, workers=0), folder)))  # as from a process

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture
def ticking(monkeypatch):
    """A clock for the contenders that advances by a second at every reading, which is every step."""
    monkeypatch.setattr(contenders, "time", SimpleNamespace(perf_counter=iter(range(10**6)).__next__))


def arguments(data, **others):
    return SimpleNamespace(
        **{"data": str(data), "minutes": 1.0, "points": 3, "preset": None, "peer": "", "options": TINY} | others
    )


def entry_of(race, contender, images):
    return replace(race.entry(contender), images=images, precision="fp32")


def test_clock_pauses_for_encoders_and_ends_in_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(contenders, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def weights():
        now[0] += 100
        return {"weight": torch.ones(2)}

    clock = Clock(13, tmp_path, CPU)
    clock.plan(9, 3, weights)
    for count in (4, 5):
        for _ in clock.batches([("views", [0] * 4)] * count):
            now[0] += 2
    assert clock.steps == 5 and clock.over, "two further steps would end after 14 s"
    assert clock.stamps == [(2, 4), (4, 8), (6, 12), (8, 16), (10, 20)]
    clock.keep(weights())
    assert [(p["step"], p["seconds"], p["images"]) for p in clock.points] == [(3, 6, 12), (5, 10, 20)]
    with pytest.raises(RuntimeError, match="diverged within 5 steps"):
        clock.keep({"weight": torch.tensor([torch.nan])})


def test_speed_is_that_at_the_end():
    assert learning.final_speed([(1, 10), (2, 20), (3, 60)]) == 40
    assert learning.final_speed([(2, 10)]) == 5


def test_the_fastest_loader_of_a_peer_is_kept(monkeypatch):
    asked = []

    def take(entry, folder):
        asked.append(entry)
        rate = {"bf16": 2, "fp32": 1}[entry.precision] * [1, 3, 2][entry.workers] if entry.trainer == "plain" else 7
        return {"stamps": [(1, rate), (2, 2 * rate)]}

    entry = Entry("plain", [], 0, 480.0, 6, "auto", 0)
    found = learning.warmed_up(entry, 50, take)
    assert found == replace(entry, precision="bf16", workers=1, images=6 * 480)
    assert {(e.precision, e.workers) for e in asked[:6]} == {(p, w) for p in ("bf16", "fp32") for w in (0, 1, 2)}
    assert [e.seconds for e in asked] == [10.0] * 6 + [30.0] and {e.images for e in asked} == {150}
    assert learning.warmed_up(replace(entry, trainer="ours"), 50, take) == replace(
        entry, trainer="ours", images=7 * 480
    )
    assert len(asked) == 8 and asked[-1].seconds == 120 and asked[-1].precision == "auto"


def test_views_of_a_race_grow_as_in_its_preset():
    rates, asked = {"16": 6, "20": 4, "24": 3, "32": 1}, []

    def take(entry, folder):
        asked.append(entry.seconds)
        rate = rates[entry.arguments[entry.arguments.index("--views.size") + 1]]
        return {"stamps": [(1, rate), (2, 2 * rate)]}

    entry = Entry("ours", ["--preset", "cifar10-cpu", "--data", "CIFAR"], 0, 480.0, 6, "auto", 0)
    found = learning.warmed_up(entry, 50, take)
    assert asked == [40.0] * 3
    assert found.images == round(480 * 80 / (16 / 6 + 54 / 4 + 10 / 3)), "its 80 epochs have 16, 54 and 10 of each size"
    entry = replace(entry, arguments=[*entry.arguments, "--epochs", "81"])
    assert learning.warmed_up(entry, 50, take).images == round(480 * 81 / (16 / 6 + 54 / 4 + 10 / 3 + 1))
    assert asked[3:] == [30.0] * 4
    assert contenders.stretched([(16, 20), (24, 40)], 80, 10) == ("16:2", "24:5")
    assert contenders.stretched([(16, 20), (24, 40)], 80, 2) == ("24:1",)
    assert contenders.stretched([(16, 20), (24, 60)], 80, 7) == ("16:1", "24:6"), "the whole run"


def test_race(data, take, ticking, tmp_path, monkeypatch):
    """Rows are complete; times grow and stay within the budget; encoders differ."""
    monkeypatch.setattr(learning, "warmed_up", lambda entry, images, take: replace(entry, images=9 * 16))
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    race = replace(learning.open_race(arguments(data)), preset="textures")
    rows = [row for name in ("ours", "plain") for row in learning.rows_of(name, race, take)]
    for name in ("ours", "plain"):
        mine = [row for row in rows if row["contender"] == name]
        assert [row["images_seen"] for row in mine] == [48, 96, 144]
        assert [row["schedule"] for row in mine] == [0.333, 0.667, 1.0]
        seconds = [row["seconds"] for row in mine]
        assert seconds == sorted(set(seconds)) and seconds[-1] <= race.seconds
        assert [row["linear_top1"] is None for row in mine] == [True, True, False]
        for row in mine:
            assert 0 <= row["knn_top1"] <= 1 and row["batch"] == 16 and row["seed"] == 0
            assert row["images_per_s"] == pytest.approx(row["images_seen"] / row["seconds"], abs=0.05)
            assert row["encoder"] == "resnet18 x 0.125, standard stem" and row["train_images"] == 48
    assert rows[0]["recipe"].startswith("muon, lr 0.02, momentum 0.95") and "temperature 0.2" in rows[0]["recipe"]
    assert rows[-1]["recipe"].startswith("sgd, lr 0.06, momentum 0.9, decay 0.0005, cosine, temperature 0.5, crop 0.08")
    read = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    monkeypatch.setattr(plot, "read_rows", lambda name: read)
    assert plot.plot_learning().stat().st_size > 10_000
    (tmp_path / "benchmarks.md").write_text("before\n<!-- learning -->\n<!-- /learning -->\nafter")
    page = plot.fill_learning_table().read_text()
    assert page.count("\n| ours |") == page.count("\n| plain |") == 1
    assert f"| {rows[-1]['knn_top1']} | {rows[-1]['linear_top1']} |\n" in page
    earlier = [{**row, "seed": seed} for row in rows for seed in ("0", "1")]
    monkeypatch.setattr(learning, "read_rows", lambda name: [{k: str(v) for k, v in row.items()} for row in earlier])
    kept = {(row["contender"], row["seed"]) for row in learning.other_rows(rows[:3])}
    assert kept == {("ours", "1"), ("plain", "0"), ("plain", "1")}


@pytest.mark.parametrize(("contender", "steps"), [("ours-lightly", 19), ("plain", 18)])
def test_training_ends_with_its_time(data, take, ticking, tmp_path, contender, steps):
    """The time is up at the end of the sixth epoch, which train.py notices a step later."""
    race = replace(learning.open_race(arguments(data)), seconds=19.5)
    result = take(entry_of(race, contender, 30 * 48), tmp_path)
    assert result["planned_steps"] == 90 and len(result["stamps"]) == steps
    (point,) = result["points"]
    assert (point["step"], point["seconds"], point["images"]) == (steps, steps, 16 * steps)
    assert (tmp_path / point["file"]).exists()


def test_peers_are_not_described_by_a_schedule_that_they_do_not_follow(data, take, tmp_path):
    race = learning.open_race(arguments(data))
    race = replace(race, options=[*race.options, "--views.size-schedule", "16:1"])
    assert "px" not in take(entry_of(race, "plain", 32), tmp_path)["recipe"]


def test_lightly_races(data, take, tmp_path):
    pytest.importorskip("lightly", reason="`make bench` installs lightly")
    result = take(entry_of(learning.open_race(arguments(data)), "lightly", 32), tmp_path)
    assert result["planned_steps"] == 2 and result["points"][-1]["images"] == 32
    assert result["mean"] == [0.485, 0.456, 0.406] and "decay 0.0005" in result["recipe"]


def test_script_in_one_file(data, take, tmp_path):
    """Its loop runs with our images, encoder and number of epochs, and its evaluation does not."""
    file = tmp_path / "simclr.py"
    file.write_text(FILE)
    race = learning.open_race(arguments(data, peer=str(file)))
    result = take(entry_of(race, "peer", 60), tmp_path)
    assert result["planned_steps"] == 4, "two epochs of two batches of 24"
    assert [point["images"] for point in result["points"]] == [48, 96] and result["batch"] == 24
    assert (result["mean"], result["std"]) == ([0, 0, 0], [1, 1, 1])
    assert result["recipe"] == "BATCH_SIZE 24, BASE_LR 0.03, temperature 0.5"
    rows = learning.scores(
        race, tmp_path / result["points"][0]["file"], race.config("plain").views, race.config("peer"), False
    )
    assert set(rows) == {"knn_top1"}
    file.write_text("from torchvision.datasets import CIFAR10\n")
    with pytest.raises(RuntimeError, match=r"simclr\.py did not train on a DataLoader"):
        take(entry_of(race, "peer", 60), tmp_path)


def test_images_in_memory(data):
    images = ImagesInMemory(open_shards(str(data / "train")), lambda image: image)
    assert len(images) == 48 and images[3][0].size == (40, 40) and images[3][0].mode == "RGB"
    assert sorted({label for _, label in images}) == list(range(10))


def test_missing_contenders(data, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "find_spec", lambda name: None)
    asked = arguments(data, contenders=None)
    assert learning.available(asked) == ["ours", "ours-lightly", "plain"]
    for contender, message in (("lightly", "not installed"), ("peer", "use --peer FILE")):
        with pytest.raises(UserError, match=message):
            learning.available(arguments(data, contenders=[contender]))
    with pytest.raises(UserError, match=r"none\.py is not a file"):
        learning.available(arguments(data, contenders=None, peer=str(tmp_path / "none.py")))
    with pytest.raises(UserError, match="Batches of 64 exceed the 48 images"):
        learning.open_race(arguments(data, options=["--batch-size", "64"])).config("plain")
    with pytest.raises(UserError, match="no test split"):
        learning.open_race(arguments(data / "train"))


def test_the_documentation_shows_the_committed_rows(tmp_path, monkeypatch):
    page = (plot.DOCS / "benchmarks.md").read_text()
    monkeypatch.setattr(plot, "DOCS", tmp_path)
    (tmp_path / "benchmarks.md").write_text(page)
    assert "<!-- learning -->" in page and plot.fill_learning_table().read_text() == page
