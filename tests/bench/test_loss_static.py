"""The shipped tiles, compiled without a GPU: no spills, enough shared memory, tensor cores, nothing computed twice."""

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler import ASTSource

from bench import loss_static as triton_static
from bench.loss_static import FORMS, PLAIN, Case
from loss.triton import tiles as triton_tiles

GENERAL = FORMS[-1]
QUICK = [
    Case(architecture, kernel, dtype, precision, 128, form)
    for architecture in ("sm_80", "sm_90")
    for kernel in ("negatives", "products")
    for dtype, precision, form in (
        (torch.bfloat16, "tf32", PLAIN),
        (torch.bfloat16, "tf32", GENERAL),
        (torch.float16, "tf32", PLAIN),
        (torch.float32, "tf32", PLAIN),
        (torch.float32, "ieee", PLAIN),
    )
] + [
    Case(architecture, kernel, torch.bfloat16, "tf32", 192, GENERAL)  # D not a power of two: the rows are padded
    for architecture in triton_tiles.SHARED_BYTES
    for kernel in triton_static.KERNELS
]
# fewer columns than a block of the similarities, in full precision: where registers are nearest to their limit
NARROW = [
    Case(architecture, kernel, torch.float32, "ieee", width, form)
    for architecture in triton_tiles.SHARED_BYTES
    for kernel, width in (("negatives", 8), ("products", 24))
    for form in FORMS[1:]
]


def check(case, target=None):
    compiled = triton_static.compile_case(case, target)
    assert compiled.stack_bytes == 0, f"{compiled.stack_bytes} bytes of registers spilled"
    assert compiled.shared_bytes <= triton_tiles.SHARED_BYTES[case.architecture]
    if case.precision == "ieee" and case.dtype == torch.float32:
        assert compiled.tensor_core is None
    elif case.architecture == "sm_90" and case.width <= 256:
        assert compiled.tensor_core == ("wgmma" if target is None else "tcgen05.mma")
    else:
        assert compiled.tensor_core
    if case.form == PLAIN and target is None:
        tile = triton_tiles.tile_for(case.kernel, case.architecture, case.dtype, case.precision, case.width)
        assert case.dtype == torch.float16 or compiled.programs >= tile.programs
        assert compiled.exps_per_pair == 1
        if compiled.gemm_units is not None:
            assert compiled.gemm_units == {"negatives": 1, "products": 2}[case.kernel]


@pytest.mark.parametrize(
    "case", QUICK + NARROW, ids=lambda case: "-".join(map(str, (*case[:5], case.form.even, case.form.online)))
)
def test_typical_tiles(case):
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "tau_is_pointer"), [(128, False), (37, True), (1024, True)])
def test_kernels_over_rows_do_not_spill(dtype, width, tau_is_pointer):
    for capability in (80, 90):
        for name, (_, stack_bytes) in triton_static.row_kernel_resources(
            dtype, width, capability, tau_is_pointer
        ).items():
            assert stack_bytes == 0, name


def test_arguments_of_one_compile(monkeypatch):
    # A launch makes constants of integers that are 1, as the sizes of a small batch are.
    def source_of_ones(kernel, signature, constants, attributes):
        ones = {name: 1 for name, kind in signature.items() if kind == "i32" and name in ("n", "splits", "slots")}
        attributes = {at: value for at, value in attributes.items() if kernel.arg_names[at[0]] not in ones}
        return ASTSource(kernel, signature | dict.fromkeys(ones, "constexpr"), constants | ones, attributes)

    monkeypatch.setattr(triton_static, "ASTSource", source_of_ones)
    for kernel in triton_static.KERNELS:
        for width in (128, 512):
            check(Case("sm_80", kernel, torch.bfloat16, "tf32", width, GENERAL))
    triton_static.row_kernel_resources(torch.float16, 37, 80, True)


@pytest.mark.soak
@pytest.mark.parametrize("case", list(triton_static.shipped((8, 24, 37, 96, 192, 200, 384, 768))), ids=str)
def test_every_shipped_tile(case):
    check(case)


@pytest.mark.soak
@pytest.mark.parametrize("case", [case for case in triton_static.shipped() if case.architecture == "sm_90"], ids=str)
def test_hopper_tiles_on_blackwell(case):
    if case.form == PLAIN or case.width <= 128:  # ragged batches spill a few registers at wider D
        check(case, target=100)


def test_every_architecture_dtype_and_width_has_a_tile():
    for architecture in triton_tiles.SHARED_BYTES:
        for kernel in triton_static.KERNELS:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for precision in ("tf32", "ieee"):
                    for width in (1, 16, 37, 128, 200, 512, 1024, 2048):
                        tile = triton_tiles.tile_for(kernel, architecture, dtype, precision, width)
                        assert tile.block_k <= max(16, 2 * width) and tile.block_d <= max(16, 2 * width)
