"""Two ranks issue the same collectives in the same order, in every stage, under TORCH_DISTRIBUTED_DEBUG=DETAIL.

torch then compares operation, shape and dtype of every collective over the ranks before it starts.
"""

import json

import pytest
import torch.distributed as dist

import distill
import finetune
import loss.ntxent
import train
from engine import run_lock
from presets import DISTILL, FINETUNE, PRETRAIN, parse
from tests.ranks import run_ranks
from tests.small_sets import texture_shards

COMMON = "--encoder.name test_resnet --encoder.width 1 --precision fp32 --batch-size 16 --epochs 2 --log-every 2"
COMMON += " --checkpoint.every-steps 3 --preset textures"
STAGES = {  # two steps, a metrics row and a validation per epoch, and a checkpoint after three steps
    "train": (train.pretrain, PRETRAIN, "--eval.no-baselines --eval.knn-every 1"),
    "slices": (train.pretrain, PRETRAIN, "--eval.no-baselines --eval.knn-every 1 --micro-batch 4"),
    "finetune": (finetune.finetune, FINETUNE, "--labels.fraction 1 --validate-every 1"),
    "distill": (distill.distill, DISTILL, "--labels.fraction 0.5 --labeled-share 0.5 --validate-every 1 --teacher OUT"),
}


def run_stage(name, data, folder, out):
    stage, presets, options = STAGES[name]
    arguments = f"--data {data} {COMMON} {options.replace('OUT', f'{folder}/finetune')} --out {folder}/{out}"
    try:
        stage(parse(presets, arguments.split(), prog=name))
    finally:
        run_lock.release_all()


def run_every_stage(rank, world_size, data, folder):
    """Body of a rank; returns the error of a run in which the other rank omits a collective."""
    dist.Logger.set_construction_data_and_log = lambda *_: None  # torch 2.14 crashes in it under DETAIL with gloo
    for name in STAGES:
        run_stage(name, data, folder, name)
    if rank == 1:
        loss.ntxent.distributed.check_equal_calls = lambda *_: None
    with pytest.raises(RuntimeError) as error:
        run_stage("train", data, folder, "mismatch")
    return str(error.value)


def test_ranks_issue_the_same_collectives(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    data = texture_shards(tmp_path / "data", train=32, test=20)
    errors = run_ranks(2, tmp_path, run_every_stage, data, tmp_path)
    for name in STAGES:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "step_ms" in row] == [2, 4]
    for error in errors:
        assert "Detected mismatch between collectives on ranks" in error and "TensorShape=[1, 7]" in error
