"""Reductions of gradients over all ranks, compared with the reduction of their sums at the boundary of the step.

Each rank takes sums of what it puts in and of what it gets; at the boundary the former are added up over a process
group of our own, in float64, and compared where a result lies. Nothing waits for a device before that. A sum that does
not fit says that a rank added wrongly, or that a link or a buffer changed what was sent: which rank did is not known,
so no device is blamed, and the step is run again. Never here: which collectives those are, decisions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import torch

from resilience.abft.finding import Finding
from resilience.abft.reduction import chunk_sums, may_overflow, reduction_ratio
from resilience.clock import Clock
from resilience.deepspeed.collectives import watch_reductions
from resilience.events import Check, DetectionKind
from resilience.guard.exchange import Exchange

__all__ = ["Reductions"]


@dataclasses.dataclass(slots=True)
class _Reduction:
    """One of them."""

    dtype: torch.dtype
    sums: torch.Tensor
    """Of this rank's part, (shards, chunks, c)."""
    shard: int = 0
    observed: torch.Tensor | None = None
    """Of the result, (chunks, c); None where another rank has it."""


class Reductions:
    """What is told of an attempt's reductions (`deepspeed.collectives.ReductionListener`), and the comparison.

    Args:
        exchange: to the other ranks.
        clock: for `Finding.detected_at`.
        tell: says a reason why sums are not compared any more.
        apart: what is run within it is no work of the script's: DeepSpeed reduces in the middle of a backward pass.
        enabled: look at DeepSpeed's reductions at all.
    """

    def __init__(
        self,
        exchange: Exchange,
        clock: Clock,
        *,
        tell: Callable[[str], None],
        apart: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        enabled: bool = True,
    ) -> None:
        self._exchange = exchange
        self._clock = clock
        self._tell = tell
        self._apart = apart
        self._seen: list[_Reduction] = []
        self.num_checks = 0
        self._is_on = enabled and exchange.world_size > 1
        self._is_listening = False
        self._stop = watch_reductions(self) if self._is_on else lambda: None

    def remove(self) -> None:
        """Look no more."""
        self._is_on = False
        self.forget()
        self._stop()

    def listen(self) -> None:
        """This engine works on a step from here on: what is reduced before belongs to others."""
        self._is_listening = self._is_on

    def forget(self) -> None:
        """What was seen counts no more: the step is over, or a new attempt begins."""
        self._is_listening = False
        self._seen.clear()

    def goes_in(self, shards: torch.Tensor) -> None:
        """This rank's part of a reduction that begins."""
        if not self._is_listening:
            return
        with self._apart():
            self._seen.append(_Reduction(shards.dtype, chunk_sums(shards)))

    def comes_out(self, result: torch.Tensor | None, shard: int) -> None:
        """The result of the reduction that began last."""
        if result is not None and self._is_listening:
            last = self._seen[-1]
            with self._apart():
                last.shard, last.observed = shard, chunk_sums(result.view(1, -1))[0]

    def findings(self) -> list[Finding]:
        """What does not fit on this rank. Collective; waits for the device."""
        if not self._is_on:
            return []
        if self._seen and self._seen[0].sums.device.type != "cpu":
            torch.accelerator.synchronize()  # DeepSpeed reduces on streams of its own
        parts = [part for each in self._seen for part in (each.sums, each.sums.square().mean(-1))]
        totals = self._exchange.total(torch.cat([torch.empty(0).double(), *(part.flatten().cpu() for part in parts)]))
        if totals is None:
            self._tell("sums over the ranks are not compared any more: ranks have not taken part in the same ones")
            self.remove()
            return []
        found = []
        for number, each in enumerate(self._seen):
            expected, totals = _split(totals, each.sums.shape)
            energy, totals = _split(totals, each.sums.shape[:-1])
            if each.observed is not None:
                self.num_checks += 1
                found += self._compare(number, each, expected[each.shard], energy[each.shard])
        return found

    def _compare(self, number: int, each: _Reduction, expected: torch.Tensor, energy: torch.Tensor) -> list[Finding]:
        assert each.observed is not None
        if not bool(expected.isfinite().all()):
            return []  # what went in was bad already: the screens of local gradients know whose it is
        observed = each.observed.cpu()
        num_ranks = self._exchange.world_size
        finite = bool(observed.isfinite().all())
        if not finite and may_overflow(energy, dtype=each.dtype, num_ranks=num_ranks):
            return []  # the search for a loss scale: DeepSpeed skips the step
        ratio = float(reduction_ratio(expected, energy, observed, dtype=each.dtype, num_ranks=num_ranks).max())
        if ratio <= 1.0:
            return []
        return [
            Finding(
                site="gradient.sum",
                layer=number,
                check=Check.REPLICA,
                kind=DetectionKind.MISMATCH if finite else DetectionKind.NAN,
                residual_ratio=ratio if math.isfinite(ratio) else math.inf,
                detected_at=self._clock.wall(),
            )
        ]


def _split(values: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    return values[: shape.numel()].view(shape), values[shape.numel() :]
