"""Times fused attention with its checks, without them, and the vendor's SDPA, on a CUDA device; rows as JSON.

python -m resilience.kernels.attention.bench [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["SHAPES", "Shape", "main", "measure"]


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """One attention: queries and keys of equal length."""

    batch: int
    heads: int
    key_heads: int
    length: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.key_heads}" if self.heads != self.key_heads else f"{self.heads}"
        return f"b{self.batch} h{heads} t{self.length} d{self.head_dim}" + (" causal" if self.causal else "")

    def flops(self, *, backward: bool) -> float:
        """Of the matrix products alone: two of them in forward, five in backward."""
        products = 5 if backward else 2
        whole = 2.0 * products * self.batch * self.heads * self.length**2 * self.head_dim
        return whole / 2 if self.causal else whole


SHAPES = (
    Shape(8, 12, 12, 512, 64, False),
    Shape(4, 16, 16, 2048, 64, True),
    Shape(4, 16, 16, 2048, 128, True),
    Shape(1, 32, 8, 8192, 128, True),
    Shape(1, 16, 16, 16384, 128, True),
    Shape(2, 8, 8, 4096, 256, True),
)


def _times_ms(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median, 20th and 80th percentile of each call; the device's cache is cleared between calls."""
    import triton.testing

    times: dict[str, float] = {}
    for name, call in calls.items():
        median, low, high = triton.testing.do_bench(call, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
        times |= {f"{name}_ms": median, f"{name}_p20_ms": low, f"{name}_p80_ms": high}
    return times


def _row(shape: Shape, dtype: torch.dtype, times: dict[str, float], *, backward: bool) -> dict[str, Any]:
    return {
        "kernel": "backward" if backward else "forward",
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: round(value, 4) for name, value in times.items()},
        "checked_by_plain": round(times["checked_ms"] / times["plain_ms"], 4),
        "checked_by_vendor": round(times["checked_ms"] / times["vendor_ms"], 4),
        "checked_tflop_per_s": round(shape.flops(backward=backward) / times["checked_ms"] / 1e9, 1),
    }


def _measure(shape: Shape, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward and backward of one shape."""
    from . import api

    of_q = (shape.batch, shape.heads, shape.length, shape.head_dim)
    of_k = (shape.batch, shape.key_heads, shape.length, shape.head_dim)
    q, k, v, d_out = (torch.randn(size, device="cuda", dtype=dtype) for size in (of_q, of_k, of_k, of_q))
    ring, checks = api.Ring("cuda"), api.Checks()
    economical = dataclasses.replace(checks, inner=False)
    once = dataclasses.replace(checks, max_repairs=1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grouped = shape.heads != shape.key_heads

    def vendor() -> torch.Tensor:
        query, key, value = leaves
        return F.scaled_dot_product_attention(query, key, value, is_causal=shape.causal, enable_gqa=grouped)

    def forward(how: api.Checks | None) -> api.Forward:
        return api.attention_forward(q, k, v, causal=shape.causal, checks=how, ring=ring)

    run, out = forward(None), vendor()

    def backward(how: api.Checks | None) -> api.Gradients:
        return api.attention_backward(d_out, q, k, v, run.out, run.lse, causal=shape.causal, checks=how, ring=ring)

    forwards = {
        "checked": lambda: forward(checks),
        "one_repair": lambda: forward(once),
        "plain": lambda: forward(None),
        "vendor": vendor,
    }
    backwards = {
        "checked": lambda: backward(checks),
        "one_repair": lambda: backward(once),
        "economical": lambda: backward(economical),
        "plain": lambda: backward(None),
        "vendor": lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True),
    }
    rows = [
        _row(shape, dtype, _times_ms(forwards), backward=False),
        _row(shape, dtype, _times_ms(backwards), backward=True),
    ]
    records, num_lost = ring.drain()
    for row in rows:
        row["num_false_alarms"] = len(records) + num_lost
    return rows


def measure() -> list[dict[str, Any]]:
    """Two rows a shape, forward and backward, in bfloat16.

    `checked` is the default; `one_repair` launches one repair instead of two, `economical` leaves out backward's inner
    checks. `num_false_alarms`, over all runs of a shape, should be 0.
    """
    return [row for shape in SHAPES for row in _measure(shape, torch.bfloat16)]


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
