"""Times the hash kernel on a CUDA device beside a copy of the same bytes, and writes a list of rows as JSON.

python -m resilience.kernels.hash.bench [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["main", "measure"]

SIZES_MIB = (1, 16, 256, 2048)


def measure() -> list[dict[str, Any]]:
    """One row for each size; a copy reads and writes, so the hash could be twice as fast."""
    import triton.testing

    from .kernel import hash_words

    rows = []
    for size in SIZES_MIB:
        words = torch.randint(-(1 << 31), 1 << 31, (size << 18,), device="cuda", dtype=torch.int64).int()
        target = torch.empty_like(words)
        quantiles = [0.5, 0.2, 0.8]
        median, low, high = triton.testing.do_bench(lambda words=words: hash_words(words), quantiles=quantiles)
        copy = triton.testing.do_bench(lambda words=words, target=target: target.copy_(words), return_mode="median")
        rows.append(
            {
                "kernel": "hash",
                "size_mib": size,
                "median_ms": round(median, 4),
                "p20_ms": round(low, 4),
                "p80_ms": round(high, 4),
                "gbyte_per_s": round(words.numel() * 4 / median / 1e6, 1),
                "copy_ms": round(copy, 4),
            }
        )
    return rows


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
