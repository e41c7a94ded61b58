"""Interactive figures of a report, drawn by Bokeh."""

import math
from collections.abc import Sequence

import numpy as np
from bokeh.models import BasicTicker, ColorBar, ColumnDataSource, HoverTool, LinearColorMapper
from bokeh.palettes import Category10, Category20, Viridis256
from bokeh.plotting import figure

from .record import RunRecord

TRAINING = {
    "loss": "Loss",
    "lr": "Learning rate",
    "gradient_norm": "Gradient norm",
    "probe_top1": "Online probe, top-1",
    "train_top1": "Training top-1",
    "agreement": "Agreement with the teacher",
    "temperature": "Temperature",
    "images_per_s": "Images per second",
    "wait": "Share of the time waiting for data",
}
"""Metrics of training steps -> title; `wait` is data_wait_ms / step_ms."""
SCORES = {"knn_top1": "kNN, top-1", "top1": "Test top-1"}
"""Scores of validations and of the end of training -> title."""
POINTS = 1000
"""Most points of a curve; longer ones are averaged in equal groups."""
LARGEST_MATRIX = 50
"""Most classes of a confusion matrix that is drawn."""
COLORS = Category10[10]
LEGEND_COLUMNS, LEGEND_ROW = 3, 24
"""Columns of a legend outside of its figure, and height of a row in pixels."""
CLEAR = {"background_fill_color": None, "border_fill_color": None}
"""Figures show the page's color: Bokeh never clears the outermost pixels of what it first draws."""


def curves(runs: Sequence[RunRecord]) -> dict[str, figure]:
    """Metrics over epochs, one figure per metric and one line per run: title -> figure."""
    figures = {}
    for metric, title in (TRAINING | SCORES).items():
        lines = [(run, *(_scores if metric in SCORES else _metric)(run, metric)) for run in runs]
        if not any(len(epochs) for _, epochs, _ in lines):
            continue
        log = metric == "gradient_norm" and all((values[np.isfinite(values)] > 0).all() for _, _, values in lines)
        plot = figure(height=260, sizing_mode="stretch_width", tools="pan,xwheel_zoom,box_zoom,reset", title=title,
                      x_axis_label="epoch", y_axis_type="log" if log else "linear", **CLEAR)  # fmt: skip
        plot.toolbar.logo, plot.toolbar.autohide = None, True
        for number, (run, epochs, values) in enumerate(lines):
            style = {"color": COLORS[number % 10], "line_dash": "solid" if number < 10 else "dashed", "line_width": 2}
            if len(runs) > 1:
                style["legend_label"] = run.name
            source = ColumnDataSource({"epoch": epochs, "value": values, "run": [run.name] * len(epochs)})
            plot.line("epoch", "value", source=source, **style)
            if metric in SCORES:
                plot.scatter("epoch", "value", source=source, size=7, color=style["color"])
        plot.add_tools(HoverTool(tooltips=[("run", "@run"), ("epoch", "@epoch{0.0}"), (title, "@value{0.0000}")]))
        if len(runs) > 1:
            plot.legend.click_policy = "hide"
            legend_outside(plot, "above")
            plot.height += LEGEND_ROW * math.ceil(len(runs) / LEGEND_COLUMNS)
        figures[title] = plot
    return figures


def _metric(run: RunRecord, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of a metric of the training steps, each (n,)."""
    steps_per_epoch = run.rows[-1]["step"] / run.rows[-1]["epoch"]
    points = []
    for row in run.rows:
        value = row.get(metric)
        if metric == "wait" and row.get("step_ms"):
            value = row["data_wait_ms"] / row["step_ms"]
        if value is not None:
            points.append((row["step"] / steps_per_epoch, value))
    groups = np.array_split(np.array(points, float).reshape(-1, 2), min(POINTS, len(points)) or 1)
    return tuple(np.array([group.mean(0) for group in groups if len(group)]).reshape(-1, 2).T)


def _scores(run: RunRecord, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of a score, each (n,): before, during and after training."""
    steps_per_epoch = run.rows[-1]["step"] / run.rows[-1]["epoch"]
    trained = [row for name, row in run.results.items() if name in ("untrained", "trained", run.stage)]
    rows = [row for row in [*run.validations, *trained] if row.get(score) is not None]
    points = sorted({(row["step"] / steps_per_epoch, row[score]) for row in rows})
    return tuple(np.array(points, float).reshape(-1, 2).T)


def embedding_map(points: np.ndarray, pictures: Sequence[str], labels: Sequence[str]) -> figure:
    """Map of images in which hovering shows the picture.

    Args:
        points: (n, 2), from `representation.plane`.
        pictures: n data URIs.
        labels: n class names; "" for unlabeled images.
    """
    names = sorted(set(labels))
    palette = COLORS if len(names) <= 10 else Category20[20] if len(names) <= 20 else Viridis256
    color = {name: palette[i * len(palette) // len(names) if len(names) > 20 else i] for i, name in enumerate(names)}
    source = ColumnDataSource(
        {
            "x": points[:, 0],
            "y": points[:, 1],
            "picture": list(pictures),
            "label": list(labels),
            "color": [color[label] for label in labels],
        },
        name="map",
    )
    plot = figure(height=520, sizing_mode="stretch_width", tools="pan,wheel_zoom,reset", match_aspect=True,
                  **CLEAR)  # fmt: skip
    plot.toolbar.logo, plot.axis.visible, plot.grid.visible = None, False, False
    grouped = {"legend_field": "label"} if 1 < len(names) <= 12 else {}
    plot.scatter("x", "y", source=source, size=8, color="color", alpha=0.8, selection_line_color="black",
                 nonselection_alpha=0.5, **grouped)  # fmt: skip
    tooltip = '<div class="tip"><img src="@picture" alt=""><div>@label</div></div>'
    plot.add_tools(HoverTool(tooltips=tooltip))
    if grouped:
        legend_outside(plot, "below")
    return plot


def legend_outside(plot: figure, place: str) -> None:
    """Move the legend out of the frame, "above" or "below", where it hides no data."""
    legend = plot.legend[0]
    plot.add_layout(legend, place)
    legend.orientation, legend.nrows, legend.ncols = "horizontal", "auto", LEGEND_COLUMNS
    legend.label_text_font_size, legend.location, legend.border_line_color = "11px", "left", None


def confusion_matrix(confusion: np.ndarray, classes: Sequence[str]) -> figure | None:
    """Heat map of the shares of each true class; None if there are too many classes to draw.

    Args:
        confusion: (C, C) counts, rows are true classes and columns predictions.
        classes: C names.
    """
    count = len(classes)
    if count > LARGEST_MATRIX:
        return None
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    names = [f"{i}: {name}" for i, name in enumerate(classes)]  # names may repeat
    true, predicted = np.divmod(np.arange(count * count), count)
    source = ColumnDataSource(
        {
            "true": [names[i] for i in true],
            "predicted": [names[i] for i in predicted],
            "share": share.ravel(),
            "count": confusion.ravel(),
        }
    )
    plot = figure(x_range=names, y_range=names[::-1], height=min(760, 24 * count + 260), tools="",
                  toolbar_location=None, sizing_mode="stretch_width", max_width=48 * count + 260,
                  x_axis_label="predicted", y_axis_label="true", **CLEAR)  # fmt: skip
    mapper = LinearColorMapper(palette=Viridis256, low=0, high=1)
    plot.rect("predicted", "true", 1, 1, source=source, fill_color={"field": "share", "transform": mapper},
              line_color=None)  # fmt: skip
    plot.add_tools(
        HoverTool(tooltips=[("true", "@true"), ("predicted", "@predicted"), ("images", "@count"), ("share", "@share")])
    )
    # below, so that the matrix keeps its width on a phone
    plot.add_layout(ColorBar(color_mapper=mapper, ticker=BasicTicker(desired_num_ticks=5), height=10), "below")
    plot.xaxis.major_label_orientation, plot.grid.visible = math.pi / 3, False
    return plot
