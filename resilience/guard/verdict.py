"""At the boundary: compare notes among the ranks, and if there is cause, decide together and carry the decision out.

Every path here is taken by all ranks alike, because each branch hangs on what was reduced or broadcast. Never here:
what the engine looks like inside.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, NoReturn

from resilience import policy
from resilience.abft.finding import Finding
from resilience.deepspeed.adapter import EngineAdapter
from resilience.deepspeed.monitor import EngineMonitor
from resilience.errors import ExitCode, FencedError
from resilience.events import Action, Decision, Detection, Evidence, Mode, Origin, Outcome
from resilience.guard.determinism import measure
from resilience.guard.evidence import is_root, is_unmended, scaler_will_skip
from resilience.guard.exchange import Exchange
from resilience.guard.notes import NON_FINITE, Flags, Inspection, Share, clean_step_of, waited_ms, wish
from resilience.guard.on_order import SnapshotOrder
from resilience.guard.replay import replay
from resilience.guard.rewind import Offer, Rewinder, choose
from resilience.guard.support import INSTEAD
from resilience.guard.wire import decode, encode

if TYPE_CHECKING:
    from resilience.guard.transaction import Guard

__all__ = ["LEFT_FOR_RESTART", "Boundary"]

LEFT_FOR_RESTART = 76
"""Exit code of a rank that leaves because the decision was a restart; no code that a launcher would pass on."""

_MAX_DETECTIONS = 1000
"""More than this in one evidence are cut to the root causes: a NaN in a large job reaches every rank."""

_MISFIT = "outputs that are no scalars did not replay bit-equal, so the recorded cotangents do not belong to them"


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
        self._order = SnapshotOrder(self._reporter, self._settings.clock)
        self._rewound_to: int | None = None
        self.monitor: EngineMonitor | None = None

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
        self._begin()
        inspection, scaler_skips = self._inspect()
        flags = self._compare(inspection, scaler_skips)
        self._obey(flags)
        if flags.lost_snapshot:
            self._guard.snapshots.give_up(flags.lost_snapshot)
        inspection, flags = self._settle_state(inspection, flags, scaler_skips)
        if not (self._is_measured or flags.unmeasured):
            self._take_for_deterministic(True)
        noteworthy = flags.veto or flags.mended or flags.unrepeatable or flags.scaler_skips
        if not noteworthy and not self._is_measured:
            # The last of the runs that are compared is the one that the step is taken from.
            inspection = self._measure(inspection)
            inspection, flags = self._settle_state(inspection, self._compare(inspection, False), False)
        order = 0 if self._rewinder.is_busy else flags.rewind
        if order and self._settings.rank == 0:
            ordered = self._guard.detections([wish(self._settings.clock.wall())])
            inspection = dataclasses.replace(inspection, detections=(*inspection.detections, *ordered))
        if flags.veto or order:
            inspection = self._resolve(inspection, order)
        elif flags.mended:
            self._record_mended(inspection)
        self._inspection = inspection
        self._order.at_boundary(flags, step=self._guard.step, problem=self._guard.snapshots.problem)
        self._snapshot_is_due = not flags.no_snapshot and bool(flags.snapshot or not flags.snapshot_not_due)

    @property
    def snapshot_is_due(self) -> bool:
        """Whether all ranks take a snapshot at the end of the step that was settled last."""
        return self._snapshot_is_due

    @property
    def clean_through(self) -> int:
        """Newest step that is known to be clean: so many further steps were verified, and every piece of the state that
        is hashed at all has had its turn since, and agreed."""
        verified = self.last_verified_step - self._settings.config.snapshot.verify_steps
        agreed = self._guard.state_agreed_through
        return max(0, verified if agreed is None else min(verified, agreed))

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
            self._take_for_deterministic(deterministic)

    def _take_for_deterministic(self, deterministic: bool) -> None:
        self._is_measured, self.deterministic = True, deterministic
        self._reporter.set_deterministic(deterministic)

    def checkpoint_saved(self) -> None:
        """The script has saved a checkpoint: a drain may now end the run. Called on every rank."""
        self._is_saved = True

    def decide_about_state(self, damage: list[Finding]) -> None:
        """Between two steps: decide about damaged state as at the boundary of the step to come. Collective.

        Raises:
            SystemExit: the decision was to leave.
        """
        detections = self._guard.detections(damage)
        for detection in detections:
            self._reporter.report(detection)
        inspection = Inspection(
            detections=detections, findings=tuple(damage), readings=(), fingerprints=(), replay_problem=""
        )
        flags = self._compare(inspection, False)
        self._obey(flags)
        if flags.veto:
            self._resolve(inspection, 0)

    def rewound(self, step: int) -> None:
        """The engine was put back to the end of `step`."""
        self.last_verified_step = min(self.last_verified_step, step)
        self._num_skips = 0

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

    @property
    def _rewinder(self) -> Rewinder:
        return self._guard.rewinder

    def _begin(self) -> None:
        """A step is at its boundary, or again."""
        self._handed_to_skip = False
        scale = self._falling_scale = self._adapter.falling_scale
        # At a scale that a step was taken with, an overflow is as likely a fault: a replay tells, and disturbs nothing.
        self._searched = scale is not None and scale > self._proven_scale

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

    def _compare(self, inspection: Inspection, scaler_skips: bool) -> Flags:
        orders, snapshots = self._reporter.orders(), self._guard.snapshots
        own = Flags(
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
            snapshot=bool(orders.snapshot),
            no_snapshot=self._rewinder.is_busy or not snapshots.can_take,
            snapshot_not_due=self._rewinder.is_busy or not snapshots.wants(self._guard.step),
            snapshots_off=bool(snapshots.problem),
            lost_snapshot=snapshots.lost_step,
            unmeasured=not (self._is_measured or orders.deterministic),
        )
        return Flags(*self._exchange.maximum([int(value) for value in dataclasses.astuple(own)]))

    def _settle_state(self, inspection: Inspection, flags: Flags, scaler_skips: bool) -> tuple[Inspection, Flags]:
        """Rebuild what changed at rest on any rank, if it can be; the rest becomes part of the evidence."""
        if not flags.differences:
            return inspection, flags
        findings = self._guard.settle_state()
        found = self._guard.detections(findings)
        for detection in found:
            self._reporter.report(detection)
        inspection = dataclasses.replace(
            inspection,
            detections=(*found, *inspection.detections),
            findings=(*findings, *inspection.findings),
            num_differences=0,
        )
        return inspection, self._compare(inspection, scaler_skips)

    def _obey(self, flags: Flags) -> None:
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
        """What every rank knows. Snapshots that may hold what is wrong are given up, whatever will be decided."""
        share = Share(
            detections=inspection.detections,
            replay_problem=inspection.replay_problem,
            bit_equal=bit_equal,
            state_clean_step=inspection.state_clean_step,
        )
        shares = [decode(Share, content) for content in self._exchange.all_gather(encode(share))]
        if self.monitor is not None:
            self.monitor.gathered(detection for each in shares for detection in each.detections)
        wrong = [each.state_clean_step for each in shares if each.state_clean_step is not None]
        if wrong and self._settings.config.mode is Mode.ENFORCE:
            self._rewinder.distrust(min(wrong))
            self._guard.saved.distrust(min(wrong), found_at=self._guard.step)
        return shares

    def _offers(self, inspection: Inspection, order: int) -> list[Offer]:
        """What all ranks can go back to. Collective."""
        doubtful = (f for f in inspection.findings if f.clean_step is not None or f.site in ("weight", "optimizer"))
        own = self._rewinder.offer(clean_step_of(doubtful), self.clean_through, ordered=bool(order))
        return [decode(Offer, content) for content in self._exchange.all_gather(encode(own))]

    def _doubt_checkpoints(self, decision: Decision, evidence: Evidence, offers: list[Offer]) -> None:
        """What was saved since the state changed is loaded no more, whatever becomes of the recovery."""
        clean = min((offer.clean_step for offer in offers if offer.clean_step is not None), default=None)
        since = {Action.REWIND: evidence.rewind_step, Action.RESTART: clean}.get(decision.action)
        if since is not None and self._settings.config.mode is Mode.ENFORCE:
            self._guard.saved.distrust(since, found_at=self._guard.step)

    def _evidence(
        self,
        shares: list[Share],
        attempt: int,
        previous: tuple[Detection, ...],
        rewind: tuple[int | None, str] = (None, ""),
    ) -> Evidence:
        detections = tuple(detection for share in shares for detection in share.detections)
        if len(detections) > _MAX_DETECTIONS:
            detections = tuple(detection for detection in detections if is_root(detection))[:_MAX_DETECTIONS]
        problem = next((share.replay_problem for share in shares if share.replay_problem), "")
        rewind_step, rewind_reason = rewind
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
            rewind_step=rewind_step,
            rewind_reason=rewind_reason,
            rewound_to=self._rewound_to,
            num_rewinds=self._rewinder.num_rewinds,
            loss_scale_search=self._searched,
            consecutive_skips=self.consecutive_skips,
        )

    # ------ deciding and doing

    def _resolve(self, inspection: Inspection, order: int) -> Inspection:
        """Decide, replay or rewind, look again, until the step may be taken; returns what the last attempt showed."""
        config, clock = self._settings.config, self._settings.clock
        attempt, bit_equal = 0, False
        previous: tuple[Detection, ...] = ()
        pending: Decision | None = None
        while True:
            shares = self._gather(inspection, bit_equal)
            offers = self._offers(inspection, order)
            evidence = self._evidence(shares, attempt, previous, choose(offers, order))
            decision = self._decide(evidence)
            self._doubt_checkpoints(decision, evidence, offers)
            unmended = tuple(detection for detection in evidence.detections if is_unmended(detection))
            if pending is not None:
                self._conclude(pending, Outcome.FAILED if unmended else Outcome.SUCCEEDED)
            if decision.action not in (Action.REPLAY, Action.REWIND) or config.mode is not Mode.ENFORCE:
                break
            began_at = clock.monotonic()
            if decision.action is Action.REPLAY:
                self._rewound_to = None
                inspection, bit_equal = self._replay(inspection, attempt + 1)
            else:
                inspection, bit_equal = self._rewind(decision, evidence, inspection, attempt + 1), False
            lost_s = clock.monotonic() - began_at
            self._reporter.add_badput(decision.action, lost_s)
            latency_ms = waited_ms(evidence, clock.wall())
            pending = dataclasses.replace(decision, lost_s=lost_s, latency_ms=latency_ms)
            previous, attempt = unmended, attempt + 1
        self._rewound_to = None
        self._guard.end_attempts()
        if order:
            self._reporter.order_done("rewind")
        self._carry_out(dataclasses.replace(decision, latency_ms=waited_ms(evidence, clock.wall())), unmended)
        return inspection

    def _rewind(self, decision: Decision, evidence: Evidence, before: Inspection, attempt: int) -> Inspection:
        """Go back and take the steps since again, then run the current one; what that showed.

        Where it cannot be done after all nothing has changed, and what was seen before is returned.
        """
        step = evidence.rewind_step
        assert step is not None, "decided without a snapshot to go back to"
        self._reporter.heartbeat(state="rewinding")
        ordered = decision.rule == "ordered-rewind"
        problem = self._rewinder.go(step, counts=not ordered)
        if problem:
            self.tell("rewind_off", f"no rewind to step {step}: {problem}")
            return before
        self._begin()
        self._rewound_to = step
        self.tell("rewind", f"went back to the memory snapshot of step {step} and took the steps since again")
        return self._replay(before, attempt)[0]

    def _replay(self, before: Inspection, attempt: int) -> tuple[Inspection, bool]:
        """Run the step again; what it showed, and whether its gradients equal those of the attempt before."""
        self._reporter.heartbeat(state="replaying")
        self._guard.begin_attempt(attempt)
        if self._rewound_to is not None:
            self._guard.look_at_state()
        # Where a script saves there may be nothing to run again.
        fits = self._run_again() if self._guard.recorder.events else True
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
            anew=self._rewound_to is not None,
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
            is_non_finite = any(detection.kind in NON_FINITE for detection in unmended)
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
            if self.monitor is not None:
                self.monitor.concluded(decision)

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
