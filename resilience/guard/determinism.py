"""Measures whether this generation is bit-reproducible: one clean step is run twice more, and compared.

The verdict `deterministic` (not hardware, but data or code) rests on this measurement, so nothing is assumed. It also
shows whether a replay is faithful at all: a loss that reaches the model around the engine's outputs is not recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from resilience.guard.fingerprint import fingerprint

if TYPE_CHECKING:
    from resilience.guard.notes import Inspection
    from resilience.guard.transaction import Guard

__all__ = ["Measurement", "measure"]


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """What two replays of one step showed on this rank."""

    is_equal: bool
    """The replays had bit-equal gradients and losses: fingerprints of 64 bits were compared."""
    is_faithful: bool
    """They had the original's gradients. Norms are compared, since fingerprints are not taken on the clean path;
    roughly, where not even the replays are equal."""
    last: Inspection


def measure(guard: Guard, run_again: Callable[[], bool], original: Inspection) -> Measurement:
    """Replay the recorded step twice and compare.

    Args:
        guard: at the boundary of a step in which nothing was seen.
        run_again: replays the step; its answer is whether outputs that are no scalars were bit-equal too.
        original: what the step itself showed.
    """
    first_fits, first_loss, first = _run(guard, run_again)
    second_fits, second_loss, second = _run(guard, run_again)
    is_equal = first.fingerprints == second.fingerprints and first_loss == second_loss and first_fits and second_fits
    is_faithful = second.has_norms_of(original) if is_equal else second.has_norms_like(original)
    return Measurement(is_equal=is_equal, is_faithful=is_faithful, last=second)


def _run(guard: Guard, run_again: Callable[[], bool]) -> tuple[bool, int, Inspection]:
    guard.begin_attempt(0)
    fits = run_again()
    loss = guard.recorder.last_loss
    return fits, int(fingerprint(loss)) if loss is not None else 0, guard.inspect()
