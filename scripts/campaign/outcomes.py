"""What faults do to training when nobody repairs them: some steps from the same state, with and without the fault.

For faults that no check saw, this is what remains; for those that a check saw, what was prevented. A fault whose step
ends in the bits of a clean one is harmless: the attention of a position that no loss is taken of may be anything.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from campaign.models import Subject, batches, optimizer_of
from campaign.trials import Trial

from resilience.abft.protection import Protection
from resilience.config import DetectionConfig

__all__ = ["Outcome", "is_harmless", "outcomes"]

NUM_STEPS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One unrepaired fault, five optimizer steps later."""

    site: str
    kind: str
    group: str
    """`seen` and `not seen`: drawn from those that changed a bit; `missed`: all large ones in float32 that were neither
    seen nor harmless."""
    detected: bool
    relative_change: float
    """Of the struck result; infinite where a number became none."""
    loss_change: float
    """Largest |Δ loss| ÷ loss over the steps; infinite where the loss is no number."""
    weight_change: float
    """‖Δ weights‖ ÷ ‖how far the clean run moved them‖, after the last step; infinite likewise."""


class _Unrepaired:
    """The injector: strikes one address once, in the first step."""

    def __init__(self, trial: Trial) -> None:
        self._site, self._damage = trial.site.removesuffix(" (fused)"), trial.damage
        self.armed = True

    def strike(self, site: str, layer: int, tensor: torch.Tensor, call: int | None = None) -> bool:
        if (site, layer) != (self._site, self._damage.layer):
            return False
        with torch.no_grad():
            places = torch.unravel_index(torch.tensor(list(self._damage.where)), tensor.shape)
            tensor[places] = torch.tensor(self._damage.values, dtype=tensor.dtype)
        self.armed = False
        return True


def outcomes(subject: Subject, trials: list[Trial], group: str) -> list[Outcome]:
    """Run on from the state of `subject`, once clean and once with each fault of `trials`."""
    start = copy.deepcopy(subject.model.state_dict())
    before = _flat(subject)
    clean_losses, clean = _train(subject, None), _flat(subject)
    moved = float((clean - before).norm())
    found = []
    for trial in trials:
        subject.model.load_state_dict(start)
        losses, weights = _train(subject, trial), _flat(subject)
        change = max(abs(one - other) / abs(other) for one, other in zip(losses, clean_losses, strict=True))
        distance = float((weights - clean).norm()) / moved
        found.append(
            Outcome(
                trial.site,
                trial.damage.kind,
                group,
                trial.detected,
                trial.damage.relative_change,
                _finite_or_infinite(change),
                _finite_or_infinite(distance),
            )
        )
    subject.model.load_state_dict(start)
    return found


def is_harmless(subject: Subject, trial: Trial, clean: list[torch.Tensor]) -> bool:
    """Whether a step with this fault left in place has the loss and the gradients of a clean one, bit for bit."""
    loss = _struck_step(subject, trial)
    gradients = [parameter.grad for parameter in subject.model.parameters()]
    return all(torch.equal(one, other) for one, other in zip([loss, *gradients], clean, strict=True))


def _train(subject: Subject, trial: Trial | None) -> list[float]:
    model, data = subject.model, batches()
    optimizer = optimizer_of(model)
    losses = []
    for step in range(NUM_STEPS):
        current = Subject(model, subject.tokens if step == 0 else next(data))
        losses.append(float(_struck_step(current, trial) if step == 0 and trial else current.step()))
        optimizer.step()
    return losses


def _struck_step(subject: Subject, trial: Trial) -> torch.Tensor:
    injector = _Unrepaired(trial)
    protection = Protection(DetectionConfig(max_mends=0), injector=injector)
    protection.install()
    protection.attach(subject.model)
    protection.begin_micro_step(1, 0, 0)
    try:
        with protection.active():
            loss = subject.step()
    finally:
        protection.uninstall()
    assert not injector.armed, "the operation was not met again"
    return loss


def _flat(subject: Subject) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in subject.model.parameters()])


def _finite_or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
