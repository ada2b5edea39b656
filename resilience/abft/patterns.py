"""The shape that a fault takes in a matrix, and which operation that shape accuses. Pure decisions over masks.

ATTNChecker's propagation patterns: one wrong element (0D), one row (1D row), one column (1D column), more (2D). In
attention, S = Q·Kᵀ, P = softmax(S), C = P·V, O = C·Wo. A wrong element of Q reaches one row of S, of K one column, and
a column of S all of P, because the softmax mixes each row. Never here: checksums, corrections.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import torch

__all__ = ["PROPAGATION", "Pattern", "Section", "classify_elements", "classify_lines", "culprit"]


class Pattern(enum.StrEnum):
    """Where a matrix is wrong."""

    CLEAN = "clean"
    ELEMENT = "0D"
    ROW = "1D row"
    COLUMN = "1D column"
    SPREAD = "2D"


class Section(enum.StrEnum):
    """ATTNChecker's sections of an attention, each named after the matrix at its end."""

    SCORES = "S_AS"
    """{X·Wq, X·Wk, Q·Kᵀ}, ends with the scores AS."""
    CONTEXT = "S_CL"
    """{X·Wv, AP·V}, ends with the context CL."""
    OUTPUT = "S_O"
    """{CL·Wo}, ends with the output O."""


_CULPRITS: Mapping[tuple[Section, Pattern], str] = {
    (Section.SCORES, Pattern.ELEMENT): "attention.scores",
    (Section.SCORES, Pattern.ROW): "attention.q",
    (Section.SCORES, Pattern.COLUMN): "attention.k",
    (Section.CONTEXT, Pattern.ELEMENT): "attention.context",
    (Section.CONTEXT, Pattern.ROW): "attention.probs",
    (Section.CONTEXT, Pattern.COLUMN): "attention.v",
    (Section.OUTPUT, Pattern.ELEMENT): "attention.out",
    (Section.OUTPUT, Pattern.ROW): "attention.context",
    (Section.OUTPUT, Pattern.COLUMN): "weight",
}

PROPAGATION: Mapping[str, Mapping[str, Pattern]] = {
    "attention.q": {
        "attention.scores": Pattern.ROW,
        "attention.probs": Pattern.ROW,
        "attention.context": Pattern.ROW,
        "attention.out": Pattern.ROW,
    },
    "attention.k": {
        "attention.scores": Pattern.COLUMN,
        "attention.probs": Pattern.SPREAD,
        "attention.context": Pattern.SPREAD,
        "attention.out": Pattern.SPREAD,
    },
    "attention.scores": {
        "attention.probs": Pattern.ROW,
        "attention.context": Pattern.ROW,
        "attention.out": Pattern.ROW,
    },
    "attention.v": {"attention.context": Pattern.COLUMN, "attention.out": Pattern.SPREAD},
    "attention.context": {"attention.out": Pattern.ROW},
}
"""What one wrong element at a site makes of the matrices after it, in the head and batch it is in, if nothing mends it
and no mask hides it."""


def culprit(section: Section, pattern: Pattern) -> str | None:
    """The site at which a fault shows as `pattern` at the end of `section`; None for a spread one, or none."""
    return _CULPRITS.get((section, pattern))


def classify_lines(rows_wrong: torch.Tensor, columns_wrong: torch.Tensor) -> Pattern:
    """The pattern behind the rows (m,) and the columns (n,) whose sums are not what they must be; both boolean.

    A wrong row of the left operand is in the product *and* in what it says about its rows, so the rows agree, or one of
    them is not a number; but every column is off. A wrong row of the right operand likewise, with sides changed.
    """
    num_rows, num_columns = int(rows_wrong.sum()), int(columns_wrong.sum())
    if num_rows == 0 and num_columns == 0:
        return Pattern.CLEAN
    if num_rows <= 1 and num_columns <= 1:
        return Pattern.ELEMENT
    if num_rows <= 1:
        return Pattern.ROW
    return Pattern.COLUMN if num_columns <= 1 else Pattern.SPREAD


def classify_elements(wrong: torch.Tensor) -> Pattern:
    """The pattern of the elements (m, n) that differ from a fault-free run."""
    rows, columns = wrong.any(1), wrong.any(0)
    num_rows, num_columns = int(rows.sum()), int(columns.sum())
    if num_rows == 0:
        return Pattern.CLEAN
    if num_rows == 1:
        return Pattern.ELEMENT if num_columns == 1 else Pattern.ROW
    return Pattern.COLUMN if num_columns == 1 else Pattern.SPREAD
