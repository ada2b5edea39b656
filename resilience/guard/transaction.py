"""The step transaction: no rank takes an optimizer step while any rank saw something that is not settled.

Wrapped around the engine: each forward and backward is recorded and protected; at the boundary, before the optimizer,
the ranks compare notes in one small reduction. Nothing seen anywhere: the step is taken, and that was all. Else rank 0
gathers the evidence, asks the coordinator (or, where it does not answer in time, the same policy here), and all ranks
do what was decided. The decision itself, its record and its execution are in `verdict.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from resilience.abft.finding import Finding
from resilience.checkpoint.doubt import SavedCheckpoints
from resilience.deepspeed.adapter import EngineAdapter
from resilience.errors import ResilienceError
from resilience.events import Check, Detection, DetectionKind, Mode
from resilience.guard.at_rest import AtRest
from resilience.guard.at_rest_watch import StateWatch
from resilience.guard.doubted import tell_doubted
from resilience.guard.evidence import DetectionFactory
from resilience.guard.exchange import Exchange
from resilience.guard.headway import Headway
from resilience.guard.loss import LossHistory
from resilience.guard.memory import FastForwarding, NoSnapshots, Past, Snapshots, Trail
from resilience.guard.notes import NON_FINITE, Inspection
from resilience.guard.protector import Listeners, Protector
from resilience.guard.recorder import Recorder
from resilience.guard.reductions import Reductions
from resilience.guard.replicas import Replicas
from resilience.guard.reporter import Reporter
from resilience.guard.rewind import Rewinder
from resilience.guard.screens import GradientScreen
from resilience.guard.settings import Settings
from resilience.guard.verdict import LEFT_FOR_RESTART, Boundary

__all__ = ["Guard"]


class Guard:
    """The transaction of one engine on one rank. Making one is collective.

    Args:
        adapter: the engine.
        settings: this rank.
        reporter: the line to the coordinator.
        screen: of the local gradients.
        protector: checks inside operations; None for the strengths `off` and `screen`.
        listeners: told of each micro-step as it begins.
        replay_problem: why no step of this engine can be run again; empty where it can.
        at_rest: hashes of what is kept between the steps; None where they are off.
        snapshots: copies of the state in memory; None where they are off.
        past: the same, to go back to; None where they are off.
        trail: what a successor of this process needs to catch up; None where it is off.
        fast_forwarding: leads a restarted script to its snapshot; None where there is nothing to catch up with.
    """

    def __init__(
        self,
        adapter: EngineAdapter,
        settings: Settings,
        *,
        reporter: Reporter,
        screen: GradientScreen,
        protector: Protector | None = None,
        listeners: Listeners = (),
        replay_problem: str = "",
        at_rest: AtRest | None = None,
        snapshots: Snapshots | None = None,
        past: Past | None = None,
        trail: Trail | None = None,
        fast_forwarding: FastForwarding | None = None,
    ) -> None:
        self.settings = settings
        self.reporter = reporter
        self._adapter = adapter
        self._screen = screen
        self._protector = protector
        self._listeners = listeners
        self.recorder = Recorder(adapter, enabled=settings.config.guard.replay and not replay_problem)
        if trail is not None:
            self.recorder.on_replayed = trail.forward_replayed
        if protector is not None:
            self.recorder.on_backward = protector.admit_backward
        self.replay_problem = replay_problem
        screen.micro_step = self._micro_step_of_gradients
        self._factory = DetectionFactory(
            generation=settings.generation, rank=settings.rank, node=settings.node, device=settings.device
        )
        self._findings: list[Finding] = []
        self._attempt = 0
        self._micro_step = -1
        self._replayed_micro_step: int | None = None
        self._is_cpu = next((p.device.type for p in adapter.module.parameters()), "cpu") == "cpu"
        self._headway = Headway(reporter, settings.clock, is_cpu=self._is_cpu)
        self.exchange = exchange = Exchange()
        off = "" if settings.config.guard.replay else "recording is off (guard.replay = false)"
        off = f"replay is off ({replay_problem})" if replay_problem else off
        self.rewinder = Rewinder(self, adapter, exchange, past, off)
        self._losses = LossHistory(settings.config.policy.loss_spike_factor)
        self.boundary = Boundary(self, adapter, exchange)
        self._state = self._watch(at_rest, exchange) if at_rest is not None else None
        self.loaded_step: int | None = None
        self.saved = SavedCheckpoints(functools.partial(tell_doubted, settings, reporter))
        self.snapshots: Snapshots = snapshots or NoSnapshots()
        self._trail = trail
        self._fast_forwarding = fast_forwarding
        if fast_forwarding is not None:
            fast_forwarding.attach(self)
        self._is_inside_forward = False
        self._reductions = self._watch_sums(exchange)
        self._unwrap = adapter.wrap(
            forward=self._forward,
            backward=self._backward,
            take_model_step=self._take_model_step,
            step=self._engine_step,
        )

    # ------ what checkpoints read (resilience.deepspeed.checkpoint.GuardState)

    @property
    def generation(self) -> int:
        """The generation of this process."""
        return self.settings.generation

    @property
    def last_verified_step(self) -> int:
        """Newest step whose checks all reported."""
        return self.boundary.last_verified_step

    def uninstall(self) -> None:
        """Put the engine back as it was."""
        self._unwrap()
        self._reductions.remove()
        self._screen.remove()
        self.boundary.close()

    # ------ the wrappers

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_led:
            assert self._fast_forwarding is not None
            return self._fast_forwarding.forward(args, kwargs)
        if not torch.is_grad_enabled():
            return self._evaluate(self._adapter.forward, args, kwargs)
        self.boundary.leave_if_drained()
        if self._state is not None and self._adapter.module.training:
            self.look_at_state()
        self.snapshots.before_forward()
        self._begin_micro_step(self.recorder.micro_step)
        event = self.recorder.before_forward(args, kwargs)
        self._headway.fed((args, kwargs))
        began = self._trail.before_forward(args, kwargs) if self._trail is not None else None
        with contextlib.ExitStack() as undoing:
            undoing.callback(self.recorder.forget, event)
            with self.protected():
                outputs = self._adapter.forward(*args, **kwargs)
            undoing.pop_all()
        if self._trail is not None:
            self._trail.after_forward(began, event.micro_step, event, outputs)
        return self.recorder.after_forward(event, outputs)

    def module_called(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The model's own forward is called: by the engine, or past it, as Hugging Face's Trainer does to evaluate."""
        if self._is_inside_forward or (torch.is_grad_enabled() and not self.is_led):
            return forward(*args, **kwargs)
        if self.is_led:
            assert self._fast_forwarding is not None
            return self._fast_forwarding.forward(args, kwargs)
        return self._evaluate(forward, args, kwargs)

    def _evaluate(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A forward without gradients has no part in the step, but a restarted script wants to hear the same again."""
        self.snapshots.finish()
        began = self._trail.before_forward(args, kwargs) if self._trail is not None else None
        self._is_inside_forward = True
        try:
            outputs = forward(*args, **kwargs)
        finally:
            self._is_inside_forward = False
        if self._trail is not None:
            self._trail.after_forward(began, self.recorder.micro_step, None, outputs)
        return outputs

    def _backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_led:
            assert self._fast_forwarding is not None
            return self._fast_forwarding.backward(loss, args, kwargs)
        with self.protected():
            returned = self._adapter.backward(loss, *args, **kwargs)
        scaled = kwargs.get("scale_wrt_gas", args[1] if len(args) > 1 else True)
        self.recorder.after_backward(loss, returned, self._adapter.gradient_accumulation_steps if scaled else 1)
        return returned

    def _take_model_step(self, lr_kwargs: Any) -> Any:
        self.snapshots.finish()
        try:
            self.boundary.settle()
        except ResilienceError as error:
            # For people, not for debuggers: one line and its code.
            self.boundary.leave(error.exit_code, str(error))
        self._reductions.forget()  # what DeepSpeed's own step adds up is not voted about
        taken = self.rewinder.keep_and_take(lr_kwargs) if self.rewinder.is_recording else self.take(lr_kwargs)
        self._say_how_it_goes()
        self.recorder.clear()
        self.end_step()
        return taken

    def _engine_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_led:
            assert self._fast_forwarding is not None
            return self._fast_forwarding.step(args, kwargs)
        before = self._adapter.global_steps
        returned = self._adapter.step(*args, **kwargs)
        step = self._adapter.global_steps
        if step != before:
            # Whatever the script does between its steps is its own to do again: a snapshot is from here.
            if self._trail is not None:
                self._trail.step_taken(step, deterministic=self.boundary.deterministic)
            if self.boundary.snapshot_is_due:
                self.rewinder.begin(step)
                self.snapshots.take(step, clean_through=self.boundary.clean_through)
                self._headway.snapshot_taken(self.snapshots.blocked_s, self.snapshots.interval_steps)
                if self._state is not None:
                    # Under ZeRO-3 DeepSpeed gathers anew, for a checkpoint, what stays gathered.
                    self._state.moved()
                    self._state.watch_edits()
        return returned

    # ------ what fast-forwarding uses

    @property
    def is_led(self) -> bool:
        """Whether the script is being led to a snapshot, and the engine stands still."""
        return self._fast_forwarding is not None and self._fast_forwarding.active

    def caught_up(self, step: int, *, deterministic: bool | None) -> None:
        """The engine's state is that of `step`, loaded and verified; what was seen before does not count."""
        self.recorder.clear()
        self._screen.begin()
        self._reductions.forget()
        self._findings.clear()
        self._attempt, self._micro_step, self._step_began_at = 0, -1, None
        self.boundary.go_on_after(step, deterministic=deterministic)

    def leave_for_restart(self, reason: str) -> NoReturn:
        """End this process; its agent ends the other ranks, and a new generation begins."""
        self.boundary.leave(LEFT_FOR_RESTART, reason)

    # ------ what the boundary uses

    @property
    def step(self) -> int:
        """The step that is being worked on."""
        return self._adapter.global_steps + 1

    def begin_attempt(self, attempt: int) -> None:
        """A replay begins: what was seen so far belongs to the attempt before."""
        self._attempt, self._micro_step = attempt, -1
        self._screen.begin()
        self._reductions.forget()
        self._screen.fingerprinting = True
        self._findings.clear()

    def end_attempts(self) -> None:
        """No further replay of this step."""
        self._screen.fingerprinting = False
        self._replayed_micro_step = None

    def begin_replayed_micro_step(self, micro_step: int) -> None:
        """A replay reaches the first forward of this micro-step."""
        self._begin_micro_step(micro_step)

    def begin_replayed_backward(self, micro_step: int) -> None:
        """A replay reaches the backward pass of this micro-step: not always the one of the forward before it."""
        self._replayed_micro_step = micro_step

    def add_misfit(self) -> None:
        """The replay's gradients are worth nothing: an alarm of its own, which blames no device."""
        self._collect()
        self._findings.append(
            Finding(
                site="gradient",
                layer=-1,
                check=Check.SCREEN,
                kind=DetectionKind.MISMATCH,
                residual_ratio=float("inf"),
                detected_at=self.settings.clock.wall(),
            )
        )

    @contextlib.contextmanager
    def protected(self) -> Iterator[None]:
        """The checks inside operations are on."""
        if self._protector is None:
            yield
            return
        with self._protector.active():
            yield

    def inspect(self) -> Inspection:
        """All that this rank saw in the attempt that has just run. Waits for the device."""
        self._collect()
        if self._state is not None:
            self._findings += self._state.at_boundary(self._attempt)
        readings = self._screen.read(self._adapter.loss_scale)
        findings = [*self._findings, *self._screen.findings(readings), *self._reductions.findings()]
        findings = [*self._not_finite(findings), *findings, *self._loss_spike(findings)]
        return Inspection(
            detections=tuple(self._factory.make(findings, step=self.step, attempt=self._attempt)),
            findings=tuple(findings),
            readings=tuple(readings),
            fingerprints=self._screen.fingerprints(),
            replay_problem=self.replay_problem or self.recorder.why_unavailable(),
            num_differences=self._state.num_differences if self._state is not None else 0,
        )

    def settle_state(self) -> list[Finding]:
        """What became of the differences that `inspect` saw on any rank; this rank's own. Collective."""
        assert self._state is not None, "differences where nothing is watched"
        return self._state.settle()

    def look_at_state(self) -> None:
        """Called before each forward of a training step; collective before the first one."""
        if self._state is None:
            return
        step = self._adapter.global_steps
        self._findings += self._state.before_forward(step)
        if self._state.was_edited and self.rewinder.is_recording and not self.recorder.events:
            self.rewinder.cut(step + 1, f"the script wrote weights or optimizer state after step {step}")

    @property
    def state_was_edited(self) -> bool:
        """Whether the script wrote to weights or optimizer state since the last step, as far as that shows."""
        return self._state is not None and self._state.was_edited

    @property
    def state_agreed_through(self) -> int | None:
        """See `AtRest.agreed_through`."""
        return self._state.agreed_through if self._state is not None else None

    def check_before_save(self) -> None:
        """Called on every rank before the script saves a checkpoint: nothing damaged is written into one.

        Raises:
            SystemExit: something is damaged, and the decision was to leave.
        """
        self.snapshots.finish()
        if self._state is None:
            return
        findings = self._state.before_save()
        self._findings += [finding for finding in findings if finding.mended]
        self.boundary.decide_about_state([each for each in findings if not each.mended])

    def verified(self, inspection: Inspection) -> None:
        """The step was taken, and this is what its last attempt showed."""
        self._screen.verified(inspection.readings)

    # ------ what a rewind uses

    def take(self, lr_kwargs: Any) -> Any:
        """Take the step that was settled, for the first time or again."""
        taken = self._adapter.take_model_step(lr_kwargs)
        self.boundary.step_taken()
        if self._losses.is_on and self.recorder.last_loss is not None:
            self._losses.add(self._adapter.global_steps, float(self.recorder.last_loss))
        return taken

    def end_step(self) -> None:
        """A step was taken, or gone back to."""
        self._screen.begin()
        self._reductions.forget()
        self._findings.clear()
        self._attempt, self._micro_step = 0, -1
        if self._state is not None:
            self._state.after_step(self._adapter.global_steps)

    def rewound(self, step: int) -> None:
        """The engine was put back to the end of `step`."""
        self.boundary.rewound(step)
        self._losses.rewound(step)
        if self._state is not None:
            self._state.rewound(step)
        self.end_step()

    # ------

    def _watch(self, at_rest: AtRest, exchange: Exchange) -> StateWatch:
        config = self.settings.config
        return StateWatch(
            at_rest,
            Replicas(config.detection.replica_interval_steps),
            exchange,
            repair=config.mode is Mode.ENFORCE,
            tell=lambda text: self.boundary.tell("replicas_off", text),
        )

    def _watch_sums(self, exchange: Exchange) -> Reductions:
        detection = self.settings.config.detection
        return Reductions(
            exchange,
            self.settings.clock,
            tell=lambda text: self.boundary.tell("sums_off", text),
            apart=contextlib.nullcontext if self._protector is None else self._protector.paused,
            threshold_scale=detection.threshold_scale,
            enabled=detection.strength != "off",
        )

    def detections(self, findings: list[Finding]) -> tuple[Detection, ...]:
        """Findings about this step, with what makes them detections."""
        return tuple(self._factory.make(findings, step=self.step, attempt=self._attempt))

    def _not_finite(self, findings: list[Finding]) -> list[Finding]:
        """Where gradients are not finite it may be the state that they were computed from, which no replay mends."""
        if self._state is None or not any(each.kind in NON_FINITE and not each.mended for each in findings):
            return []
        return self._state.not_finite(clean_step=self.step - 2)

    def _loss_spike(self, findings: list[Finding]) -> list[Finding]:
        """A loss out of all proportion, where nothing else explains it."""
        loss = self.recorder.last_loss
        if not self._losses.is_on or loss is None or any(not each.mended for each in findings):
            return []
        clean_step = max(0, min(self.step - 2, self.boundary.clean_through))
        return self._losses.findings(float(loss), clean_step=clean_step, now=self.settings.clock.wall())

    def _micro_step_of_gradients(self) -> int:
        if self._replayed_micro_step is not None:
            return self._replayed_micro_step
        return max(0, self.recorder.num_backwards - 1)

    def _begin_micro_step(self, micro_step: int) -> None:
        self._reductions.listen()
        if micro_step == self._micro_step:
            return
        self._headway.begin()
        if self._is_cpu:
            # Reading early costs nothing on a CPU, and tells micro-steps apart.
            self._collect()
        self._micro_step = micro_step
        for listener in self._listeners:
            listener.begin(self.step, micro_step, self._attempt)
        if self._protector is not None:
            self._protector.begin_micro_step(self.step, micro_step, self._attempt)

    def _collect(self) -> None:
        if self._protector is None:
            return
        findings = self._protector.drain()
        if self._is_cpu:
            micro_step = max(0, self._micro_step)
            findings = [dataclasses.replace(finding, micro_step=micro_step) for finding in findings]
        self._findings.extend(findings)

    def _say_how_it_goes(self) -> None:
        """Fill in the next heartbeat; it is sent by another thread."""
        checks = {"gradient.sum": self._reductions.num_checks, **({} if self._state is None else self._state.checks())}
        inside: dict[str, Any] = {}
        if self._protector is not None:
            checks |= self._protector.checks()
            inside["check_seconds"] = self._protector.check_seconds
            inside["residual_ratios"] = self._protector.residual_sample()
            for reason in self._protector.new_shortfalls():
                self.boundary.tell("unprotected", reason)
        self._headway.step_taken(
            self._adapter.global_steps,
            self.recorder.last_loss,
            last_verified_step=self.last_verified_step,
            checks=checks,
            **inside,
        )
