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
import zlib
from collections.abc import Callable

import torch

from resilience.abft.finding import Finding
from resilience.abft.reduction import ChunkSums, chunk_sums, may_overflow, reduction_ratio
from resilience.clock import Clock
from resilience.deepspeed.collectives import watch_reductions
from resilience.events import Check, DetectionKind
from resilience.guard.exchange import Exchange

__all__ = ["Reductions"]


@dataclasses.dataclass(slots=True)
class _Reduction:
    """One of them."""

    dtype: torch.dtype
    part: ChunkSums
    """Of what this rank put in."""
    shard: int = 0
    observed: ChunkSums | None = None
    """Of the result, one shard; None where another rank has it."""


class Reductions:
    """What is told of an attempt's reductions (`deepspeed.collectives.ReductionListener`), and the comparison.

    Args:
        exchange: to the other ranks.
        clock: for `Finding.detected_at`.
        tell: says why the sums of a step could not be compared.
        apart: what is run within it is no work of the script's: DeepSpeed reduces in the middle of a backward pass.
        threshold_scale: `DetectionConfig.threshold_scale`.
        enabled: look at DeepSpeed's reductions at all.
    """

    def __init__(
        self,
        exchange: Exchange,
        clock: Clock,
        *,
        tell: Callable[[str], None],
        apart: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        threshold_scale: float = 1.0,
        enabled: bool = True,
    ) -> None:
        self._exchange = exchange
        self._threshold_scale = threshold_scale
        self._clock = clock
        self._tell = tell
        self._apart = apart
        self._seen: list[_Reduction] = []
        self._has_said = False
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
                last.shard, last.observed = shard, _shard(chunk_sums(result.view(1, -1)), 0)

    def findings(self) -> list[Finding]:
        """What does not fit on this rank. Collective; waits for the device."""
        if not self._is_on:
            return []
        if not self._exchange.agree(_fingerprint(self._seen)):
            self._say_once()
            return []
        if any(each.part.sums.device.type != "cpu" for each in self._seen):
            torch.accelerator.synchronize()  # DeepSpeed reduces on streams of its own
        parts = [part.flatten() for part in _on_host([part for each in self._seen for part in each.part])]
        totals = self._exchange.total(torch.cat([torch.empty(0, dtype=torch.float64, device="cpu"), *parts]))
        results = iter(_on_host([part for each in self._seen if each.observed is not None for part in each.observed]))
        found = []
        for number, each in enumerate(self._seen):
            sums, totals = _split(totals, each.part.sums.shape)
            energies, totals = _split(totals, each.part.energies.shape)
            if each.observed is not None:
                expected, observed = ChunkSums(sums, energies), ChunkSums(next(results), next(results))
                found += self._compare(number, each.dtype, _shard(expected, each.shard), observed)
        return found

    def _say_once(self) -> None:
        if not self._has_said:
            self._tell("sums over the ranks were not compared in a step: ranks have not taken part in the same ones")
        self._has_said = True

    def _compare(self, number: int, dtype: torch.dtype, expected: ChunkSums, result: ChunkSums) -> list[Finding]:
        if not expected.is_finite():
            return []  # what went in was bad already: the screens of local gradients know whose it is
        num_ranks, finite = self._exchange.world_size, bool(result.sums.isfinite().all())
        if not finite and may_overflow(expected, dtype=dtype, num_ranks=num_ranks):
            return []  # the search for a loss scale: DeepSpeed skips the step
        self.num_checks += 1
        ratios = reduction_ratio(expected, result, dtype=dtype, num_ranks=num_ranks)
        ratio = float(ratios.max()) / self._threshold_scale
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


def _shard(of_all: ChunkSums, number: int) -> ChunkSums:
    return ChunkSums(of_all.sums[number], of_all.energies[number])


def _on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same in the host's memory, copied at once from each of their devices."""
    found = list(tensors)
    for device in {tensor.device for tensor in tensors if not tensor.is_cpu}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        together = torch.cat([tensors[place].flatten() for place in places]).cpu()
        parts = torch.split(together, [tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


def _fingerprint(seen: list[_Reduction]) -> int:
    """The same on all ranks that took part in the same reductions, in the same order."""
    return zlib.crc32(repr([(str(each.dtype), tuple(each.part.sums.shape)) for each in seen]).encode())


def _split(values: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    return values[: shape.numel()].view(shape), values[shape.numel() :]
