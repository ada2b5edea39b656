"""Trials of the campaign: one fault in the result of one operation of a real training step, seen by the real checks.

A step runs under `resilience.abft.protection.Protection`. Each of its protected operations may be one trial: after the
arithmetic and before the check its result is corrupted; the check, the confirmation and the repair are the production
code's own. When the operation has returned, what it returned is compared with the clean result bit for bit, and the
clean result is put back: the next operation is a trial of its own, and the step must end in the bits of a clean one.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resilience.abft.finding import Finding
from resilience.abft.protection import Protection
from resilience.config import DetectionConfig
from resilience.faults.corruption import bits_of, corrupted, positions
from resilience.faults.plan import Fault

__all__ = ["Damage", "Schedule", "Striker", "Trial", "Trials", "kinds"]

FUSED = "_scaled_dot_product_flash_attention_for_cpu"
FUSED_SITES = ("attention.dq", "attention.dk", "attention.dv")
MAX_BITS = 4


def kinds(dtype: torch.dtype) -> list[str]:
    """Every kind of fault; `bit 0` is the lowest of the mantissa."""
    width = torch.finfo(dtype).bits
    return [
        "nan",
        "inf",
        "-inf",
        "near_inf",
        "zero",
        "scale",
        "multibit",
        "stride",
        *(f"bit {b}" for b in range(width)),
    ]


@dataclasses.dataclass(slots=True)
class Damage:
    """What was done to one result."""

    kind: str
    layer: int
    where: range
    """Places in row-major order."""
    values: tuple[float, ...]
    """What stands there now."""
    relative_change: float
    """max|ΔY| ÷ rms(Y); infinite where a number became none; 0 where no bit changed."""


@dataclasses.dataclass(slots=True)
class Trial:
    """One fault and what became of it."""

    site: str
    damage: Damage
    detected: bool = False
    late: bool = False
    """Detected in the backward pass of the same attention: a replay repairs it, not the operation itself."""
    bit_exact: bool = False
    """The operation returned the clean result, bit for bit."""
    harmless: bool | None = None
    """Whether the step with this fault left in place ended in the bits of a clean one; None: that was not tried."""


class Schedule:
    """Deals out the kinds of each site evenly, in an order of chance, until each had its number of trials."""

    def __init__(self, dtype: torch.dtype, num_trials: Callable[[str], int], draw: random.Random) -> None:
        self._kinds = kinds(dtype)
        self._num_trials = num_trials
        self._draw = draw
        self._left: dict[str, list[str]] = {}

    def left(self, site: str) -> list[str]:
        """The kinds that are still to be dealt out at `site`."""
        left = self._left.get(site)
        if left is None:
            left = self._left[site] = self._kinds * self._num_trials(site)
            self._draw.shuffle(left)
        return left

    def next(self, site: str) -> str | None:
        left = self.left(site)
        return left.pop() if left else None

    @property
    def num_left(self) -> int:
        """Trials still to come at the sites that were seen."""
        return sum(len(left) for left in self._left.values())


class Striker:
    """The injector of the protection: corrupts at most one result of an operation."""

    armed = True

    def __init__(self, schedule: Schedule | None, draw: random.Random) -> None:
        self._schedule = schedule
        self._draw = draw
        self.begin("")

    def begin(self, operator: str, site: str | None = None) -> None:
        """An operator of aten is about to run; with `site`, only its result of that name may be struck."""
        self.num_strikes = 0
        self._wanted = site
        self.operator = operator
        self.trial: Trial | None = None
        self.clean: torch.Tensor | None = None
        self.faulty: torch.Tensor | None = None

    def strike(self, site: str, layer: int, tensor: torch.Tensor, call: int | None = None) -> bool:
        self.num_strikes += 1
        if self.trial is not None or self._schedule is None or self._wanted not in (None, site):
            return False
        name = f"{site} (fused)" if self.operator.startswith(FUSED) else site
        kind = self._schedule.next(name)
        if kind is None:
            return False
        self.clean = tensor.detach().clone()
        self.trial = Trial(name, damage(tensor, kind, layer, self._draw))
        self.faulty = tensor.detach().clone()
        return True


@torch.no_grad()
def damage(tensor: torch.Tensor, kind: str, layer: int, draw: random.Random) -> Damage:
    """Corrupt `tensor` in place, somewhere."""
    where, values = _damaged(tensor, kind, draw)
    places = torch.unravel_index(torch.tensor(list(where)), tensor.shape)
    before = tensor[places]
    changed = bits_of(before) != bits_of(values)
    rms = float(tensor.double().square().mean().sqrt())
    largest = float((values.double() - before.double()).abs()[changed].max()) if bool(changed.any()) else 0.0
    tensor[places] = values
    ratio = largest / rms if rms > 0 and largest == largest else float("inf")
    return Damage(kind, layer, where, tuple(values.tolist()), ratio if bool(changed.any()) else 0.0)


def _damaged(tensor: torch.Tensor, kind: str, draw: random.Random) -> tuple[range, torch.Tensor]:
    settings: dict[str, Any] = {"kind": kind.removeprefix("-")}
    if kind.startswith("bit "):
        settings = {"kind": "bitflip", "bit": int(kind[4:])}
    elif kind == "multibit":
        width = torch.finfo(tensor.dtype).bits
        settings["bits"] = tuple(sorted(draw.sample(range(width), draw.randint(2, MAX_BITS))))
    elif kind == "scale":
        settings["factor"] = 1.5
    fault = Fault(step=1, site="linear.out", **settings)
    where = positions(fault, tensor.numel(), draw)
    before = tensor[torch.unravel_index(torch.tensor(list(where)), tensor.shape)]
    values = corrupted(before, fault)
    negative = kind == "-inf" or (kind == "near_inf" and draw.random() < 0.5)
    return where, -values if negative else values


class Trials(TorchDispatchMode):
    """Runs steps in which operations are struck; collects what came of it."""

    def __init__(self, model: torch.nn.Module, schedule: Schedule | None, draw: random.Random) -> None:
        super().__init__()
        self._striker = Striker(schedule, draw)
        self._protection = Protection(DetectionConfig(), injector=self._striker)
        self._model = model
        self._pending: dict[int, tuple[Trial, torch.Tensor, torch.Tensor]] = {}
        self.trials: list[Trial] = []
        self.false_alarms: list[Finding] = []

    def run(self, step: Any) -> list[torch.Tensor]:
        """One step under protection, with trials."""
        self._protection.install()
        self._protection.attach(self._model)
        self._protection.begin_micro_step(1, 0, 1)  # a replay: sums of weights are taken anew
        try:
            with self, self._protection.active():
                result: list[torch.Tensor] = step()
        finally:
            self._protection.uninstall()
        for trial, _, _ in self._pending.values():
            self.trials.append(trial)
        self._pending.clear()
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._overloadpacket.__name__
        sites: tuple[str | None, ...] = (None,)
        if operator == f"{FUSED}_backward":
            self._look_again(func, args, kwargs)
            sites = FUSED_SITES  # it runs once for each of its results, a trial each
        for site in sites:
            result = self._run(operator, site, func, args, kwargs)
        return result

    def _run(self, operator: str, site: str | None, func: Any, args: Any, kwargs: Any) -> Any:
        striker = self._striker
        striker.begin(operator, site)
        result = func(*args, **kwargs)
        if not striker.num_strikes:
            return result
        findings = self._protection.drain()
        if striker.trial is None:
            self.false_alarms += findings
        else:
            self._finish(striker, result, bool(findings))
        return result

    @torch.no_grad()
    def _finish(self, striker: Striker, result: Any, detected: bool) -> None:
        trial, clean, faulty = striker.trial, striker.clean, striker.faulty
        assert trial is not None
        assert clean is not None
        assert faulty is not None
        place = FUSED_SITES.index(trial.site.split()[0]) if striker.operator == f"{FUSED}_backward" else 0
        returned = (result[place] if isinstance(result, tuple) else result).detach()
        trial.detected = detected
        trial.bit_exact = _same_bits(returned, clean)
        returned.copy_(clean)
        if striker.operator == FUSED and not detected:
            self._pending[returned.data_ptr()] = (trial, returned, faulty)
        else:
            self.trials.append(trial)

    @torch.no_grad()
    def _look_again(self, func: Any, args: Any, kwargs: Any) -> None:
        """Let the backward see the output that the forward let pass; the gradient that arrives is the clean one."""
        kept = self._pending.pop(args[4].data_ptr(), None)
        if kept is None:
            return
        trial, out, faulty = kept
        clean = out.clone()
        out.copy_(faulty)
        self._striker.begin("look again")
        self._striker.trial = trial  # nothing else is struck
        func(*args, **kwargs)
        trial.detected = trial.late = any(not finding.inputs_bad for finding in self._protection.drain())
        out.copy_(clean)
        self.trials.append(trial)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(bits_of(one.contiguous()), bits_of(other.contiguous()))
