"""Where the compiled CPU kernels get their threads from: the OpenMP library that torch computes with.

A second pool would fight with torch's for the cores. Nothing is linked: the kernels get an address. No arithmetic here.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

__all__ = ["gomp_parallel"]


@functools.cache
def gomp_parallel() -> int:
    """Address of GOMP_parallel in torch's OpenMP library; 0 where there is none: the kernels then use one thread."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    try:
        # A look-up in a loaded library goes on in those that it was linked with.
        function = ctypes.CDLL(str(libraries[0])).GOMP_parallel
    except (IndexError, OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
