"""Tables of the documents from the rows of `python -m bench.gpu`.

    python -m bench.gpu.tables       fills the marked blocks of README.md and docs/benchmarks.md from bench/results

A block starts with <!-- gpu:NAME --> and ends with <!-- /gpu:NAME -->. Without rows it says "not measured".
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.harness import read_rows

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/benchmarks.md")
NOT_MEASURED = "Not measured yet: no row of `python -m bench.gpu {part}` is in `bench/results`."
MODES = {"compiled": "compiled", "cuda_graph": "CUDA graph"}
"""Column -> how a training step runs if it is true."""
Rows = list[dict[str, str]]


def table(rows: Iterable[dict[str, str]], columns: dict[str, str]) -> str:
    """Markdown table of `rows`; `columns` maps their columns to headings."""
    lines = [columns.values(), ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def checks_table(rows: Rows) -> str:
    """One line per check: counts of its outcomes, and what failed or was left out."""
    lines = []
    for part, check in dict.fromkeys((row["part"], row["check"]) for row in rows):
        own = [row for row in rows if (row["part"], row["check"]) == (part, check)]
        line = {"part": part, "check": check.replace("_", " ")}
        for status in ("passed", "failed"):
            line[status] = str(sum(row["status"] == status for row in own))
        said = [
            " ".join(filter(None, (row["case"], row["what"], row["note"]))) for row in own if row["status"] == "failed"
        ]
        said += [f"{row['status']}: {row['note']}" for row in own if row["status"] in ("skipped", "not reached")]
        lines.append(line | {"note": "; ".join(said[:3]) + (f"; and {len(said) - 3} more" if len(said) > 3 else "")})
    return table(lines, {"part": "part", "check": "check", "passed": "passed", "failed": "failed", "note": ""})


def loss_table(rows: Rows) -> str:
    columns = {
        "implementation": "",
        "pass": "pass",
        "M": "M",
        "D": "D",
        "arithmetic": "arithmetic",
        "median_ms": "ms",
        "tflop_per_s": "TFLOP/s",
        "ratio_to_roofline": "times the roofline",
        "peak_extra_mb": "extra MB, both passes",
    }
    return table(sorted(rows, key=lambda row: (row["implementation"] != "triton", row["arithmetic"])), columns)


def tiles_table(rows: Rows) -> str:
    """The five fastest tiles of each kernel."""
    timed = sorted((row for row in rows if row.get("ratio_to_table")), key=lambda row: float(row["ratio_to_table"]))
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        best = [row for row in timed if row["kernel"] == kernel][:5]
        lines += [row | {"tile": f"{row['block_m']} x {row['block_n']}"} for row in best]
    columns = {
        "kernel": "kernel",
        "tile": "tile",
        "warps": "warps",
        "stages": "stages",
        "programs": "programs",
        "registers": "registers",
        "spills": "spills",
        "median_ms": "ms",
        "ratio_to_table": "times today's tile",
    }
    return table(lines, columns)


def step_table(rows: Rows) -> str:
    lines = [
        row
        | {"source": ", ".join([row["source"], *(mode for column, mode in MODES.items() if row.get(column) == "True")])}
        | {"wait": f"{float(row['wait_share']):.1%}", "verdict": row["verdict"].split(":")[0]}
        for row in sorted(rows, key=lambda row: row["network"])
    ]
    columns = {
        "network": "network",
        "batch": "batch",
        "source": "views",
        "images_per_s": "images/s",
        "step_ms": "step, ms",
        "peak_mb": "peak MB",
        "wait": "waiting for data",
        "verdict": "verdict",
    }
    return table(lines, columns)


def views_table(rows: Rows) -> str:
    columns = {
        "backend": "backend",
        "jitter": "jitter",
        "size": "px",
        "images_per_s": "images/s, two views each",
        "host_threads": "host threads",
        "device_mb": "MB on the device",
    }
    return table(rows, columns)


def fused_table(rows: Rows) -> str:
    columns = {
        "backend": "",
        "jitter": "jitter",
        "size": "px",
        "dtype": "views in",
        "views_per_s": "views/s",
        "gb_per_s": "GB/s",
        "ratio_to_bound": "times the bound",
    }
    return table(rows, columns)


def kernels_table(rows: Rows) -> str:
    lines = [row | {"share": f"{float(row['share']):.1%}"} for row in rows]
    columns = {"kernel": "kernel", "calls_per_step": "calls per step", "ms_per_step": "ms per step", "share": "share"}
    return table(lines, columns)


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "checks": ("all", checks_table),
    "loss": ("loss", loss_table),
    "tiles": ("loss", tiles_table),
    "step": ("step", step_table),
    "kernels": ("step", kernels_table),
    "views": ("dali", views_table),
    "fused": ("dali", fused_table),
}
"""Name -> part that writes gpu_<name>.csv, and what renders its rows."""


def block(name: str, folder: Path | None = None) -> str:
    """Markdown of the rows of gpu_<name>.csv in `folder`, with the device and the versions."""
    part, render = TABLES[name]
    rows = read_rows(f"gpu_{name}", folder)
    if not rows:
        return NOT_MEASURED.format(part=part)
    measured = [
        f"{row['date']}, {row['device']}, torch {row['torch']}, Triton {row['triton'] or 'missing'}" for row in rows
    ]
    return "\n\n".join([f"Measured on {'; '.join(dict.fromkeys(measured))}.", render(rows)])


def fill(text: str, folder: Path | None = None) -> str:
    """Replace the content of every marked block."""

    def content(found: re.Match) -> str:
        name = found[1]
        return f"<!-- gpu:{name} -->\n\n{block(name, folder)}\n\n<!-- /gpu:{name} -->"

    return re.sub(r"<!-- gpu:(\w+) -->.*?<!-- /gpu:\1 -->", content, text, flags=re.DOTALL)


def write_summary(folder: Path) -> Path:
    """Write gpu_summary.md with all tables of a folder."""
    path = folder / "gpu_summary.md"
    blocks = [f"## {name}\n\n{block(name, folder)}\n" for name in TABLES]
    path.write_text("\n".join(["# Validation on a GPU\n", *blocks]))
    return path


if __name__ == "__main__":
    for name in DOCUMENTS:
        document = ROOT / name
        document.write_text(fill(document.read_text()))
        print(document)
