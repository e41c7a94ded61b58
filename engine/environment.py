"""What a run or a benchmark was measured on: hardware and versions."""

import platform
import resource
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .common import available_cores

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "accelerate",
    "opencv-python-headless",
    "kornia",
    "numba",
    "nvidia-dali-cuda120",
)


def environment(device: torch.device, world_size: int) -> dict[str, dict[str, Any]]:
    """Hardware and versions, both by name; packages that are not installed are left out."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    hardware = {"device": device_name(device), "processes": world_size, "CPU cores per process": available_cores()}
    return {"hardware": hardware, "versions": versions}


def device_name(device: torch.device) -> str:
    """Name of the GPU, or model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kind = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} {kind}"


def peak_resident_mb() -> float:
    """Peak resident memory of this process in MB.

    getrusage's ru_maxrss is only a fallback: on Linux it starts at the peak of the parent process.
    """
    with suppress(OSError, ValueError):  # not on Linux, or on a kernel without this line
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
