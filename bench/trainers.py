"""What bench/train_step.py compares: `train.pretrain` itself, lightly as its examples use it, and a plain PyTorch loop.

    python -m bench.trainers TURN OUT      one turn in a process of its own; TURN and what is printed are JSON

All train the encoder, the head's widths, the recipe, the temperature and the batch that train.py's arguments name.
Every part of every step is marked on the way, for ours without a line of train.py changed. A mark reads the host's
clock on a CPU and records an event on a GPU, which is read when the run is over: nothing waits for the device, and the
ten or so marks of a step are microseconds.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise, repeat
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import train
from bench.harness import peak_resident_mb
from bench.implementations import dense
from config import PretrainConfig
from engine.loop import Instruments
from model import create_encoder, encoder_spec, feature_dim, projection_head
from presets import parse

PARTS = ("wait", "forward", "loss", "backward", "optimizer", "other")


@dataclass(frozen=True)
class Turn:
    """One run of one trainer."""

    trainer: str
    """ours, lightly or plain."""
    precision: str
    """fp32, or bf16 by autocast."""
    source: str
    """images: from the files on. same batch: views that are in memory already, the same in every step."""
    arguments: list[str]
    """train.py's command line, but for --precision and --out."""
    images: str
    """The images of --data as files, in a folder per class: for the peers."""
    workers: int
    """Processes of the peers' DataLoader; 0 loads in the training process."""
    warm: int
    """Steps that are not counted."""
    steps: int
    """Steps that are."""


class Marks:
    """What is being done from when on, over a whole run."""

    def __init__(self, device: torch.device):
        self.device = device
        self.taken: list[tuple[str, float | torch.cuda.Event]] = []

    def __call__(self, part: str) -> None:
        """From here on it is `part`."""
        now = torch.cuda.Event(enable_timing=True) if self.device.type == "cuda" else time.perf_counter()
        if self.device.type == "cuda":
            now.record()
        self.taken.append((part, now))

    def batches(self, batches: Iterable) -> Iterator:
        """The same batches, the wait for each marked; each begins a step."""
        iterator = iter(batches)
        while True:
            self("wait")
            batch = next(iterator, None)
            if batch is None:
                self.taken[-1] = ("end", self.taken[-1][1])  # of the last step; no other begins
                return
            self("other")
            yield batch

    def steps_ms(self) -> list[dict[str, float]]:
        """Milliseconds of each of `PARTS` in every step. They add up to the step: from one wait to the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        steps = []
        for (part, begun), (_, ended) in pairwise(self.taken):
            if part == "wait":
                steps.append(dict.fromkeys(PARTS, 0.0))
            if part != "end":  # what follows it, a checkpoint say, is no step's
                ms = begun.elapsed_time(ended) if self.device.type == "cuda" else 1000 * (ended - begun)
                steps[-1][part] += ms
        return steps


def train_ours(turn: Turn, config: PretrainConfig, marks: Marks, supply: Callable[[Iterable], Iterator]) -> float:
    """`train.pretrain`, observed by its own hooks; returns the mean loss of the last metrics row.

    The loss is its forward pass, that of the probe included: its gradient is part of the backward pass. The other
    parts are the seed, the guard, the means and the metrics rows.
    """
    train.pretrain(config, LoopMarks(marks, supply))
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["loss"] or math.nan


class LoopMarks(Instruments):
    """Marks the parts of a step of the training loop, and chooses among the loader's batches."""

    def __init__(self, marks: Marks, supply: Callable[[Iterable], Iterator]):
        self.mark, self.supply = marks, supply

    def batches(self, loader: Iterable) -> Iterator:
        return self.mark.batches(self.supply(loader))


def train_peer(turn: Turn, config: PretrainConfig, marks: Marks, supply: Callable[[Iterable], Iterator]) -> float:
    """The loop of lightly's examples, or a plain one, in torch's own number of threads; returns the last loss."""
    device, views = marks.device, config.views
    torch.manual_seed(config.seed)
    encoder = create_encoder(encoder_spec(config.encoder.name, views.size, config.encoder.stem, config.encoder.width))
    width = feature_dim(encoder, views.size)
    peer = lightly if turn.trainer == "lightly" else plain
    transform, head, encode, contrast = peer(config, width)
    model = nn.Sequential(encoder, head).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)  # the examples'
    loader = DataLoader(
        ImageFolder(turn.images, transform),
        config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=turn.workers,
        pin_memory=device.type == "cuda",
    )
    for (first, second), _ in marks.batches(supply(loader)):
        first, second = first.to(device, non_blocking=True), second.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=turn.precision == "bf16"):
            marks("forward")
            z = encode(model, first, second)
            marks("loss")
            loss = contrast(*z)
        marks("backward")
        loss.backward()
        marks("optimizer")
        optimizer.step()
        optimizer.zero_grad()
        marks("other")
    return loss.item()


Encode = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, ...]]


def lightly(config: PretrainConfig, width: int) -> tuple[Callable, nn.Module, Encode, Callable[..., Tensor]]:
    """Views, head and loss of lightly, and one pass for each view as in its examples."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    views = config.views
    transform = SimCLRTransform(
        input_size=views.size,
        cj_prob=views.jitter_p,
        cj_strength=views.jitter_strength,
        min_scale=views.crop_area[0],
        random_gray_scale=views.gray_p,
        gaussian_blur=views.blur_p,
        sigmas=views.blur_sigma,
        hf_prob=views.flip_p,
        normalize={"mean": views.mean, "std": views.std},
    )
    head = SimCLRProjectionHead(width, config.head.hidden, config.head.out)
    return transform, head, lambda model, *both: tuple(map(model, both)), NTXentLoss(config.loss.temperature)


def plain(config: PretrainConfig, width: int) -> tuple[Callable, nn.Module, Encode, Callable[..., Tensor]]:
    """torchvision's transforms, both views in one pass and the dense loss."""
    from bench.pipeline import torchvision_views  # only here: it brings much with it, and memory is measured

    view = torchvision_views(config.views)
    head = projection_head(config.head.version, width, config.head.hidden, config.head.out)
    return (
        partial(both_views, view),
        head,
        lambda model, *both: (model(torch.cat(both)),),
        lambda z: dense(z, config.loss.temperature),
    )


def both_views(view: Callable, image: Image) -> tuple[Tensor, Tensor]:
    return view(image), view(image)


def take_turn(turn: Turn, out: Path) -> dict:
    """Train; JSON of `steps_ms`, `loss` and `peak_mb`, the most memory of this process (on a GPU, of the GPU)."""
    log_every = ["--log-every", str(turn.warm + turn.steps)]  # a row makes the host wait for the device
    config = parse([*turn.arguments, *log_every, "--precision", turn.precision, "--out", str(out)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def supply(batches: Iterable) -> Iterator:
        batches = repeat(next(iter(batches))) if turn.source == "same batch" else batches
        return islice(batches, turn.warm + turn.steps)

    marks = Marks(device)
    loss = (train_ours if turn.trainer == "ours" else train_peer)(turn, config, marks, supply)
    if not math.isfinite(loss):
        raise RuntimeError(f"{turn.trainer} in {turn.precision} ended with a loss of {loss}: nothing to be compared")
    on_gpu = device.type == "cuda"
    peak_mb = torch.cuda.max_memory_allocated(device) / 1e6 if on_gpu else peak_resident_mb()
    return {"steps_ms": marks.steps_ms()[turn.warm :], "loss": loss, "peak_mb": peak_mb}


if __name__ == "__main__":
    print(json.dumps(take_turn(Turn(**json.loads(sys.argv[1])), Path(sys.argv[2]))))
