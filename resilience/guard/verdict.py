"""At the boundary: compare notes among the ranks, and if there is cause, decide together and carry the decision out.

Every path here is taken by all ranks alike, because each branch hangs on what was reduced or broadcast. Never here:
what the engine looks like inside.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, NoReturn

from resilience import policy
from resilience.abft.finding import Finding
from resilience.deepspeed.adapter import EngineAdapter
from resilience.errors import ExitCode, FencedError
from resilience.events import Action, Decision, Detection, DetectionKind, Evidence, Mode, Origin, Outcome
from resilience.guard.determinism import measure
from resilience.guard.evidence import is_root, is_unmended, scaler_will_skip
from resilience.guard.exchange import Exchange
from resilience.guard.replay import replay
from resilience.guard.screens import Reading
from resilience.guard.support import INSTEAD
from resilience.guard.wire import decode, encode

if TYPE_CHECKING:
    from resilience.guard.transaction import Guard

__all__ = ["LEFT_FOR_RESTART", "Boundary", "Inspection", "Share"]

LEFT_FOR_RESTART = 76
"""Exit code of a rank that leaves because the decision was a restart; no code that a launcher would pass on."""

_MAX_DETECTIONS = 1000
"""More than this in one evidence are cut to the root causes: a NaN in a large job reaches every rank."""

_NON_FINITE = frozenset({DetectionKind.INF, DetectionKind.NAN, DetectionKind.NEAR_INF})

_MISFIT = "outputs that are no scalars did not replay bit-equal, so the recorded cotangents do not belong to them"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What one rank saw in one attempt."""

    detections: tuple[Detection, ...]
    findings: tuple[Finding, ...]
    readings: tuple[Reading, ...]
    fingerprints: tuple[int, ...]
    replay_problem: str
    """Why the step cannot be run again; empty where it can."""
    num_differences: int = 0
    """Pieces of state that are not what they were, to be settled with the other ranks."""

    def equals(self, other: Inspection) -> bool:
        """Whether both attempts gave the same local gradients: by fingerprints where both have them, else by norms."""
        if self.fingerprints and other.fingerprints:
            return self.fingerprints == other.fingerprints
        return self.has_norms_of(other)

    def has_norms_of(self, other: Inspection) -> bool:
        """Whether both attempts gave local gradients of exactly the same norms."""
        # NaN is not equal to itself, but its text is.
        return repr(self.readings) == repr(other.readings)

    def has_norms_like(self, other: Inspection) -> bool:
        """Whether both attempts gave local gradients of about the same norms, as non-deterministic kernels do."""
        return len(self.readings) == len(other.readings) and all(
            (a.micro_step, a.index) == (b.micro_step, b.index)
            and math.isclose(a.norm, b.norm, rel_tol=0.1, abs_tol=1e-6)
            for a, b in zip(self.readings, other.readings, strict=True)
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a rank puts into the evidence of an attempt."""

    detections: tuple[Detection, ...]
    replay_problem: str
    bit_equal: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Flags:
    """The reduction at the boundary: the largest over all ranks."""

    veto: int
    differences: int
    mended: int
    unrepeatable: int
    scaler_skips: int
    stop_code: int
    restart: int
    fenced: int
    drain: int
    rewind: int
    snapshot: int
    no_snapshot: int
    snapshot_not_due: int


class Boundary:
    """What happens between the last backward of a step and its optimizer step.

    Args:
        guard: this rank's guard.
        adapter: the engine.
        exchange: to the other ranks.
    """

    def __init__(self, guard: Guard, adapter: EngineAdapter, exchange: Exchange) -> None:
        self._guard = guard
        self._adapter = adapter
        self._exchange = exchange
        self._settings = guard.settings
        self._reporter = guard.reporter
        self.last_verified_step = 0
        self.deterministic: bool | None = None
        self._num_skips = 0
        self._has_stepped = False
        self._inspection: Inspection | None = None
        self._falling_scale: float | None = None
        self._proven_scale = 0.0
        self._searched = False
        self._handed_to_skip = False
        config = self._settings.config
        self._is_measured = not config.guard.measure_determinism or config.detection.strength == "off"
        self._draining = self._is_saved = False
        self._snapshot_is_due = False

    @property
    def consecutive_skips(self) -> int:
        """Steps skipped in a row outside of the loss scaler's search, an earlier generation's last ones too."""
        return self._num_skips + (0 if self._has_stepped else self._reporter.orders().inherited_skips)

    def close(self) -> None:
        """Give the process group back."""
        self._exchange.close()

    # ------ called by the guard

    def settle(self) -> None:
        """Return when the step may be taken (or skipped by DeepSpeed itself).

        Raises:
            SystemExit: the decision, or an order, was to leave.
            FencedError: a newer generation has begun.
        """
        self._handed_to_skip = False
        scale = self._falling_scale = self._adapter.falling_scale
        # At a scale that a step was taken with, an overflow is as likely a fault: a replay tells, and disturbs nothing.
        self._searched = scale is not None and scale > self._proven_scale
        inspection, scaler_skips = self._inspect()
        flags = self._compare(inspection, scaler_skips)
        self._obey(flags)
        inspection, flags = self._settle_state(inspection, flags, scaler_skips)
        noteworthy = flags.veto or flags.mended or flags.unrepeatable or flags.scaler_skips
        if not noteworthy and not self._is_measured:
            # The last of the runs that are compared is the one that the step is taken from.
            inspection = self._measure(inspection)
            inspection, flags = self._settle_state(inspection, self._compare(inspection, False), False)
        if flags.veto:
            inspection = self._resolve(inspection)
        elif flags.mended:
            self._record_mended(inspection)
        self._inspection = inspection
        if flags.snapshot and not flags.no_snapshot:
            self._reporter.order_done("take_snapshot")
        self._snapshot_is_due = not flags.no_snapshot and bool(flags.snapshot or not flags.snapshot_not_due)

    @property
    def snapshot_is_due(self) -> bool:
        """Whether all ranks take a snapshot at the end of the step that was settled last."""
        return self._snapshot_is_due

    @property
    def clean_through(self) -> int:
        """Newest step that is known to be clean: so many further steps were verified."""
        return max(0, self.last_verified_step - self._settings.config.snapshot.verify_steps)

    def step_taken(self) -> None:
        """The optimizer step was taken, or DeepSpeed skipped it."""
        applied = self._adapter.step_was_applied
        if not applied:
            self._reporter.add_skipped_step()
        if applied:
            self._proven_scale = max(self._proven_scale, self._falling_scale or 0.0)
        if self._handed_to_skip or not (applied or self._falling_scale is not None):
            self._num_skips += 1
        else:
            self._num_skips, self._has_stepped = 0, True
            self.last_verified_step = self._adapter.global_steps
        if applied and not self._handed_to_skip and self._inspection is not None:
            self._guard.verified(self._inspection)
        self._inspection = None

    def go_on_after(self, step: int, *, deterministic: bool | None) -> None:
        """The state of `step`, taken by an earlier generation, was loaded; what that one had measured still holds."""
        self.last_verified_step, self._has_stepped, self._num_skips = step, True, 0
        if deterministic is not None and not self._is_measured:
            self._is_measured, self.deterministic = True, deterministic
            self._reporter.set_deterministic(deterministic)

    def checkpoint_saved(self) -> None:
        """The script has saved a checkpoint: a drain may now end the run. Called on every rank."""
        self._is_saved = True

    def decide_about_state(self, damage: tuple[Detection, ...]) -> None:
        """Between two steps: decide about damaged state as at the boundary of the step to come. Collective.

        Raises:
            SystemExit: the decision was to leave.
        """
        for detection in damage:
            self._reporter.report(detection)
        inspection = Inspection(detections=damage, findings=(), readings=(), fingerprints=(), replay_problem="")
        flags = self._compare(inspection, False)
        self._obey(flags)
        if flags.veto:
            self._resolve(inspection)

    def leave_if_drained(self) -> None:
        """Called where a new step begins.

        Raises:
            SystemExit: a drain was ordered, and the script has saved since.
        """
        if self._draining and self._is_saved and not self._guard.recorder.events:
            self.leave(ExitCode.REQUEUE, "drained: the step is finished and a checkpoint is saved")

    def leave(self, exit_code: int, reason: str) -> NoReturn:
        """End this process with a line on rank 0, after what there is to report was delivered."""
        if self._settings.rank == 0:
            print(f"resilience: step {self._guard.step}: {reason}", file=sys.stderr, flush=True)
        self._reporter.leave(int(exit_code), reason)
        sys.exit(int(exit_code))  # not raised by hand: its code is noted on the way (ending.py)

    # ------ comparing notes

    def _inspect(self) -> tuple[Inspection, bool]:
        """What this rank saw; an overflow that the loss scaler will see to itself is no detection."""
        inspection = self._guard.inspect()
        skips = self._searched and scaler_will_skip(inspection.findings)
        if skips:
            mended = tuple(detection for detection in inspection.detections if detection.mended)
            inspection = dataclasses.replace(inspection, detections=mended)
        for detection in inspection.detections:
            self._reporter.report(detection)
        return inspection, skips

    def _compare(self, inspection: Inspection, scaler_skips: bool) -> _Flags:
        orders = self._reporter.orders()
        own = _Flags(
            veto=any(is_unmended(detection) for detection in inspection.detections),
            differences=inspection.num_differences,
            mended=any(detection.mended for detection in inspection.detections),
            unrepeatable=bool(inspection.replay_problem),
            scaler_skips=scaler_skips,
            stop_code=orders.stop_code,
            restart=orders.restart,
            fenced=orders.fenced,
            drain=orders.drain,
            rewind=orders.rewind,
            snapshot=orders.snapshot,
            no_snapshot=not self._guard.can_take_snapshot,
            snapshot_not_due=not self._guard.wants_snapshot,
        )
        return _Flags(*self._exchange.maximum([int(value) for value in dataclasses.astuple(own)]))

    def _settle_state(self, inspection: Inspection, flags: _Flags, scaler_skips: bool) -> tuple[Inspection, _Flags]:
        """Rebuild what changed at rest on any rank, if it can be; the rest becomes part of the evidence."""
        if not flags.differences:
            return inspection, flags
        found = self._guard.settle_state()
        for detection in found:
            self._reporter.report(detection)
        inspection = dataclasses.replace(inspection, detections=(*found, *inspection.detections), num_differences=0)
        return inspection, self._compare(inspection, scaler_skips)

    def _obey(self, flags: _Flags) -> None:
        if flags.fenced:
            raise FencedError(
                f"generation {self._settings.generation} has ended, step {self._guard.step} is not taken; "
                "a newer generation goes on with the run"
            )
        reason = self._reporter.orders().reason or "ordered by the coordinator"
        if flags.stop_code:
            self.leave(flags.stop_code, reason)
        if flags.restart:
            self.leave(LEFT_FOR_RESTART, reason)
        if flags.drain and not self._draining:
            self._draining, self._is_saved = True, False

    def _gather(self, inspection: Inspection, bit_equal: bool) -> list[Share]:
        share = Share(detections=inspection.detections, replay_problem=inspection.replay_problem, bit_equal=bit_equal)
        return [decode(Share, content) for content in self._exchange.all_gather(encode(share))]

    def _evidence(self, shares: list[Share], attempt: int, previous: tuple[Detection, ...]) -> Evidence:
        detections = tuple(detection for share in shares for detection in share.detections)
        if len(detections) > _MAX_DETECTIONS:
            detections = tuple(detection for detection in detections if is_root(detection))[:_MAX_DETECTIONS]
        problem = next((share.replay_problem for share in shares if share.replay_problem), "")
        return Evidence(
            run_id=self._settings.run_id,
            generation=self._settings.generation,
            step=self._guard.step,
            attempt=attempt,
            world_size=len(shares),
            detections=detections,
            previous=previous,
            deterministic=self.deterministic,
            replay_available=not problem,
            replay_reason=problem,
            bit_equal=attempt > 0 and all(share.bit_equal for share in shares),
            loss_scale_search=self._searched,
            consecutive_skips=self.consecutive_skips,
        )

    # ------ deciding and doing

    def _resolve(self, inspection: Inspection) -> Inspection:
        """Decide, replay, look again, until the step may be taken; returns what the last attempt showed."""
        config, clock = self._settings.config, self._settings.clock
        attempt, bit_equal = 0, False
        previous: tuple[Detection, ...] = ()
        pending: Decision | None = None
        while True:
            evidence = self._evidence(self._gather(inspection, bit_equal), attempt, previous)
            decision = self._decide(evidence)
            unmended = tuple(detection for detection in evidence.detections if is_unmended(detection))
            if pending is not None:
                self._conclude(pending, Outcome.FAILED if unmended else Outcome.SUCCEEDED)
            if decision.action is not Action.REPLAY or config.mode is not Mode.ENFORCE:
                break
            began_at = clock.monotonic()
            inspection, bit_equal = self._replay(inspection, attempt + 1)
            lost_s = clock.monotonic() - began_at
            self._reporter.add_badput("replay", lost_s)
            latency_ms = _latency_ms(evidence, clock.wall())
            pending = dataclasses.replace(decision, lost_s=lost_s, latency_ms=latency_ms)
            previous, attempt = unmended, attempt + 1
        self._guard.end_attempts()
        self._carry_out(dataclasses.replace(decision, latency_ms=_latency_ms(evidence, clock.wall())), unmended)
        return inspection

    def _replay(self, before: Inspection, attempt: int) -> tuple[Inspection, bool]:
        """Run the step again; what it showed, and whether its gradients equal those of the attempt before."""
        self._reporter.heartbeat(state="replaying")
        self._guard.begin_attempt(attempt)
        fits = self._run_again()
        if not fits:
            self._guard.add_misfit()
        inspection, _ = self._inspect()
        if not fits:
            inspection = dataclasses.replace(inspection, replay_problem=_MISFIT)
        return inspection, inspection.equals(before)

    def _run_again(self) -> bool:
        return replay(
            self._adapter,
            self._guard.recorder,
            begin_micro_step=self._guard.begin_replayed_micro_step,
            begin_backward=self._guard.begin_replayed_backward,
            protected=self._guard.protected,
        )

    def _decide(self, evidence: Evidence) -> Decision:
        """Rank 0 asks, or decides by the same table; everyone gets the answer."""
        content = b""
        if self._settings.rank == 0:
            config = self._settings.config
            self._reporter.heartbeat(state="deciding")
            decision = self._reporter.decide(evidence, config.guard.decide_deadline_s)
            if decision is None:
                now = self._settings.clock.wall()
                decision = policy.decide_locally(evidence, config.policy, config.mode, now=now)
            if not self._reporter.orders().fenced:
                content = encode(decision)
        content = self._exchange.broadcast(content)
        if not content:
            raise FencedError(f"generation {self._settings.generation} has ended, step {evidence.step} is not taken")
        answer = decode(Decision, content)
        assert isinstance(answer, Decision)
        return answer

    def _carry_out(self, decision: Decision, unmended: tuple[Detection, ...]) -> None:
        if decision.action in (Action.CONTINUE, Action.CORRECTED):
            # A step that goes on although something is not finite will be skipped by DeepSpeed, or should have been.
            is_non_finite = any(detection.kind in _NON_FINITE for detection in unmended)
            self._handed_to_skip = is_non_finite and not (
                self._falling_scale is not None and scaler_will_skip(unmended)
            )
            shadowed = decision.outcome is Outcome.SHADOWED
            self._conclude(decision, Outcome.SHADOWED if shadowed else Outcome.SUCCEEDED)
            return
        self._conclude(decision, Outcome.SUCCEEDED)
        if decision.action is Action.STOP:
            self.leave(decision.exit_code or ExitCode.REQUEUE, decision.reason)
        self.leave(LEFT_FOR_RESTART, decision.reason)

    def _conclude(self, decision: Decision, outcome: Outcome) -> None:
        if self._settings.rank == 0:
            self._reporter.conclude(dataclasses.replace(decision, outcome=outcome))

    def _record_mended(self, inspection: Inspection) -> None:
        """What was mended in place on any rank becomes one decision `corrected`, on the ranks' own word."""
        evidence = self._evidence(self._gather(inspection, False), 0, ())
        if self._settings.rank == 0:
            now = self._settings.clock.wall()
            decision = policy.decide(evidence, self._settings.config.policy, self._settings.config.mode, now=now)
            latency_ms = max(detection.latency_ms for detection in evidence.detections)
            self._conclude(dataclasses.replace(decision, origin=Origin.RANK, latency_ms=latency_ms), Outcome.SUCCEEDED)

    def _measure(self, original: Inspection) -> Inspection:
        """Run the first clean step twice more: is it bit-reproducible, and is a replay faithful to the original?

        Returns:
            What the execution showed that the step is taken from.
        """
        self._is_measured = True
        began_at = self._settings.clock.monotonic()
        restore = self._adapter.keep_gradients()
        measured = measure(self._guard, self._run_again, original)
        self._guard.end_attempts()
        different, unfaithful = self._exchange.maximum([int(not measured.is_equal), int(not measured.is_faithful)])
        self.deterministic = not different
        self._reporter.set_deterministic(self.deterministic)
        text = "two replays of one step were bit-equal on every rank"
        if different:
            text = "two replays of one step differed: results of this run are not bit-reproducible"
        self.tell("determinism", text)
        if unfaithful:
            restore()
            self._guard.replay_problem = "a replay of the first clean step did not reproduce its gradients"
            self.tell("replay_off", f"replay off: {self._guard.replay_problem}; {INSTEAD}")
        self._reporter.add_badput("replay", self._settings.clock.monotonic() - began_at)
        for detection in measured.last.detections:
            self._reporter.report(detection)
        return measured.last

    def tell(self, kind: str, text: str) -> None:
        """Say something once: a note from rank 0, and a line where something is off."""
        if self._settings.rank == 0:
            self._reporter.note(kind, text, step=self._guard.step)
            if kind.endswith("_off"):
                print(f"resilience: {text}", file=sys.stderr, flush=True)


def _latency_ms(evidence: Evidence, now: float) -> float:
    """From the first detection to now."""
    seen = [detection.detected_at for detection in (*evidence.previous, *evidence.detections) if detection.detected_at]
    return max(0.0, now - min(seen)) * 1e3 if seen else 0.0
