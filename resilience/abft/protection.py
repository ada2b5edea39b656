"""Detection on one rank: puts checks around the operations of a model, mends what it can, reports what it saw.

The only entry that the guard uses. It joins the seam, the labels and the checks; here are no thresholds and no
arithmetic on tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from resilience.abft.adaptive import Solution
from resilience.abft.calibration import load_profile
from resilience.abft.device import on_device
from resilience.abft.finding import Finding
from resilience.abft.frequency import Frequency
from resilience.abft.fused import FUSED_OPERATORS, fused_backward_handler, fused_forward_handler
from resilience.abft.gemm import GEMM_OPERATORS
from resilience.abft.handlers import Context, GemmHandlers, Injector
from resilience.abft.in_kernel import REPLACED_OPERATORS, InKernelAttention
from resilience.abft.labels import Labels, Observer
from resilience.abft.record import Record
from resilience.abft.seam import Gate, Seam
from resilience.abft.softmax import softmax_backward_handler, softmax_handler
from resilience.abft.unprotected import add_counters
from resilience.clock import Clock, SystemClock
from resilience.config import DetectionConfig

__all__ = ["Protection"]

_log = logging.getLogger(__name__)


class Protection:
    """Checks around the GEMMs, softmaxes and fused attentions of one process.

    Strengths: `off` and `screen` override nothing here (the screen of gradients is the guard's); `invariants` checks
    fused attention; `checksum` adds every GEMM and eager attention's softmax; `kernel` computes fused attention on a
    CUDA device by a kernel that checks and repairs itself, and is `checksum` elsewhere.

    On a CPU a check is read at once, and a faulty operation is run again in place, verified again, and reported as
    mended. On a GPU nothing is read while the model runs: a suspicion is reported by `drain` at the boundary. In the
    replay that follows, checks are read at once there, too: what is round-off is dismissed, what is faulty again is
    mended in place.

    Args:
        config: strength, share, number of mends, scale of the thresholds.
        injector: strikes inside protected operations, after the arithmetic and before the check; None without a fault
            plan.
        clock: times of findings and of the checks themselves.
    """

    def __init__(
        self, config: DetectionConfig, *, injector: Injector | None = None, clock: Clock | None = None
    ) -> None:
        self._labels = Labels()
        clock = clock or SystemClock()
        share = 1.0 if config.share == "adaptive" else config.share
        self._record = Record(share=share, clock=clock)
        self._gate = Gate()
        self._seam = Seam(self._gate, on_cuda=lambda handler: on_device(handler, self._record.count_unprotected))
        self._frequency = (
            Frequency(config, measured=self._record.measured, use=self._record.set_shares, clock=clock)
            if config.share == "adaptive"
            else None
        )
        profile = {} if config.profile is None else load_profile(config.profile)
        context = Context(config, self._labels, self._record, injector, profile)
        self._gemms = GemmHandlers(context)
        self._decisions = context.decisions
        self._step = -1
        self._named_shortfalls: set[str] = set()
        self._attention = InKernelAttention(context) if config.strength == "kernel" else None
        if self._attention is not None and not torch.cuda.is_available():
            _log.warning("strength kernel: no CUDA device; fused attention is held by its invariants, as at checksum")
        if config.strength in ("invariants", "checksum", "kernel"):
            for operator in FUSED_OPERATORS:
                self._seam.add(operator, fused_forward_handler(context, operator))
                self._seam.add(f"{operator}_backward", fused_backward_handler(context, operator))
        if self._attention is not None:
            for operator in REPLACED_OPERATORS:
                self._seam.add(operator, self._attention.forward(operator), keys=("CUDA",))
                self._seam.add(f"{operator}_backward", self._attention.backward(operator), keys=("CUDA",))
        if config.strength in ("checksum", "kernel"):
            self._seam.add("_softmax", softmax_handler(context))
            self._seam.add("_softmax_backward_data", softmax_backward_handler(context))
            for operator in GEMM_OPERATORS:
                self._seam.add(operator, self._gemms.handler(operator))
            add_counters(self._seam, self._record.count_unprotected)

    def install(self) -> None:
        """Put the overrides in place. They do nothing until `active()`."""
        self._seam.install()

    def uninstall(self) -> None:
        """Remove the overrides and the hooks; torch is as it was."""
        self._seam.uninstall()
        self.detach()

    def attach(self, module: torch.nn.Module) -> None:
        """Put the hooks that name operations on `module`; replaces an earlier model."""
        apart = next((parameter.device for parameter in module.parameters() if parameter.device.type != "cpu"), None)
        if self._frequency is not None and apart is not None:
            self._frequency = None
            self._record.set_shares({})
            _log.warning(
                'detection.share = "adaptive" is measured by the host\'s clock, which does not see how long %s works: '
                "every call is checked; give a number from 0 to 1 for less",
                apart,
            )
        self._labels.attach(module)

    def detach(self) -> None:
        """Remove the hooks and the cached sums."""
        self._labels.detach()
        self._forget()

    def begin_micro_step(self, step: int, micro_step: int, attempt: int) -> None:
        """Begin a micro-step: layers count from 0; weight sums are taken anew in a new step, and in every replay.

        A replay (`attempt` above 0) is checked throughout, whatever the share, and its checks are read at once.
        """
        self._labels.begin_micro_step()
        self._record.replaying = attempt > 0
        if step != self._step and self._frequency is not None:
            self._frequency.step_begins()
        if step != self._step or attempt > 0:
            self._forget()
        self._step = step

    def _forget(self) -> None:
        self._gemms.clear()
        self._decisions.clear()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Protect what this thread executes within: the engine's forward or backward."""
        with self._gate.opened():
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What this thread executes within is no work of the script's, though it may be in the middle of it."""
        with self._gate.shut():
            yield

    def admit_backward(self, graph_task: int) -> None:
        """Protect this backward pass of autograd, wherever it was begun: a script may call `loss.backward()` itself.

        Called inside the pass. The nested passes of reentrant activation checkpointing are protected with it.
        """
        self._gate.admit(graph_task)

    def drain(self) -> list[Finding]:
        """Findings since the last call, in the order of the operations.

        On a CPU complete at any time. With work on a GPU it waits for the device: call it at the boundary only.
        """
        self._gemms.pass_ends()
        if self._attention is not None:
            self._attention.drain()
        return self._record.drain()

    def checks(self) -> dict[str, int]:
        """How many operations of each site were checked since the process began."""
        return dict(self._record.checks)

    def unprotected(self) -> dict[str, int]:
        """How many operations that multiply matrices ran unchecked, by reason, since the process began."""
        return dict(self._record.unprotected)

    def num_failed_checks(self) -> int:
        """How many checks went wrong themselves since the process began."""
        return self._record.num_failed

    def new_shortfalls(self) -> list[str]:
        """What was held by less than the strength promises, a sentence each, and was not named by an earlier call."""
        fallbacks = () if self._attention is None else self._attention.fallbacks
        found = [f"operations that run unchecked: {reason}" for reason in self._record.unprotected]
        found += [f"fused attention that runs outside the checked kernel: {reason}" for reason in fallbacks]
        new = [words for words in found if words not in self._named_shortfalls]
        self._named_shortfalls.update(new)
        return new

    def observe(self, observer: Observer | None) -> None:
        """Tell `observer` of every product that reaches a check; None ends it."""
        self._labels.observer = observer

    def tell_ratios(self, told: Callable[[str, float, bool], None]) -> None:
        """Tell site and residual ÷ threshold of every check from now on, and whether it raised an alarm."""
        self._record.on_ratio = told

    @property
    def frequency(self) -> Solution | None:
        """The newest shares of an adaptive frequency, and what they give; None without one."""
        return None if self._frequency is None else self._frequency.solution

    def tell_shares(self, told: Callable[[Solution], None]) -> None:
        """Tell of the new shares whenever an adaptive frequency sets some."""
        if self._frequency is not None:
            self._frequency.told = told

    def residual_sample(self) -> list[float]:
        """Residual ÷ threshold of up to 64 clean operations since the last call, drawn uniformly."""
        return self._record.sample()

    @property
    def check_seconds(self) -> float:
        """Seconds spent in checks and repairs since the process began."""
        return self._record.check_seconds
