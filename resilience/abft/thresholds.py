"""Numbers that decide between round-off and a fault. Pure: floats in, floats out; never a tensor, never torch.

Words: a GEMM is C = α·A·B + β·D with A of m×k, B of k×n. Its checksum vectors are the columns of V (n×c). E =
α·A·(B·V) + β·D·V is what the inputs say that the row sums of C must be, O = C·V is what they are. Both have m rows and
c columns.

Two stages decide.

1. **Screen**, for every call. Row i is suspect unless ‖E_i − O_i‖₂ ≤ factor · scale_i, where scale_i² = ‖E_i‖₂² + the
   mean of that over the rows. V has random signs, so ‖E_i‖₂² ÷ c estimates the energy of a row of C
   (a Rademacher sketch), and it comes **from the inputs alone**: a fault in C cannot widen its own tolerance. The
   factor is statistical: a multiple of the standard deviation of round-off. It may be wrong now and then.
2. **Confirm**, for suspect rows only. The rows are computed again in float64 and compared element by element with a
   bound that round-off does not exceed (`element_factors`). Only what this stage confirms is a fault, so a false alarm
   of the screen costs a little time and nothing else.

Where no second stage can run (a GPU, whose verdicts are read at the boundary) the screen is widened by `UNCONFIRMED`.
"""

from __future__ import annotations

import dataclasses
import math

from resilience.events import DetectionKind

__all__ = [
    "CARRIED_SIGMAS",
    "LONG",
    "NEAR_INF_SHARE",
    "UNCONFIRMED",
    "CarriedVarianceFactors",
    "ElementFactors",
    "Precision",
    "carried_variance_factors",
    "classify",
    "element_factors",
    "gradient_factor",
    "gradient_mass_factor",
    "invariant_factor",
    "probability_factor",
    "row_mass_tolerance",
    "screen_factor",
    "screen_grain",
]

UNCONFIRMED = 4.0
"""Factor on the screen's tolerance where its alarms are final."""

NEAR_INF_SHARE = 0.25
"""Values above this share of the dtype's maximum are called near-INF."""

_SIGMAS = 7.0
"""Standard deviations of round-off that the screen lets pass."""


CARRIED_SIGMAS = 12.0
"""Standard deviations of round-off that a line's carried checksum lets pass. The energy in them is an estimate from 16
signs: a normal deviate exceeds 12 of what a chi-squared estimate makes of its deviation with probability 1e-8."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Unit round-offs u (the largest relative error of one rounding) along one GEMM."""

    stored: float
    """Of C's dtype: 2⁻⁸ for bfloat16, 2⁻¹¹ for float16, 2⁻²⁴ for float32, 2⁻⁵³ for float64."""
    accumulated: float
    """Of the arithmetic inside: 2⁻²⁴ for float32 accumulation."""
    checked: float
    """Of the stored row sums E and O."""
    operand: float = 0.0
    """Of operands that are rounded on the way in (TF32, or bf16 passes for float32); 0 where they are exact."""
    split: float = 0.0
    """Of sums whose parts are rounded to C's dtype before they are added, all of them together; 0 where none are."""


LONG = 256
"""Products in a sum up to which the bound for random roundings, 2·(8·√k + 8), is above the k of any: 289 at most."""

_SQUARED_WEIGHT = 7.0 / 3.0
"""Mean of w², w spread evenly from 1 to 2: of the vectors with weights, and a bound for those without."""


def screen_grain(spacing: float, *, n: int, columns: int) -> float:
    """Tolerance of ‖E_i − O_i‖₂ that does not shrink with the row: below the smallest normal number a dtype's elements
    are multiples of `spacing`, off by spacing ÷ √12 on average. It counts in float16, where small gradients lie there.
    """
    return _SIGMAS * spacing * math.sqrt(n * columns * _SQUARED_WEIGHT / 12.0)


def screen_factor(precision: Precision, *, k: int, n: int, columns: int) -> float:
    """Tolerance of ‖E_i − O_i‖₂ as a multiple of scale_i, for a clean GEMM (see the head of this file).

    With ρ the root-mean-square of a row of C, one column of V gives sums of size ρ·√n. Each stored element errs with
    standard deviation `stored`·ρ ÷ √3, hence √n times that over the sum; E and O are each rounded by `checked` when
    they are stored; accumulation over k products is a random walk, about accumulated·√k·ρ an element, and so are the
    sums over n. Together: deviation·ρ·√n a column, √columns of that over the row. scale_i is about 2·√columns·ρ·√n, and
    the norm of c normal deviates exceeds √c·(1 + 7 ÷ √c) with a probability below 1e-11. What limits the screen is
    that scale_i is an estimate from few sums: where one row outweighs all others it may be a fraction of what it
    estimates. Accumulation has reserves for that in its own term, rounding gets a factor of 2.
    """
    rounding = 2.0 * precision.stored / math.sqrt(3.0)
    checking = 2.0 * precision.checked / math.sqrt(3.0)
    accumulation = precision.accumulated * (math.sqrt(k) + math.sqrt(n) + 4.0)
    deviation = rounding + checking + accumulation + 2.0 * precision.operand
    return deviation * (1.0 + _SIGMAS / math.sqrt(columns)) / 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ElementFactors:
    """|C_ij − R_ij| ≤ relative·S_ij + accumulated·(|α|·|A|·|B| + |β·D|)_ij + drift·M_ij + absolute·(1 + F_ij).

    R is in float64. S = |R| for a plain product; with an addend, S = |R| + |α·A·B| + |β·D|, since a library may round
    in between. M = (mean size of the partial sums that α·A·B goes through) + (half of the sum of |sums over every 64th
    term|) + |β·D|, see `element_factors`. F_ij = Σ_k |A_ik| + Σ_k |B_kj|: operands that are not normal numbers may
    count as zero.
    """

    relative: float
    accumulated: float
    drift: float
    absolute: float


def element_factors(precision: Precision, *, k: int, smallest_normal: float) -> ElementFactors:
    """Bounds of one element's round-off, for the confirming stage.

    Worst-case accumulation errs by k·u·(|A|·|B|)_ij. Where roundings are as good as random, 8·√k·u is enough
    (a probabilistic bound in Higham's and Mary's sense with λ = 8, failing with 2·exp(−λ²/2) ≈ 3e-14); taken twice, it
    is above the worst case up to `LONG`. They are not random where nearly equal terms are added one after the other, as
    a library does it for few results of long sums: then each rounds the same way. In any order the error is at most u
    times the sum of all |partial sums|. One after the other, beginning with the addend, that is u·k·(their mean). In L
    ≥ 2 lanes of every L-th term, whose signs may be alike where those of neighbours are not, it is u·k/L·Σ |partial
    sums of lanes|, and the sums over every 64th term bound it for any L that divides 64, since |a + b| ≤ |a| + |b|.

    What that loses: where signs are alike, changes below 1.1·k·u of the result (7e-3 at k = 1e5); where they are
    random, some 4·k·u of the result's rms come to the 10 to 13·k·u that 8·√k·u leaves open already.
    Parts of a split sum have the size of C, or, where terms of random signs cancel, 1 ÷ √k of |A|·|B|.
    Results below the smallest normal number may be flushed to zero.
    """
    terms = min(k + 2.0, 8.0 * math.sqrt(k) + 8.0)
    return ElementFactors(
        relative=1.01 * precision.stored + precision.split,
        accumulated=2.0 * (precision.accumulated * terms + precision.operand) + precision.split / math.sqrt(max(k, 1)),
        drift=precision.accumulated * k if k > LONG else 0.0,
        absolute=4.0 * smallest_normal,
    )


def classify(value: float, largest: float) -> DetectionKind:
    """Name what stands in a faulty element: `value` as stored, `largest` the dtype's maximum."""
    if math.isnan(value):
        return DetectionKind.NAN
    if math.isinf(value):
        return DetectionKind.INF
    if abs(value) >= NEAR_INF_SHARE * largest:
        return DetectionKind.NEAR_INF
    return DetectionKind.MISMATCH


def invariant_factor(*, stored: float, accumulated: float, length: int, width: int) -> float:
    """Tolerance of an identity of fused attention, as a multiple of the root of the sum of squares of its terms.

    Inside the kernel P and dS are rounded to the stored dtype before they are multiplied, and each sum over `length`
    keys and `width` components is a random walk. Clean residuals were measured at up to 5·stored in bfloat16 and
    30·accumulated in float32 at length 256; the factor leaves four times that.
    """
    return 20.0 * stored + 8.0 * math.sqrt(length + width) * accumulated


def row_mass_tolerance(*, stored: float, accumulated: float, n: int) -> float:
    """Largest |Σ_j P_ij − 1| that round-off explains, for a softmax over n elements.

    Each stored element errs by `stored` relative to itself, so their sum by at most `stored`; the stored sum by as much
    again; exponentials and the normalisation by some units of `accumulated`, the sum over n as a random walk.
    """
    return 2.02 * stored + (4.0 * math.sqrt(n) + 32.0) * accumulated


def probability_factor(*, stored: float, accumulated: float, n: int) -> float:
    """Largest relative error of one probability that round-off explains.

    exp(x − max) is as exact as its argument: arguments down to −104 matter in float32, and err by half a unit in their
    last place.
    """
    return 1.01 * stored + (4.0 * math.sqrt(n) + 240.0) * accumulated


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CarriedVarianceFactors:
    """Variance that one product adds to carried − observed plain sum of a line of n elements, each over k products:

    stored · energy + accumulated · ‖a‖²·‖B‖_F² + summed · (squares of the sums involved).
    """

    stored: float
    accumulated: float
    summed: float


def carried_variance_factors(precision: Precision, *, k: int, n: int, num_roundings: int = 1) -> CarriedVarianceFactors:
    """Round-off of one product under sums that are carried through it (no second stage confirms them).

    Storing errs with variance u_C² ÷ 3 of each element's square, `num_roundings` times where an addend follows. The
    partial sums of k products of one sign grow linearly, and their roundings add up to u·√k ÷ 3 of ‖a‖·‖b‖; of mixed
    signs to less. Parts of a split sum: as in `element_factors`. The sums themselves are taken over k, and over n, in
    `checked`.
    """
    accumulated = precision.accumulated * (0.5 * math.sqrt(k) + 2.0)
    return CarriedVarianceFactors(
        stored=num_roundings * precision.stored**2 / 3.0 + precision.split**2,
        accumulated=accumulated**2 + 2.0 * precision.operand**2 + precision.split**2 / max(k, 1),
        summed=(precision.checked * (math.sqrt(k) + math.sqrt(n) + 8.0)) ** 2,
    )


def gradient_mass_factor(*, stored: float, accumulated: float, n: int) -> float:
    """Tolerance of |Σ_j dS_ij| as a multiple of √(Σ_j dS_ij² + its mean over the rows), for a softmax's backward.

    Stored elements err by `stored`·dS_ij ÷ √3 each, at random, and the sum and its terms by a random walk; with the
    same margin for the estimate of the energy as in `screen_factor`.
    """
    rounding = 2.0 * stored / math.sqrt(3.0)
    return (rounding + accumulated * (8.0 * math.sqrt(n) + 64.0)) * _SIGMAS / math.sqrt(2.0)


def gradient_factor(*, stored: float, accumulated: float, n: int) -> float:
    """Largest error of one dS_ij beyond its own rounding, as a share of P_ij·(|dP_ij| + Σ_j P_ij·|dP_ij|).

    A library may round D_i, or the difference, to the stored dtype before it multiplies.
    """
    return (4.0 * stored if stored > accumulated else 0.0) + (4.0 * math.sqrt(n) + 32.0) * accumulated
