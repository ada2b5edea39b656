"""Screens of this rank's own gradients, before any reduction: what is not finite, and norms out of all proportion.

A hook on each parameter reads the gradient once (its 2-norm, in which an INF or a NaN shows) just before autograd
accumulates it, so blame stays with the rank that computed it. The norms stay on the device; the host reads them once,
at the boundary. Injected faults of the site `gradient` strike in the same hook, before the screen reads.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch

from resilience.abft.finding import Finding
from resilience.clock import Clock, SystemClock
from resilience.config import DetectionConfig
from resilience.events import Check, DetectionKind
from resilience.faults.tensor import TensorInjector
from resilience.guard.fingerprint import fingerprint

__all__ = ["GradientScreen", "NormHistory", "Reading"]

_NUM_SILENT_STEPS = 3
"""Verified steps that the norm screen sees before it speaks."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """The norm of one parameter's gradient in one micro-step, loss scale divided out."""

    micro_step: int
    index: int
    """The parameter's place in `named_parameters`."""
    norm: float


class NormHistory:
    """What norms were normal of late: the largest of each parameter, and of the whole gradient, per verified step.

    Pure: numbers in, numbers out.

    Args:
        factor: `DetectionConfig.norm_factor`.
        num_steps: `DetectionConfig.norm_history_steps`.
    """

    def __init__(self, factor: float, num_steps: int) -> None:
        self._factor = factor
        self._steps: collections.deque[tuple[dict[int, float], float]] = collections.deque(maxlen=num_steps)
        self._limits: dict[int, float] = {}

    def add(self, readings: Iterable[Reading]) -> None:
        """Take the readings of a verified step into the history; a step with a norm that is not finite is left out."""
        largest: dict[int, float] = {}
        squares: dict[int, float] = {}
        for reading in readings:
            if not math.isfinite(reading.norm):
                return
            largest[reading.index] = max(largest.get(reading.index, 0.0), reading.norm)
            squares[reading.micro_step] = squares.get(reading.micro_step, 0.0) + reading.norm**2
        self._limits.clear()
        if largest:
            self._steps.append((largest, math.sqrt(max(squares.values()))))

    def limit(self, index: int) -> float:
        """The largest norm that is no alarm for this parameter; infinite while too few steps were seen."""
        if index not in self._limits:
            self._limits[index] = self._compute(index)
        return self._limits[index]

    def _compute(self, index: int) -> float:
        seen = [largest[index] for largest, _ in self._steps if index in largest]
        if len(seen) < _NUM_SILENT_STEPS:
            return math.inf
        # Training itself throws up spikes of a single parameter, up to the size of the whole gradient and beyond.
        return max(self._factor * max(seen), math.sqrt(self._factor) * max(whole for _, whole in self._steps))


class GradientScreen:
    """Hooks on the parameters of `module`, and what they read since `begin`.

    Args:
        module: its parameters that require gradients are screened.
        config: norm factor and history.
        enabled: screen at all; the hooks still carry out injected faults.
        injector: strikes the site `gradient`.
        clock: for `Finding.detected_at`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        config: DetectionConfig,
        *,
        enabled: bool = True,
        injector: TensorInjector | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._names = [name for name, _ in module.named_parameters()]
        self._enabled = enabled
        self._injector = injector
        self._clock = clock or SystemClock()
        self._history = NormHistory(config.norm_factor, config.norm_history_steps)
        self.micro_step: Callable[[], int] = lambda: 0
        """Which micro-step a gradient belongs to; set by the transaction."""
        self.fingerprinting = False
        """Whether gradients are fingerprinted too: while replaying, never on the clean path."""
        self.begin()
        self._handles = [
            parameter.register_hook(self._hook(index))  # type: ignore[no-untyped-call]
            for index, (_, parameter) in enumerate(module.named_parameters())
            if parameter.requires_grad and (enabled or injector is not None)
        ]

    def begin(self) -> None:
        """Forget what was read: a new attempt begins."""
        self._places: list[tuple[int, int]] = []
        # Numbers on a CPU, where nothing waits; tensors on a device, which are read together.
        self._norms: list[float | torch.Tensor] = []
        self._near_inf: set[int] = set()
        self._fingerprints: list[torch.Tensor] = []

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def read(self, loss_scale: float) -> list[Reading]:
        """All norms since `begin`, in the order of the backward passes. Waits for the device, once."""
        norms = [*self._norms]
        deferred = [place for place, norm in enumerate(norms) if isinstance(norm, torch.Tensor)]
        if deferred:
            values = torch.stack([torch.as_tensor(norms[place]) for place in deferred]).tolist()
            for place, value in zip(deferred, values, strict=True):
                norms[place] = value
        return [
            Reading(micro_step=micro_step, index=index, norm=float(norm) / loss_scale)
            for (micro_step, index), norm in zip(self._places, norms, strict=True)
        ]

    def fingerprints(self) -> tuple[int, ...]:
        """The gradients' fingerprints since `begin`, in the order of the backward passes."""
        return tuple(torch.stack(self._fingerprints).tolist()) if self._fingerprints else ()

    def findings(self, readings: Sequence[Reading]) -> list[Finding]:
        """The alarms among `readings`, in their order."""
        found = []
        for place, reading in enumerate(readings):
            if not math.isfinite(reading.norm):
                found.append(self._not_finite(reading, near=place in self._near_inf))
                continue
            limit = self._history.limit(reading.index)
            if reading.norm > limit:
                ratio = reading.norm / limit if limit else math.inf
                found.append(self._finding(reading, Check.NORM, DetectionKind.NORM_SPIKE, ratio))
        return found

    def verified(self, readings: Iterable[Reading]) -> None:
        """The step with these readings was taken without an alarm."""
        self._history.add(readings)

    def _hook(self, index: int) -> Callable[[torch.Tensor], torch.Tensor | None]:
        name = self._names[index]

        def read(gradient: torch.Tensor) -> torch.Tensor | None:
            struck = None
            if self._injector is not None and self._injector.armed:
                # Autograd may share a gradient's memory; only the copy that goes on is struck.
                copy = gradient.clone(memory_format=torch.contiguous_format)
                if self._injector.strike("gradient", index, copy, param=name):
                    struck = gradient = copy
            if self._enabled:
                self._read(index, gradient)
            return struck

        return read

    def _read(self, index: int, gradient: torch.Tensor) -> None:
        # Not under no_grad(): entered for each parameter, it would cost as much as the norm of a small one.
        gradient = gradient.detach()
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        norm = _norm(gradient)
        self._places.append((self.micro_step(), index))
        if norm.is_cpu:
            value = norm.item()
            if math.isinf(value) and bool(torch.isfinite(gradient).all()):
                # Finite, but its squares overflow. On a GPU, where the host does not look, this reads as INF.
                self._near_inf.add(len(self._norms))
            self._norms.append(value)
        else:
            self._norms.append(norm.double())
        if self.fingerprinting:
            self._fingerprints.append(fingerprint(gradient))

    def _not_finite(self, reading: Reading, *, near: bool) -> Finding:
        kind = DetectionKind.NAN if math.isnan(reading.norm) else DetectionKind.INF
        return self._finding(reading, Check.SCREEN, DetectionKind.NEAR_INF if near else kind, math.inf)

    def _finding(self, reading: Reading, check: Check, kind: DetectionKind, ratio: float) -> Finding:
        return Finding(
            site="gradient",
            layer=reading.index,
            check=check,
            kind=kind,
            residual_ratio=ratio,
            param=self._names[reading.index],
            micro_step=reading.micro_step,
            detected_at=self._clock.wall(),
        )


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """2-norm, a scalar in float32 or wider; INF and NaN come through.

    Always by this arithmetic, whatever else has read the gradient: a replay's norms are held against those of the step
    that it repeats, to the bit.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if gradient.is_cpu and gradient.dim() > 1 and gradient.is_floating_point():
        # One result would be the work of one thread.
        gradient = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=wide)
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=wide)
    return norm
