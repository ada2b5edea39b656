"""Small attentions for the tests of the kernels: operands, tiles of 16, comparisons with the oracle. No assertions."""

from __future__ import annotations

import dataclasses
import struct

import torch

from resilience.kernels.attention import api
from resilience.kernels.attention.oracle import Attention, attend
from resilience.kernels.attention.tiling import Launch, Tiling

__all__ = ["SMALL", "Case", "bits_of", "largest_error"]

_SMALL = Launch(16, 16, 4, 1)
SMALL = Tiling(forward=_SMALL, dq=_SMALL, dkdv=_SMALL, num_columns=8)
"""Several tiles of a few dozen positions; odd sizes against each other are tested through `Tiling`s of their own."""


def bits_of(value: float) -> int:
    """The bits of a float32, as an int32."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands of one attention, and how to run it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    causal: bool = False
    tiling: Tiling = SMALL
    packed: api.Packed | None = None

    @classmethod
    def random(
        cls,
        device: torch.device,
        *,
        heads: int = 1,
        key_heads: int | None = None,
        batch: int = 1,
        length_q: int = 24,
        length_k: int | None = None,
        head_dim: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        causal: bool = False,
        seed: int = 0,
        tiling: Tiling = SMALL,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        of_q = (batch, heads, length_q, head_dim)
        of_k = (batch, key_heads or heads, length_k or length_q, head_dim)
        tensors = (torch.randn(shape, generator=generator).to(device, dtype) for shape in (of_q, of_k, of_k, of_q))
        return cls(*tensors, causal=causal, tiling=tiling)

    def forward(self, checks: api.Checks | None = None, ring: api.Ring | None = None, **more: object) -> api.Forward:
        return api.attention_forward(
            self.q, self.k, self.v, causal=self.causal, checks=checks, ring=ring, tiling=self.tiling,
            packed=self.packed, **more,
        )  # fmt: skip

    def backward(
        self, run: api.Forward, checks: api.Checks | None = None, ring: api.Ring | None = None, **more: object
    ) -> api.Gradients:
        return api.attention_backward(
            self.d_out, self.q, self.k, self.v, run.out, run.lse, causal=self.causal, checks=checks, ring=ring,
            tiling=self.tiling, packed=self.packed, **more,
        )  # fmt: skip

    def oracle(self) -> Attention:
        return attend(*(x.double() for x in (self.q, self.k, self.v, self.d_out)), causal=self.causal)


def largest_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference as a multiple of the unit round-off of `ours` and the root mean square of `exact`."""
    unit = torch.finfo(ours.dtype).eps / 2
    size = exact.square().mean().sqrt()
    return float(((ours.double() - exact).abs() / (unit * (size + exact.abs()))).max())
