"""README.md and docs/: every command is executed, or read by its program's parser, or marked with what it needs."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import tyro
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState

import evaluate
import export
import presets
from auto_preset import Facts
from bench.harness import read_rows
from common import UserError
from options import parse_options
from pipeline.augment.__main__ import PreviewConfig
from pipeline.convert import textures
from pipeline.images.pixel_format import RGB8
from presets import DISTILL, FINETUNE, PRETRAIN

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = ROOT / "docs" / "quickstart.md"
NEEDS = {"GPU", "network", "data set", "minutes", "Slurm"}
"""What `<!-- needs: ... -->` before a block may say; its commands are not executed."""
EXECUTED = {
    "evaluate.py": "evaluate",
    "export.py": "export",
    "pipeline.augment": "pipeline.augment.__main__",
    "pipeline.shards": "pipeline.shards.__main__",
}
"""Programs whose commands are executed, with their modules."""
SHELL = ("", "bash")


class Block(NamedTuple):
    """Fenced block of a page."""

    place: str  # page:line
    language: str
    needs: str  # "" unless it is marked
    text: str

    def commands(self) -> list[str]:
        """One command per element, without comments and continuation lines."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    found, needs, place, language, lines = [], "", "", "", []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        text = line.strip()
        if place and text == "```":
            found.append(Block(place, language, needs, textwrap.dedent("\n".join(lines))))
            needs, place, lines = "", "", []
        elif place:
            lines.append(line)
        elif text.startswith("```"):
            place, language = f"{page.name}:{number}", text[3:]
        elif text:
            marker = re.fullmatch("<!-- needs: (.+) -->", text)
            needs = marker[1] if marker else ""
    assert not place, f"{place} does not end"
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def test_blocks_are_found():
    assert any(block.needs == "network" and "make demo" in block.text for block in ALL)
    assert any(block.place.startswith("README.md") and "evaluate.py linear" in block.text for block in ALL)


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.place)
def test_blocks_have_a_known_language_and_marker(block):
    assert block.language in (*SHELL, "python", "text") and block.needs in ("", *NEEDS)


class OptionsRead(Exception):
    """Raised in place of what a program does after reading its options."""


def read_with_argparse(module: str, arguments: list[str]) -> None:
    """Start a program that uses argparse, up to the point where its options are read."""
    parse_known_args = argparse.ArgumentParser.parse_known_args  # parse_args and subcommands call it, too
    inner = False

    def stop(parser, *args, **options):
        nonlocal inner
        if inner:
            return parse_known_args(parser, *args, **options)
        inner = True
        _, unknown = parse_known_args(parser, *args, **options)
        if unknown:
            parser.error(f"unrecognized arguments: {unknown}")
        raise OptionsRead

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OptionsRead):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [module, *arguments])
        runpy.run_module(module, run_name="__main__")


PARSERS = {
    "train.py": partial(presets.parse, PRETRAIN, prog="train.py"),
    "finetune.py": partial(presets.parse, FINETUNE, prog="finetune.py"),
    "distill.py": partial(presets.parse, DISTILL, prog="distill.py"),
    "evaluate.py": evaluate.parse,
    "export.py": partial(parse_options, export.ExportConfig(), prog="export.py"),
    "pipeline.augment": lambda arguments: tyro.extras.subcommand_cli_from_dict(
        {"preview": PreviewConfig}, args=arguments
    ),
    "pipeline.convert": partial(read_with_argparse, "pipeline.convert"),
    "pipeline.shards": partial(read_with_argparse, "pipeline.shards"),
}


def program(command: str) -> tuple[str, list[str]]:
    """Program of a command, without its launcher, and the program's arguments."""
    words = shlex.split(re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", command), comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:3] == ["srun", "bash", "-c"]:
        return program(words[3])
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if words[0] == "python":
        words = words[2:] if words[1] == "-m" else words[1:]
    return words[0], words[1:]


def is_read(command: str) -> bool:
    """Read a command with the parser of its program, which raises if it can't; False for programs without one here."""
    name, arguments = program(command)
    if name == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        return False
    module = name.removesuffix(".py").replace("/", ".")
    if module.startswith("bench."):
        path = ROOT / module.replace(".", "/")
        if "parse_args" not in (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text():
            return False
        read_with_argparse(module, arguments)
    elif name in PARSERS:
        with contextlib.suppress(SystemExit) if "--help" in arguments else contextlib.nullcontext():
            PARSERS[name](arguments)
    else:
        return False
    return True


@pytest.fixture(scope="module")
def earlier_runs(tmp_path_factory):
    """Folder with the runs that later stages start from, as far as their options need them."""
    folder = tmp_path_factory.mktemp("runs")
    imagenet = presets.imagenet()
    options = dataclasses.replace(imagenet, data="IMAGENET", views=imagenet.views.for_images(RGB8, {}))
    for name in ("PRETRAINED", "TUNED", "RUN"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(dataclasses.asdict(options)))
    return folder


def unexplained(page: Path) -> list[str]:
    """Commands that are neither read by their program's parser nor marked; an invalid one raises."""
    found = [(block, command) for block in blocks(page) if block.language in SHELL for command in block.commands()]
    return [f"{block.place}: {command}" for block, command in found if not is_read(command) and not block.needs]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_valid_or_marked(page, earlier_runs, monkeypatch, capsys):
    monkeypatch.chdir(earlier_runs)
    photos = Facts(
        images=5000, side_px=96, megapixels=0.01, labeled=5000, classes=10, device="cpu", memory_gb=16, bf16=False
    )
    monkeypatch.setattr(presets, "read_facts", lambda config: photos)  # the preset "auto" would open the data
    assert unexplained(page) == []


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch train.py --optim.lrr 1",
        "accelerate launch --num_processess 2 train.py",
        "python -m pipeline.convert folder PHOTOS",
        "python evaluate.py knn",
        "make nothing",
    ],
)
def test_an_invalid_command_is_noticed(command, capsys):
    with pytest.raises((UserError, SystemExit, AssertionError)):
        is_read(command)


def test_an_unknown_command_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    marked = "<!-- needs: network -->\n\n```bash\nmake demo\n```\n"
    page.write_text(f"```\ncargo build  # a comment\n```\n\n{marked}\n```\nmake \\\n  demo\n```\n")
    assert unexplained(page) == ["page.md:1: cargo build  # a comment", "page.md:11: make    demo"]


@pytest.mark.parametrize(
    "block",
    [block for block in ALL if block.language == "python" and not block.place.startswith(QUICKSTART.name)],
    ids=lambda block: block.place,
)
def test_python_of_the_pages_runs(block):
    exec(block.text, {"z": torch.randn(16, 8)})


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with a folder of photographs in it, and how `type_in` executes what a user types there."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "data", "site"):
            (folder / path.name).symlink_to(path)
    for split, count in {"train": 40, "test": 20}.items():
        for number in range(count):
            photo = folder / "photos" / split / textures.CLASSES[number % 10] / f"{number}.jpg"
            photo.parent.mkdir(parents=True, exist_ok=True)
            photo.write_bytes(textures.render(0, split, number))
    programs = folder / ".venv" / "bin"  # those of the activated environment
    programs.mkdir(parents=True)
    for name, arguments in {"python": "", "accelerate": "-m accelerate.commands.accelerate_cli"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    return folder


def type_in(folder: Path, chosen: list[Block]) -> str:
    """Execute blocks one after the other; returns what they printed."""
    environment = os.environ | {
        "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "STREAMCLR_CACHE": str(folder / ".cache"),
        "COLUMNS": "200",
    }
    printed = ""
    for block in chosen:
        command = ["bash", "-e", "-c", block.text] if block.language in SHELL else [sys.executable, "-c", block.text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.place}: {done.stderr}"
        printed += done.stdout
    return printed


@pytest.fixture(scope="module")
def quickstart(checkout):
    """Folder after the quickstart, and what it printed."""
    typed = [block for block in blocks(QUICKSTART) if block.language != "text" and not block.needs]
    return checkout, type_in(checkout, typed)


def test_the_quickstart_works_as_typed(quickstart):
    folder, printed = quickstart
    assert "40 images of 10 classes" in printed and "20 images of 10 classes" in printed
    assert "kNN" in printed and "most similar to photos/test/" in printed
    for name in ("views.png", "encoder.safetensors", "runs/photos/report.html", "runs/photos/evaluation/knn.json"):
        assert (folder / name).is_file()


@pytest.mark.soak
def test_the_long_steps_of_the_quickstart_work(checkout):
    printed = type_in(checkout, [block for block in blocks(QUICKSTART) if block.needs == "minutes"])
    assert "trained" in printed and (checkout / "runs" / "demo" / "report.html").is_file()


STAND_INS = {"RUN": "runs/photos", "runs/cifar": "runs/photos", "SHARDS": "shards", "FOLDER_OR_URL": "shards/train"}
STAND_INS |= {"200": "30"}  # neighbors, of 40 images
FASTER = {"linear": ["--max-iterations", "10"]}


def on_stand_ins(command: str) -> tuple[str, ...]:
    """Program and arguments of a command, on what the quickstart made."""
    name, arguments = program(command)
    return name, *(STAND_INS.get(word, word) for word in arguments), *FASTER.get(arguments[0], ())


COMMANDS = {  # each once
    on_stand_ins(command): block.place
    for block in ALL
    if block.language in SHELL and not block.needs and not block.place.startswith(QUICKSTART.name)
    for command in block.commands()
    if command.startswith("python ")
    and program(command)[0] in EXECUTED
    and "evaluate.py report" not in command  # every run of the quickstart ends with one; see test_report.py
}


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join((at, *words))) for words, at in COMMANDS.items()])
def test_commands_on_runs_and_shards_work(words, quickstart, tmp_path, monkeypatch, capsys):
    """In this process and in a folder with runs and shards of the quickstart."""
    for shared in ("runs", "shards"):
        shutil.copytree(quickstart[0] / shared, tmp_path / shared)
    if words[0] == "evaluate.py" and "encoder.safetensors" in words:
        (tmp_path / "encoder.safetensors").symlink_to("runs/photos/encoder.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMCLR_CACHE", str(quickstart[0] / ".cache"))
    monkeypatch.setattr(sys, "argv", list(words))
    threads = torch.get_num_threads()
    try:
        importlib.import_module(EXECUTED[words[0]]).main()
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)
    assert capsys.readouterr().out


class Links(HTMLParser):
    """What a page loads, where it links to, and its anchors."""

    def __init__(self, page: Path):
        super().__init__()
        self.loads, self.links, self.anchors = [], [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a":
            self.links.append(attributes.get("href") or "")
        else:
            self.loads += [attributes[name] for name in ("src", "href", "srcset") if attributes.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="The site needs mkdocs-material and mkdocstrings.")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {page: Links(page) for page in out.rglob("*.html") if page.name != "404.html"}  # its links are absolute


def test_the_site_loads_nothing_from_other_hosts(site):
    assert len(site) > 15
    for page, found in site.items():
        assert not [place for place in found.loads if "//" in place], page
    (some,) = (page for page in site if page.name == "index.html")
    for style in (some.parent / "assets").rglob("*.css"):
        assert not re.search(r"url\(\W?(https?:)?//|@import", style.read_text()), style


def test_every_link_of_the_site_has_a_target(site):
    for page, found in site.items():
        for link in (*found.links, *found.loads):
            if link.startswith(("http", "mailto:", "data:")):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.name}: {link}"
            assert not anchor or anchor in site[target].anchors or anchor == "__codelineno", f"{page.name}: {link}"


def test_the_reference_shows_docstrings(site):
    (loss,) = (page for page in site if page.parts[-2:] == ("api", "loss.html"))
    assert "loss.nt_xent" in site[loss].anchors and "arXiv 2002.05709" in loss.read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_in_the_checkout_have_targets(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).is_file(), link
        if anchor:
            titles = re.findall("^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", ["report-desktop", "report-phone", "report-dark"])
def test_screenshots_are_small(name):
    assert (ROOT / "docs" / f"{name}.webp").stat().st_size < 300_000


def test_the_readme_quotes_the_rows_of_the_demonstration():
    rows = read_rows("demo")
    page = (ROOT / "README.md").read_text()
    for row in rows:
        assert f"| {float(row['knn_top1']):.3f} | {float(row['linear_top1']):.3f} |" in page
    assert f"took {float(rows[0]['wall_s']):.0f} s at {float(rows[0]['images_per_s']):,.0f} images/s" in page
