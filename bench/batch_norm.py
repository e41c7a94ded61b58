"""Batch norm with ReLU in training on a CPU: torch's separate operations against the kernels of engine/batch_norm.py.

    python -m bench.batch_norm                      write bench/results/batch_norm.csv

Each row is the forward and backward pass of batch norm and ReLU, with or without the addition of a shortcut, on a batch
of views in channels-last layout. `ratio` is the time of torch over that of the kernels. The floor is the time of
copying as many bytes as two passes in each direction have to read and write.
"""

import argparse
import statistics

import torch

from bench.harness import environment, interleave, percentiles_ms, show, write_rows
from common import available_cores
from engine.batch_norm import BatchNormReLU2d
from engine.session import keep_freed_memory

CHANNELS_AND_SIDES = [(16, 24), (32, 12), (64, 6), (128, 3), (32, 24), (64, 24), (64, 12), (256, 6), (256, 14)]
"""Channels and side of the map: ResNet-18 at a quarter of its width on 24 px, then wider maps."""
TRANSFERS = {False: 8, True: 11}
"""Activations read or written: forward x, x and y; backward x and dy twice, and dx. An addition also reads the shortcut
forward, and y backward, and writes and reads its gradient instead of the second dy."""


def measure(channels: int, side: int, views: int, dtype: torch.dtype, added: bool, seconds: float) -> dict[str, object]:
    """Row of one batch."""
    torch.manual_seed(0)

    def random() -> torch.Tensor:
        return torch.randn(views, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)

    x, shortcut, grad, copy = random().requires_grad_(), random().requires_grad_(), random(), random()
    plain, fused = torch.nn.BatchNorm2d(channels), BatchNormReLU2d(channels)

    def separate() -> None:
        y = plain(x)
        if added:
            y += shortcut
        differentiate(y.relu_(), plain)

    def together() -> None:
        differentiate(fused(x, shortcut if added else None), fused)

    def differentiate(y: torch.Tensor, norm: torch.nn.BatchNorm2d) -> None:
        torch.autograd.grad(y, [x, norm.weight, norm.bias] + [shortcut] * added, grad)

    def copies() -> None:
        for _ in range(TRANSFERS[added] // 2):
            copy.copy_(grad)

    times = interleave(
        {"torch": separate, "kernels": together, "copies": copies},
        seconds,
        torch.device("cpu"),
        shuffled=True,
    )
    floor = [TRANSFERS[added] / (2 * (TRANSFERS[added] // 2)) * t for t in times["copies"]]

    def over(slower: list[float], faster: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(slower, faster, strict=True)), 2)

    return {
        "dtype": str(dtype).removeprefix("torch."),
        "views": views,
        "channels": channels,
        "map": side,
        "shortcut": added,
        "torch_ms": percentiles_ms(times["torch"])["median_ms"],
        "kernels_ms": percentiles_ms(times["kernels"])["median_ms"],
        "floor_ms": percentiles_ms(floor)["median_ms"],
        "ratio": over(times["torch"], times["kernels"]),
        "ratio_to_floor": over(times["kernels"], floor),
        "rounds": len(floor),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=512, help="views of a batch (default: 512)")
    parser.add_argument("--seconds", type=float, default=3, help="time for each row (default: 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    keep_freed_memory()
    rows = [
        environment(torch.device("cpu")) | measure(*shape, arguments.views, dtype, added, arguments.seconds)
        for dtype in (torch.bfloat16, torch.float32)
        for shape in CHANNELS_AND_SIDES
        for added in (False, True)
    ]
    columns = ("dtype", "channels", "map", "shortcut", "torch_ms", "kernels_ms", "floor_ms", "ratio", "ratio_to_floor")
    show(rows, columns)
    print(f"written: {write_rows('batch_norm', rows)}")


if __name__ == "__main__":
    main()
