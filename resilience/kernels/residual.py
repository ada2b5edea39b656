"""The largest residual ÷ tolerance of a set of sums: the end of every check, compiled where it could be.

With E expected and O observed, row i has ratio_i² = ‖E_i − O_i‖² ÷ (factor²·(‖E_i‖² + mean_i ‖E_i‖²) + grain²). What
factor and grain mean is not known here.
"""

from __future__ import annotations

import torch

from resilience.kernels import launch
from resilience.kernels.threads import gomp_parallel

try:
    from resilience.kernels import _sweep as _compiled
except ImportError:  # built without a C compiler
    _compiled = None  # type: ignore[assignment]

__all__ = ["TINY", "deferred_worst_ratio", "residual_ratios", "worst_ratio_of"]

_GOMP_PARALLEL = gomp_parallel() if _compiled is not None else 0

TINY = 1e-36
"""Added to squares of tolerances: keeps 0 ÷ 0 out of the ratio of an empty row. Sums below 1e-18 count as nothing."""


def residual_ratios(
    expected: torch.Tensor, observed: torch.Tensor, factor: float, *, grain: float = 0.0, finite_rows: bool = False
) -> torch.Tensor:
    """Ratio of every row, (m,) or (b, m), of sums (m, c) or (b, m, c), on their device; NaN where one is not finite.

    One row that is not finite makes all of them NaN, since the mean is in every tolerance. With `finite_rows` (it waits
    for the device) the others have their own.
    """
    expected, observed = expected.double(), observed.double()  # squares of float32 may overflow
    scale = _energy(expected)
    usual = scale[scale.isfinite()].mean() if finite_rows else scale.mean()
    tolerance = scale.add_(usual).mul_(factor * factor).add_(_least(grain))
    return _energy(expected - observed).div_(tolerance).sqrt_()


def worst_ratio_of(
    matrix: torch.Tensor,
    right: torch.Tensor,
    sums: torch.Tensor,
    factor: float,
    *,
    grain: float = 0.0,
    alpha: float = 1.0,
    addend: torch.Tensor | None = None,
    beta: float = 1.0,
) -> float | None:
    """The largest of `residual_ratios` where matrix · right is observed and alpha · sums + beta · addend expected; NaN
    if one is. None where there is no compiled form, and for what that does not take.

    Every product's result comes here once: tensors for its sums would cost more than the sums of a small one.

    Args:
        matrix: (m, n) or (b, m, n), float32 or bfloat16, not lazily negated.
        right: (n, c), float32.
        sums: (m, c) or (b, m, c), float32; what it has in columns beyond c does not count.
        factor: as in `residual_ratios`.
        grain: as there.
        alpha: on the sums.
        addend: c columns, broadcast to the sums; float32.
        beta: on the addend.
    """
    if _compiled is None:
        return None
    threads = torch.get_num_threads()
    least = _least(grain)
    return _compiled.worst(matrix, right, sums, alpha, addend, beta, factor, least, _GOMP_PARALLEL, threads)


def deferred_worst_ratio(
    expected: torch.Tensor, observed: torch.Tensor, factor: float, *, grain: float = 0.0
) -> torch.Tensor:
    """(largest of `residual_ratios`, 1 if a sum in `expected` is not finite), (2,), on the device and without waiting.

    The sums are float32 or float64 and not empty. The largest ratio is NaN if one is.
    """
    if expected.dtype == torch.float32:
        least = _least(grain)
        result: torch.Tensor | None = launch(
            "checksum.residual", expected, lambda kernels: kernels.worst_ratio(expected, observed, factor, least)
        )
        if result is not None:
            return result
    ratios = residual_ratios(expected, observed, factor, grain=grain)
    return torch.stack([ratios.max().float(), (~expected.isfinite().all()).float()])


def _least(grain: float) -> float:
    """Square of the tolerance of an empty row."""
    return grain * grain + TINY


def _energy(sums: torch.Tensor) -> torch.Tensor:
    """Sum of squares of every row of (…, c): c is small, and each column lies contiguous."""
    first, *others = sums.unbind(-1)
    energy = first * first
    for column in others:
        energy.addcmul_(column, column)
    return energy
