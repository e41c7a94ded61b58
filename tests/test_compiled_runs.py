"""`--compile` compiles once, not in every step: torch's counters over whole runs, with evaluations and checkpoints.

The counters are those of torch's tracer, so the cheapest backend is enough.
"""

import os
import time
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

import finetune
import train
from engine import run_lock, session
from presets import FINETUNE, PRETRAIN, parse
from tests.ranks import run_ranks
from tests.small_sets import texture_shards

COMMON = "--preset textures --encoder.name test_resnet --encoder.width 1 --precision fp32 --batch-size 16 --epochs 2"
COMMON += " --checkpoint.every-steps 2 --no-report --trackers none --compile"
STAGES = {
    "slices": (train.pretrain, PRETRAIN, "--eval.no-baselines --eval.knn-every 1 --micro-batch 3"),
    "sizes": (train.pretrain, PRETRAIN, "--batch-size 48 --epochs 4 --views.size-schedule 16:1 24:1"),
    "finetune": (finetune.finetune, FINETUNE, "--labels.fraction 1 --validate-every 1"),
}


class Counts:
    """Instruments that count compiled graphs before each batch, and whose marks cannot be traced."""

    def __init__(self):
        self.graphs = []

    def mark(self, part):
        time.perf_counter()

    def batches(self, loader):
        for batch in loader:
            self.graphs.append(counters["stats"]["unique_graphs"])
            yield batch


def graphs_before_each_step(name, data, out):
    stage, presets, options = STAGES[name]
    stage(parse(presets, f"{COMMON} {options} --data {data} --out {out}".split(), prog=name), instruments := Counts())
    assert not counters["graph_break"]
    return instruments.graphs


@pytest.fixture
def data(tmp_path, monkeypatch):
    """48 train and 20 test textures, of which runs in this process make six steps with the cheapest backend."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(session, "available_cores", torch.get_num_threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    counters.clear()
    yield texture_shards(tmp_path / "data", train=48, test=20)
    run_lock.release_all()
    torch.compiler.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_evaluation_of_the_compiled_network_compiles_once(data, tmp_path):
    """Evaluations follow steps 3 and 6; training after the first one is not compiled again."""
    assert graphs_before_each_step("finetune", data, tmp_path / "run") == [0, 1, 1, 2, 2, 2]


def test_every_size_of_views_is_compiled_once(data, tmp_path):
    """By itself, not for any size, and beyond torch's limit of graphs."""
    with torch._dynamo.config.patch(recompile_limit=2):
        assert graphs_before_each_step("sizes", data, tmp_path / "run") == [0, 1, 2, 3]


def slices_on_a_rank(rank, world_size, data, out):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "ACCELERATE_USE_CPU": "true"}
    torch.compile = partial(torch.compile, backend="eager")
    return graphs_before_each_step("slices", data, out)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_caching_compiles_in_the_first_step_only(data, tmp_path, ranks):
    """Slices of two sizes need two graphs without gradients, of which the second takes any size, and one with them."""
    assert run_ranks(ranks, tmp_path, slices_on_a_rank, data, tmp_path / "run") == [[0, 3, 3, 3, 3, 3]] * ranks
