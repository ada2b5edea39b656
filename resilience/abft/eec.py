"""EEC-ABFT: find one wrong element of a line by its carried sums, and rebuild it: extreme and moderate errors.

ATTNChecker (arXiv 2410.11720), every row of its case table, for all lines of a matrix at once. With d₁ and d₂ the
carried − observed sums under weights 1 and i + 1:

| condition | located by |
|---|---|
| abs(d₁) above its tolerance and finite, d₂ finite | round(d₂ ÷ d₁) − 1 |
| the same, d₂ not finite | the largest magnitude |
| d₁ = ±INF | the largest magnitude |
| d₁ = NaN | the NaN, or the INF |

In each a line with more than one suspect is left as it is; else the element becomes carried sum − sum of the others.
What differs from the published code:

* Its constants are absolute (1, 10¹⁰, 10³). Here tolerances come with the carried sums, from the inputs; a suspect is
  an element larger than `_SUSPECT` times the estimated norm of its line, which no clean element exceeds. The others
  are always summed anew: adding d₁ instead, as it does below 10³, is never more exact.
* d₂ ÷ d₁ names one column only where abs(d₁) is some n times its tolerance. Below that, the sums under pseudo-random
  signs choose among the columns that it leaves possible: an error e at j shows in them as e·s_j.
* The element is rebuilt from the mean of what the signs say, which has a quarter of one sum's round-off.
* A corrected line must pass *all* its sums again, or it is put back. Two wrong elements can satisfy weights 1 and i + 1
  exactly as one in between; the signs tell them apart.

The result is off by the round-off of the other elements of the line, so it is not bit-exact.
"""

from __future__ import annotations

import dataclasses
import enum

import torch

from resilience.abft.carried import NUM_SIGNS, Carried, Encoded, line_weights
from resilience.abft.patterns import Pattern, classify_lines
from resilience.abft.thresholds import CARRIED_SIGMAS

__all__ = ["Lines", "Repair", "Status", "correct", "rebuild", "residual_ratio"]

_SUSPECT = 8.0
"""An element above this multiple of its line's estimated norm is wrong: the estimate, a mean of 16 squares, is below
1/64 of the norm's square with a probability under 1e-9."""

_MAX_PASSES = 3


class Status(enum.IntEnum):
    """What became of a line."""

    CLEAN = 0
    CORRECTED = 1
    """One wrong element was found and rebuilt; all sums agree again."""
    SEVERAL = 2
    """Left as it was: more than one element is wrong."""
    UNSURE = 3
    """Left as it was: the error is too close to round-off for one column to be named."""
    NO_SUMS = 4
    """Left as it was: the carried sums are not finite themselves."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lines:
    """What was found in the lines of a matrix."""

    status: torch.Tensor
    """(…, L) int8, a `Status`."""
    index: torch.Tensor
    """(…, L) int64: the element that was located, −1 where none was."""
    ratio: torch.Tensor
    """(…, L): residual ÷ tolerance before any correction; NaN where a sum is not finite."""

    def count(self, status: Status) -> int:
        """How many lines have this status."""
        return int((self.status == status).sum())


def residual_ratio(lines: torch.Tensor, carried: Carried, *, tolerance_scale: float = 1.0) -> torch.Tensor:
    """Residual ÷ tolerance of each line of (…, L, n), (…, L); NaN where a sum is not finite. A clean line is ≤ 1."""
    return _ratio(_residuals(lines, carried), _tolerances(carried, tolerance_scale), lines.shape[-1])


def correct(
    matrix: torch.Tensor,
    carried: Carried,
    *,
    dim: int = -1,
    at: int | None = None,
    tolerance_scale: float = 1.0,
) -> Lines:
    """Find and rebuild one wrong element in every line of `matrix` that has one, in place.

    Args:
        matrix: (…, m, n), any float dtype and strides; only elements that are rebuilt and verified are written.
        carried: sums of its rows (dim −1) or of its columns (dim −2).
        dim: the dimension that the sums run over.
        at: the index of the wrong element in each line, where it is known (a row of the matrix is wrong).
        tolerance_scale: factor on every tolerance.
    """
    lines = matrix if dim == -1 else matrix.mT
    n = lines.shape[-1]
    residuals = _residuals(lines, carried)
    tolerances = _tolerances(carried, tolerance_scale)
    ratio = _ratio(residuals, tolerances, n)
    status = torch.zeros(ratio.shape, dtype=torch.int8, device=ratio.device)
    index = torch.full(ratio.shape, -1, dtype=torch.int64, device=ratio.device)
    suspects = torch.nonzero(~(ratio <= 1.0), as_tuple=True)
    if suspects[0].numel():
        part = _Suspects(
            elements=lines[suspects].to(carried.sums.dtype),
            sums=carried.sums.expand(*ratio.shape, -1)[suspects],
            residuals=residuals[suspects],
            tolerances=tolerances.expand(*ratio.shape, -1)[suspects],
            norm=carried.energy.expand(ratio.shape)[suspects].sqrt(),
        )
        verdict, where = part.located(at)
        value = part.rebuilt(where).to(matrix.dtype)
        chosen = verdict == Status.CORRECTED
        good = chosen & part.agrees(where, value)
        status[suspects] = torch.where(chosen & ~good, int(Status.SEVERAL), verdict).to(torch.int8)
        index[suspects] = torch.where(good, where, -1)
        lines[(*(each[good] for each in suspects), where[good])] = value[good]
    return Lines(status, index, ratio)


def _tolerances(carried: Carried, scale: float) -> torch.Tensor:
    """(…, L, 2): of the sums under signs, and of the plain sum."""
    signs = CARRIED_SIGMAS * carried.variance.sqrt() + torch.finfo(carried.sums.dtype).tiny
    return torch.stack([signs, signs + carried.coherent], dim=-1) * scale


def _residuals(lines: torch.Tensor, carried: Carried) -> torch.Tensor:
    wide = carried.sums.dtype
    return carried.sums - lines.to(wide) @ line_weights(lines.shape[-1], wide, lines.device)


def _ratio(residuals: torch.Tensor, tolerances: torch.Tensor, n: int) -> torch.Tensor:
    """The worst of d₁, d₂ ÷ n and the signs' root mean square, each ÷ its tolerance; NaN stays NaN."""
    plain = torch.maximum(residuals[..., 0].abs(), residuals[..., 1].abs() / n)
    # As a norm, which does not overflow where a square would.
    signs = torch.linalg.vector_norm(residuals[..., 2:] / NUM_SIGNS**0.5, dim=-1)
    return torch.maximum(signs / tolerances[..., 0], plain / tolerances[..., 1])


@dataclasses.dataclass(frozen=True, slots=True)
class _Suspects:
    """The s lines whose sums disagree, in the dtype of the sums."""

    elements: torch.Tensor
    """(s, n)"""
    sums: torch.Tensor
    """(s, c), as carried."""
    residuals: torch.Tensor
    """(s, c), carried − observed."""
    tolerances: torch.Tensor
    """(s, 2): signs, plain."""
    norm: torch.Tensor
    """(s,): estimated, of the clean line."""

    def located(self, at: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(status, index) of each line; `CORRECTED` stands for: to be rebuilt at that index."""
        n = self.elements.shape[1]
        plain, weighted = self.residuals[:, 0], self.residuals[:, 1]
        size = self.elements.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        extremes = ~(size <= _SUSPECT * self.norm.unsqueeze(1))
        by_ratio = plain.isfinite() & weighted.isfinite()
        quotient = torch.where(by_ratio, weighted / plain, 0.0).nan_to_num()
        spread = (n + quotient.abs()) * self.tolerances[:, 1] / plain.abs()
        fits = self._fits(quotient, spread)
        # Only the first row of the table has a finite d₂; all others look for the largest magnitude, or the NaN.
        is_close = by_ratio & ~(spread < 0.5)
        index = torch.where(by_ratio, quotient.round().long() - 1, size.argmax(1))
        index = torch.where(is_close, fits.long().argmax(1), index)
        status = torch.full(plain.shape, int(Status.CORRECTED), device=plain.device)
        if at is None:
            status[is_close & (fits.sum(1) > 1)] = int(Status.UNSURE)
            status[is_close & (fits.sum(1) == 0)] = int(Status.SEVERAL)
        else:
            index = torch.full_like(index, at)
        status[(extremes.sum(1) > 1) | (index < 0) | (index >= n)] = int(Status.SEVERAL)
        status[~self.sums.isfinite().all(1)] = int(Status.NO_SUMS)
        return status, index.clamp(0, n - 1)

    def _fits(self, quotient: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
        """(s, n): whether an error at this column alone explains the sums under signs, and d₂ ÷ d₁ within `spread`.

        With the error e estimated from the signs themselves, ‖d − e·s_j‖² = ‖d‖² − (d·s_j)² ÷ c.
        """
        n = self.elements.shape[1]
        signs = line_weights(n, self.sums.dtype, self.sums.device)[:, 2:]
        observed = self.residuals[:, 2:]
        misfit = observed.square().sum(1, keepdim=True) - (observed @ signs.mT).square() / NUM_SIGNS
        position = torch.arange(1, n + 1, device=signs.device)
        is_near = ~((position - quotient.unsqueeze(1)).abs() > spread.unsqueeze(1) + 0.5)
        return (misfit <= NUM_SIGNS * self.tolerances[:, :1].square()) & is_near

    def rebuilt(self, index: torch.Tensor) -> torch.Tensor:
        """The element at `index` of each line: what is left of the carried sums when the others are taken off."""
        signs = line_weights(self.elements.shape[1], self.sums.dtype, self.sums.device)[:, 2:]
        others = self.elements.scatter(1, index.unsqueeze(1), 0.0)
        return ((self.sums[:, 2:] - others @ signs) * signs[index]).mean(1)

    def agrees(self, index: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Whether each line passes all its sums with `value` at `index`.

        Round-off of the sums is in the rebuilt element now, and from there in the other sums: twice the tolerance.
        """
        elements = self.elements.scatter(1, index.unsqueeze(1), value.to(self.sums.dtype).unsqueeze(1))
        residuals = self.sums - elements @ line_weights(elements.shape[1], self.sums.dtype, self.sums.device)
        return _ratio(residuals, 2.0 * self.tolerances, elements.shape[1]) <= 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Repair:
    """What `rebuild` found and did in one matrix, or in the matrices of a batch."""

    pattern: Pattern
    """Of the worst matrix."""
    clean: bool
    """Whether the sums of every matrix agree now (a side whose sums a fault has poisoned is left out)."""
    num_rebuilt: int
    """Elements that were written."""
    max_ratio: float
    """Largest residual ÷ tolerance that was found; infinite where it is not a number."""


def rebuild(encoded: Encoded, *, tolerance_scale: float = 1.0) -> Repair:
    """Rebuild what is wrong in a matrix from the carried sums of its rows and columns, in place, and verify it again.

    A wrong element is rebuilt by its row or its column; a wrong row by all columns, a wrong column by all rows. A
    matrix of a batch whose sums do not agree afterwards is put back as it was. With one side known only, that side
    decides alone.
    """
    value, rows, columns = encoded.value, encoded.rows, encoded.columns
    flat = value.unsqueeze(0) if value.dim() == 2 else value
    sides = [None if side is None else side.of_batch(flat.shape[:-2]) for side in (rows, columns)]
    ratios = [
        torch.zeros(0, device=flat.device)
        if side is None
        else residual_ratio(flat if which == 0 else flat.mT, side, tolerance_scale=tolerance_scale)
        for which, side in enumerate(sides)
    ]
    wrong = torch.zeros(flat.shape[:-2], dtype=torch.bool, device=value.device)
    for ratio in ratios:
        if ratio.numel():
            wrong |= ~(ratio <= 1.0).all(-1)
    worst = max(
        (float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) for ratio in ratios if ratio.numel()),
        default=0.0,
    )
    repair = Repair(Pattern.CLEAN, True, 0, worst)
    for place in zip(*torch.nonzero(wrong, as_tuple=True), strict=True):
        one = [None if side is None else _of_one(side, place) for side in sides]
        repair = _worse(repair, _rebuild_one(flat[place], one[0], one[1], tolerance_scale))
    return repair


def _of_one(side: Carried, place: tuple[torch.Tensor, ...]) -> Carried:
    return side.mapped(lambda tensor: tensor[place])


_ORDER = (Pattern.CLEAN, Pattern.ELEMENT, Pattern.ROW, Pattern.COLUMN, Pattern.SPREAD)


def _worse(one: Repair, other: Repair) -> Repair:
    pattern = max(one.pattern, other.pattern, key=_ORDER.index)
    return Repair(pattern, one.clean and other.clean, one.num_rebuilt + other.num_rebuilt, one.max_ratio)


def _rebuild_one(value: torch.Tensor, rows: Carried | None, columns: Carried | None, scale: float) -> Repair:
    before = value.clone()
    sides = [(side, dim) for side, dim in ((rows, -1), (columns, -2)) if side is not None]
    wrong = {dim: _wrong(value, side, dim, scale) for side, dim in sides}
    none = torch.zeros(0, dtype=torch.bool)
    pattern = classify_lines(wrong.get(-1, none), wrong.get(-2, none))
    if pattern is Pattern.ROW:
        sides.reverse()  # the row agrees with what made it wrong; the columns know better
    accepted = False
    suspect: dict[int, int] = {}
    for side, dim in sides * _MAX_PASSES:
        place = _correct_lines(value, side, dim, scale)
        if place is not None:
            suspect[-3 - dim] = place
        left = {dim: _wrong(value, side, dim, 2.0 * scale) for side, dim in sides}
        accepted = _accept(left, suspect)
        if accepted:
            break
    if not accepted:
        value.copy_(before)
    changed = (value != before) & ~(value.isnan() & before.isnan())
    return Repair(pattern, accepted, int(changed.sum()), 0.0)


def _wrong(value: torch.Tensor, side: Carried, dim: int, scale: float) -> torch.Tensor:
    return ~(residual_ratio(value if dim == -1 else value.mT, side, tolerance_scale=scale) <= 1.0)


def _correct_lines(value: torch.Tensor, side: Carried, dim: int, scale: float) -> int | None:
    """Correct every line; the index that all corrections share, if they do: the wrong line of the other direction."""
    found = correct(value, side, dim=dim, tolerance_scale=scale)
    located = found.index[found.index >= 0]
    if located.numel() == 0:
        return None
    place = int(located.mode().values)
    if found.count(Status.UNSURE) + found.count(Status.SEVERAL) and bool((located == place).all()):
        correct(value, side, dim=dim, at=place, tolerance_scale=scale)
    return place if bool((located == place).all()) else None


def _accept(wrong: dict[int, torch.Tensor], suspect: dict[int, int]) -> bool:
    """Whether the sums agree: of all lines, or of all lines of one direction and all but the suspect one of the other.

    A wrong row of the left operand is in what the product says about that very row.
    """
    counts = {dim: int(lines.sum()) for dim, lines in wrong.items()}
    if not any(counts.values()):
        return True
    for dim, lines in wrong.items():
        other = -3 - dim
        if other in counts and counts[other] == 0 and counts[dim] == 1 and dim in suspect:
            return bool(lines[suspect[dim]])
    return False
