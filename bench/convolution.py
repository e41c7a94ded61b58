"""Weight gradients of convolutions on small maps: torch's against one matrix product.

    python -m bench.convolution                     write bench/results/convolution.csv

Each shape is a batch of views and a 3x3 convolution in the last layers of a ResNet, in bfloat16 on a CPU with AMX, for
which engine/convolution.py is; `used` tells whether it replaces torch there. Only the gradient of the weights is timed.
`ratio` is the time of torch over that of `MultipliedGradient`, whose floor is the product without its patches.
"""

import argparse
import statistics

import torch

from bench.harness import environment, interleave, percentiles_ms, show, write_rows
from common import available_cores
from engine.convolution import MultipliedGradient, is_small
from engine.session import keep_freed_memory

CHANNELS_AND_SIDES = [
    (32, 4),
    (64, 2), (64, 3), (64, 4), (64, 6),
    (96, 5),
    (128, 2), (128, 3), (128, 4), (128, 6),
    (256, 4), (256, 7), (256, 9),
    (512, 1), (512, 2), (512, 4), (512, 7), (512, 13),
]  # fmt: skip
"""Input and output channels, and side of the map."""


def measure(channels: int, side: int, views: int, seconds: float) -> dict[str, object]:
    """Row of one convolution."""
    torch.manual_seed(0)

    def random(n: int, height: int, width: int) -> torch.Tensor:
        return torch.randn(n, channels, height, width).bfloat16().contiguous(memory_format=torch.channels_last)

    x, grad, weight = random(views, side, side), random(views, side, side), random(channels, 3, 3).requires_grad_()
    torchs = torch.nn.functional.conv2d(x, weight, padding=1)
    product = MultipliedGradient.apply(x, weight, (1, 1), (1, 1))
    rows, patches = torch.randn(views * side**2, channels).bfloat16(), torch.randn(views * side**2, 9 * channels)
    patches = patches.bfloat16()
    times = interleave(
        {
            "torch": lambda: torch.autograd.grad(torchs, weight, grad, retain_graph=True),
            "product": lambda: torch.autograd.grad(product, weight, grad, retain_graph=True),
            "floor": lambda: rows.T @ patches,
        },
        seconds,
        torch.device("cpu"),
        shuffled=True,
    )

    def over(slower: str, faster: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[slower], times[faster], strict=True)), 2)

    return {
        "views": views,
        "channels": channels,
        "map": side,
        "used": is_small(side**2, channels),
        "torch_ms": percentiles_ms(times["torch"])["median_ms"],
        "product_ms": percentiles_ms(times["product"])["median_ms"],
        "floor_ms": percentiles_ms(times["floor"])["median_ms"],
        "ratio": over("torch", "product"),
        "ratio_to_floor": over("product", "floor"),
        "rounds": len(times["torch"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=512, help="views of a batch (default: 512)")
    parser.add_argument("--seconds", type=float, default=3, help="time for each shape (default: 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    keep_freed_memory()
    rows = [
        environment(torch.device("cpu"))
        | {"amx": bool(torch.cpu.get_capabilities().get("amx_bf16"))}
        | measure(channels, side, arguments.views, arguments.seconds)
        for channels, side in CHANNELS_AND_SIDES
    ]
    columns = ("channels", "map", "used", "torch_ms", "product_ms", "floor_ms", "ratio", "ratio_to_floor")
    show(rows, columns)
    print(f"written: {write_rows('convolution', rows)}")


if __name__ == "__main__":
    main()
