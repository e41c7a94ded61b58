"""The host never waits for the device between two rows of metrics: the scripts' own loops on a fake GPU."""

import json
from collections import Counter
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import distill
import engine.session
import finetune
import loss.distributed
import train
from common import UserError
from engine import cuda_graph, run_lock
from engine.session import Session
from engine.trackers import Trackers
from model import EncoderConfig, StartConfig, save_classifier, start_classifier
from pipeline.convert import textures
from pipeline.loader.prefetch import Batch
from presets import DISTILL, FINETUNE, PRETRAIN, parse
from tests.fake_cuda import HostWait, fake_cuda
from tests.small_sets import texture_shards

STEPS, LOG_EVERY = 3, 2
ENCODER = ["--encoder.name", "test_resnet", "--encoder.width", "1"]
STAGES = {
    "train": (train, train.pretrain, PRETRAIN),
    "finetune": (finetune, finetune.finetune, FINETUNE),
    "distill": (distill, distill.distill, DISTILL),
}


class Finished(Exception):
    """The last batch was used."""


class FakeLoader:
    """Batches on the fake device, with the interface of a `ViewLoader`; `waits` watches from the first one on."""

    backend_name, filling = "none", ""

    def __init__(self, waits, shards, views, config, *, batch_size, world_size, views_per_image=2, **_):
        self.waits, self.shards = waits, shards
        self.images, self.views = batch_size // world_size, views_per_image
        self.size, self.sampler = views.size, SimpleNamespace(dropped=0)
        self.bad_samples = SimpleNamespace(replaced=0, check=lambda replaced, epoch: None)

    def __len__(self):
        return 1000  # an epoch does not end within the test: checkpoints and validations may wait

    def __iter__(self):
        for _ in range(STEPS):
            shape = self.views * self.images, 3, self.size, self.size
            views = torch.empty(shape, device="cuda").to(memory_format=torch.channels_last)
            label = torch.zeros(self.images, dtype=torch.int64, device="cuda")
            self.waits.watching, before = True, self.waits.launches
            yield Batch(views, label, torch.arange(self.images))
            self.waits.launched.append(self.waits.launches - before)
        self.waits.watching = False
        raise Finished

    def close(self):
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 textures as shards; there is no test split, so nothing is evaluated."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=80)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """Run folder of a classifier with random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    classifier, spec = start_classifier(StartConfig(), EncoderConfig("test_resnet"), 32, 10)
    save_classifier(classifier, spec, sorted(textures.CLASSES), folder / "model.safetensors")
    config = parse(FINETUNE, ["--preset", "textures", "--data", str(data)], prog="finetune.py")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return folder


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """run("train", *options, ranks=2) a few steps of a stage; returns where the host waited in them, with counts.

    `run.launched` is the number of operations that the host launched in each step of the latest run.
    """

    def run_stage(name, *options, ranks=1):
        script, stage, presets = STAGES[name]
        arguments = ["--preset", "textures", "--data", data, "--out", tmp_path / "run"]
        arguments += ["--batch-size", 16, "--log-every", LOG_EVERY]
        config = parse(presets, list(map(str, [*arguments, *ENCODER, *options])), prog=f"{name}.py")
        AcceleratorState._reset_state(reset_partial_state=True)
        if ranks > 1:
            join_ranks(ranks)
        with fake_cuda(monkeypatch) as waits:
            monkeypatch.setattr(script, "ViewLoader", partial(FakeLoader, waits))
            allow(waits, Session, "mean_of")
            monkeypatch.setattr(Trackers, "draw_views", lambda trackers, step, sheet: sheet.cpu())
            allow(waits, Trackers, "draw_views")  # waits for nothing that `mean_of` has not waited for: adds no count
            allow(waits, loss.distributed, "check_equal_calls")
            with pytest.raises(Finished):
                stage(config)
        run_stage.launched = waits.launched
        return waits.waited

    def join_ranks(ranks):
        dist.init_process_group("fake", rank=0, world_size=ranks, store=dist.HashStore())
        state = PartialState()
        state.num_processes, state.distributed_type = ranks, DistributedType.MULTI_GPU
        monkeypatch.setattr(engine.session, "broadcast_object_list", lambda objects: objects)
        monkeypatch.setattr(Session, "distribute", lambda self, module: module)  # no hooks, so no DDP

    def allow(waits, owner, name):
        function = getattr(owner, name)

        def waiting(*arguments):
            with waits.allow(name):
                return function(*arguments)

        monkeypatch.setattr(owner, name, waiting)

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    # accelerate would move the module a second time, which fake weights do not survive
    monkeypatch.setattr(engine.session, "Accelerator", partial(engine.session.Accelerator, device_placement=False))
    yield run_stage
    run_lock.release_all()
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


ROWS = Counter(mean_of=STEPS // LOG_EVERY)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, "--loss.impl triton --optim.name adamw"),
        (1, "--loss.impl reference --optim.name lars --micro-batch 8"),
        (2, "--loss.impl reference --optim.name sgd"),
        (1, "--loss.impl reference --optim.name muon"),
        (2, "--loss.impl triton --optim.name lars --micro-batch 4"),
        (1, "--loss.impl triton --loss.learn-temperature --loss.decoupled"),
        (2, "--loss.impl triton --loss.learn-temperature --micro-batch 4"),
        (1, "--loss.impl triton --loss.learn-temperature --loss.queue 5000"),
        (2, "--loss.impl triton --loss.queue 40 --micro-batch 4"),
    ],
)
def test_pretraining_waits_once_per_row(run, ranks, options):
    first_call = Counter(check_equal_calls=3 if ranks > 1 else 0)  # of the loss, compared over the ranks
    assert run("train", *options.split(), ranks=ranks) == ROWS + first_call


def test_graphs_leave_little_to_launch(run, monkeypatch):
    """The first step warms up and captures; the capture raises at whatever a graph cannot hold."""
    monkeypatch.setattr(cuda_graph, "WARM_UP_PASSES", 1)
    assert run("train", "--cuda-graph", "--loss.learn-temperature", "--optim.name", "adamw") == ROWS
    assert 3 * run.launched[-1] < run.launched[0]


def test_graphs_of_several_processes_are_refused(run):
    with pytest.raises(UserError, match="--cuda-graph works in one process only"):
        run("train", "--cuda-graph", ranks=2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fine_tuning_waits_once_per_row(run, ranks):
    assert run("finetune", "--labels.fraction", 1, ranks=ranks) == ROWS


@pytest.mark.parametrize("ranks", [1, 2])
def test_distillation_waits_once_per_row(run, teacher, ranks):
    options = ["--teacher", teacher, "--labeled-share", 0.5, "--labels.fraction", 0.5]
    assert run("distill", *options, ranks=ranks) == ROWS


def test_a_wait_in_the_step_is_found(run, monkeypatch):
    nt_xent = train.nt_xent_and_append
    monkeypatch.setattr(
        train, "nt_xent_and_append", lambda z, *rest, **options: nt_xent(z, *rest, **options) / z.norm().item()
    )
    with pytest.raises(HostWait):
        run("train")
