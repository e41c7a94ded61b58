"""Scoring features on a train and a test split, and the tables that are shown."""

from typing import Any

from rich.table import Table

from .intervals import mean_and_half_width, wilson


def report_table(report: dict[str, dict[str, float]]) -> Table:
    """One line per kind of features or classifier: {"trained": {"knn_top1": 0.7, "linear_top1": 0.8}, ...}."""
    titles = {"knn_top1": "kNN top-1", "linear_top1": "linear top-1", "top1": "top-1", "top5": "top-5"}
    figures = [name for name in titles if any(name in scores for scores in report.values())]
    table = Table("classifier" if "top1" in figures else "features", *map(titles.get, figures))
    for name, scores in report.items():
        table.add_row(name, *(f"{scores[figure]:.3f}" for figure in figures))
    return table


def scores(correct: tuple[int, int], total: int) -> dict[str, Any]:
    """Shares of `total` test images from how many of them were right at top-1 and top-5."""
    return {"top1": correct[0] / total, "top5": correct[1] / total, "top1_wilson_95": wilson(correct[0], total)}


def over_seeds(results: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean of each figure over seeds, and half the width of its 95 % interval (see `evaluation.intervals`)."""
    summary = {}
    for figure in ("top1", "top5"):
        mean, half_width = mean_and_half_width([result[figure] for result in results])
        summary[figure] = {"mean": mean, "half_width_95": half_width}
    return summary


def scores_table(record: dict[str, Any]) -> Table:
    """One line for each result that evaluate.py writes, and over all seeds if there are several."""
    settings = [name for name in ("k", "temperature", "seed", "l2") if name in record["results"][0]]
    top5 = f"top-{min(5, record['classes'])}"
    table = Table(*settings, "top-1", "95 % over test images", top5)
    for result in record["results"]:
        low, high = result["top1_wilson_95"]
        unsolved = "" if result.get("converged", True) else " (not converged)"
        figures = (f"{result['top1']:.4f}{unsolved}", f"{low:.4f} to {high:.4f}", f"{result['top5']:.4f}")
        shown = (f"{result[name]:.3g}" if isinstance(result[name], float) else str(result[name]) for name in settings)
        table.add_row(*shown, *figures)
    if len(record["results"]) > 1 and "over_seeds" in record:
        means = [
            f"{of['mean']:.4f} ± {of['half_width_95']:.4f}" for of in map(record["over_seeds"].get, ("top1", "top5"))
        ]
        table.add_section()
        table.add_row("mean ± 95 %", *[""] * (len(settings) - 1), means[0], "", means[1])
    return table
