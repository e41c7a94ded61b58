"""Validation on a GPU in four parts of under ten minutes each; `make gpu` runs each in a process of its own.

    python -m bench.gpu correctness     loss, optimizers, host waits, resumption, image files, two ranks
    python -m bench.gpu loss            speed of the loss next to the roofline, sweep of tiles and registers
    python -m bench.gpu step            speed, memory and bottleneck of the training step; profiler trace
    python -m bench.gpu dali            views of DALI and the other backends: accuracy, rate, memory, overlap
    python -m bench.gpu all             every part
    python -m bench.gpu all --device cpu --small      dry run without a GPU, in Triton's interpreter

Needs torch, Triton, timm, accelerate and NumPy; a check whose other packages are missing is skipped and says so. Writes
gpu_*.csv, gpu_summary.md and gpu_trace.json.gz to --out; rows there of other parts, and of checks that do not run, are
kept. Exits with 1 if a check fails. `python -m bench.gpu.tables` fills the tables of the documents from bench/results.
"""

import argparse
import faulthandler
import importlib
import os
import sys
import tempfile
from pathlib import Path

PARTS = ("correctness", "loss", "step", "dali")
RESULTS = Path(__file__).parents[1] / "results"  # importing bench.harness would import torch too early


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"], metavar="PART", help=f"{', '.join(PARTS)} or all")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: dry run (default: cuda)")
    parser.add_argument("--small", action="store_true", help="small sizes")
    parser.add_argument("--seconds", type=float, default=540, help="time of each part (default: 540)")
    parser.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="only these checks of the parts")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results; runs/dry-run on a CPU)")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.out and options.out.resolve() == RESULTS:
        sys.exit("The documents show what is in bench/results as measured on a GPU; use another --out for a dry run.")
    if options.device == "cpu":  # read when torch, Triton and Accelerate are imported
        os.environ |= {"TRITON_INTERPRET": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Run the chosen parts; returns the exit code."""
    import torch

    from bench.gpu.checks import Report, Setup, run_part
    from bench.gpu.tables import write_summary

    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no NVIDIA GPU; use --device cpu --small for a dry run.")
    out = options.out or (RESULTS if options.device == "cuda" else Path("runs/dry-run"))
    parts = {
        part: importlib.import_module(f"bench.gpu.{MODULES[part]}").CHECKS
        for part in PARTS
        if part in options.parts or "all" in options.parts
    }
    known = [check.name for checks in parts.values() for check in checks]
    if unknown := set(options.only) - set(known):
        sys.exit(f"There is no check {min(unknown)!r} in these parts; use {', '.join(known)}.")
    failed = []
    for part, checks in parts.items():
        checks = [check for check in checks if not options.only or check.name in options.only]
        print(f"{part}, at most {options.seconds:.0f} s:", flush=True)
        faulthandler.dump_traceback_later(options.seconds + 300, exit=True)  # a deadlock must not take the machine
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            setup = Setup(device, options.small, Path(scratch), out)
            if not run_part(checks, setup, Report(part, device, out), options.seconds):
                failed.append(part)
        faulthandler.cancel_dump_traceback_later()
    print(f"written: {write_summary(out)}")
    print(f"failed: {', '.join(failed)}" if failed else "no check failed")
    return bool(failed)


MODULES = {"correctness": "correctness", "loss": "loss_speed", "step": "step_speed", "dali": "views"}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
