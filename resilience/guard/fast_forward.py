"""Fast-forward: leads a restarted script, which begins where it begins by itself, to the step of a memory snapshot.

Until there the engine stands still: forward returns what was recorded, backward does nothing, step counts. Each
forward's inputs are held against their recorded mark. At the end of the snapshot's step its state is loaded, and from
there on everything is as if the script had never been interrupted.

If it cannot be done at all, that is known at the first forward, and the script goes on from what it loaded by itself:
all ranks agree on it. If it turns out on the way, or that load was a light one (`resilience/deepspeed/light_load.py`),
this rank says why and leaves; its agent ends the other ranks, and the next generation does without the snapshot,
because every snapshot of the run was refused with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from resilience.deepspeed.adapter import EngineAdapter
from resilience.deepspeed.leading import EngineLead
from resilience.errors import CheckpointError, SnapshotError
from resilience.events import SnapshotFact, SnapshotKind
from resilience.guard.exchange import Exchange
from resilience.guard.input_mark import InputMark
from resilience.guard.reporter import Reporter
from resilience.guard.settings import Settings
from resilience.guard.trail import TrailWriter
from resilience.guard.trail_reader import LedForward, LedStep, read_trail, set_rng

__all__ = ["FastForward", "Host", "Target"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The snapshot that a script is led to."""

    step: int
    generation: int
    """Generation that took it."""
    read_trail: Callable[[], bytes]
    """This rank's trail up to it, verified; raises SnapshotError."""
    load: Callable[[], None]
    """Put its state, counters and random states into the engine, verified; raises SnapshotError. Collective."""
    all_snapshots: Callable[[], Iterable[tuple[int, int]]]
    """(step, generation) of every snapshot that the run has: where one cannot be reached, none can."""
    full_loads: Path
    """Made where a load that left something out did not end at the snapshot; where it is, loads leave nothing out."""


class Host(Protocol):
    """What fast-forwarding needs of the guard."""

    @property
    def exchange(self) -> Exchange: ...

    def caught_up(self, step: int, *, deterministic: bool | None) -> None:
        """The state is that of `step`: nothing that was seen before counts."""

    def leave_for_restart(self, reason: str) -> NoReturn:
        """End this process, so that a new generation begins."""


class FastForward:
    """Implements `resilience.guard.memory.FastForwarding`.

    Args:
        adapter: the engine.
        lead: stands in for its step.
        target: None where this generation has nothing to catch up with, or nothing that can be read; then `problem`
            says why.
        problem: why not, in words; empty without a snapshot.
        settings: this rank.
        reporter: the line to the coordinator.
        trail: goes on where the recorded one ends.
        place: told of each micro-step: the record of the last place.
    """

    def __init__(
        self,
        adapter: EngineAdapter,
        lead: EngineLead,
        target: Target | None,
        *,
        settings: Settings,
        reporter: Reporter,
        trail: TrailWriter | None,
        place: Callable[[int, int, int], None],
        problem: str = "",
    ) -> None:
        self._adapter = adapter
        self._lead = lead
        self._target = target
        self._problem = problem
        self._settings = settings
        self._reporter = reporter
        self._trail = trail
        self._place = place
        self.relies_on_snapshot = False
        """Whether the script's load left something out, which only the snapshot brings."""
        self._host: Host | None = None
        self._is_settled = False
        self._leading = False
        self._trail_content = b""
        self._steps: dict[int, LedStep] = {}
        self._read_after: int | None = None
        """Step after which `_steps` begin."""
        self._num_forwards = 0
        self._first_step = 0
        self._has_matched = False
        self._began_at = 0.0

    def attach(self, host: Host) -> None:
        """The guard, which exists by now."""
        self._host = host

    def goes_beyond(self, step: int) -> bool:
        """Whether this rank's script can be led from the end of `step` to the snapshot, as far as it knows yet, and
        its load may leave out what the snapshot brings.
        """
        target = self._target
        if target is None or target.step <= step or self._problem or self._is_settled or target.full_loads.exists():
            return False
        return not self._read(target, step)

    def begin_again(self, reason: str) -> NoReturn:
        """The script needs what its load left out: the next generation loads everything, and is led from there."""
        assert self._host is not None
        self._ask_for_full_loads()
        self._host.leave_for_restart(f"{reason}, and its load left the optimizer's state out")

    @property
    def active(self) -> bool:
        """Whether the script is being led; before the first forward the ranks agree on it. Collective then."""
        if not self._is_settled:
            self._is_settled = True
            self._leading = self._agree()
        if self.relies_on_snapshot and not self._leading:
            self._refuse("the script trains on without having reached it")  # whatever else it was that failed
        return self._leading

    def ended(self) -> None:
        """The process ends. A script that does so on the way would do it again."""
        if self._leading:
            self._refuse_all("the script ended before it was led to the snapshot's step")
        elif self.relies_on_snapshot and not self._is_settled:
            self._ask_for_full_loads()  # maybe it looked for what was left out

    # ------ in the place of the engine

    def forward(self, args: Any, kwargs: Any) -> Any:
        """What the recorded forward returned.

        Raises:
            SystemExit: it is another forward than the recorded one.
        """
        step, mark = self._step(), InputMark((args, kwargs)).value()
        if step.step == self._first_step and not self._has_matched:
            self._skip_evaluations(step, mark)
        if self._num_forwards >= len(step.forwards):
            self._refuse(f"step {step.step} has more forwards than when it was recorded ({len(step.forwards)})")
        led = step.forwards[self._num_forwards]
        self._compare(led, mark)
        self._num_forwards, self._has_matched = self._num_forwards + 1, True
        if led.trains:
            self._place(step.step, led.micro_step, 0)
            self._reporter.heartbeat(state="fast_forwarding", micro_step=led.micro_step)
        try:
            result = led.result(self._refuse)
        except SnapshotError as error:
            self._refuse(str(error))
        set_rng(led.rng, led.blob, self._adapter)
        return result

    def backward(self, loss: Any, args: Any, kwargs: Any) -> Any:
        """Nothing but what `engine.backward` returns."""
        scaled = kwargs.get("scale_wrt_gas", args[1] if len(args) > 1 else True)
        return self._lead.backward(loss, scaled=bool(scaled))

    def step(self, args: Any, kwargs: Any) -> Any:
        """Count; at the end of the snapshot's step load its state.

        Raises:
            SystemExit: the step is another one than the recorded one, or the state cannot be loaded.
        """
        if not self._lead.ends_step():
            self._lead.micro_step()
            return
        led = self._step()
        if self._num_forwards != len(led.forwards):
            self._refuse(
                f"step {led.step} has {self._num_forwards} forwards, and had {len(led.forwards)} when it was recorded"
            )
        lr_kwargs = args[0] if args else kwargs.get("lr_kwargs")
        self._lead.optimizer_step(lr_kwargs, applied=led.applied, grad_norm=led.grad_norm)
        set_rng(led.rng, led.blob, self._adapter)
        self._num_forwards = 0
        del self._steps[led.step]
        assert self._target is not None
        if led.step == self._target.step:
            self._arrive(self._target, led)

    # ------

    def _agree(self) -> bool:
        """Whether the script can be led, asked of all ranks; what this rank needs for it is read."""
        assert self._host is not None
        start, problem = self._adapter.global_steps, self._problem
        target = self._target
        if target is not None and start < target.step and not problem:
            problem = self._read(target, start)
        own = [target.step if target is not None else None, start, problem]
        ranks = [json.loads(content) for content in self._host.exchange.all_gather(json.dumps(own).encode())]
        if all(step is None and not why for step, _, why in ranks):
            return False
        problem = _why_not(ranks)
        if problem:
            self._do_without(problem)
            return False
        if target is None or start >= target.step:
            self._note(f"the script goes on after step {start}, which the memory snapshot does not go beyond")
            return False
        self._began_at, self._first_step = self._settings.clock.monotonic(), start + 1
        self._note(f"fast-forward from step {start} to step {target.step}, whose state is in memory")
        self._lead.begin(self._refuse)
        self._reporter.heartbeat(state="fast_forwarding", step=start, micro_step=0)
        return True

    def _ask_for_full_loads(self) -> None:
        if self._target is not None:
            with contextlib.suppress(OSError):  # without it the next generation does as this one
                self._target.full_loads.touch()

    def _read(self, target: Target, start: int) -> str:
        """Read the trail; why it does not serve, in words."""
        if start == self._read_after:
            return ""
        try:
            self._trail_content = target.read_trail()
            self._steps = read_trail(
                self._trail_content, after=start, through=target.step, source=f"trail of rank {self._settings.rank}"
            )
        except (SnapshotError, OSError) as error:
            return str(error)
        self._read_after = start
        return ""

    def _step(self) -> LedStep:
        return self._steps[self._adapter.global_steps + 1]

    def _skip_evaluations(self, step: LedStep, mark: str) -> None:
        """A script that saves its checkpoint after an evaluation does not evaluate again when it begins from there."""
        for place, led in enumerate(step.forwards):
            if led.inputs == mark and led.trains == torch.is_grad_enabled():
                self._num_forwards = place
                return
            if led.trains:
                return

    def _compare(self, led: LedForward, mark: str) -> None:
        step = self._adapter.global_steps + 1
        where = f"forward {self._num_forwards + 1} of step {step}"
        if led.trains != torch.is_grad_enabled():
            was, now = ("with", "without") if led.trains else ("without", "with")
            self._refuse(f"{where} was recorded {was} gradients and is called {now}")
        if mark != led.inputs:
            self._refuse(
                f"the inputs of {where} differ from those that were recorded: the script's data do not come in the "
                "same order after a restart"
            )

    def _arrive(self, target: Target, led: LedStep) -> None:
        assert self._host is not None
        self._lead.end()
        clock = self._settings.clock
        load_began_at = clock.monotonic()
        self.relies_on_snapshot = True  # until it is there, the engine is nothing to save
        try:
            target.load()
        except (CheckpointError, SnapshotError, OSError) as error:
            self._refuse_one(target, str(error))
            self._host.leave_for_restart(f"the memory snapshot of step {target.step} is not loaded: {error}")
        load_s = clock.monotonic() - load_began_at
        self._leading = self.relies_on_snapshot = False
        if self._trail is not None:
            self._trail.continue_from(self._trail_content, target.step)
        self._trail_content = b""
        seconds = clock.monotonic() - self._began_at
        self._host.caught_up(target.step, deterministic=led.deterministic)
        if self._settings.rank == 0:
            self._reporter.report(self._fact(SnapshotKind.LOADED, target.step, target.generation, seconds=load_s))
        self._note(f"fast-forwarded to step {target.step} in {seconds:.2f} s; its state is loaded and verified")
        self._reporter.heartbeat(state="training", step=target.step, micro_step=0)

    # ------ where it cannot be done

    def _do_without(self, problem: str) -> None:
        """Before anything was led: the script goes on from what it loaded by itself. On every rank alike."""
        if self.relies_on_snapshot:
            self._refuse(problem)
        self._refuse_all(problem)
        self._note(f"no fast-forward: {problem}; the script goes on from what it loaded by itself")

    def _refuse(self, reason: str) -> NoReturn:
        """On the way: nothing of this process can be trusted to be what the script thinks it is."""
        assert self._host is not None
        self._refuse_all(reason)
        self._leading = False
        self._host.leave_for_restart(
            f"the script cannot be led to the memory snapshot: {reason}; "
            "the next generation begins from what the script loads by itself"
        )

    def _refuse_all(self, reason: str) -> None:
        if self._target is None:
            return
        snapshots = {(self._target.step, self._target.generation), *self._target.all_snapshots()}
        for step, generation in sorted(snapshots):
            self._reporter.report(self._fact(SnapshotKind.REFUSED, step, generation, reason=reason))

    def _refuse_one(self, target: Target, reason: str) -> None:
        self._reporter.report(self._fact(SnapshotKind.REFUSED, target.step, target.generation, reason=reason))

    def _fact(self, kind: SnapshotKind, step: int, generation: int, **fields: Any) -> SnapshotFact:
        return SnapshotFact(
            kind=kind, step=step, generation=generation, node="", at=self._settings.clock.wall(), **fields
        )

    def _note(self, text: str) -> None:
        if self._settings.rank == 0:
            print(f"resilience: {text}", flush=True)
            self._reporter.note("fast_forward", text, step=self._adapter.global_steps)


def _why_not(ranks: list[Any]) -> str:
    """Why the ranks cannot be led together, in words; empty where they can, or need not."""
    for rank, (_, _, problem) in enumerate(ranks):
        if problem:
            return str(problem) if len(ranks) == 1 else f"{problem} (rank {rank})"
    if len({step for step, _, _ in ranks}) > 1:
        return "not all ranks have the same snapshot"
    if len({start for _, start, _ in ranks}) > 1:
        return "the ranks do not begin at the same step"
    return ""
