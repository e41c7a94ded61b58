"""Trainers compared by bench/train_step.py: `train.pretrain`, lightly as in its examples, and a plain PyTorch loop.

    python -m bench.trainers TURN OUT      one turn in a separate process; TURN and the output are JSON

All train the encoder, the widths of the head, the augmentation, the temperature and the batch size of train.py's
arguments. Every part of every step is marked; train.py offers hooks for this (`engine.loop.Instruments`). A mark reads
the host's clock on a CPU and records an event on a GPU, which is read after the run: nothing waits for the device, and
the roughly ten marks of a step take microseconds.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise, repeat
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

import train
from bench.harness import read_metrics
from bench.implementations import dense
from config import PretrainConfig
from engine import session
from engine.environment import peak_resident_mb
from engine.loop import Instruments
from model import create_encoder, encoder_spec, feature_dim, projection_head
from presets import PRETRAIN, parse

PARTS = ("wait", "forward", "loss", "backward", "optimizer", "other")


@dataclass(frozen=True)
class Turn:
    """One run of one trainer."""

    trainer: str
    """ours, lightly or plain."""
    precision: str
    """fp32, or bf16 by autocast."""
    source: str
    """images: including reading and augmenting. resident: including augmenting. same batch: the same views in memory in
    every step."""
    arguments: list[str]
    """Command line of train.py, except --precision and --out."""
    images: str
    """Folder with the images of --data as files, one folder per class, for the peers."""
    workers: int
    """Processes of the peers' DataLoader; 0 loads in the training process."""
    warm: int
    """Warm-up steps, which are not measured."""
    steps: int
    """Measured steps."""


class Marks:
    """Starting times of the parts of all steps of a run."""

    def __init__(self, device: torch.device):
        self.device = device
        self.taken: list[tuple[str, float | torch.cuda.Event]] = []

    def __call__(self, part: str) -> None:
        """Note that `part` starts now."""
        now = torch.cuda.Event(enable_timing=True) if self.device.type == "cuda" else time.perf_counter()
        if self.device.type == "cuda":
            now.record()
        self.taken.append((part, now))

    def batches(self, batches: Iterable) -> Iterator:
        """Yield the same batches and mark the wait for each, with which a step starts."""
        iterator = iter(batches)
        while True:
            self("wait")
            batch = next(iterator, None)
            if batch is None:
                self.taken[-1] = ("end", self.taken[-1][1])  # of the last step
                return
            self("other")
            yield batch

    def steps_ms(self) -> list[dict[str, float]]:
        """Milliseconds of each of `PARTS` in every step; they add up to the step, from one wait to the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        steps = []
        for (part, start), (_, end) in pairwise(self.taken):
            if part == "wait":
                steps.append(dict.fromkeys(PARTS, 0.0))
            if part != "end":  # what follows, such as a checkpoint, is not part of a step
                ms = start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)
                steps[-1][part] += ms
        return steps


def train_ours(turn: Turn, config: PretrainConfig, marks: Marks, supply: Callable[[Iterable], Iterator]) -> float:
    """Run `train.pretrain` with its hooks; returns the mean loss of the last metrics row.

    "loss" is the forward pass of the loss, including the probe's; its gradient belongs to "backward". "other" is the
    seed, the non-finite guard, the means and the metrics rows.
    """
    train.pretrain(config, LoopMarks(marks, supply))
    rows = read_metrics(Path(config.out))
    return rows[-1]["loss"] or math.nan


class LoopMarks(Instruments):
    """Marks the parts of a step of the training loop, and replaces the loader's batches by those of `supply`."""

    def __init__(self, marks: Marks, supply: Callable[[Iterable], Iterator]):
        self.mark, self.supply = marks, supply

    def batches(self, loader: Iterable) -> Iterator:
        return self.mark.batches(self.supply(loader))


def supplied(batches: Iterable, source: str, warm: int, steps: int, device: torch.device) -> Iterator:
    """Yield the first `warm` + `steps` batches, or the first one repeated if the source is "same batch".

    A repeated batch is on the device. The peak of a GPU's memory starts after the warm-up, in which cuDNN tries
    algorithms that it then does not use.
    """
    batches = repeat(_on_device(next(iter(batches)), device)) if source == "same batch" else batches
    for step, batch in enumerate(islice(batches, warm + steps)):
        if step == warm and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield batch


def _on_device(batch: object, device: torch.device) -> object:
    """A DataLoader's batch on the device; batches of `ViewLoader` are already there."""
    if isinstance(batch, list):
        return [_on_device(part, device) for part in batch]
    return batch.to(device) if isinstance(batch, Tensor) else batch


def train_peer(turn: Turn, config: PretrainConfig, marks: Marks, supply: Callable[[Iterable], Iterator]) -> float:
    """Run lightly's example loop or a plain one; returns the last loss."""
    prepare_torch(marks.device, turn.precision)
    torch.manual_seed(config.seed)
    model, peer = create_peer(turn.trainer, config, marks.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)  # as in lightly's examples
    loader = peer_loader(ImageFolder(turn.images, peer.transform), config.batch_size, turn.workers, marks.device)
    for views, _ in marks.batches(supply(loader)):
        loss = peer_step(model, peer, optimizer, views, turn.precision, marks)
    return loss.item()


def prepare_torch(device: torch.device, precision: str) -> None:
    """Give a peer what train.py gives itself: threads where a container may use fewer cores than the machine has, and
    cuDNN's choice of algorithms and multiplication on a GPU."""
    if device.type == "cpu":
        torch.set_num_threads(session.available_cores())
        return
    torch.backends.cudnn.benchmark = True
    if precision == "fp32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def create_peer(name: str, config: PretrainConfig, device: torch.device) -> tuple[nn.Sequential, "Peer"]:
    """Encoder and head, on the device, and the other parts of a peer's step; `name` is lightly or plain."""
    encoder = create_encoder(encoder_spec(config.encoder, config.views.size))
    peer = (lightly if name == "lightly" else plain)(config, feature_dim(encoder, config.views.size))
    return nn.Sequential(encoder, peer.head).to(device), peer


def peer_loader(images: Dataset, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Shuffled full batches of a data set of (views, label); workers survive the end of an epoch."""
    return DataLoader(
        images,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def peer_step(
    model: nn.Sequential,
    peer: "Peer",
    optimizer: torch.optim.Optimizer,
    views: Sequence[Tensor],
    precision: str,
    mark: Callable[[str], None],
) -> Tensor:
    """One step of a peer on both views of a batch, each (B, 3, S, S) on the host; returns the loss ()."""
    device = next(model.parameters()).device
    first, second = (view.to(device, non_blocking=True) for view in views)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        mark("forward")
        z = peer.encode(model, first, second)
        mark("loss")
        loss = peer.contrast(*z)
    mark("backward")
    loss.backward()
    mark("optimizer")
    optimizer.step()
    optimizer.zero_grad()
    mark("other")
    return loss


@dataclass(frozen=True)
class Peer:
    """Parts of a peer's training step."""

    transform: Callable[[Image], tuple[Tensor, Tensor]]
    """image -> its two views."""
    head: nn.Module
    """Projection head."""
    encode: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, ...]]
    """(model, first views, second views) -> arguments of `contrast`."""
    contrast: Callable[..., Tensor]
    """Projections -> loss ()."""


def lightly(config: PretrainConfig, features: int) -> Peer:
    """Views, head and loss of lightly, and one forward pass per view, as in its examples."""
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
    head = SimCLRProjectionHead(features, config.head.hidden, config.head.out)
    return Peer(transform, head, lambda model, *both: tuple(map(model, both)), NTXentLoss(config.loss.temperature))


def plain(config: PretrainConfig, features: int) -> Peer:
    """torchvision's transforms, both views in one forward pass, and the dense loss."""
    from bench.pipeline import torchvision_views  # not at the top: it imports much, and memory is measured

    return Peer(
        partial(both_views, torchvision_views(config.views)),
        projection_head(config.head, features),
        lambda model, *both: (model(torch.cat(both)),),
        lambda z: dense(z, config.loss.temperature),
    )


def both_views(view: Callable, image: Image) -> tuple[Tensor, Tensor]:
    return view(image), view(image)


def take_turn(turn: Turn, out: Path) -> dict:
    """Train; returns `steps_ms`, `loss` and `peak_mb`, the peak memory of this process (on a GPU, of the GPU)."""
    log_every = ["--log-every", str(turn.warm + turn.steps)]  # the host waits for the device when a row is written
    arguments = [*turn.arguments, *log_every, "--no-report", "--precision", turn.precision, "--out", str(out)]
    config = parse(PRETRAIN, arguments, prog="train.py")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def supply(batches: Iterable) -> Iterator:
        return supplied(batches, turn.source, turn.warm, turn.steps, device)

    marks = Marks(device)
    loss = (train_ours if turn.trainer == "ours" else train_peer)(turn, config, marks, supply)
    if not math.isfinite(loss):
        raise RuntimeError(f"{turn.trainer} in {turn.precision} ended with a loss of {loss}, so it is not compared")
    on_gpu = device.type == "cuda"
    peak_mb = torch.cuda.max_memory_allocated(device) / 1e6 if on_gpu else peak_resident_mb()
    return {"steps_ms": marks.steps_ms()[turn.warm : turn.warm + turn.steps], "loss": loss, "peak_mb": peak_mb}


if __name__ == "__main__":
    print(json.dumps(take_turn(Turn(**json.loads(sys.argv[1])), Path(sys.argv[2]))))
