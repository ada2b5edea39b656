"""Times the checksum kernel on a CUDA device against what else could be done, and writes a list of rows as JSON.

python -m resilience.kernels.checksum.bench [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["main", "measure"]

SHAPES = ((2048, 4096), (8192, 4096), (8192, 16384))
COLUMNS = ((2, 0), (4, 0), (4, 4))
K = 4096
"""Inner dimension of the GEMM whose result has the swept shape."""


def _median_ms(call: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile; the cache of the device is cleared between calls."""
    import triton.testing

    median, low, high = triton.testing.do_bench(call, warmup=25, rep=200, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def _row(shape: tuple[int, int], dtype: torch.dtype, num_right: int, num_left: int) -> dict[str, Any]:
    from .sweep import sweep

    num_rows, num_columns = shape
    matrix = torch.randn(shape, device="cuda").to(dtype)
    right = torch.randn(num_columns, num_right, device="cuda")
    left = torch.randn(num_rows, num_left, device="cuda") if num_left else None
    one, other = torch.randn(num_rows, K, device="cuda").to(dtype), torch.randn(K, num_columns, device="cuda").to(dtype)
    median, low, high = _median_ms(lambda: sweep(matrix, right, left))
    gemm, *_ = _median_ms(lambda: one @ other)

    def library() -> None:
        matrix @ right.to(dtype)
        if left is not None:
            matrix.mT @ left.to(dtype)

    products, *_ = _median_ms(library)
    return {
        "kernel": "sweep",
        "shape": f"{num_rows}x{num_columns}",
        "dtype": str(dtype).removeprefix("torch."),
        "columns": f"{num_right}+{num_left}",
        "median_ms": round(median, 4),
        "p20_ms": round(low, 4),
        "p80_ms": round(high, 4),
        "gbyte_per_s": round(matrix.numel() * matrix.element_size() / median / 1e6, 1),
        "library_ms": round(products, 4),
        f"of_gemm_k{K}": round(median / gemm, 4),
    }


def measure() -> list[dict[str, Any]]:
    """One row for each shape, dtype and number of columns; `library_ms` are torch's products in the matrix's dtype."""
    return [
        _row(shape, dtype, *columns)
        for dtype in (torch.bfloat16, torch.float32)
        for shape in SHAPES
        for columns in COLUMNS
    ]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 69
    text = json.dumps(measure(), indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
