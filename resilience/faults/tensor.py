"""Carries out the tensor faults of a plan on one rank.

A strike lands inside the protected operation, after its arithmetic and before its check, as broken hardware would; the
caller is the operation. Nothing here reads a check's result or touches a global random state, so that a run whose plan
is exhausted goes on exactly as one without a plan.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import torch

from resilience.clock import Clock, SystemClock
from resilience.errors import FaultPlanError
from resilience.events import Strike
from resilience.faults.corruption import bits_of, corrupted, positions
from resilience.faults.ledger import Ledger
from resilience.faults.plan import Fault, FaultPlan

__all__ = ["TensorInjector"]


class TensorInjector:
    """Strikes tensors at the plan's addresses.

    Use: `begin` at the start of each micro-step; then, in each operation, `if injector.armed: injector.strike(…)`.
    Not thread-safe: one thread (the one that runs the operations) calls it; backward runs in autograd's thread while
    the training thread waits, which is safe.

    Args:
        plan: the fault plan of the run.
        rank: this rank.
        ledger: this rank's ledger; strikes that it holds already are not repeated.
        on_strike: called after the strike is on disk, just before the tensor changes.
        clock: for `Strike.struck_at`.
    """

    armed: bool
    """Whether some fault may strike in this micro-step. Operations test it before they call `strike`."""

    def __init__(
        self,
        plan: FaultPlan,
        *,
        rank: int,
        ledger: Ledger,
        on_strike: Callable[[Strike], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._seed = plan.seed
        self._faults = plan.for_rank(rank, tensor=True)
        self._ledger = ledger
        self.on_strike = on_strike
        self._clock = clock or SystemClock()
        self._pending: list[tuple[int, Fault]] = []
        self._num_calls: Counter[tuple[str, int]] = Counter()
        self._step = self._micro_step = self._attempt = 0
        self.armed = False

    def begin(self, step: int, micro_step: int, attempt: int) -> None:
        """Set the address: optimizer step from 1, micro-step from 0, attempt from 0 (n is the n-th replay)."""
        self._step, self._micro_step, self._attempt = step, micro_step, attempt
        self._num_calls.clear()
        self._pending = [
            (i, fault)
            for i, fault in self._faults
            if fault.step == step and fault.micro_step == micro_step and self._is_left(i, fault)
        ]
        self.armed = bool(self._pending)

    def strike(
        self, site: str, layer: int, tensor: torch.Tensor, call: int | None = None, *, param: str | None = None
    ) -> bool:
        """Corrupt `tensor` in place if the plan says so at this address.

        Args:
            site: the operation, or `gradient`, `weight`, `optimizer`.
            layer: which call of that site in the forward order; for those three, the parameter's place in
                `named_parameters`.
            tensor: what the operation computed (any shape, any strides without overlap; fp16, bf16, fp32 or fp64).
            call: which execution of this operation within the micro-step and attempt; None counts them here.
            param: for those three, the parameter's name.

        Returns:
            Whether a fault struck (also where it changed no bit).

        Raises:
            FaultPlanError: the fault does not fit the tensor (no such bit, no such element, overlapping memory).
        """
        if not self.armed:
            return False
        if call is None:
            call = self._num_calls[site, layer]
            self._num_calls[site, layer] += 1
        struck = False
        for i, fault in self._pending:
            if _is_addressed(fault, site, layer, call, param) and self._is_left(i, fault) and tensor.numel():
                self._strike(i, fault, layer, tensor)
                struck = True
        if struck:
            self._pending = [(i, fault) for i, fault in self._pending if self._is_left(i, fault)]
            self.armed = bool(self._pending)
        return struck

    def never_struck(self, sites: tuple[str, ...]) -> list[Fault]:
        """The faults of these sites that are due at this address and have not struck in this run."""
        return [fault for i, fault in self._pending if fault.site in sites and not self._ledger.num_strikes(i)]

    def _is_left(self, i: int, fault: Fault) -> bool:
        return fault.repeat == -1 or self._ledger.num_strikes(i) < fault.repeat

    @torch.no_grad()
    def _strike(self, i: int, fault: Fault, layer: int, tensor: torch.Tensor) -> None:
        target = tensor.detach()
        if any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape, strict=True)):
            raise FaultPlanError(f"site {fault.site!r}: elements of the tensor share memory; it cannot be struck")
        # Each fault has its own draw, so that the same element is struck at every repeat and in every generation.
        where = positions(fault, target.numel(), random.Random(f"{self._seed}:{i}"))
        before = _take(target, where)
        bits_before = bits_of(before)
        after = corrupted(before, fault)
        strike = Strike(
            strike_id=self._ledger.next_id(i),
            step=self._step,
            micro_step=self._micro_step,
            rank=fault.rank,
            site=fault.site,
            layer=layer,  # of a parameter that the plan names, its place
            kind=fault.kind,
            struck_at=self._clock.wall(),
            attempt=self._attempt,
            no_effect=torch.equal(bits_before, bits_of(after)),
            relative_change=_relative_change(target, before, after),
        )
        self._ledger.append(strike)
        if self.on_strike is not None:
            self.on_strike(strike)
        _put(target, where, after)


def _is_addressed(fault: Fault, site: str, layer: int, call: int, param: str | None) -> bool:
    if fault.site != site or fault.call not in (None, call):
        return False
    return fault.param == param if fault.param is not None else fault.layer == layer


def _coordinates(target: torch.Tensor, where: range) -> tuple[torch.Tensor, ...]:
    places = torch.arange(where.start, where.stop, where.step, device=target.device)
    return torch.unravel_index(places, target.shape)


def _take(target: torch.Tensor, where: range) -> torch.Tensor:
    """A 1-D copy of the elements at `where`."""
    if len(where) == target.numel():
        return target.clone(memory_format=torch.contiguous_format).reshape(-1)
    return target[_coordinates(target, where)]


def _put(target: torch.Tensor, where: range, values: torch.Tensor) -> None:
    if len(where) == target.numel():
        target.copy_(values.reshape(target.shape))
    else:
        target[_coordinates(target, where)] = values


def _relative_change(target: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    """max|ΔY| ÷ rms(Y), Y as it was before the strike; infinite where a number became none or Y is all zero."""
    changed = bits_of(before) != bits_of(after)
    if not bool(changed.any()):
        return 0.0
    largest = float((after[changed].double() - before[changed].double()).abs().max())
    rms = float(target.double().square().mean().sqrt())
    ratio = largest / rms if rms > 0 else float("inf")
    return ratio if ratio == ratio else float("inf")
