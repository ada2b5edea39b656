"""A copy of bytes that nobody reads again soon, past the caches where that was compiled. Nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from resilience.kernels import _copy as _compiled
except ImportError:  # built without a C compiler
    _compiled = None  # type: ignore[assignment]

__all__ = ["copy_past_caches"]

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def copy_past_caches(target: _Bytes, source: _Bytes) -> None:
    """`target[:] = source`, other threads of Python go on meanwhile.

    Args:
        target: (n,) uint8, contiguous and writeable.
        source: (n,) uint8, contiguous; it does not overlap the target.

    Raises:
        ValueError: they differ in shape, or are not as described.
    """
    if target.shape != source.shape or target.ndim != 1:
        raise ValueError(f"copying needs two rows of bytes of one length, not {source.shape} to {target.shape}")
    if not (target.flags.c_contiguous and source.flags.c_contiguous and target.flags.writeable):
        raise ValueError("copying needs contiguous bytes, and a target that can be written")
    if _compiled is None:
        np.copyto(target, source)
    else:
        _compiled.copy(target.ctypes.data, source.ctypes.data, len(target))
