"""SimCLR v2's three stages on the built-in textures, compared with a classifier trained only on the labels.

python -m bench.demo_v2     pretrain, fine-tune on 2 % of the labels, distill; write bench/results/demo_v2.csv
"""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import environment, launch, write_rows

STAGES = {
    "pretrain": ["train.py", "--head.version", "v2", "--eval.no-baselines"],
    "supervised": ["finetune.py"],
    "finetune": ["finetune.py", "--start.run", "pretrain", "--start.from-layer", "1"],
    "distill": ["distill.py", "--teacher", "finetune"],
}
"""Stage -> script and arguments; the run folder has the name of the stage."""
SHOWN = {
    "supervised": "from random weights on 2 % of the labels",
    "finetune": "pretrained without labels, fine-tuned on the same labels",
    "distill": "student of the fine-tuned classifier, on all images",
}
SCORES = ("top1", "top5", "knn_top1", "linear_top1")
console = Console()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    scores, wall_s = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for stage, (script, *arguments) in STAGES.items():
            console.print(f"accelerate launch {' '.join([script, *arguments])} --out {stage}", style="bold")
            wall_s[stage], rows = launch(script, *arguments, folder=Path(folder), out=stage)
            scores[stage] = {name: round(rows[-1][name], 4) for name in SCORES if name in rows[-1]}
    table = Table("classifier", "top-1", "top-5", "s")
    for stage, title in SHOWN.items():
        table.add_row(title, f"{scores[stage]['top1']:.3f}", f"{scores[stage]['top5']:.3f}", f"{wall_s[stage]:.0f}")
    console.print(table)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blank = dict.fromkeys(SCORES, "")
    where = environment(device)
    rows = [where | {"stage": stage, "wall_s": round(wall_s[stage], 1)} | blank | scores[stage] for stage in STAGES]
    console.print(f"pretraining took {wall_s['pretrain']:.0f} s; {write_rows('demo_v2', rows)}")


if __name__ == "__main__":
    main()
