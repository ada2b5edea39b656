"""Repair in place: the same call again, on the same inputs, which is bit-exact; or from checksums, which is not.

Never blocks of rows: a library GEMM of another shape need not give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from resilience.abft.carried import encode_gemm
from resilience.abft.eec import rebuild
from resilience.abft.gemm import Gemm

__all__ = ["rebuilt", "repeat_until_clean", "restore_overwritten"]

Result = TypeVar("Result")


def repeat_until_clean(
    run_again: Callable[[], Result], is_clean: Callable[[Result], bool], *, max_mends: int
) -> Result | None:
    """Run an operation again until a check passes, at most `max_mends` times; None if it never did.

    `run_again` includes the fault injector, as broken hardware would be included.
    """
    for _ in range(max_mends):
        result = run_again()
        if is_clean(result):
            return result
    return None


def restore_overwritten(gemm: Gemm) -> None:
    """Put back what an operator in place has overwritten, so that it can be run again."""
    if gemm.overwritten is not None:
        assert gemm.addend is not None
        gemm.overwritten.copy_(gemm.addend)


def rebuilt(gemm: Gemm, out: torch.Tensor, *, tolerance_scale: float = 1.0) -> bool:
    """Rebuild what is wrong in the result of a GEMM from its checksums; whether something was, and all sums agree now.

    Waits for the device. Otherwise `out` is as it was: too many elements are wrong, or the operands are not finite.
    """
    repair = rebuild(encode_gemm(gemm, out), tolerance_scale=tolerance_scale)
    return repair.clean and repair.num_rebuilt > 0
