"""Plots and tables of the committed CSVs: `python -m bench.plot`."""

import re
from collections import defaultdict
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt

from bench.ablation import BASE, CHANGES, by_setting, effects, shown
from bench.harness import read_rows

DOCS = Path(__file__).parents[1] / "docs"


def plot_loss_kernel(table: str = "loss_kernel") -> Path:
    """docs/TABLE.png: time and memory of NT-Xent over M at D = 128, from TABLE.csv, one line per device."""
    rows = [row for row in read_rows(table) if row["D"] == "128" and row["dtype"] == "float32"]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names, devices = (list(dict.fromkeys(row[column] for row in rows)) for column in ("implementation", "device"))
    for name, device in product(names, devices):
        mine = [row for row in rows if (row["implementation"], row["device"]) == (name, device)]
        style = {"color": f"C{names.index(name)}", "linewidth": 2.5 if name in ("triton", "blockwise") else 1.2}
        time.plot(*_points(mine, "median_ms"), "o-", markersize=4, **style)
        memory.plot(*_points(mine, "peak_extra_mb"), "o-", markersize=4, **style)
    for device in devices:
        time.plot(*_points([row for row in rows if row["device"] == device], "floor_ms"), "k:")
    for name in names:
        time.plot([], [], color=f"C{names.index(name)}", label=name)
    time.plot([], [], "k:", label="floor")
    for axes, title in ((time, "forward and backward, ms"), (memory, "peak extra memory, MB")):
        axes.set(title=title, xlabel="rows M (two views of M / 2 images)", xscale="log", yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    time.legend(fontsize=8)
    measured = " and ".join(devices)  # rows may be replaced on another machine
    figure.suptitle(f"NT-Xent, fp32, D = 128, {measured}, {rows[0]['threads']} threads", fontsize=10)
    return _save(figure, f"{table}.png")


def plot_pipeline() -> Path:
    """docs/pipeline.png: images/s of complete pipelines and of decoding, from pipeline.csv."""
    rows = [row for row in read_rows("pipeline") if row["stage"] in ("all", "decode")]
    kinds = list(dict.fromkeys(row["shards"] for row in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(11, 4.2), layout="constrained", sharey=True, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        mine = [row for row in rows if row["shards"] == kind and row["stage"] == "all"][::-1]
        names = [f"{row['implementation']}, {row['jitter']}" for row in mine]
        colors = ["0.7" if row["implementation"] in ("torchvision", "lightly") else "C0" for row in mine]
        bars = axes.barh(names, [float(row["images_per_s"]) for row in mine], color=colors)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        (decode,) = (float(row["images_per_s"]) for row in rows if (row["shards"], row["stage"]) == (kind, "decode"))
        axes.axvline(decode, color="k", linestyle=":", label=f"decoding only: {decode:.0f}")
        axes.set(title=f"{kind} ({mine[0]['mean_kb']} KB per file)", xlabel="images/s, two views per image")
        axes.grid(alpha=0.3, axis="x")
        axes.legend(fontsize=8)
    figure.suptitle(f"Full augmentation, 224 px, {rows[0]['device']}, {rows[0]['workers']} threads", fontsize=10)
    return _save(figure, "pipeline.png")


def fill_loader_table() -> Path:
    """Table of docs/benchmarks.md between its marks, the loader next to its backend, from pipeline.csv."""
    rows = [row for row in read_rows("pipeline") if row["stage"] == "all"]
    rate = {(row["shards"], row["implementation"], row["jitter"]): row["images_per_s"] for row in rows}
    lines = ["| images | jitter | OpenCV backend, images/s | loader, images/s | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        if row.get("ratio_to_backend"):
            of_backend = rate[row["shards"], "opencv", row["jitter"]]
            cells = (row["shards"], row["jitter"], of_backend, row["images_per_s"], row["ratio_to_backend"])
            lines.append(f"| {' | '.join(cells)} |")
    missing = "Not measured yet: no row of `bench/results/pipeline.csv` has a `ratio_to_backend`."
    return _fill("benchmarks.md", "pipeline:loader", "\n".join(lines) if len(lines) > 2 else missing)


def fill_views_table() -> Path:
    """Table of docs/augmentation.md between its marks, decoding and views of each implementation, from pipeline.csv."""
    names = {"opencv": "OpenCV backend", "kornia": "Kornia", "dali": "DALI"}
    columns: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for row in (row for row in read_rows("pipeline") if row["stage"] in ("decode", "all")):
        if row["implementation"] != "loader":
            name = f"{names.get(row['implementation'], row['implementation'])}, {row['jitter']} jitter"
            name = "decoding alone" if row["stage"] == "decode" else name
            columns[row["shards"]] = f"{row['shards']}, {float(row['mean_kb']):.0f} KB"
            cells[name][row["shards"]] = f"{float(row['images_per_s']):.0f} ({float(row['ratio_to_decode']):.2f})"
            measured = f"{row['device']}, {row['workers']} threads, {row['date']}:"
    lines = [["", *columns.values()], ["---"] * (1 + len(columns))]
    lines += [[name, *(rates.get(kind, "") for kind in columns)] for name, rates in cells.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    missing = "Not measured yet: there is no `pipeline.csv` in `bench/results`."
    return _fill("augmentation.md", "pipeline:views", f"{measured}\n\n{table}" if cells else missing)


def fill_ablation_table() -> Path:
    """Tables of docs/training.md between its marks, one for each setting of ablation.csv."""
    parts = []
    for (data, images, epochs, encoder, device, *_), rows in by_setting(read_rows("ablation")).items():
        if not (found := effects(rows, "knn_top1")):
            continue
        fewest, most = (bound(effect.seeds for effect in found.values()) for bound in (min, max))
        seeds = str(most) if fewest == most else f"{fewest} to {most}"
        batches = sorted({batch for _, batch in found})
        lines = [["change", *(f"batch {batch}" for batch in batches)], ["---"] * (1 + len(batches))]
        lines.append([f"{BASE}: kNN, %", *(f"{found[BASE, batch].mean:.1f}" for batch in batches)])
        for change in CHANGES:
            cells = [shown(found[change, batch]) if (change, batch) in found else "" for batch in batches]
            if change != BASE and any(cells):
                lines.append([change, *cells])
        parts.append(f"{data}, {images} training images, {epochs} epochs, {encoder}, {device}; seeds: {seeds}")
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    missing = "Not measured yet: there is no `ablation.csv` in `bench/results`."
    return _fill("training.md", "ablation", "\n\n".join(parts) or missing)


def fill_learning_table() -> Path:
    """Tables of docs/benchmarks.md between its marks, the last point of every contender, from learning.csv."""
    parts, races = [], {}
    for row in read_rows("learning"):
        if row["linear_top1"]:
            minutes = f"{float(row['budget_s']) / 60:g} minutes on {row['cores']} cores of {row['device']}"
            races.setdefault(f"{row['data']}, {row['encoder']}, {minutes}, seed {row['seed']}", []).append(row)
    columns = {
        "contender": "contender",
        "batch": "batch",
        "precision": "precision",
        "images_per_s": "images/s",
        "images_seen": "images seen",
        "seconds": "seconds",
        "schedule": "share of its schedule",
        "knn_top1": "kNN",
        "linear_top1": "linear",
    }
    for race, rows in races.items():
        lines = [columns.values(), ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
        parts += [race + ":", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    missing = "Not measured yet: there is no `learning.csv` in `bench/results`."
    return _fill("benchmarks.md", "learning", "\n\n".join(parts) or missing)


def plot_learning() -> Path:
    """docs/learning.png: kNN accuracy over seconds of training, from learning.csv; one panel per race."""
    rows = read_rows("learning")
    races = list(dict.fromkeys(map(race_of, rows)))
    figure, panels = plt.subplots(
        1, len(races), figsize=(max(7, 5.5 * len(races)), 4.2), layout="constrained", squeeze=False
    )
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for axes, race in zip(panels[0], races, strict=True):
        mine = [row for row in rows if race_of(row) == race]
        for name, seed in dict.fromkeys((row["contender"], row["seed"]) for row in mine):
            points = [row for row in mine if (row["contender"], row["seed"]) == (name, seed)]
            seconds, top1 = ([float(row[column]) for row in points] for column in ("seconds", "knn_top1"))
            label = f"{name}: {float(points[-1]['images_per_s']):,.0f} images/s, linear {points[-1]['linear_top1']}"
            width, color = 2.5 if name.startswith("ours") else 1.2, f"C{names.index(name)}"
            axes.plot(seconds, top1, "o-", label=label, color=color, linewidth=width, markersize=4)
        machine = f"{mine[0]['device']}, {mine[0]['threads']} threads"
        axes.set_title(f"{race[0]}, {race[1]}\n{machine}", fontsize=10)
        axes.set(xlabel="seconds of training", ylabel="kNN top-1")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("Equal time for all contenders of a panel", fontsize=10)
    return _save(figure, "learning.png")


def race_of(row: dict[str, str]) -> tuple[str, ...]:
    """Columns of learning.csv that the contenders of a race have in common."""
    return tuple(row[name] for name in ("data", "encoder", "budget_s", "device"))


def _save(figure: plt.Figure, name: str) -> Path:
    """Write a figure to docs/ and release it."""
    path = DOCS / name
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _fill(page: str, mark: str, content: str) -> Path:
    """Replace what is between <!-- mark --> and <!-- /mark --> in a page of docs/."""
    path, start, end = DOCS / page, f"<!-- {mark} -->", f"<!-- /{mark} -->"
    block = f"{start}\n\n{content}\n\n{end}"
    path.write_text(re.sub(f"{start}.*{end}", lambda _: block, path.read_text(), flags=re.DOTALL))
    return path


def _points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    pairs = sorted({int(row["M"]): float(row[column]) for row in rows if float(row[column] or 0) > 0}.items())
    return [m for m, _ in pairs], [value for _, value in pairs]


if __name__ == "__main__":
    print(plot_loss_kernel())
    print(plot_pipeline())
    print(fill_loader_table())
    print(fill_views_table())
    print(fill_ablation_table())
    if read_rows("learning"):
        print(plot_learning())
        print(fill_learning_table())
