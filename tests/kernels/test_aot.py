"""The checksum and hash kernels compiled for GPUs that are not there: registers, spills, shared memory, wide loads."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton has builds for Linux only")
from resilience.kernels.checksum.kernel import sweep_kernel
from resilience.kernels.checksum.residual import MAX_PARTS, MIN_ROWS, energy_kernel, ratio_kernel
from resilience.kernels.checksum.sweep import blocks
from resilience.kernels.hash.kernel import BLOCK, hash_kernel
from tests.kernels.aot import TARGETS, Usage, compile_for

WIDE_LOAD = {"sm_80": r"LDG\.E\.128", "sm_90": r"LDG\.E\.128", "gfx942": "(global|buffer)_load_dwordx[24]"}
MAX_SHARED_BYTES = 8192
MAX_REGISTERS_FOR_HALF_OCCUPANCY = 64
"""On NVIDIA: 65,536 registers, 2,048 threads a multiprocessor."""

_SIZES = ("num_rows", "rows_per_program", "num_chunks", "num_panels")
_STRIDES_OF_WEIGHTS = ("right_n", "right_c", "left_m", "left_c")
GENERAL = frozenset({*_SIZES, *_STRIDES_OF_WEIGHTS, "fault_matrix", "fault_row", "fault_column"})
"""Arguments that Triton is not to specialise on, or whose multiples of 16 prove nothing."""


def compiled_sweep(target: str, dtype: str, num_right: int, num_left: int, **flags: bool) -> Usage:
    """As `sweep` launches it for a matrix with contiguous rows of a multiple of 16 elements."""
    statistics = flags.get("STATISTICS", False)
    block_m, block_n = blocks(num_left, statistics, 4096)
    constants: dict[str, Any] = {
        "matrix_n": 1,
        "NUM_RIGHT": num_right,
        "NUM_LEFT": num_left,
        "STATISTICS": statistics,
        "INJECT": flags.get("INJECT", False),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    signature = dict.fromkeys(sweep_kernel.arg_names, "i32")
    pointers = ("right", "left", "row_parts", "column_parts", "largest_parts")
    signature |= dict.fromkeys(pointers, "*fp32")
    signature |= {"matrix": f"*{dtype}", "count_parts": "*i32", "fault_value": "fp32"}
    if not num_right:
        constants |= {"right": None, "row_parts": None}
    if not num_left:
        constants |= {"left": None, "column_parts": None}
    if not statistics:
        constants |= {"largest_parts": None, "count_parts": None}
    return compile_for(target, sweep_kernel, signature, constants, unaligned=GENERAL)


UNSPECIALIZED = (
    "num_rows",
    "rows_per_program",
    "num_chunks",
    "num_panels",
    "fault_matrix",
    "fault_row",
    "fault_column",
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "num_right", "num_left", "max_registers"),
    [("fp32", 2, 0, 80), ("bf16", 4, 4, 144)],
)
def test_sums_fit_into_registers(target: str, dtype: str, num_right: int, num_left: int, max_registers: int) -> None:
    usage = compiled_sweep(target, dtype, num_right, num_left)
    assert usage.spilled_bytes == 0
    assert usage.registers <= max_registers
    assert usage.shared_bytes <= MAX_SHARED_BYTES
    assert usage.count(WIDE_LOAD[target]) > 0


def test_the_widest_sums_with_statistics_and_injection_do_not_spill() -> None:
    plain = compiled_sweep("sm_90", "fp16", 8, 8)
    full = compiled_sweep("sm_90", "fp16", 8, 8, STATISTICS=True, INJECT=True)
    assert plain.spilled_bytes == full.spilled_bytes == 0
    assert plain.count("F(SETP|MNMX)") < full.count("F(SETP|MNMX)"), "statistics are compiled in only where asked for"


@pytest.mark.parametrize("target", TARGETS)
def test_the_comparison_fits_into_registers(target: str) -> None:
    constants = {"NUM": 4, "PADDED": 4, "BLOCK": MIN_ROWS}
    floats = ("expected", "observed", "parts", "result")
    for kernel, more in ((energy_kernel, {}), (ratio_kernel, {"PARTS": MAX_PARTS})):
        signature = {name: "*fp32" if name in floats else "i32" for name in kernel.arg_names}
        signature |= {"factor": "fp32", "tiny": "fp32"}
        integers = frozenset(name for name, kind in signature.items() if kind == "i32")
        usage = compile_for(target, kernel, signature, constants | more, unaligned=integers)
        assert usage.spilled_bytes == 0
        assert usage.registers <= 128
        assert usage.shared_bytes <= MAX_SHARED_BYTES


def compiled_hash(target: str, *, offset: str = "i32", inject: bool = False) -> Usage:
    signature = dict.fromkeys(hash_kernel.arg_names, "i32") | {"words": "*i32", "parts": "*i64", "offset": offset}
    general = frozenset({"num_words", "offset", "blocks_per_program", "fault_word", "fault_bits"})
    return compile_for(target, hash_kernel, signature, {"INJECT": inject, "BLOCK": BLOCK}, unaligned=general)


@pytest.mark.parametrize("target", TARGETS)
def test_the_hash_fits_into_registers(target: str) -> None:
    usage = compiled_hash(target, offset="i64")
    assert usage.spilled_bytes == 0
    assert usage.registers <= MAX_REGISTERS_FOR_HALF_OCCUPANCY
    assert usage.shared_bytes <= MAX_SHARED_BYTES
    assert usage.count(WIDE_LOAD[target]) > 0


def test_the_hash_compiles_with_injection() -> None:
    assert compiled_hash("sm_90", inject=True).assembly != compiled_hash("sm_90").assembly
