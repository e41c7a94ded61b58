"""Part "correctness": the loss, the optimizers, training, image files and several ranks on the device."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import files, ranks, training
from bench.gpu.checks import Case, Check, Outcome, Setup, largest
from bench.implementations import dense, projections
from bench.rates import matmul_precision
from engine.nonfinite import NonFiniteGuard
from engine.optim import OptimConfig, create_optimizer, parameter_groups
from loss import nt_xent
from loss.common import OPERATOR_NAMESPACE

ARITHMETIC = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
"""Name -> dtype of z and precision of the products of a float32 z."""
SHAPES = [
    (512, 128, 0.1),
    (8192, 128, 0.1),
    (2, 24, 0.1),
    (130, 37, 0.01),
    (2048, 256, 0.05),
    (1030, 128, 1.0),
    (8192, 512, 0.01),
    (514, 64, 0.05),
    (4096, 200, 1.0),
    (4098, 128, 0.08),
    (66, 512, 0.1),
    (8192, 64, 1.0),
    (6, 96, 0.02),
]
"""(M, D, temperature): every magnitude of each, batches that fill all tiles and batches that do not."""
SMALL_SHAPES = [(2, 24, 0.1), (34, 37, 0.01), (32, 64, 1.0)]


def z_of(m: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`projections` (M, D) with norms from 0.3 to 30.

    Every fourth sample resembles another one; without such negatives, the loss at a low temperature is 0.
    """
    random = torch.Generator().manual_seed(1)
    z = projections(m, d, torch.float32, torch.device("cpu")).unflatten(0, (2, -1))  # (2, M / 2, D)
    twins = z[:, 1::4]
    z[:, 1::4] = z[:, ::4][:, : twins.shape[1]] + 0.27 * torch.randn(twins.shape, generator=random)
    scale = torch.empty(m, 1).uniform_(0.3, 30, generator=random)
    return (z.flatten(0, 1) * scale).to(device, dtype)


def loss_and_gradients(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, tau: float) -> dict[str, Tensor]:
    """Loss, dL/dz and dL/dtau; the loss is scaled like in mixed precision, or float16 gradients would vanish.

    The temperature stays on the host: a tensor on the device would compile every kernel in two forms.
    """
    z = z.detach().clone().requires_grad_()
    temperature = torch.tensor(tau, dtype=torch.promote_types(z.dtype, torch.float32), requires_grad=True)
    value = loss(z, temperature)
    (value * 1024).backward()
    dz = z.grad.to(temperature.dtype)  # before the division, whose result float16 would round to multiples of 6e-8
    return {"loss": value.detach(), "dL/dz": dz / 1024, "dL/dtau": temperature.grad / 1024}


def loss_accuracy(setup: Setup) -> Iterator[Case]:
    """Errors against float64 are at most twice those of the dense form in the same arithmetic."""
    names = ("fp16", "fp32") if setup.small else ARITHMETIC  # Triton's interpreter multiplies bfloat16 as integers
    for m, d, tau in SMALL_SHAPES if setup.small else SHAPES:
        for name in names:
            yield Case(f"M {m}, D {d}, tau {tau}, {name}", partial(compare_with_float64, setup, m, d, tau, name))


def compare_with_float64(setup: Setup, m: int, d: int, tau: float, name: str) -> Iterator[Outcome]:
    dtype, precision = ARITHMETIC[name]
    z, tau = z_of(m, d, dtype, setup.device), torch.tensor(tau).item()  # its rounding is not part of the error
    truth = loss_and_gradients(partial(nt_xent, impl="reference"), z.double(), tau)
    ours = loss_and_gradients(partial(nt_xent, impl="triton", precision=precision), z, tau)
    with matmul_precision(precision):
        usual = loss_and_gradients(dense_as_in_autocast, z, tau)
    # The dense form's error may be small by chance, hence slack: similarities are rounded by an ulp of 1 / tau,
    # differently in both passes. In 16 bits the gradient is rounded too, and so are the weights of its product, whose
    # rounding averages out over the rows.
    eps = 2.0**-10 if precision == "tf32" else torch.finfo(torch.float32).eps
    half_ulp = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
    norms = {what: true.norm().item() for what, true in truth.items()}
    slack = {
        "loss": eps / tau,
        "dL/dz": (2 * eps / tau + half_ulp) * norms["dL/dz"] + 8 * torch.finfo(torch.float32).tiny,
        "dL/dtau": 2 * eps / tau * norms["dL/dtau"] + (eps + half_ulp / math.sqrt(m)) / tau**2,
    }
    for what, true in truth.items():
        error, theirs = ((found[what].double() - true).norm().item() for found in (ours, usual))
        yield Outcome(what, error / (2 * theirs + 2 * slack[what]), 1, f"error {error:.2e}, dense form {theirs:.2e}")


def dense_as_in_autocast(z: Tensor, temperature: Tensor) -> Tensor:
    """Dense form on unit rows rounded to z's dtype, with the rest in float32."""
    return dense(normalize(z, dim=1).float(), temperature)


@contextmanager
def no_host_waits(device: torch.device) -> Iterator[None]:
    """Context in which an operation that makes the host wait for the GPU raises; without a GPU nothing can wait."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loss_tensor_temperature(setup: Setup) -> Iterator[Case]:
    """A temperature on the device: never read by the host, same result as the number, nan where it is not positive."""
    for tau in (0.1, 0.01):
        yield Case(f"tau {tau}", partial(compare_temperatures, setup, tau))
    if setup.device.type == "cuda":
        yield Case("tau -1", partial(invalid_temperature, setup))


def compare_temperatures(setup: Setup, tau: float) -> Iterator[Outcome]:
    z = z_of(34 if setup.small else 1026, 64, torch.float32, setup.device).requires_grad_()
    tau = torch.tensor(tau).item()
    (by_number,) = torch.autograd.grad(expected := nt_xent(z, tau, impl="triton"), z)
    tensor = torch.tensor(tau, device=setup.device)
    nt_xent(z, tensor, impl="triton").backward()  # compiles; loading a kernel waits for the device
    z.grad = None
    with no_host_waits(setup.device):
        loss = nt_xent(z, tensor, impl="triton")
        loss.backward()
    yield Outcome("loss", (loss - expected).abs().item(), 1e-6 * max(1, expected.item()))
    # A number may select the triangle, a tensor on the device does not. log2 of a sum, about ten, is accurate to 2^-22
    # of that, and scales all weights of the row.
    yield Outcome("dL/dz", ((z.grad - by_number).norm() / by_number.norm()).item(), 5e-6)


def invalid_temperature(setup: Setup) -> Iterator[Outcome]:
    loss = nt_xent(z_of(34, 64, torch.float32, setup.device), torch.tensor(-1.0, device=setup.device), impl="triton")
    yield Outcome("loss is not nan", float(not loss.isnan().item()), 0)


def loss_bit_identity(setup: Setup) -> Iterator[Case]:
    """The same bits from every run."""
    for m, d, tau in SMALL_SHAPES[1:2] if setup.small else SHAPES[:6]:
        for name in ("fp16",) if setup.small else ("bf16", "fp32"):
            yield Case(f"M {m}, D {d}, tau {tau}, {name}", partial(repeat_loss, setup, m, d, tau, name))


def repeat_loss(setup: Setup, m: int, d: int, tau: float, name: str) -> Iterator[Outcome]:
    dtype, precision = ARITHMETIC[name]
    z, loss = z_of(m, d, dtype, setup.device), partial(nt_xent, impl="triton", precision=precision)
    first = loss_and_gradients(loss, z, tau)
    differing = dict.fromkeys(first, 0)
    for _ in range(2 if setup.small else 20):
        for what, value in loss_and_gradients(loss, z, tau).items():
            differing[what] += not torch.equal(value, first[what])
    for what, count in differing.items():
        yield Outcome(f"runs with another {what}", count, 0)


class RecordedCalls(TorchDispatchMode):
    """Records every call of the loss's custom operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == OPERATOR_NAMESPACE:
            self.calls.setdefault(function.name(), (function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def loss_opcheck(setup: Setup) -> Iterator[Case]:
    """torch.library.opcheck of every custom operator, with the arguments of a real call."""
    z = z_of(34, 24, torch.float32, setup.device).requires_grad_()
    with RecordedCalls() as recorded:
        nt_xent(z, 0.1, impl="triton").backward()
    backward = any("grad" in name for name in recorded.calls)
    yield Case("operators", lambda: [Outcome("none of the backward pass was called", float(not backward), 0)])
    for name, call in recorded.calls.items():
        yield Case(name, partial(check_operator, *call))


def check_operator(function, args: tuple, kwargs: dict) -> Iterator[Outcome]:
    detached = [arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
    found = torch.library.opcheck(function, tuple(detached), kwargs, raise_exception=False)
    for what, result in found.items():
        yield Outcome(what, float(result != "SUCCESS"), 0, "" if result == "SUCCESS" else str(result)[:300])


def loss_compiled(setup: Setup) -> Iterator[Case]:
    """torch.compile without graph breaks gives the eager result."""
    for name in ("fp32",) if setup.small else ("bf16", "fp32"):
        yield Case(name, partial(compare_compiled, setup, name))


def compare_compiled(setup: Setup, name: str) -> Iterator[Outcome]:
    dtype, precision = ARITHMETIC[name]
    loss = partial(nt_xent, impl="triton", precision=precision)
    z = z_of(34 if setup.small else 1024, 128, dtype, setup.device)
    backend = "aot_eager" if setup.small else "inductor"  # a C++ compiler would take a minute
    compiled = torch.compile(lambda z, temperature: loss(2 * z, temperature), fullgraph=True, backend=backend)
    eager = loss_and_gradients(lambda z, temperature: loss(2 * z, temperature), z, 0.1)
    for what, value in loss_and_gradients(compiled, z, 0.1).items():
        difference = (value.double() - eager[what].double()).norm() / eager[what].double().norm()
        yield Outcome(what, difference.item(), 1e-6)


OPTIMIZERS = [
    ("lars", 0.9),
    ("lars", 0.0),
    ("sgd", 0.9),
    ("sgd", 0.0),
    ("nesterov", 0.9),
    ("adamw", 0.9),
    ("muon", 0.95),
]
"""(name, momentum)."""
INFINITE_STEP = 2


def optimizers(setup: Setup) -> Iterator[Case]:
    """Five steps, the second with an infinite gradient and activation, give the CPU's weights and statistics."""
    for name, momentum in OPTIMIZERS:
        yield Case(f"{name}, momentum {momentum}", partial(compare_with_cpu, setup, name, momentum))


def compare_with_cpu(setup: Setup, name: str, momentum: float) -> Iterator[Outcome]:
    torch.manual_seed(0)
    # batch norm comes first, because convolutions on a GPU may round to TF32
    here = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    there = deepcopy(here).to(setup.device, memory_format=torch.channels_last)
    found = []
    for module, device in ((here, torch.device("cpu")), (there, setup.device)):
        config = OptimConfig(name, momentum=momentum)
        optimizer = create_optimizer(config, parameter_groups([module], 1e-4), lr=0.1)
        guard = NonFiniteGuard(module, [optimizer], device)
        random = torch.Generator().manual_seed(1)
        for step in range(1, 6):
            guard.before_forward()
            x = torch.randn(4, 3, 8, 8, generator=random)
            x[0, 0, 0, 0] = math.inf if step == INFINITE_STEP else 0
            with torch.no_grad():
                module(x.to(device))
            for w in module.parameters():
                w.grad = torch.randn(w.shape, generator=random).to(device)
            if step == INFINITE_STEP:
                module[1].weight.grad[0, 0, 0, 0] = math.inf
            guard.after_backward(step)
            optimizer.step()
        found.append(([*module.parameters(), *guard.buffers], guard.counts_by_name()["skipped"].item()))
    (expected, skipped), (tensors, skipped_there) = found
    pairs = [(t.detach().double().cpu(), e.detach().double()) for t, e in zip(tensors, expected, strict=True)]
    yield Outcome("weights and statistics", largest((t - e).norm() / e.norm() for t, e in pairs), 2e-6)
    yield Outcome("skipped steps", abs(skipped - 1) + abs(skipped_there - 1), 0)


CHECKS = [
    Check(loss_accuracy, 300, ("triton",)),
    Check(optimizers, 30),
    Check(loss_bit_identity, 60, ("triton",)),
    Check(loss_tensor_temperature, 30, ("triton",)),
    Check(training.host_waits, 120, training.SHARDS),
    Check(training.kill_and_resume, 90, training.SHARDS),
    Check(training.cuda_graphs, 90, training.SHARDS),
    Check(ranks.two_ranks, 60),
    Check(loss_opcheck, 60, ("triton",)),
    Check(loss_compiled, 60, ("triton",)),
    Check(files.image_files, 60, ("cv2", "numba")),  # last: damaged files may break the context
]
