"""The attention kernels, compiled for GPUs that are not there: what they take of each, and what their checks add.

The numbers are those of Triton 3.7.1 and its assembler; a bound that a newer one breaks is a reason to look at the
tiles again, not a bug.
"""

from __future__ import annotations

import re

import pytest

from tests.kernels.aot import Usage
from tests.kernels.attention_signatures import compile_attention

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""What one block may use."""


def loops(usage: Usage) -> list[list[str]]:
    """Instructions of each loop of NVIDIA assembly that multiplies matrices and holds no other such loop."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", usage.assembly)
    listing = [(int(address, 16), text) for address, text in lines]
    jumps = [(int(m.group(1), 16), at) for at, text in listing if (m := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    spans = [(begin, end) for begin, end in jumps if begin < end]
    innermost = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    bodies = [[text for at, text in listing if begin <= at <= end] for begin, end in innermost]
    return [body for body in bodies if any("MMA" in text for text in body)]


def count(body: list[str], word: str) -> int:
    return sum(re.search(rf"\b{word}\b", text) is not None for text in body)


@pytest.mark.parametrize(
    ("target", "kernel", "head_dim", "spilled_bytes"),
    [
        ("sm_90", "forward", 128, 0),
        ("sm_90", "dq", 128, 24),
        ("sm_90", "dkdv", 128, 400),
        ("sm_90", "dkdv", 256, 400),
        ("sm_80", "forward", 64, 128),
        ("sm_80", "dkdv", 64, 128),
        ("sm_80", "dkdv", 128, 400),
    ],
)
def test_nvidia_loops_hardly_spill(target: str, kernel: str, head_dim: int, spilled_bytes: int) -> None:
    usage = compile_attention(target, kernel, head_dim)
    assert usage.registers <= 255
    assert usage.shared_bytes <= SHARED_BYTES[target]
    assert usage.spilled_bytes <= spilled_bytes, "before and after the loops"
    bodies = loops(usage)
    assert len(bodies) == 2, "tiles with a mask, and tiles without"
    whole, masked = (count(body, "LDL") + count(body, "STL") for body in sorted(bodies, key=len))
    assert whole <= (1 if kernel == "dkdv" else 0)
    assert masked <= (2 if kernel == "dkdv" else 1)
    for body in bodies:
        assert count(body, "HGMMA" if target == "sm_90" else "HMMA") > 0


@pytest.mark.long
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_tile_fits(target: str, kernel: str, head_dim: int) -> None:
    """Prints what kernels/attention/README.md says of spills."""
    usage = compile_attention(target, kernel, head_dim)
    in_loops = [count(body, "LDL") + count(body, "STL") for body in loops(usage)]
    print(
        f"{target} {kernel} {head_dim}: {usage.registers} registers, {usage.shared_bytes} bytes shared, "
        f"{usage.spilled_bytes} bytes spilled, accesses to them a tile {in_loops}"
    )
    assert usage.shared_bytes <= SHARED_BYTES[target]
    assert usage.registers <= (512 if target == "gfx942" else 255)
    if (target, kernel, head_dim) != ("sm_80", "dkdv", 256):  # it needs Hopper
        assert usage.spilled_bytes <= (200 if target == "gfx942" else 410)
        assert max(in_loops, default=0) <= 66


def test_a_tile_of_the_forward_grows_by_a_quarter_at_most() -> None:
    checked, plain = (compile_attention("sm_90", "forward", 128, checked=checked) for checked in (True, False))
    (ours, _), (theirs, _) = (sorted(loops(usage), key=len) for usage in (checked, plain))
    assert count(ours, "HGMMA") == count(theirs, "HGMMA")
    assert count(ours, "HMMA") == 4, "the checksum columns, 64 keys of 16 each"
    assert len(ours) <= 1.25 * len(theirs)


@pytest.mark.long
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_checks_less_than_double_the_instructions(kernel: str, head_dim: int) -> None:
    """Prints the rows of the table in kernels/attention/README.md."""
    variants: list[dict[str, bool]] = [{"checked": False}, {}, {"inner": False}]
    whole, masked = zip(
        *(sorted(loops(compile_attention("sm_90", kernel, head_dim, **each)), key=len) for each in variants),
        strict=True,
    )
    spills = [count(body, "LDL") + count(body, "STL") for body in (whole[1], masked[1])]
    print(f"{kernel} {head_dim}: plain, checked, not inner {[len(body) for body in whole]}, spills {spills}")
    assert len(whole[1]) < 2 * len(whole[0])


@pytest.mark.parametrize(("kernel", "head_dim"), [("forward", 128), ("dkdv", 64)])
def test_amd_matrix_units_are_used_without_spills(kernel: str, head_dim: int) -> None:
    usage = compile_attention("gfx942", kernel, head_dim)
    assert usage.spilled_bytes == 0
    assert usage.registers <= 512
    assert usage.shared_bytes <= SHARED_BYTES["gfx942"]
    assert usage.count("v_mfma") > 0


@pytest.mark.parametrize("kernel", ["summarise_keys", "summarise_queries"])
def test_summaries_do_not_spill(kernel: str) -> None:
    usage = compile_attention("sm_90", kernel, 128)
    assert usage.spilled_bytes == 0


def test_packed_sequences_padded_heads_and_float16_compile() -> None:
    usage = compile_attention("sm_90", "dq", 96, packed=True, dtype="fp16", causal=False)
    assert usage.count("HGMMA") > 0


def test_the_multiprocessor_is_asked_for_its_number() -> None:
    assert compile_attention("sm_90", "dq", 128).count("SR_VIRTUALSMID|SR_SMID|SR_VIRTID") > 0


def test_the_injecting_variant_is_another_kernel() -> None:
    plain, injecting = (compile_attention("sm_90", "dq", 128, inject=inject).assembly for inject in (0, 6))
    assert plain != injecting
