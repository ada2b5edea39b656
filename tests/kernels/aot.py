"""Compiles a Triton kernel for a GPU that is not there, and says what it would take of it. Asserts nothing.

usage = compile_for("sm_90", kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 128}, num_warps=8)
assert usage.spilled_bytes == 0
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["TARGETS", "Usage", "compile_for"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, MI300."""

ALIGNMENT_BYTES = 16
"""Of pointers, and the factor of sizes and strides, for which Triton compiles when the arguments at hand allow it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What one compiled kernel takes."""

    registers: int
    """32-bit registers a thread (vector registers on AMD)."""
    spilled_bytes: int
    """Local memory a thread, which is where spilled registers go."""
    shared_bytes: int
    """Shared memory a block."""
    assembly: str
    """SASS on NVIDIA, GCN assembly on AMD; to count instructions in."""

    def count(self, pattern: str) -> int:
        """Lines of the assembly in which the regular expression is found, such as `HGMMA` or `v_mfma`."""
        return sum(re.search(pattern, line) is not None for line in self.assembly.splitlines())


def compile_for(
    target: str,
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    unaligned: frozenset[str] = frozenset(),
    num_warps: int = 4,
    num_stages: int = 2,
) -> Usage:
    """Compile `kernel` for one of `TARGETS`.

    Args:
        target: key of `TARGETS`.
        kernel: the `@triton.jit` function (with autotuning, its `.fn`).
        signature: type of each argument that is not a compile-time constant, such as `*bf16`, `i32`, `fp32`.
        constexprs: value of each compile-time constant; arguments of value None or 1 belong here, too.
        unaligned: integer or pointer arguments that are not multiples of 16.
        num_warps: as in a launch.
        num_stages: as in a launch.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    aligned = [
        name
        for name, kind in types.items()
        if name not in unaligned and (kind.startswith("*") or kind in ("i32", "i64"))
    ]
    attributes = {(names.index(name),): [["tt.divisibility", ALIGNMENT_BYTES]] for name in aligned}
    source = ASTSource(
        kernel, types, constexprs={(names.index(name),): v for name, v in constexprs.items()}, attrs=attributes
    )
    compiled = triton.compile(
        source, target=TARGETS[target], options={"num_warps": num_warps, "num_stages": num_stages}
    )
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        return _amd(compiled.asm["amdgcn"], shared)
    return _nvidia(compiled.asm["cubin"], shared)


def _amd(assembly: str, shared_bytes: int) -> Usage:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, name
        return int(found.group(1))

    return Usage(field("vgpr_count"), field("private_segment_fixed_size"), shared_bytes, assembly)


def _nvidia(cubin: bytes, shared_bytes: int) -> Usage:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage.splitlines()[-1])}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], shared_bytes, sass)
