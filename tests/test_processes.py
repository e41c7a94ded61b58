"""Several processes: four equal one, and a failure of one that `accelerate launch` started ends all of them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import finetune
import train
from common import UserError
from engine import run_lock
from engine.processes import ending_together
from presets import FINETUNE, PRETRAIN, parse
from tests.ranks import run_ranks
from tests.small_sets import texture_shards

ROOT = Path(__file__).parents[1]
OPTIONS = [
    "--preset",
    "textures",
    "--no-report",
    "--encoder.width",
    "0.125",
    "--encoder.stem",
    "small",
    "--head.hidden",
    "32",
    "--head.out",
    "16",
]
OPTIONS += ["--batch-size", "16", "--epochs", "1", "--log-every", "1", "--precision", "fp32"]
OPTIONS += ["--loss.temperature", "0.5", "--loss.queue", "50"]
OPTIONS += ["--optim.name", "sgd", "--optim.lr", "0.02", "--eval.no-baselines", "--no-report"]
# with seed 0, an activation within rounding of zero takes another side of its ReLU in the third step
OPTIONS += ["--seed", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 textures of ten classes, as shards of a train split only."""
    return texture_shards(tmp_path_factory.mktemp("data"), train=64)


def launch(processes, script, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--main_process_port", "0", script, *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "COLUMNS": "400", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


def pretrain_in_rank(rank, world_size, *arguments):
    """Body of a rank that is a fork, which starts faster than by the launcher."""
    train.pretrain(parse(PRETRAIN, list(map(str, arguments)), prog="train.py"))


def finetune_in_rank(rank, world_size, *arguments):
    finetune.finetune(parse(FINETUNE, list(map(str, arguments)), prog="finetune.py"))


def pretrain_until_a_signal(rank, world_size, *arguments):
    """The last of the ranks gets SIGTERM in its second step; returns the number of steps taken."""
    nt_xent, steps = train.nt_xent_and_append, []

    def signaled(*args, **options):
        steps.append(1)
        if len(steps) == 2 and rank == world_size - 1:
            signal.raise_signal(signal.SIGTERM)
        return nt_xent(*args, **options)

    train.nt_xent_and_append = signaled  # of this process alone
    pretrain_in_rank(rank, world_size, *arguments)
    return len(steps)


def losses(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_four_processes_equal_one(data, tmp_path):
    """Four steps with SGD, which does not magnify rounding as AdamW does: see the test of two ranks."""
    alone = subprocess.run(
        list(map(str, [sys.executable, ROOT / "train.py", "--data", data, "--out", tmp_path / "one", *OPTIONS])),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert alone.returncode == 0, alone.stderr
    often = ["--checkpoint.every-steps", "1", "--checkpoint.keep", "4"]
    run_ranks(4, tmp_path, pretrain_in_rank, "--data", data, "--out", tmp_path / "four", *OPTIONS, *often)
    summary = json.loads((tmp_path / "four" / "summary.json").read_text())
    assert summary["hardware"]["processes"] == 4 and "-bound: " in summary["sentences"][1]
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert len(one) == 4 and four == pytest.approx(one, abs=1e-5)
    before, after = (
        load_file(tmp_path / "four" / "checkpoints" / f"step-{step:08d}" / "state.safetensors") for step in (2, 4)
    )
    moved = [
        (after[name] - before[name]).abs().max().item()
        for name in before
        if "/encoder." in name and name.endswith("weight")
    ]
    assert max(moved) > 1e-3, "the comparison would prove nothing with frozen weights"


def test_two_processes_fine_tune_like_one(data, tmp_path):
    options = ["--preset", "textures", "--no-report", "--encoder.width", "0.125", "--encoder.stem", "small"]
    options += ["--batch-size", "16", "--epochs", "1", "--log-every", "1", "--precision", "fp32", "--seed", "1"]
    options += ["--labels.fraction", "1", "--optim.name", "sgd", "--optim.lr", "0.02", "--data", data]
    for processes in (1, 2):
        folder = tmp_path / f"{processes}"
        folder.mkdir()
        run_ranks(processes, folder, finetune_in_rank, *options, "--out", folder / "run")
    one, two = losses(tmp_path / "1" / "run"), losses(tmp_path / "2" / "run")
    assert len(one) == 4 and two == pytest.approx(one, abs=1e-5) and max(one) - min(one) > 1e-3
    one, two = (load_file(tmp_path / f"{n}" / "run" / "model.safetensors") for n in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def test_a_signal_to_one_process_stops_all_after_saving(data, tmp_path):
    options = ["--data", data, "--out", tmp_path / "run", *OPTIONS]
    assert run_ranks(2, tmp_path, pretrain_until_a_signal, *options) == [2, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "run" / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("raise UserError('The third step of this process fails; fix it.')", "error: The third step of this"),
        ("raise IndexError('a bug in the program')", "IndexError: a bug in the program"),
        ("os.kill(os.getpid(), 9)", "error: Another process ended"),
    ],
    ids=["user error", "bug", "kill"],
)
def test_failure_of_one_process_ends_all_with_its_message(data, tmp_path, failure, message):
    script = tmp_path / "fails.py"
    script.write_text(
        textwrap.dedent(f"""
        import os
        import train
        from common import UserError

        nt_xent, steps = train.nt_xent_and_append, []

        def failing(*arguments, **options):
            steps.append(1)
            if len(steps) == 3 and os.environ["RANK"] == "1":
                {failure}
            return nt_xent(*arguments, **options)

        train.nt_xent_and_append = failing
        train.main()
        """)
    )
    started = time.monotonic()
    done = launch(2, script, "--data", data, "--out", tmp_path / "run", *OPTIONS)
    assert done.returncode != 0 and time.monotonic() - started < 120, "no process waits for one that has ended"
    assert message in done.stderr
    assert "gloo" not in done.stderr, "errors that follow in other processes are not shown"
    assert not (tmp_path / "run" / "encoder.safetensors").exists()


@pytest.mark.parametrize("fails", ["all", "1"])
def test_an_error_before_the_process_group_exists_is_shown_once(tmp_path, fails):
    script = tmp_path / "fails.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, time
        from common import UserError
        from engine.processes import ending_together

        with ending_together():
            if {fails!r} in ("all", os.environ["LOCAL_RANK"]):
                raise UserError("No room; free some space.")
            time.sleep(300)
        """)
    )
    done = launch(2, script)
    assert done.returncode != 0 and done.stderr.count("error: No room; free some space.") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
        MemoryError("Unable to allocate 9 GiB for an array"),
        # NCCL allocates its buffers itself; texts of ProcessGroupNCCL.cpp and of NCCL
        dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:3763, unhandled cuda error (run with NCCL_DEBUG=INFO for details), "
            "NCCL version 2.28.8\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 "
            "'out of memory'"
        ),
    ],
)
def test_out_of_memory_ends_with_one_sentence(error):
    message = r"^error: Out of memory \(.*\); use a smaller batch or encoder.*\.$"
    with pytest.raises(SystemExit, match=message), ending_together():
        raise error


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="size"), ending_together():
        torch.zeros(2) @ torch.zeros(3)


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:3763, remote process exited or there was a network error, NCCL "
            "version 2.28.8\nncclRemoteError: A call failed possibly due to a network error or a remote process "
            "exiting prematurely.\nLast error:\nsocketProgressOpt: Call to recv from 10.0.0.1<33759> failed : Reset"
        ),
        dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\nncclInternalError: "
            "Internal check failed.\nLast error:\nNet : Connection closed by remote peer host<50260>"
        ),
        dist.DistBackendError("NCCL communicator was aborted on rank 1. "),
        dist.DistBackendError(
            "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for "
            "7200010 milliseconds before timing out."
        ),
        dist.DistBackendError(
            "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key "
            "'0', but store->get('0') got error: Connection reset by peer"
        ),
        dist.DistNetworkError("The client socket has failed to connect to any network address of (node0, 29500)."),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3521"),
    ],
)
def test_errors_that_follow_from_the_end_of_another_process(error):
    with pytest.raises(SystemExit, match=r"^error: Another process ended .*see its log\.$"), ending_together():
        raise error


def test_other_errors_of_nccl_keep_their_traceback():
    error = dist.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:77, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version "
        "2.28.8\nLast error:\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000"
    )
    with pytest.raises(dist.DistBackendError), ending_together():
        raise error


def test_run_folder_is_unlocked_however_a_script_ends(tmp_path):
    for error in (UserError("refused"), KeyboardInterrupt()):
        with pytest.raises(SystemExit), ending_together():
            run_lock.acquire(tmp_path / "run")
            raise error
        assert not (tmp_path / "run").exists()
