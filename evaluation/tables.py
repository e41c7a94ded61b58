"""Tables and sentences shown to the user."""

from typing import Any

from rich.table import Table

SCORES = {"knn_top1": "kNN top-1", "linear_top1": "linear top-1", "top1": "top-1", "top5": "top-5"}
"""Titles of the columns of scores, in their order."""


def report_table(report: dict[str, dict[str, float]]) -> Table:
    """Table of scores by name of the features or classifier: {"trained": {"knn_top1": 0.7, "linear_top1": 0.8}}."""
    shown = [name for name in SCORES if any(name in scores for scores in report.values())]
    table = Table("classifier" if "top1" in shown else "features", *map(SCORES.get, shown))
    for name, scores in report.items():
        table.add_row(name, *(f"{scores[score]:.3f}" for score in shown))
    return table


def scores_table(record: dict[str, Any]) -> Table:
    """Table of `results` in a record of evaluate.py and, if there are several seeds, of their mean."""
    settings = [name for name in ("k", "temperature", "seed", "l2") if name in record["results"][0]]
    table = Table(*settings, "top-1", "95 % over test images", f"top-{min(5, record['classes'])}")
    for result in record["results"]:
        low, high = result["top1_wilson_95"]
        mark = "" if result.get("converged", True) else " (not converged)"
        cells = (f"{result[name]:.3g}" if isinstance(result[name], float) else str(result[name]) for name in settings)
        table.add_row(*cells, f"{result['top1']:.4f}{mark}", f"{low:.4f} to {high:.4f}", f"{result['top5']:.4f}")
    if len(record["results"]) > 1 and "over_seeds" in record:
        top1, top5 = (f"{mean['mean']:.4f} ± {mean['half_width_95']:.4f}" for mean in record["over_seeds"].values())
        table.add_section()
        table.add_row("mean ± 95 %", *[""] * (len(settings) - 1), top1, "", top5)
    return table
