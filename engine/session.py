"""One process of a run: device, ranks, precision, threads and console. The only file that imports accelerate."""

import ctypes
import os
import shutil
import sys
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import DynamoBackend, broadcast_object_list, set_seed
from rich.console import Console
from torch import Tensor, nn

from .common import UserError, available_cores
from .convolution import multiply_small_maps
from .cuda_graph import GraphedForward
from .run_folder import run_folder

T = TypeVar("T")
RANK_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for each other before the run fails. NCCL's default of ten minutes is shorter than what one rank
may need for a checkpoint on slow storage or a shard from a slow server, while the others are in the next collective."""

OTHER_PARALLELISM = [f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")]
"""Variables that the launcher sets for configurations under which accelerate would wrap or shard the network."""


class Session:
    """Everything that depends on where a script runs, shared by all scripts.

    Args:
        precision: "bf16", "fp32" (on a GPU without TF32, for the whole process), or "auto" for bf16 where the hardware
            multiplies in it. With "bf16" and "auto", what stays in float32 is computed as torch is set up to.
        seed: seed of Python, NumPy and torch on every rank.
        compile: whether `to_device` compiles networks; refused where no C++ compiler is installed.
        cuda_graph: whether networks that `to_device` returns replay CUDA graphs in training, see `engine.cuda_graph`;
            refused without a GPU and with several processes.

    Attributes:
        device: device of this rank.
        rank, world_size: number of this process and of all processes.
        bf16: whether `autocast` computes in bfloat16.
        dtype: bfloat16 or float32: what `autocast` computes in.
        out, resume_from: run folder and checkpoint, once `open_run` was called.
    """

    def __init__(self, precision: str = "auto", seed: int = 0, compile: bool = False, cuda_graph: bool = False):
        for name in OTHER_PARALLELISM:
            if os.environ.get(name, "").lower() in ("1", "true", "yes"):
                raise UserError(
                    f"Only data parallelism is supported, but the configuration of accelerate sets {name}; answer "
                    "`accelerate config` again, or use `accelerate launch --multi_gpu --config_file OTHER`."
                )
        self.accelerator = Accelerator(
            mixed_precision="no",  # `autocast` is opened around forward passes alone, never around the loss
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=RANK_TIMEOUT),
            ],
        )
        if self.accelerator.gradient_accumulation_steps != 1:  # from the environment; it would divide every gradient
            raise UserError(
                "Gradient accumulation would lose negatives and is not supported; unset "
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS and use --micro-batch."
            )
        if self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:  # it would rename every weight
            raise UserError(
                "A compiler chosen by accelerate (ACCELERATE_DYNAMO_BACKEND or --dynamo_backend) is not supported; "
                "unset it and use --compile."
            )
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.compile, self.cuda_graph, self.console = compile, cuda_graph, Console()
        if cuda_graph and self.device.type != "cuda":
            raise UserError("--cuda-graph needs an NVIDIA GPU; omit the option on a CPU.")
        if cuda_graph and self.world_size > 1:  # a graph would hold batch norm's collectives, but not DDP's
            raise UserError("--cuda-graph works in one process only; omit the option or start one process.")
        if self.device.type == "cpu":
            torch.set_num_threads(available_cores())  # the launcher restricts each process to one thread
            keep_freed_memory()
            if compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
                raise UserError("--compile needs a C++ compiler on a CPU; install g++ or omit the option.")
        torch.backends.cudnn.benchmark = True  # most steps have the same shapes
        if precision == "fp32":  # cuDNN's default is TF32; the loss follows the setting of matmul
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.bf16 = precision == "bf16" or (precision == "auto" and computes_in_bf16(self.device))
        # if the hardware of all ranks does, because they must agree
        self.bf16 = self.mean(torch.tensor(float(self.bf16), device=self.device)).item() == 1
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        set_seed(seed)

    def open_run(self, out: str, resume: str, name: str, dry_run: bool = False) -> None:
        """Choose the run folder (`out`) and the checkpoint to resume from (`resume_from`), None for a new run.

        Args:
            out: --out; "" for runs/<name>-<time>, or for the folder of the run that `resume` names.
            resume: --resume.
            name: of the default folder.
            dry_run: use a temporary folder instead, which is deleted at the end of the process.

        Raises:
            UserError: the folder is in use, cannot be written or holds something other than a run that can be resumed.
        """
        chosen: list = [None]
        if self.is_main and dry_run:
            self.temporary = TemporaryDirectory(prefix="streamclr-dry-run-")
            out, resume = self.temporary.name, "none"
        if self.is_main:  # for all ranks: clocks and views of a network folder differ
            default = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
            named = bool(out) or resume not in ("auto", "none")
            for number in range(1, 2 if named else 100):  # jobs of a sweep may start in the same second
                try:
                    chosen = [run_folder(out, resume, default if number == 1 else f"{default}-{number}")]
                    break
                except (UserError, OSError) as error:
                    chosen = [error]
        (result,) = broadcast_object_list(chosen)
        if isinstance(result, Exception):
            raise result
        self.out, self.resume_from = result

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def print(self, content: object) -> None:
        """Print a text or a table on rank 0; paths in a text are neither wrapped nor taken for markup."""
        if self.is_main:
            self.console.print(content, markup=False, soft_wrap=isinstance(content, str))

    def create_tracker(self, kind: str, **options: Any) -> GeneralTracker:
        """Create one of accelerate's experiment trackers, not yet started; `options` are those of its class.

        `Accelerator.init_trackers` would start all of them or none, and `end_training` would end the process group too.
        """
        return LOGGER_TYPE_TO_CLASS[kind](**options)

    def log(self, text: str) -> None:
        """Print a line with the time of day on rank 0; the terminal wraps it, so that commands in it can be copied."""
        if self.is_main:
            self.console.print(f"{time.strftime('%H:%M:%S')} {text}", soft_wrap=True, markup=False)

    def print_json(self, record: dict[str, Any]) -> None:
        """Print a record as JSON on rank 0."""
        if self.is_main:
            self.console.print_json(data=record)

    def autocast(self) -> torch.autocast:
        """Context in which forward passes run in the precision of the session."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def to_device(self, module: nn.Module, view_sizes: int = 1) -> nn.Module:
        """Move a module to the device in channels-last layout; compile it and capture CUDA graphs as configured.

        Args:
            module: its forward maps views to tensors.
            view_sizes: number of sizes of views in training; with several, each is compiled by itself.
        """
        module = module.to(self.device, memory_format=torch.channels_last)
        if self.device.type == "cpu" and self.bf16 and torch.cpu.get_capabilities().get("amx_bf16"):
            multiply_small_maps(module)
        if self.device.type == "cpu" and not self.compile:
            from .batch_norm import fuse_batch_norm  # Numba takes a second to import

            fuse_batch_norm(module)
        # in place, so that names in checkpoints do not change; hooks of the module stay outside, or would break graphs
        if self.compile:
            static = view_sizes > 1  # or torch compiles the second size for all sizes, which is slower
            module.forward = torch.compile(module.forward, dynamic=False if static else None)
            if static:  # at most four graphs per size: slices of two lengths, with and without gradients
                limit = torch._dynamo.config.recompile_limit
                torch._dynamo.config.recompile_limit = max(limit, 4 * view_sizes)
        if self.cuda_graph:
            module.forward = GraphedForward(module)
        return module

    def distribute(self, module: nn.Module) -> nn.Module:
        """Wrap a module in DistributedDataParallel if there are several ranks."""
        return self.accelerator.prepare_model(module)

    def no_sync(self, module: nn.Module) -> AbstractContextManager:
        """Context in which backward passes through `module` do not average gradients over ranks."""
        return self.accelerator.no_sync(module)

    def from_rank_0(self, value: T) -> T:
        """The object that rank 0 passes, on every rank: what ranks choose by their own hardware must not differ."""
        return broadcast_object_list([value])[0]

    def copy_to_device(self, x: Tensor) -> Tensor:
        """Copy a tensor of the host to the device; on CUDA through pinned memory, so that the host does not wait."""
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) of each rank -> (world_size * n, ...), rank-major, on every rank."""
        return self.accelerator.gather(x)

    def mean(self, x: Tensor) -> Tensor:
        """Elementwise mean over ranks."""
        return self.accelerator.reduce(x, "mean")

    def mean_of(self, values: dict[str, Tensor | float]) -> dict[str, float]:
        """Mean over ranks of every value, () each, on the host: one collective and one wait for the device."""
        # numbers are written by the device, because the host would wait for a copy of them
        scalars = [
            value if isinstance(value, Tensor) else torch.full((), float(value), device=self.device)
            for value in values.values()
        ]
        return dict(zip(values, self.mean(torch.stack(scalars)).tolist(), strict=True))

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks."""
        return self.accelerator.reduce(x, "sum")

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def keep_freed_memory() -> None:
    """Let malloc keep up to 2 GB of freed memory for the next tensors, where the C library is glibc.

    By default it returns large blocks to the system at once, so every activation of every step is made of new pages,
    which the system clears one by one when they are first written.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
        libc.mallopt(m_mmap_max, 0)
