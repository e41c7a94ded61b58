"""The page itself: figures, pictures and tables in one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common import UserError, flatten, replacing
from ..tables import SCORES
from .record import RunRecord

TEMPLATE = Path(__file__).with_name("page.html.jinja")
CONFUSED = 10
"""Number of pairs of classes listed as most confused."""


@dataclass(frozen=True)
class Neighbor:
    picture: str
    """Data URI."""
    label: str
    """Class name; "" for an unlabeled image."""


@dataclass(frozen=True)
class RunPictures:
    """What a run's encoder shows on images; pictures are data URIs."""

    views: list[tuple[str, str, str]]
    """Original and its two views."""
    neighbors: list[tuple[Neighbor, list[Neighbor]]]
    """Query and its nearest images, in descending order of cosine."""
    points: np.ndarray
    """(n, 2), map of the embedding."""
    pictures: list[str]
    """n pictures of the map."""
    labels: list[str]
    """n class names of the map; "" for unlabeled images."""
    rank: float
    """RankMe of the features."""
    rank_images: int
    """Number of images the rank was computed on."""
    feature_dim: int
    """D, the largest possible rank."""
    confusion: np.ndarray | None = None
    """(C, C) test images by true and predicted class; None without labels."""
    classes: list[str] = ()
    """C class names."""
    classifier: str = ""
    """What predicted the classes."""


def write_page(runs: Sequence[RunRecord], pictures: Sequence[RunPictures], out: Path) -> None:
    """Write the page; it needs neither files next to it nor a network.

    Raises:
        UserError: Bokeh or Jinja2 is missing, or the file can't be written.
    """
    try:
        from bokeh.embed import components
        from bokeh.resources import Resources
        from jinja2 import Environment
    except ImportError as error:
        raise UserError(f"The report needs {error.name}; run pip install bokeh.") from error
    from .charts import confusion_matrix, curves, embedding_map

    charts = curves(runs)
    figures = {("curve", title): plot for title, plot in charts.items()}
    for number, shown in enumerate(pictures):
        if len(shown.points):
            figures["map", number] = embedding_map(shown.points, shown.pictures, shown.labels)
        if shown.confusion is not None and (plot := confusion_matrix(shown.confusion, shown.classes)):
            figures["confusion", number] = plot
    script, divs = components(list(figures.values()))
    divs = dict(zip(figures, divs, strict=True))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text()).render(
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(),
        script=script,
        divs=divs,
        charts=list(charts),
        runs=[
            {"record": run, "pictures": shown, "number": number, "confused": most_confused(shown)}
            for number, (run, shown) in enumerate(zip(runs, pictures, strict=True))
        ],
        scores=score_rows(runs),
        options=option_rows(runs),
    )
    with replacing(out) as partial:
        partial.write_text(page, encoding="utf-8")


def score_rows(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Final scores of all runs: {"columns": names, "rows": [(run, features, values)]}."""
    columns = [name for name in SCORES if any(name in row for run in runs for row in run.results.values())]
    rows = [
        (run.name, features, [row.get(name) for name in columns])
        for run in runs
        for features, row in run.results.items()
    ]
    return {"columns": [SCORES[name] for name in columns], "rows": rows}


def option_rows(runs: Sequence[RunRecord]) -> list[tuple[str, list[str], bool]]:
    """Every option with its value in each run, and whether they differ; those that differ come first."""
    flat = [{name: str(value) for name, value in flatten(run.config).items()} for run in runs]
    names = list(dict.fromkeys(name for options in flat for name in options))
    rows = [(name, values := [options.get(name, "") for options in flat], len(set(values)) > 1) for name in names]
    return sorted(rows, key=lambda row: not row[2])


def most_confused(shown: RunPictures) -> list[tuple[str, str, int, float]]:
    """Pairs of classes that are confused most often: true class, prediction, images, share of the true class."""
    if shown.confusion is None:
        return []
    wrong = shown.confusion * (1 - np.eye(len(shown.classes), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
    pairs = [(int(at) // len(wrong), int(at) % len(wrong)) for at in order if wrong.flat[at]]
    totals = shown.confusion.sum(1)
    return [(shown.classes[i], shown.classes[j], int(wrong[i, j]), wrong[i, j] / totals[i]) for i, j in pairs]
