"""What the kernels write and the host reads: names of checks, verdicts, the record's fields. No Triton, no torch.

A *block* is one program of a kernel: a tile of queries of one head (forward, dq) or a tile of keys of one head (dkdv).
Its *status* is four int32 words: failing checks (0: clean or settled), worst residual ÷ tolerance of the first attempt
(the bits of a float32), SM of the first attempt, checks that failed at the first attempt.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Iterable, Sequence

__all__ = ["FIELDS", "NUM_STATUS_WORDS", "CheckBit", "FaultRecord", "Site", "Verdict", "parse_records"]


class CheckBit(enum.IntFlag):
    """Checks of the kernels; a record names all that failed together."""

    SCORES = 1
    """Forward: row sums of S = q·Σk."""
    CONTEXT = 2
    """Forward: O·1 = P·(V·1)."""
    ROW_SUM = 4
    """Forward: the denominator = Σ of the rounded P."""
    MASS = 8
    """dq: Σ_j P_ij = 1 with P from the stored log-sum-exp: forward's S, softmax and log-sum-exp."""
    DS = 16
    """dq: Σ_j dS_ij = 0: also forward's O, dP and D."""
    DQ = 32
    """dq: dQ·1 = dS·(K·1)."""
    DV = 64
    """dkdv: dV·1 = Pᵀ·(dO·1)."""
    DK = 128
    """dkdv: dK·1 = dSᵀ·(Q·1)."""
    SCORES_AGAIN = 256
    """dkdv: column sums of S = k·Σq."""
    DP = 512
    """dkdv: column sums of dP = v·ΣdO."""
    DP_ROWS = 1024
    """dq: row sums of dP = dO·Σv."""
    DS_ROWS = 2048
    """dq: Σ_j dS_ij = Σ_j P_ij dP_ij − D_i Σ_j P_ij."""
    QUOTIENT = 4096
    """dkdv: Σ_i dS_ij ÷ P_ij = Σ_i (dP_ij − D_i), with 1 ÷ P from another exponential."""


class Verdict(enum.IntEnum):
    """What became of a failing block."""

    REPAIRED = 1
    """Run again, and clean: bit-identical to a run without the fault."""
    UNREPAIRED = 2
    """It failed at every attempt, or the cause lies before this kernel."""
    INPUTS = 3
    """The operands were not finite, or too large to be checked: the alarm only propagates an earlier one."""


class Site(enum.IntEnum):
    """Where the test-only variant of a kernel strikes, after the arithmetic that produces the value."""

    NONE = 0
    SCORES = 1
    PROBS = 2
    ROW_SUM = 3
    CONTEXT = 4
    DP = 5
    DS = 6
    DQ = 7
    DK = 8
    DV = 9


FIELDS = ("sequence", "checks", "layer", "batch", "head", "tile", "sm", "ratio", "verdict", "num_attempts")
"""One record, int32 each; `ratio` holds the bits of a float32. `sm` is −1 where the hardware does not tell."""

NUM_STATUS_WORDS = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FaultRecord:
    """One block that failed a check."""

    sequence: int
    """The caller's number of the launch."""
    checks: CheckBit
    layer: int
    batch: int
    head: int
    tile: int
    """Tile of queries (forward, dq) or of keys (dkdv)."""
    sm: int
    ratio: float
    """Worst residual ÷ tolerance at the first attempt; infinite when it is not a number."""
    verdict: Verdict
    num_attempts: int
    """How often the block ran."""


def parse_records(rows: Iterable[Sequence[int]]) -> list[FaultRecord]:
    """Records from rows of int32 words, in the order of the launches."""
    records = []
    for row in rows:
        words = dict(zip(FIELDS, row, strict=True))
        words["ratio"] = struct.unpack("<f", struct.pack("<i", words["ratio"]))[0]
        checks, verdict = CheckBit(words.pop("checks")), Verdict(words.pop("verdict"))
        records.append(FaultRecord(checks=checks, verdict=verdict, **words))
    return sorted(records, key=lambda record: (record.sequence, record.batch, record.head, record.tile))
