"""What a check may raise without ending the script that it watches over. Nothing else is caught anywhere."""

from __future__ import annotations

from resilience.kernels import triton_errors

__all__ = ["defects"]

_DEFECTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What a defect of ours raises, or a device without memory for a check (a RuntimeError of torch)."""


def defects() -> tuple[type[BaseException], ...]:
    """Classes for an `except`: those of our defects, and those of Triton's compiler where it is loaded: a kernel that a
    device cannot have, a cache that cannot be written.
    """
    return *_DEFECTS, *triton_errors()
