"""How training goes on, for the next heartbeat: seconds and tokens of a step, its loss, the cost of its checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from resilience.clock import Clock
from resilience.guard.reporter import Reporter

__all__ = ["Headway"]

_LOSS_INTERVAL_STEPS = 10
"""On a GPU reading a loss waits for the device."""


class Headway:
    """Told of each forward as it begins; tells of each step when it was taken.

    Args:
        reporter: takes the heartbeat, which another thread sends.
        clock: for durations.
        is_cpu: whether reading a loss costs nothing.
    """

    def __init__(self, reporter: Reporter, clock: Clock, *, is_cpu: bool) -> None:
        self._reporter = reporter
        self._clock = clock
        self._is_cpu = is_cpu
        self._began_at: float | None = None
        self._num_tokens = 0
        self._check_seconds = 0.0
        self._blocked_s = 0.0

    def begin(self) -> None:
        """A micro-step begins, perhaps the first one of a step."""
        if self._began_at is None:
            self._began_at = self._clock.monotonic()

    def fed(self, inputs: Any) -> None:
        """The inputs of a forward."""
        self._num_tokens += _num_tokens(inputs)

    def snapshot_taken(self, blocked_s: float, interval_steps: int) -> None:
        """Tell of a memory snapshot.

        Args:
            blocked_s: seconds that training waited for copies since the start.
            interval_steps: between two of them, as things stand.
        """
        seconds, self._blocked_s = blocked_s - self._blocked_s, blocked_s
        self._reporter.add_badput("snapshot", seconds)
        self._reporter.heartbeat(snapshot_seconds_since=[seconds], snapshot_interval_steps=interval_steps)

    def step_taken(
        self,
        step: int,
        loss: torch.Tensor | None,
        *,
        last_verified_step: int,
        checks: Mapping[str, int],
        check_seconds: float = 0.0,
        residual_ratios: list[float] | None = None,
    ) -> None:
        """Tell of `step`.

        Args:
            step: just taken.
            loss: its last one; scalar.
            last_verified_step: newest step whose checks all reported.
            checks: how many were made since the start, by site.
            check_seconds: spent inside operations since the start.
            residual_ratios: a sample of them; None where operations are not checked.
        """
        now = self._clock.monotonic()
        seconds = now - (self._began_at if self._began_at is not None else now)
        self._began_at = None
        fields: dict[str, Any] = {"state": "training", "step": step, "micro_step": 0}
        if loss is not None and (self._is_cpu or step % _LOSS_INTERVAL_STEPS == 0):
            fields["loss"] = float(loss)
        if self._num_tokens and seconds > 0:
            fields["tokens_per_s"] = self._num_tokens / seconds
        self._num_tokens = 0
        if checks:
            fields["checks"] = checks
        if residual_ratios is not None:
            spent, self._check_seconds = check_seconds - self._check_seconds, check_seconds
            fields["residual_ratios"] = residual_ratios
            if seconds > 0:
                fields["abft_overhead_ratio"] = spent / seconds
        self._reporter.heartbeat(step_seconds=seconds, last_verified_step=last_verified_step, **fields)


def _num_tokens(values: Any) -> int:
    """Elements of the first integer tensor among a forward's inputs."""
    if isinstance(values, torch.Tensor):
        return 0 if values.is_floating_point() else values.numel()
    items = values.values() if isinstance(values, dict) else values if isinstance(values, (tuple, list)) else ()
    return next((count for count in map(_num_tokens, items) if count), 0)
