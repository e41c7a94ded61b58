"""Temperature of the kernels: a number, or a tensor on the device that the host never reads.

Kernels over tiles of pairs exist in two forms, chosen by MIN_TEMPERATURE: see ONLINE in the package docstring.
"""

import triton
import triton.language as tl
from torch import Tensor

# 1 / (log of the largest float32 - log of a million terms), rounded up to a float32: all comparisons agree.
MIN_TEMPERATURE = tl.constexpr(878 / 2**16)


@triton.jit
def load_temperature(temperature, TAU_IS_POINTER: tl.constexpr):
    return tl.load(temperature).to(tl.float32) if TAU_IS_POINTER else temperature


@triton.jit
def is_online(temperature, TAU_IS_POINTER: tl.constexpr):
    return load_temperature(temperature, TAU_IS_POINTER) < MIN_TEMPERATURE


def is_on_host(temperature: Tensor) -> bool:
    return temperature.device.type == "cpu"


def temperature_argument(temperature: Tensor) -> float | Tensor:
    """The float32 number of a tensor on the host; the tensor itself on a device, where reading would synchronize."""
    return temperature.float().item() if is_on_host(temperature) else temperature


def launch_forms(temperature: Tensor) -> tuple[dict[str, bool], ...]:
    """Constants of every launch of a kernel over tiles.

    A temperature on the device launches both forms; the one that does not apply returns at once.
    """
    if is_on_host(temperature):
        return ({"ONLINE": temperature_argument(temperature) < MIN_TEMPERATURE.value, "TAU_IS_POINTER": False},)
    return tuple({"ONLINE": online, "TAU_IS_POINTER": True} for online in (False, True))
