"""Experiment trackers: TensorBoard, Weights & Biases and MLflow, through accelerate's tracker classes.

Trackers live on rank 0 and receive the numbers of metrics.jsonl under the same names, after they reached the host.
Everything stays in the run folder unless the user is logged in to W&B or MLFLOW_TRACKING_URI names a server:

    RUN/tensorboard/     event files
    RUN/wandb/           W&B runs, one folder for every part of a resumed run
    RUN/mlflow/          local MLflow store
    RUN/trackers.json    what a resumed run needs to continue the same curves
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from .common import UserError, flatten, replacing
from .session import Session

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Package to install for each tracker."""
PROJECT = "streamclr"
"""Project of W&B (WANDB_PROJECT has priority) and experiment of MLflow (MLFLOW_EXPERIMENT_NAME has)."""
IMAGES = 8
"""Most images on a sheet of views."""
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # the store that needs no database packages
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # all ranks wait meanwhile; the default takes minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_ERROR_REPORTING": "false",  # sends telemetry even when recording offline
    "WANDB_FINISH_TIMEOUT": "600",  # the default waits forever for a server that is gone
}
"""Variables that are set unless the user has set them."""


def choose_trackers(names: Sequence[str]) -> list[str]:
    """The trackers that --trackers selects: "auto" is TensorBoard if it is installed; "none" or no name is none.

    Raises:
        UserError: a name is unknown, a package is missing, or "none" stands next to other names.
    """
    for name in names:
        if name not in ("auto", "none", *PACKAGES):
            (nearest,) = get_close_matches(name, ["auto", "none", *PACKAGES], n=1, cutoff=0)
            raise UserError(
                f"There is no tracker {name!r} (did you mean {nearest}?); use --trackers with any of "
                f"{', '.join(PACKAGES)}, or with auto or none."
            )
        if name in PACKAGES and not is_installed(name):
            package = PACKAGES[name]
            raise UserError(f"--trackers {name} needs {package}, which is not installed; run `pip install {package}`.")
    if "none" in names and len(names) > 1:
        raise UserError(f"--trackers {' '.join(names)} is contradictory; use none alone.")
    automatic = [name for name in ("tensorboard",) if is_installed(name)]
    chosen = [each for name in names for each in {"auto": automatic, "none": []}.get(name, [name])]
    return list(dict.fromkeys(chosen))


def is_installed(name: str) -> bool:
    """Whether a package can be imported; a folder of its name, such as W&B leaves behind, is not a package."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


class Trackers:
    """Trackers of a run; none on other ranks than 0, and none before `start`.

    A tracker that fails is reported once and not used again: neither a server nor a full disk may end a training.

    Args:
        session: session of the run, whose folder is open.
    """

    def __init__(self, session: Session):
        self.session = session
        self.trackers: dict[str, Any] = {}
        self.state: dict[str, dict[str, Any]] = {}
        self.sent: dict[str, set[tuple[int, str]]] = {}
        self.uses_local_mlflow = False

    def start(
        self, names: Iterable[str], step: int, config: dict[str, Any], dropped: Iterable[dict[str, Any]] = ()
    ) -> None:
        """Start trackers, or let those that the run had before continue.

        Args:
            names: what `choose_trackers` returned.
            step: number of completed steps.
            config: options, in nested dictionaries.
            dropped: rows of metrics.jsonl that the run wrote before and will write again. W&B and MLflow cannot delete
                their values, so these values are not sent twice; TensorBoard hides events after `step`.
        """
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        file = self.session.out / "trackers.json"
        self.state = {}
        with suppress(OSError, ValueError, TypeError):  # a new run, or a damaged file: trackers start new runs
            self.state = dict(json.loads(file.read_text()))
        written = {(row["step"], name) for row in dropped for name in scalars(row)}
        kept = {(at, name) for at, name in written if at <= step}
        for name in names:
            with self._surviving(name):
                known = self.state.get(name)
                tracker, run_id = self._start(name, known and known["id"], step)
                self.trackers[name], self.sent[name] = tracker, set()
                if known is None:
                    tracker.store_init_configuration(flatten(config))
                    self._update(name, id=run_id, drawn=False)
                else:
                    self.sent[name] = kept if name == "tensorboard" else written

    def _start(self, name: str, run_id: str | None, step: int) -> tuple[Any, str | None]:
        """A started tracker and the id of its run; `run_id` is that of the run to continue."""
        out = self.session.out
        if name == "tensorboard":
            tracker = self.session.create_tracker(name, run_name=name, logging_dir=out, purge_step=step + 1)
            tracker.start()
            return tracker, None
        if name == "wandb":
            import wandb

            options = {"id": run_id, "resume": "allow" if run_id else None, "name": out.name, "dir": str(out)}
            online = os.environ.get("WANDB_MODE", "online") in ("online", "run", "shared")
            if online and not wandb.login(prompt=False, verify=False):  # init would ask for a key
                options["mode"] = "offline"
                self.session.log(
                    f"W&B is not logged in, so it records offline; to upload, run `wandb login` and then `wandb sync "
                    f"{out}/wandb/offline-run-*`."
                )
            tracker = self.session.create_tracker(name, run_name=os.environ.get("WANDB_PROJECT", PROJECT), **options)
            tracker.start()
            return tracker, tracker.tracker.id
        import mlflow

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri((out / "mlflow").absolute().as_uri())
            self.uses_local_mlflow = True
        tracker = self.session.create_tracker(name, experiment_name=PROJECT, run_id=run_id, run_name=out.name)
        tracker.start()
        return tracker, tracker.tracker.info.run_id

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send scalars by name."""
        for name, tracker in list(self.trackers.items()):
            new = {key: value for key, value in values.items() if (step, key) not in self.sent[name]}
            if new:
                with self._surviving(name):
                    tracker.log(new, step=step)

    @property
    def lack_views(self) -> bool:
        """Whether a tracker has no picture of views yet."""
        return any(not self.state[name]["drawn"] for name in self.trackers)

    def draw_views(self, step: int, sheet: Tensor) -> None:
        """Send a picture, (H, W, 3) uint8, to each tracker that has none."""
        picture = sheet.cpu().numpy()
        for name, tracker in list(self.trackers.items()):
            if self.state[name]["drawn"]:
                continue
            with self._surviving(name):
                if name == "mlflow":  # accelerate's class cannot send pictures
                    import mlflow

                    mlflow.log_image(picture, "views.png")
                else:
                    layout = {"dataformats": "NHWC"} if name == "tensorboard" else {}
                    tracker.log_images({"views": picture[None]}, step=step, **layout)
                self._update(name, drawn=True)

    def close(self, failed: bool = False) -> None:
        """Finish all trackers; W&B and MLflow note whether the run `failed`."""
        for name, tracker in list(self.trackers.items()):
            with self._surviving(name):
                if failed and name == "wandb":
                    tracker.tracker.finish(exit_code=1)
                elif failed and name == "mlflow":
                    import mlflow

                    mlflow.end_run("FAILED")
                else:
                    tracker.finish()
        if self.uses_local_mlflow:  # the next run of this process has another store
            import mlflow

            mlflow.set_tracking_uri(None)
        self.trackers, self.uses_local_mlflow = {}, False

    def _update(self, name: str, **changes: Any) -> None:
        """Change what trackers.json holds about a tracker."""
        self.state[name] = self.state.get(name, {}) | changes
        with replacing(self.session.out / "trackers.json") as path:
            path.write_text(json.dumps(self.state, indent=1) + "\n")

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Context in which an error ends a tracker, not the run."""
        try:
            yield
        except Exception as error:  # of any kind: they come from servers, disks and other people's code
            self.trackers.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.session.log(f"{name} failed and receives nothing more from this run, which continues: {reason}")


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Name -> value of what trackers receive of a row of metrics.jsonl; rows of the final table are prefixed."""
    prefix = f"{row['features']}/" if "features" in row else ""
    return {prefix + name: value for name, value in row.items() if name not in ("step", "features")}


def view_sheet(batch: Any, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Picture of the first images of a batch: a column for each image, a row for each of its views.

    Args:
        batch: batch of a view loader; `views` (V * B, C, S, S), `label` (B,).
        draw: views (n, V, C, S, S) -> pictures (n, V, S, S, 3) uint8.

    Returns:
        (V * S, n * S, 3) uint8 on the device of the batch, which is not waited for.
    """
    views = batch.views.unflatten(0, (-1, len(batch.label)))[:, :IMAGES]  # (V, n, C, S, S)
    return draw(views.transpose(0, 1)).permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
