"""report.html as users meet it: written by a run or by evaluate.py, and opened in a real browser."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import presets
import train
from common import UserError
from engine import run_lock
from model import EncoderConfig, create_classifier, create_encoder, encoder_spec, save_classifier, save_encoder
from pipeline.augment import AugmentConfig
from pipeline.images.pixel_format import RGB8
from pipeline.loader import LoaderConfig, center_crop_batches
from pipeline.shards import open_shards
from presets import PRETRAIN, parse
from report import count_pairs, embed_split, predictions, write_report
from tests.small_sets import remove_labels, texture_shards

CPU = torch.device("cpu")
SPEC = encoder_spec(EncoderConfig("resnet18", stem="standard", width=0.125), image_size=32)
ROWS = [
    {"step": step, "epoch": 1 + step // 6, "loss": 5 - step / 10, "lr": 0.1, "gradient_norm": 1.0, "replaced_images": 0,
     "images_per_s": 100.0, "data_wait_ms": 1.0, "step_ms": 10.0, "probe_top1": 0.1 * step}
    for step in range(1, 11)
]  # fmt: skip
RESULTS = [{"features": name, "step": step, "knn_top1": 0.5, "linear_top1": 0.6}
           for name, step in (("untrained", 0), ("trained", 10))]  # fmt: skip
SHORT = ["--epochs", "1", "--batch-size", "16", "--encoder.width", "0.125", "--head.hidden", "32", "--head.out", "16"]
SHORT += ["--eval.no-baselines", "--preset", "textures"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 train and 40 test textures of ten classes, as shards."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=80, test=40)


def make_run(folder, data, **changes):
    """Folder of a finished pretraining with random weights."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_encoder(create_encoder(SPEC), SPEC, folder / "encoder.safetensors")
    options = dataclasses.replace(presets.textures(), data=str(data), **changes)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(options)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS + RESULTS))
    summary = {"sentences": ["Compute-bound: 99 % of the time."], "images_per_s": 123.0,
               "hardware": {"device": "a test"}, "versions": {"torch": "2"}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (bad := make_run(folder / "first", data) / "bad_samples.jsonl").write_text(
        json.dumps({"shard": "train-0.tar", "key": "broken", "reason": "truncated"}) + "\n"
    )
    assert bad.exists()
    return [folder / "first", make_run(folder / "second", data, seed=1)]


@pytest.fixture(scope="module")
def page(runs):
    """Report of one run."""
    write_report(runs[:1], out := runs[0] / "report.html", CPU)
    return out


@pytest.fixture(scope="module")
def comparison(runs, tmp_path_factory):
    """Report of two runs."""
    write_report(runs, out := tmp_path_factory.mktemp("comparison") / "report.html", CPU)
    return out


class References(HTMLParser):
    """Everything that a page would load, and its text."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded, self.ids, self.texts, self.images = [], set(), [], 0
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loaded += [attributes[name] for name in ("src", "href") if attributes.get(name)]
        self.images += tag == "img"
        if "id" in attributes:
            self.ids.add(attributes["id"])

    def handle_data(self, text):
        self.texts.append(text.strip())


def test_the_page_needs_no_other_file_and_every_link_has_a_target(page):
    found = References(page)
    assert found.images >= 8 * 3 + 8 * 9 and page.stat().st_size < 10e6
    links = {target for target in found.loaded if target.startswith("#")}
    assert {target[1:] for target in links} <= found.ids
    assert all(target.startswith(("data:", "#")) for target in found.loaded)


def test_the_page_states_scores_hardware_verdict_and_unreadable_images(page):
    text = " ".join(References(page).texts)
    for expected in (
        "50.0 %",
        "60.0 %",
        "Compute-bound: 99 % of the time.",
        "a test",
        "1 unreadable images",
        "truncated",
    ):
        assert expected in text


def test_unreadable_images_are_left_out_or_replaced(data, tmp_path):
    """The first training image is among the few whose views are shown."""
    shards = shutil.copytree(data, tmp_path / "shards")
    first = np.load(shards / "train" / "train-000000.index.npy")[0]
    with open(shards / "train" / "train-000000.tar", "r+b") as tar:
        tar.seek(int(first["offset"]))
        tar.write(bytes(int(first["size"])))
    write_report([make_run(tmp_path / "run", shards)], page := tmp_path / "report.html", CPU)
    assert References(page).images > 20


def test_two_runs_are_compared(comparison):
    text = " ".join(References(comparison).texts)
    assert "2 runs compared" in text and text.index("seed") < text.index("optim.lr")  # what differs comes first


def test_the_confusion_matrix_counts_labeled_images():
    label, predicted = torch.tensor([0, 1, 1, -1]), torch.tensor([0, 1, 0, 2])
    counts, classes = count_pairs(label, predicted, ["ant", "bee", "cat"])
    assert counts.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]] and classes == ["ant", "bee", "cat"]


def test_the_confusion_matrix_of_many_classes_has_those_that_occur():
    names = [f"class {i}" for i in range(30_000)]
    counts, classes = count_pairs(torch.tensor([7, 29_999, -1]), torch.tensor([3, 29_999, 5]), names)
    assert counts.tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1]] and classes == ["class 3", "class 7", "class 29999"]


def test_the_classes_of_a_teacher_are_not_confused_with_those_of_other_images(data, tmp_path):
    shards, views = open_shards(str(data / "test")), AugmentConfig(size=32).for_images(RGB8, {})
    options = {"augment": views, "config": LoaderConfig(), "batch_size": 8, "device": CPU}
    batches = functools.partial(center_crop_batches, **options)
    split = embed_split(torch.nn.Flatten(), shards, np.arange(4), batches)
    classifier, found = create_classifier(create_encoder(SPEC), None, 0, 64, 10), []
    for classes in ([f"other {n}" for n in range(10)], list(shards.classes)):
        save_classifier(classifier, SPEC, classes, tmp_path / "model.safetensors")
        found.append(predictions(tmp_path, split, split, batches, CPU)[1])
    assert found == ["", "the trained classifier"]


def test_data_without_labels_gives_everything_that_needs_none(data, tmp_path):
    shutil.copytree(data, tmp_path / "shards")
    for split in ("train", "test"):
        remove_labels(tmp_path / "shards" / split)
    run = make_run(tmp_path / "run", tmp_path / "shards")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_report([run], run / "report.html", CPU)
    found = References(run / "report.html")
    assert "confusion-0" not in found.ids and {"map-0", "neighbors-0", "views-0"} <= found.ids
    assert not {"✓", "✗"} & set("".join(found.texts))
    assert "no labeled test split" in " ".join(found.texts)


def test_data_without_a_test_split_shows_no_image_as_its_own_neighbor(data, tmp_path):
    run = make_run(tmp_path / "run", data / "train")
    write_report([run], run / "report.html", CPU)
    drawn = re.findall(r'<div class="neighbors">(.*?)</div>', (run / "report.html").read_text(), re.DOTALL)
    assert len(drawn) == 8
    for line in drawn:
        query, *found = re.findall(r'src="([^"]+)"', line)
        assert len(found) == 8 and query not in found


@pytest.fixture
def pretrain():
    """pretrain(*options) in this process."""
    threads = torch.get_num_threads()

    def run(*options):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            train.pretrain(parse(PRETRAIN, [*map(str, options), *SHORT], prog="train.py"))
        finally:
            run_lock.release_all()

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def test_a_run_ends_by_naming_its_report(pretrain, data, tmp_path, capsys):
    pretrain("--data", data, "--out", tmp_path / "run")
    printed = "".join(capsys.readouterr().out.split())
    assert printed.endswith(f"report:{tmp_path}/run/report.html")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images_per_s"] > 0 and summary["hardware"]["processes"] == 1
    text = " ".join(References(tmp_path / "run" / "report.html").texts)
    assert summary["sentences"][-1] in text and f"torch {summary['versions']['torch']}" in text


def test_a_report_that_fails_does_not_fail_the_run(pretrain, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)  # as if Bokeh were not installed
    pretrain("--data", data, "--out", tmp_path / "run")
    assert "There is no report: The report needs bokeh" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run" / "encoder.safetensors").exists() and not (tmp_path / "run" / "report.html").exists()


def damage(run, name, content):
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "not a run folder"),
        ("config.json", "{", "can't be read"),
        ("config.json", "{}", "written by another version"),
        ("encoder.safetensors", None, "not finished"),
        ("encoder.safetensors", "half", "encoder.safetensors"),
        ("metrics.jsonl", None, "can't be read"),
        ("metrics.jsonl", '{"step": 1, "lo', "can't be read"),
        ("metrics.jsonl", "", "incomplete"),
        ("summary.json", "[", "can't be read"),
    ],
)
def test_a_damaged_run_is_refused_in_one_sentence_and_nothing_is_written(runs, tmp_path, name, content, message):
    run = shutil.copytree(runs[1], tmp_path / "run")
    damage(run, name, content)
    with pytest.raises(UserError, match=message) as refused:
        write_report([run], tmp_path / "page" / "report.html", CPU)
    assert "\n" not in str(refused.value) and not (tmp_path / "page").exists()


def test_options_of_another_version_are_refused(runs, tmp_path):
    run = shutil.copytree(runs[1], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["views"]["swirl_p"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="another version"):
        write_report([run], tmp_path / "report.html", CPU)


@pytest.mark.parametrize(("change", "message"), [({"labels": {}}, "stage"), ({"data": "elsewhere"}, "data")])
def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, change, message):
    run = shutil.copytree(runs[1], tmp_path / "run")
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | change))
    with pytest.raises(UserError, match=f"can't be compared: the {message}"):
        write_report([runs[0], run], tmp_path / "report.html", CPU)


def test_a_place_that_cannot_be_written_is_refused(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write_report(runs[:1], tmp_path / "file" / "report.html", CPU)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*switches, "--disable-sync"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, page, **options):
    """The page in a new window, after it was drawn; every message that is not information fails."""
    context, problems = browser.new_context(**options), []
    tab = context.new_page()
    tab.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", state="attached")
    tab.wait_for_selector(".bk-Figure canvas", state="attached")
    yield tab
    context.close()
    assert problems == []


def test_a_browser_draws_every_figure_and_picture_without_errors(browser, page):
    with opened(browser, page, viewport={"width": 1280, "height": 900}) as tab:
        assert tab.locator(".bk-Figure").count() == 9  # seven curves, the map, the confusion matrix
        assert tab.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


@pytest.mark.parametrize("name", ["page", "comparison"])
def test_the_page_fits_a_phone(browser, name, request):
    size = {"width": 360, "height": 740}
    with opened(browser, request.getfixturevalue(name), viewport=size, is_mobile=True) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.locator(".bk-Figure").first.bounding_box()["width"] <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark_mode(browser, page, scheme):
    def brightness(color):
        levels = [int(level) for level in color[color.index("(") + 1 : -1].split(",")[:3]]
        return sum(levels) / 765

    with opened(browser, page, color_scheme=scheme) as tab:
        paper, ink = tab.evaluate(
            "(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))"
        )
        title = tab.evaluate("[...Bokeh.documents[0].all_models].find((model) => model.type === 'Title').text_color")
        ink_of_page = tab.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()")
    assert abs(brightness(paper) - brightness(ink)) > 0.7 and title == ink_of_page
    assert (brightness(paper) < 0.5) == (scheme == "dark")


def test_the_map_shows_pictures_on_hovering_and_by_keyboard(browser, page):
    with opened(browser, page, viewport={"width": 1280, "height": 900}) as tab:
        place = tab.locator("[data-map]")
        place.scroll_into_view_if_needed()
        place.focus()
        tab.keyboard.press("ArrowRight")
        first = tab.locator(".chosen img").get_attribute("src")
        tab.keyboard.press("ArrowRight")
        second = tab.locator(".chosen img").get_attribute("src")
        assert first.startswith("data:image/webp") and second.startswith("data:image/webp") and first != second
        spot = tab.evaluate(
            """() => {
                const root = document.querySelector("[data-map] [data-root-id]").dataset.rootId;
                const view = Bokeh.index.get_by_id(root);
                const {data} = view.model.renderers[0].data_source;
                const box = view.el.getBoundingClientRect(), frame = view.frame;
                const inner = view.frame.bbox;
                return [box.left + frame.x_scale.compute(data.x[3]), box.top + frame.y_scale.compute(data.y[3])];
            }"""
        )
        tab.mouse.move(*spot)
        tab.wait_for_selector(".bk-Tooltip img", state="attached")


def test_everything_is_reached_by_tabulator(browser, page):
    with opened(browser, page) as tab:
        reached = set()
        for _ in range(80):  # the tools of the figures are stops, too
            tab.keyboard.press("Tab")
            element = "document.activeElement"
            reached.add(tab.evaluate(f"{element}.getAttribute('aria-label') || {element}.tagName"))
    assert {"A", "SUMMARY"} <= reached
    assert all(any(kind in name for name in reached) for kind in ("Nearest neighbors", "Map of the embedding"))
