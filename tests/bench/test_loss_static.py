"""The shipped tiles compiled without a GPU: no spills, shared memory in range, tensor cores, no redundant work."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import ASTSource

from bench import loss_static
from bench.loss_static import (
    FORMS,
    KERNELS,
    PLAIN,
    VERSIONS,
    Case,
    compile_case,
    environment_with,
    row_kernel_resources,
    shipped,
)
from loss.triton.tiles import SHARED_BYTES, tile_for

_, RAGGED, GENERAL = FORMS
QUICK = (
    [
        Case(architecture, kernel, dtype, precision, 128, form)
        for architecture in ("sm_80", "sm_90")
        for kernel in ("lse_forward", "grad_matmul")
        for dtype, precision, form in (
            (torch.bfloat16, "tf32", PLAIN),
            (torch.bfloat16, "tf32", GENERAL),
            (torch.bfloat16, "tf32", RAGGED),
            (torch.float16, "tf32", PLAIN),
            (torch.float16, "tf32", GENERAL),
            (torch.float32, "tf32", PLAIN),
            (torch.float32, "ieee", PLAIN),
        )
    ]
    + [
        Case(architecture, kernel, torch.bfloat16, "tf32", 192, GENERAL)  # D is not a power of two: rows are padded
        for architecture in SHARED_BYTES
        for kernel in KERNELS
    ]
    + [Case("sm_90", "lse_triangle", torch.bfloat16, "tf32", 128, PLAIN)]
)
# D smaller than a block of the similarities, in full precision: closest to the limit of registers
NARROW = [
    Case(architecture, kernel, torch.float32, "ieee", width, form)
    for architecture in SHARED_BYTES
    for kernel, width in (("lse_forward", 8), ("grad_matmul", 24))
    for form in FORMS[1:]
]


def check(case, target=None):
    """Compile a case and compare resources and instruction counts with what its tile promises."""
    compiled = compile_case(case, target)
    assert compiled.stack_bytes == 0, f"{compiled.stack_bytes} bytes of registers spilled"
    assert compiled.shared_bytes <= SHARED_BYTES[case.architecture]
    if case.precision == "ieee" and case.dtype == torch.float32:
        assert compiled.tensor_core is None
    elif case.architecture == "sm_90" and case.width <= 256:
        assert compiled.tensor_core == ("wgmma" if target is None else "tcgen05.mma")
    else:
        assert compiled.tensor_core
    if target is None:
        assert compiled.programs >= case.tile.programs_for(case.form.even, case.form.online)
    if case.form == PLAIN and target is None:
        assert compiled.exps_per_pair == 1
        if compiled.gemm_units is not None:
            assert compiled.gemm_units == {"lse_forward": 1, "lse_triangle": 1, "grad_matmul": 2}[case.kernel]


@pytest.mark.parametrize(
    "case", QUICK + NARROW, ids=lambda case: "-".join(map(str, (*case[:5], case.form.even, case.form.online)))
)
def test_typical_tiles_meet_their_limits(case):
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "tau_is_pointer"), [(128, False), (37, True), (1024, True)])
def test_row_kernels_do_not_spill(dtype, width, tau_is_pointer):
    for capability in (80, 90):
        for name, (_, stack_bytes) in row_kernel_resources(dtype, width, capability, tau_is_pointer).items():
            assert stack_bytes == 0, name


def test_integer_arguments_equal_to_one_compile(monkeypatch):
    """Triton specializes integer arguments that are 1, such as the sizes of a small batch, as constants."""

    def source_of_ones(kernel, signature, constants, attributes):
        ones = {name: 1 for name, kind in signature.items() if kind == "i32" and name in ("n", "splits", "slots")}
        attributes = {at: value for at, value in attributes.items() if kernel.arg_names[at[0]] not in ones}
        return ASTSource(kernel, signature | dict.fromkeys(ones, "constexpr"), constants | ones, attributes)

    monkeypatch.setattr(loss_static, "ASTSource", source_of_ones)
    for kernel in ("lse_forward", "grad_matmul"):  # one sample has no triangle
        for width in (128, 512):
            check(Case("sm_80", kernel, torch.bfloat16, "tf32", width, GENERAL))
    row_kernel_resources(torch.float16, 37, 80, True)


@pytest.mark.soak
@pytest.mark.parametrize("case", list(shipped((8, 24, 37, 96, 192, 200, 384, 768))), ids=str)
def test_every_shipped_tile_meets_its_limits(case):
    check(case)


@pytest.mark.soak
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_triton_meets_the_limits(version):
    """The tests above, in a process that imports this version."""
    try:
        environment = environment_with(version)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"Triton {version} could not be installed: {error.stderr.strip()}")
    process = {"env": environment, "cwd": Path(__file__).parents[2], "capture_output": True, "text": True}
    imported = subprocess.run([sys.executable, "-c", "import triton; print(triton.__version__)"], **process)
    assert imported.stdout.strip() == version
    tests = "every_shipped_tile or row_kernels or integer_arguments"
    arguments = ["-p", "no:cacheprovider", "-m", "soak or not soak", "-k", tests, __file__]
    run = subprocess.run([sys.executable, "-m", "pytest", *arguments], **process)
    assert run.returncode == 0, run.stdout[-5000:]


@pytest.mark.soak
@pytest.mark.parametrize("case", [case for case in shipped() if case.architecture == "sm_90"], ids=str)
def test_hopper_tiles_compile_for_blackwell(case):
    if case.kernel == "lse_triangle":
        return  # not used there
    if case.form == PLAIN or case.width <= 128:  # uneven batches spill a few registers at larger D
        check(case, target=100)


def test_every_architecture_dtype_and_width_has_a_tile():
    for architecture in SHARED_BYTES:
        for kernel in KERNELS:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for precision in ("tf32", "ieee"):
                    for width in (1, 16, 37, 128, 200, 512, 1024, 2048):
                        tile = tile_for(kernel, architecture, dtype, precision, width)
                        assert tile.block_k <= max(16, 2 * width) and tile.block_d <= max(16, 2 * width)
                        if kernel == "lse_triangle":  # reads the rows as copied for the square
                            square = tile_for("lse_forward", architecture, dtype, precision, width)
                            assert tile.pitch(width) == square.pitch(width) and tile.block_m % tile.block_n == 0
