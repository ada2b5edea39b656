"""Round-off of the kernels' sums over long sequences, on a matrix unit that truncates: below the tolerances.

Emulated in float64: Triton's interpreter multiplies with rounding to nearest, and takes minutes for these lengths. The
unit takes a few products at a time, aligns them with the largest of them and of the accumulator, cuts off what lies
more than one bit below float32's last, and rounds the sum towards zero: what is known of NVIDIA's (Fasi et al.,
"Numerical behavior of NVIDIA tensor cores", 2021), and not measured here. The operands have a common mean, or one key
has half of the attention: partial sums grow, and round-off with them.
"""

from __future__ import annotations

import math

import pytest
import torch

from resilience.kernels.attention.backward import _TOLERANCE_QUOTIENT
from resilience.kernels.attention.device import of_gradient, of_products, of_sums

NUM_ROWS = 16
TILE = 64
MEAN = 4.0
"""Of every operand, in its standard deviations."""
NUM_AT_ONCE = 8
"""Products that a matrix unit adds."""
EXTRA_BITS = 1


def towards_zero(exact: torch.Tensor) -> torch.Tensor:
    """Rounded to float32 towards zero, as float64."""
    nearest = exact.float()
    beyond = nearest.double().abs() > exact.abs()
    return torch.where(beyond, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest).double()


def product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """a·b + total, (m, k) by (k, n), as a matrix unit accumulates it."""
    if total is None:
        total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for start in range(0, a.shape[1], NUM_AT_ONCE):
        stop = start + NUM_AT_ONCE
        terms = torch.cat([total[None], a[:, start:stop].mT[:, :, None] * b[start:stop, None, :]])
        _, exponent = torch.frexp(terms.abs().amax(0))
        last = torch.ldexp(torch.ones_like(total), exponent - 24 - EXTRA_BITS)
        total = towards_zero(((terms / last).trunc() * last).sum(0))
    return total


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.float().bfloat16().double()


def columns(x: torch.Tensor) -> torch.Tensor:
    """x·1 ÷ D in three parts, ‖x‖ ÷ D, 1 and three x·r ÷ D under signs r, as summary.py stores them."""
    depth = x.shape[1]
    total = x.sum(1) / depth
    hi = rounded(total)
    mid = rounded(total - hi)
    signs = torch.randn(depth, 3, generator=torch.Generator().manual_seed(depth)).sign().double()
    first = torch.stack([hi, mid, rounded(total - hi - mid), rounded(x.norm(dim=1) / depth), torch.ones(len(x))], 1)
    return torch.cat([first, rounded(x @ signs / depth)], 1)


def size_of(peak: torch.Tensor, depth: int) -> torch.Tensor:
    """√D times `norm_of` the columns that `peak` was the most of."""
    return peak[:, [0, 5, 6, 7]].amax(1) * math.sqrt(depth)


def drawn(length: int, depth: int) -> torch.Tensor:
    return rounded(torch.randn(length, depth) + MEAN)


def seen_by(sums: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """|Σ of a row − what its checksum columns say|."""
    return (total.sum(1) / total.shape[1] - sums[:, :3].sum(1)).abs()


def of_queries(length: int, depth: int) -> dict[str, torch.Tensor]:
    """Residual ÷ tolerance of what the forward and the dQ kernel sum over `length` keys."""
    k, v, q, d_out = (drawn(rows, depth) for rows in (length, length, NUM_ROWS, NUM_ROWS))
    scale = 1.0 / math.sqrt(depth)
    lse = torch.logsumexp(scale * q @ k.mT, 1)
    delta = (d_out * rounded(torch.softmax(scale * q @ k.mT, 1) @ v)).sum(1).float().double()
    score_sums, dp_sums, ds_sums, mass = (torch.zeros(NUM_ROWS) for _ in range(4))
    k_sum, v_sum = torch.zeros(depth), torch.zeros(depth)
    out, dq = (torch.zeros(NUM_ROWS, depth, dtype=torch.float64) for _ in range(2))
    of_out, of_dq, dq_peak = (torch.zeros(NUM_ROWS, 8, dtype=torch.float64) for _ in range(3))
    for k_tile, v_tile in zip(k.split(TILE), v.split(TILE), strict=True):
        scores = product(q, k_tile.mT)
        score_sums, k_sum = score_sums + scores.float().sum(1), k_sum + k_tile.float().sum(0)
        probs = (scale * scores - lse[:, None]).exp().float().double()
        out, of_out = product(rounded(probs), v_tile, out), product(rounded(probs), columns(v_tile), of_out)
        d_probs = product(d_out, v_tile.mT)
        dp_sums, v_sum = dp_sums + d_probs.float().sum(1), v_sum + v_tile.float().sum(0)
        d_scores = (probs * (d_probs - delta[:, None]).float()).float()
        dq, of_dq = product(rounded(d_scores), k_tile, dq), product(rounded(d_scores), columns(k_tile), of_dq)
        dq_peak = dq_peak.maximum(of_dq.abs())
        ds_sums = ds_sums + (d_scores - probs.float() * d_probs.float()).sum(1)
        mass = mass + probs.float().sum(1)
    sums, norms, size = of_sums.fn(depth, length / TILE), k.norm(dim=1), d_out.norm(dim=1) * v.norm(dim=1).max()
    return {
        "scores": (score_sums - (q.float() * k_sum).sum(1)).abs() / (sums * q.norm(dim=1) * norms.sum()),
        "dp_rows": (dp_sums - (d_out.float() * v_sum).sum(1)).abs() / (sums * d_out.norm(dim=1) * v.norm(dim=1).sum()),
        "ds_rows": (ds_sums + delta * mass).abs() / (sums * size),
        "context": seen_by(of_out, out) / (of_products.fn(length) * of_out[:, 3]),
        "dq": seen_by(of_dq, dq) / of_gradient.fn(size * norms.max() / depth, size_of(dq_peak, depth), length),
    }


def of_keys(length: int, depth: int) -> dict[str, torch.Tensor]:
    """Residual ÷ tolerance of what the dK/dV kernel sums over `length` queries, for keys of twice the others' value."""
    k, v = drawn(NUM_ROWS, depth), 2 * drawn(NUM_ROWS, depth)
    scale = 1.0 / math.sqrt(depth)
    score_sums, dp_sums, quotient = (torch.zeros(NUM_ROWS) for _ in range(3))
    q_sum, do_sum = torch.zeros(depth), torch.zeros(depth)
    dk, dv = (torch.zeros(NUM_ROWS, depth, dtype=torch.float64) for _ in range(2))
    of_dk, of_dv, dk_peak = (torch.zeros(NUM_ROWS, 8, dtype=torch.float64) for _ in range(3))
    q, d_out = drawn(length, depth), drawn(length, depth)
    for q_tile, do_tile in zip(q.split(TILE), d_out.split(TILE), strict=True):
        scores = product(k, q_tile.mT)
        score_sums, q_sum = score_sums + scores.float().sum(1), q_sum + q_tile.float().sum(0)
        exponents = (scale * scores - MEAN**2 * math.sqrt(depth) - 8).float()
        probs = torch.exp2(exponents.clamp(min=-64)).double()
        d_probs, delta = product(v, do_tile.mT), (MEAN**2 * depth + torch.randn(TILE)).double()
        dp_sums, do_sum = dp_sums + d_probs.float().sum(1), do_sum + do_tile.float().sum(0)
        d_scores = (probs * (d_probs - delta).float()).float()
        inverses = torch.exp2((-exponents).clamp(max=64))
        residual = (d_scores * inverses).sum(1) - (d_probs.float().sum(1) - delta.float().sum())
        of_tile = float(do_tile.norm(dim=1).sum())
        residual += ((probs.float() * inverses).sum(1) - TILE) * float(v.norm(dim=1).max()) * of_tile / TILE
        quotient = torch.maximum(quotient, residual.abs() / of_tile)
        dv, of_dv = product(rounded(probs), do_tile, dv), product(rounded(probs), columns(do_tile), of_dv)
        dk, of_dk = product(rounded(d_scores), q_tile, dk), product(rounded(d_scores), columns(q_tile), of_dk)
        dk_peak = dk_peak.maximum(of_dk.abs())
    sums, norms, v_norm_max = of_sums.fn(depth, length / TILE), d_out.norm(dim=1).sum(), v.norm(dim=1).max()
    size = 2 * v_norm_max * of_dv[:, 3] * q.norm(dim=1).max()
    return {
        "scores": (score_sums - (k.float() * q_sum).sum(1)).abs()
        / (sums * k.norm(dim=1) * q.norm(dim=1).sum()),
        "dp": (dp_sums - (v.float() * do_sum).sum(1)).abs() / (sums * v.norm(dim=1) * norms),
        "quotient": quotient / (_TOLERANCE_QUOTIENT.value * v_norm_max),
        "dv": seen_by(of_dv, dv) / (of_products.fn(length) * of_dv[:, 3]),
        "dk": seen_by(of_dk, dk) / of_gradient.fn(size, size_of(dk_peak, depth), length),
    }  # fmt: skip


def of_a_sink(length: int, depth: int) -> dict[str, torch.Tensor]:
    """Residual ÷ tolerance where the first key has half of the attention, and channels of K have means of their own."""
    k, v = rounded(torch.randn(length, depth) + 2 * torch.randn(depth)), rounded(torch.randn(length, depth))
    d_out = rounded(torch.randn(NUM_ROWS, depth) + v[0])
    probs = torch.full((NUM_ROWS, length), 0.5 / (length - 1)).double()
    probs[:, 0] = 0.5
    delta = (d_out * rounded(probs @ v)).sum(1)
    out, dq = (torch.zeros(NUM_ROWS, depth, dtype=torch.float64) for _ in range(2))
    of_out, of_dq, dq_peak = (torch.zeros(NUM_ROWS, 8, dtype=torch.float64) for _ in range(3))
    for p, k_tile, v_tile in zip(probs.split(TILE, 1), k.split(TILE), v.split(TILE), strict=True):
        d_scores = rounded(p * (product(d_out, v_tile.mT) - delta[:, None]))
        out, of_out = product(rounded(p), v_tile, out), product(rounded(p), columns(v_tile), of_out)
        dq, of_dq = product(d_scores, k_tile, dq), product(d_scores, columns(k_tile), of_dq)
        dq_peak = dq_peak.maximum(of_dq.abs())
    size = d_out.norm(dim=1) * v.norm(dim=1).max() * k.norm(dim=1).max()
    return {
        "context": seen_by(of_out, out) / (of_products.fn(length) * of_out[:, 3]),
        "dq": seen_by(of_dq, dq) / of_gradient.fn(size / depth, size_of(dq_peak, depth), length),
    }


def of_a_wave(length: int, depth: int) -> dict[str, torch.Tensor]:
    """Residual ÷ tolerance of a dQ that grows over half of the keys and shrinks again to next to nothing, while sums
    over d, and over keys, stay small: of all checksum columns only those under signs see how large it was.
    """
    sign = 1.0 - 2.0 * (torch.arange(length) % 2).double()
    half = torch.where(torch.arange(length) < length // 2, 1.0, -1.0).double()
    means = torch.randn(depth).sign()
    means[depth // 2 :] = -means[: depth // 2]
    k = rounded(torch.randn(length, depth) + MEAN * sign[:, None] * means)
    direction = torch.randn(depth)
    v = rounded(torch.randn(length, depth) + (sign * half)[:, None] * direction)
    d_out = rounded(torch.randn(NUM_ROWS, depth) + direction)
    probs = torch.full((NUM_ROWS, length), 1.0 / length).double()
    delta = (d_out * rounded(probs @ v)).sum(1)
    dq, of_dq, peak = (torch.zeros(NUM_ROWS, n, dtype=torch.float64) for n in (depth, 8, 8))
    for p, k_tile, v_tile in zip(probs.split(TILE, 1), k.split(TILE), v.split(TILE), strict=True):
        d_scores = rounded(p * (product(d_out, v_tile.mT) - delta[:, None]))
        dq, of_dq = product(d_scores, k_tile, dq), product(d_scores, columns(k_tile), of_dq)
        peak = peak.maximum(of_dq.abs())
    bound = d_out.norm(dim=1) * v.norm(dim=1).max() * k.norm(dim=1).max() / depth
    return {"dq": seen_by(of_dq, dq) / of_gradient.fn(bound, size_of(peak, depth), length)}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("length", [2048, 8192, 32768])
@pytest.mark.parametrize("ratios", [of_queries, of_a_sink, of_a_wave, of_keys], ids=["queries", "sink", "wave", "keys"])
def test_round_off_of_long_sums_stays_below_the_tolerances(ratios, length: int, depth: int) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    for name, ratio in ratios(length, depth).items():
        print(f"{length} {depth} {name} {float(ratio.max()):.3f}")
        assert ratio.max() <= 0.6, name
