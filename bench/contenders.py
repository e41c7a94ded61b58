"""Contenders of bench/learning.py: `train.pretrain`, lightly, a plain PyTorch loop, and a training script in one file.

    python -m bench.contenders ENTRY OUT      one training in a separate process; ENTRY and the output are JSON

A contender trains until its schedule or its time ends, and leaves its encoder at a few points of it in OUT. These are
evaluated after the race, so that evaluation takes none of its time and disturbs no loader. Peers get their images
decoded in memory, as torchvision's CIFAR10 keeps them; what this takes does not count, nor does anything else before
the first batch.
"""

import ast
import inspect
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import train
from bench.trainers import create_peer, peer_loader, peer_step, prepare_torch
from config import PretrainConfig
from engine import checkpoint
from engine.loop import Instruments
from engine.optim import create_optimizer
from engine.schedule import create_schedule, peak_learning_rate
from model import create_encoder, encoder_spec, feature_dim
from pipeline.shards import ShardSet, open_shards
from pipeline.shards.reader import Reader
from presets import PRETRAIN, parse


@dataclass(frozen=True)
class Entry:
    """One training of one contender."""

    trainer: str
    """ours, lightly, plain or file."""
    arguments: list[str]
    """Command line of train.py with the recipe, except --epochs, --precision and --out. Its --data is a train split."""
    images: int
    """Images after which the learning rate ends. Trainers that count epochs round up."""
    seconds: float
    """Time after which training stops, if the schedule has not ended before."""
    points: int
    """Number of times at which the encoder is kept, evenly spread over the schedule; the last one is the end."""
    precision: str
    """auto, bf16 or fp32. In bf16, the peers' networks run under autocast."""
    workers: int
    """Processes of a peer's DataLoader; 0 loads in the training process."""
    file: str = ""
    """Training script of the trainer "file"."""


class Clock(Instruments):
    """Time and images of a training, which it ends in time, and its encoders.

    Attributes:
        steps: completed steps.
        stamps: seconds and images after every step; keeping an encoder does not count.
        over: whether there is no time for another step.
        points: step, seconds and images of every encoder that was kept, and the name of its file.
    """

    def __init__(self, budget_s: float, folder: Path, device: torch.device):
        self.budget_s, self.folder, self.device = budget_s, folder, device
        self.steps, self.over = 0, False
        self.stamps: list[tuple[float, int]] = []
        self.points: list[dict[str, Any]] = []
        self.start_s: float | None = None

    def plan(self, steps: int, points: int, weights: Callable[[], dict[str, Tensor]]) -> None:
        """Set the length of the schedule, the number of encoders to keep, and what returns their weights."""
        self.total_steps, self.every_steps, self.weights = steps, math.ceil(steps / points), weights

    def batches(self, loader: Iterable) -> Iterator:
        """Yield the batches of an epoch, each a tuple that ends with labels (B,) or similar, while there is time."""
        if self.start_s is None:
            self.start_s = time.perf_counter()
        for batch in loader:
            yield batch
            self.steps += 1
            self._step_ended(len(batch[-1]))
            if self.over:
                return

    def _step_ended(self, images: int) -> None:
        ends, due = self.steps == self.total_steps, self.steps % self.every_steps == 0
        if (due or ends) and self.device.type == "cuda":  # at other steps the host does not wait for the device
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.start_s
        self.stamps.append((seconds, images + (self.stamps[-1][1] if self.stamps else 0)))
        # two steps ahead, because train.py takes one more if the time is up at the end of an epoch
        self.over = ends or seconds + 2 * seconds / self.steps > self.budget_s
        if due and not self.over:
            self.keep(self.weights())
            self.start_s += time.perf_counter() - self.start_s - seconds

    def keep(self, weights: dict[str, Tensor]) -> None:
        """Write the encoder as it is after the last step.

        Raises:
            RuntimeError: a weight is not finite.
        """
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise RuntimeError(f"The training diverged within {self.steps} steps, so it is not compared.")
        name = f"{self.steps:08d}.safetensors"
        save_file({key: weight.detach().cpu().contiguous() for key, weight in weights.items()}, self.folder / name)
        seconds, images = self.stamps[-1]
        self.points.append({"step": self.steps, "seconds": seconds, "images": images, "file": name})


def train_ours(entry: Entry, config: PretrainConfig, clock: Clock, shards: ShardSet) -> dict[str, Any]:
    """Run `train.pretrain`. Its encoder at a point is that of the checkpoint which it writes there."""
    steps_per_epoch = len(shards) // config.batch_size
    epochs = math.ceil(entry.images / (steps_per_epoch * config.batch_size))
    out = Path(config.out)

    def newest() -> dict[str, Tensor]:
        tensors, _ = checkpoint.load(checkpoint.find(out))
        encoder = "model/encoder."
        return {name.removeprefix(encoder): tensor for name, tensor in tensors.items() if name.startswith(encoder)}

    clock.plan(epochs * steps_per_epoch, entry.points, newest)
    views = replace(config.views, size_schedule=stretched(config.views.phases, config.epochs, epochs))
    checkpoints = replace(config.checkpoint, every_steps=clock.every_steps)
    evaluation = replace(config.eval, knn_every=0, baselines=False)  # it would take time of the race, which has its own
    config = replace(config, epochs=epochs, views=views, report=False, checkpoint=checkpoints, eval=evaluation)
    train.pretrain(config, clock)
    clock.keep(load_file(out / "encoder.safetensors"))
    return described(config)


def stretched(phases: list[tuple[int, int]], old: int, new: int) -> tuple[str, ...]:
    """A schedule of sizes of a run of `old` epochs for one of `new`, see `AugmentConfig.size_schedule`.

    Its ends are rounded down, so a schedule that leaves epochs at full size still does, and one that fills the run too.
    """
    ends = [0, *(end * new // old for end in accumulate(epochs for _, epochs in phases))]
    lengths = (end - start for start, end in pairwise(ends))
    return tuple(f"{size}:{epochs}" for (size, _), epochs in zip(phases, lengths, strict=True) if epochs)


def train_peer(entry: Entry, config: PretrainConfig, clock: Clock, shards: ShardSet) -> dict[str, Any]:
    """Run lightly's loop or a plain one, see `bench.trainers`; the learning rate follows a cosine over the steps."""
    prepare_torch(clock.device, entry.precision)
    torch.manual_seed(config.seed)
    model, peer = create_peer(entry.trainer, config, clock.device)
    peer = replace(peer, contrast=partial(in_float32, peer.contrast))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    steps = math.ceil(entry.images / config.batch_size)
    schedule = create_schedule(config.optim, config.batch_size, 1, steps)
    groups = [{"params": weights, "weight_decay": config.optim.weight_decay}]  # biases decay too, as in lightly's
    optimizer = create_optimizer(config.optim, groups, schedule(0))
    loader = peer_loader(ImagesInMemory(shards, peer.transform), config.batch_size, entry.workers, clock.device)
    clock.plan(steps, entry.points, model[0].state_dict)
    while not clock.over:
        for views, _ in clock.batches(loader):
            for group in optimizer.param_groups:
                group["lr"] = schedule(clock.steps)
            peer_step(model, peer, optimizer, views, entry.precision, mark=lambda part: None)
    clock.keep(model[0].state_dict())
    return described(replace(config, views=config.views.full_size))  # the only one that peers see


def in_float32(contrast: Callable[..., Tensor], *projections: Tensor) -> Tensor:
    """Loss of projections outside autocast, which would round their similarities to bfloat16."""
    with torch.autocast(projections[0].device.type, enabled=False):
        return contrast(*(z.float() for z in projections))


def train_file(entry: Entry, config: PretrainConfig, clock: Clock, shards: ShardSet) -> dict[str, Any]:
    """Run a training script in one file, github.com/dkobak/simclr-cifar10 or one of its form, up to its evaluation.

    The file keeps its recipe, its views and its loop. What it imports or sets under these names is replaced: CIFAR10
    by the images, DataLoader by a timed one, resnet18 to resnet50 by the encoder, and `device`, N_EPOCHS and
    N_CPU_WORKERS.

    Raises:
        RuntimeError: the file does not train on such a DataLoader.
    """
    prepare_torch(clock.device, entry.precision)
    torch.manual_seed(config.seed)
    encoder = create_encoder(encoder_spec(config.encoder, config.views.size))
    epochs = math.ceil(entry.images / len(shards))

    class TimedLoader(DataLoader):
        def __init__(self, dataset: Dataset, **options: Any):
            super().__init__(dataset, persistent_workers=entry.workers > 0, **options)

        def __iter__(self) -> Iterator:
            if not clock.steps:
                clock.plan(epochs * len(self), entry.points, encoder.state_dict)
            yield from clock.batches(super().__iter__())
            if clock.over:
                raise TimeIsUp

    replaced = {
        "CIFAR10": lambda transform, **_: ImagesInMemory(shards, transform),
        "DataLoader": TimedLoader,
        "device": clock.device.type,
        "N_EPOCHS": epochs,
        "N_CPU_WORKERS": entry.workers,
    }
    features = feature_dim(encoder, config.views.size)
    for name in ("resnet18", "resnet34", "resnet50"):
        replaced[name] = lambda **_: Backbone(encoder, features, entry.precision)
    names: dict[str, Any] = {}
    with suppress(TimeIsUp):
        for statement in ast.parse(Path(entry.file).read_text()).body:
            exec(compile(ast.Module([statement], []), entry.file, "exec"), names)
            names |= replaced
    if not clock.steps:
        raise RuntimeError(f"{entry.file} did not train on a DataLoader of CIFAR10.")
    clock.keep(encoder.state_dict())
    numbers = {name: value for name, value in names.items() if name.isupper() and type(value) in (int, float)}
    numbers |= {
        argument.name: argument.default
        for function in filter(inspect.isfunction, names.values())
        for argument in inspect.signature(function).parameters.values()
        if argument.name == "temperature"
    }
    recipe = ", ".join(f"{name} {value:g}" for name, value in numbers.items() if name not in replaced)
    # its views are not normalized
    return {"batch": names["BATCH_SIZE"], "mean": [0.0] * 3, "std": [1.0] * 3, "recipe": recipe}


class TimeIsUp(Exception):
    """Ends the training loop of a file."""


class Backbone(nn.Module):
    """The encoder in place of a torchvision ResNet; its layers are not those that a file may exchange.

    Args:
        encoder: (B, 3, S, S) -> h (B, features).
        features: width of h, which files read from the layer `fc`.
        precision: bf16 to run the encoder under autocast.
    """

    def __init__(self, encoder: nn.Module, features: int, precision: str):
        super().__init__()
        self.encoder, self.precision, self.fc = encoder, precision, nn.Linear(features, 1)

    def forward(self, views: Tensor) -> Tensor:
        with torch.autocast(views.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.encoder(views).float()


class ImagesInMemory(Dataset):
    """Decoded 8-bit RGB images of a shard set with their labels, like torchvision's CIFAR10."""

    def __init__(self, shards: ShardSet, transform: Callable[[Image.Image], Any]):
        self.transform, self.label = transform, shards.index["label"].tolist()
        reader, numbers = Reader(shards), np.arange(len(shards))
        self.pixels = [
            np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
            for first in range(0, len(shards), 1024)
            for encoded in reader(numbers[first : first + 1024])
        ]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.pixels[i])), self.label[i]


def described(config: PretrainConfig) -> dict[str, Any]:
    """Batch size, normalization and recipe of a trainer that has a configuration."""
    optim, views, head = config.optim, config.views, config.head
    recipe = (
        f"{optim.name}, lr {peak_learning_rate(optim.lr, config.batch_size, optim.scaling):g}, "
        f"momentum {optim.momentum:g}, decay {optim.weight_decay:g}, cosine, temperature {config.loss.temperature:g}, "
        f"crop {views.crop_area[0]:g} to {views.crop_area[1]:g}, jitter {views.jitter_strength:g}, "
        f"gray {views.gray_p:g}, blur {views.blur_p:g}, head {head.hidden} to {head.out}"
    )
    recipe += "".join(f", {size} px for {epochs} epochs" for size, epochs in views.phases)
    return {"batch": config.batch_size, "mean": views.mean, "std": views.std, "recipe": recipe}


TRAINERS = {"ours": train_ours, "lightly": train_peer, "plain": train_peer, "file": train_file}


def run(entry: Entry, out: Path) -> dict[str, Any]:
    """Train; returns `stamps` and `points` of the clock, `planned_steps`, and what `described` returns."""
    arguments = [*entry.arguments, "--precision", entry.precision, "--out", str(out / "run")]
    config = parse(PRETRAIN, arguments, prog="train.py")
    shards = open_shards(config.data)
    views = config.views.for_images(shards.pixel_format, shards.manifest.get("statistics", {}))
    clock = Clock(entry.seconds, out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    about = TRAINERS[entry.trainer](entry, replace(config, views=views), clock, shards)
    return {"stamps": clock.stamps, "points": clock.points, "planned_steps": clock.total_steps, **about}


if __name__ == "__main__":
    print(json.dumps(run(Entry(**json.loads(sys.argv[1])), Path(sys.argv[2]))))
