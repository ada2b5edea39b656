"""Goes back to a memory snapshot in the live processes, and takes the steps since again: nothing is lost but seconds.

All ranks together, at a boundary or where a script saves. First it is made sure that it can be done: the files match
their manifest, the inputs still hold what they held. Until then nothing has changed. Then newer snapshots, which may
hold the damage, are given up; the state is loaded; each recorded step is run again under protection, with the ladder
beneath it, and taken. A failure in the middle leaves for a restart: what is in the engine then is no state. Never
here: the question whether to do so, files.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from resilience.deepspeed.adapter import EngineAdapter
from resilience.errors import SnapshotError
from resilience.guard.exchange import Exchange
from resilience.guard.history import History, StepRecord
from resilience.guard.memory import Past
from resilience.guard.replay import replay
from resilience.guard.rng import capture_rng, restore_rng
from resilience.guard.wire import decode, encode

if TYPE_CHECKING:
    from resilience.guard.transaction import Guard

__all__ = ["NEWEST", "Offer", "Rewinder", "choose"]

NEWEST = 1
"""The order of an operator who names no step; another number is one more than the step."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one rank can go back to."""

    steps: tuple[int, ...]
    """Of snapshots whose part of this rank is whole, and since which its history reaches; ascending."""
    problem: str
    """Why there are none, or no older ones, in words."""
    clean_step: int | None
    """Newest step whose snapshot is free of what this rank has seen; −1 where that is not known, None where it has seen
    nothing of the kind."""
    clean_through: int
    """Newest step that is known to be clean."""


def choose(offers: Sequence[Offer], order: int = 0) -> tuple[int | None, str]:
    """The newest snapshot that serves all ranks.

    Args:
        offers: by rank.
        order: of an operator (`NEWEST`, or 1 + a step); 0 for none.

    Returns:
        Its step; or None, and why there is none.
    """
    limits = [offer.clean_step for offer in offers if offer.clean_step is not None]
    if order == NEWEST:
        limits += [min(offer.clean_through for offer in offers)]
    limit = min(limits, default=math.inf)
    if limit < 0:
        return None, "it is not known since when the state is wrong"
    common = set[int].intersection(*(set(offer.steps) for offer in offers))
    fitting = [step for step in common if step <= limit and order in (0, NEWEST, 1 + step)]
    if fitting:
        return max(fitting), ""
    if common and order > NEWEST:
        there = ", ".join(map(str, sorted(common)))
        why = next((f" ({offer.problem})" for offer in offers if offer.problem), "")
        return None, f"only the memory snapshots of step {there} can be gone back to, not that of {order - 1}{why}"
    if offers[0].problem and len({offer.problem for offer in offers}) == 1 and not common:
        return None, offers[0].problem
    for rank, offer in enumerate(offers):
        if offer.problem and not any(step <= limit for step in offer.steps):
            return None, f"rank {rank}: {offer.problem}"
    if common:
        return None, (
            f"the memory snapshots that all ranks can go back to, the oldest of step {min(common)}, are newer than step"
            f" {limit}, the last that is known to be clean{_way_out(offers, common, order)}"
        )
    return None, "no memory snapshot is whole on all ranks"


def _way_out(offers: Sequence[Offer], common: set[int], order: int) -> str:
    """What an operator can do whom nothing but the want of proof refuses."""
    doubted_since = min((offer.clean_step for offer in offers if offer.clean_step is not None), default=math.inf)
    open_to_order = sorted(step for step in common if step <= doubted_since)
    if order != NEWEST or not open_to_order:
        return ""
    return (
        f"; to take one unproven, name it (`resilience rewind --step {open_to_order[-1]}`; there are"
        f" {', '.join(map(str, open_to_order))}), or wait: with detection.at_rest_share = 1 the proof takes"
        " snapshot.verify_steps steps, with less the whole state must have had its turn"
    )


class Rewinder:
    """What one rank keeps for going back, and the going back.

    Args:
        guard: of this rank.
        adapter: its engine.
        exchange: to the other ranks.
        past: the snapshots; None where there are none.
        problem: why there will never be a rewind; empty where there may be.
    """

    def __init__(
        self, guard: Guard, adapter: EngineAdapter, exchange: Exchange, past: Past | None, problem: str = ""
    ) -> None:
        self._guard = guard
        self._adapter = adapter
        self._exchange = exchange
        self._past = past
        self._problem = problem or ("" if past is not None else "no memory snapshots are kept")
        config = guard.settings.config
        self._limits = config.policy
        self._history = History(int(config.snapshot.history_max_mib * (1 << 20)))
        self._rewound_at: collections.deque[float] = collections.deque()
        self._tried: tuple[int, int] | None = None
        self._refused: dict[int, str] = {}
        self.is_busy = False
        """Whether steps are being taken again."""
        self.num_rewinds = 0
        """Of this generation."""

    @property
    def is_possible(self) -> bool:
        """Whether there can be a rewind at all."""
        return not self._problem

    @property
    def is_recording(self) -> bool:
        """Whether steps are worth keeping."""
        return self._history.is_recording and not self._problem and not self.is_busy

    # ------ keeping

    def begin(self, step: int) -> None:
        """A snapshot is about to be taken at the end of `step`."""
        if self._problem or self._past is None:
            return
        self._history.begin(step, self._adapter.hyperparameters())
        self._history.trim(min(self._past.steps(), default=0))

    def cut(self, step: int, why: str) -> None:
        """What was done by the end of `step` cannot be done again from before it, for this reason."""
        self._history.cut(step, why)

    def keep_and_take(self, lr_kwargs: Any) -> Any:
        """Take the step that was settled, and remember how it was taken."""
        adapter, recorder = self._adapter, self._guard.recorder
        before, scale = adapter.hyperparameters(), adapter.loss_scale
        position, rng = adapter.position(), capture_rng(adapter)
        problem = recorder.why_unavailable()
        if self._guard.state_was_edited:
            problem = problem or "the script wrote weights or optimizer state in the middle of it"
        taken = self._guard.take(lr_kwargs)
        reused = self._history.add(
            adapter.global_steps,
            recorder.events,
            position=position,
            rng=rng,
            lr_kwargs=lr_kwargs,
            loss_scale=scale,
            before=before,
            after=adapter.hyperparameters(),
            problem=problem,
        )
        recorder.copy_inputs |= reused
        return taken

    # ------ offering

    def offer(self, clean_step: int | None, clean_through: int, *, ordered: bool) -> Offer:
        """What this rank can go back to, for the evidence.

        Args:
            clean_step: as in `Offer`.
            clean_through: as in `Offer`.
            ordered: whether an operator asks: the budget is for what the run does by itself.
        """
        problem = self._problem or self._why_not_now(ordered)
        steps: list[int] = []
        if not problem and self._past is not None:
            held = [step for step in self._past.settled_steps() if step < self._guard.step]
            unfit = {step: self._refused.get(step, "") or self._history.problem(step) for step in held}
            steps = [step for step in held if not unfit[step]]
            newest_unfit = max((step for step in held if unfit[step]), default=None)
            problem = unfit[newest_unfit] if newest_unfit is not None else "" if steps else self._history.problem(-1)
        return Offer(steps=tuple(steps), problem=problem, clean_step=clean_step, clean_through=clean_through)

    def _why_not_now(self, ordered: bool) -> str:
        if self.is_busy:
            return "a rewind is under way already"
        if self._tried is not None and self._tried[0] == self._guard.step:
            return f"the rewind to step {self._tried[1]} did not help"
        now = self._guard.settings.clock.monotonic()
        window_s = self._limits.restart_window_s
        while self._rewound_at and now - self._rewound_at[0] > window_s:
            self._rewound_at.popleft()
        if not ordered and len(self._rewound_at) >= self._limits.max_rewinds:
            return f"the budget of {self._limits.max_rewinds} rewinds within {window_s:.0f} s is used up"
        if self._guard.recorder.events and self._guard.recorder.why_unavailable():
            return f"step {self._guard.step} cannot be run again: {self._guard.recorder.why_unavailable()}"
        return ""

    def distrust(self, clean_step: int) -> None:
        """State has changed after `clean_step`: later snapshots may hold what is wrong. Nobody loads them any more."""
        if self._past is not None and not self.is_busy:
            self._past.drop_after(clean_step)

    # ------ going back

    def go(self, step: int, *, counts: bool) -> str:
        """Go back to the snapshot of `step` and take all later steps again, up to the one that is being worked on.

        Collective. The gradients of the current step are gone afterwards; generators, positions and what the script
        set are where they were.

        Args:
            step: of the snapshot.
            counts: whether it counts against the budget.

        Returns:
            Why nothing was done; empty where it was done.

        Raises:
            SystemExit: it failed in the middle, or a fault on the way led to leaving.
        """
        assert self._past is not None, "nothing to go back to"
        problem = self._first(self._prepare(step))
        if problem:
            self._refused[step] = problem
            return problem
        self._tried = (self._guard.step, step)
        self.num_rewinds += 1
        if counts:
            self._rewound_at.append(self._guard.settings.clock.monotonic())
        self._past.drop_after(step)
        # No rank writes into the engine before every rank has given up what is newer.
        self._exchange.maximum([0])
        self.is_busy = True
        try:
            self._run(step)
        finally:
            self.is_busy = False
        return ""

    def _prepare(self, step: int) -> str:
        """Make sure that the way back is open on this rank."""
        assert self._past is not None
        spoiled = [record.step for record in self._history.since(step) if record.spoiled()]
        if spoiled:
            self._history.cut(spoiled[-1], f"an input of step {spoiled[-1]} no longer holds what it held")
            return self._history.problem(step)
        try:
            self._past.prepare(step)
        except SnapshotError as error:
            return str(error)
        return ""

    def _run(self, step: int) -> None:
        adapter, guard = self._adapter, self._guard
        position, groups = adapter.position(), adapter.hyperparameters()
        script_wrote = self._history.has_written_groups(groups)
        records = self._history.since(step)
        expected = list(range(step + 1, guard.step))
        assert [record.step for record in records] == expected, "the history has a hole"
        rng = capture_rng(adapter)
        self._load(step, records)
        for record in records:
            self._take_again(record)
        adapter.move_to(position)
        restore_rng(rng, adapter)
        if script_wrote:
            adapter.set_hyperparameters(groups)

    def _load(self, step: int, records: Sequence[StepRecord]) -> None:
        assert self._past is not None
        self._guard.reporter.heartbeat(state="rewinding", step=step)
        self._adapter.discard_gradients()
        problem, counters = "", {}
        try:
            counters = dict(self._past.load(step))
        except SnapshotError as error:
            problem = str(error)
        problem = self._first(problem)
        if problem:
            self._leave(step, problem)
        if self._adapter.global_steps != step:
            self._leave(step, f"the engine is at step {self._adapter.global_steps} after loading ({counters})")
        events = records[0].events if records else self._guard.recorder.events
        with self._guard.recorder.revisiting(events):
            # Buffers that are in no checkpoint; what the record holds was captured before anything went wrong.
            self._guard.recorder.restore_buffers()
        self._guard.rewound(step)

    def _take_again(self, record: StepRecord) -> None:
        self._guard.reporter.heartbeat(state="rewinding", step=self._adapter.global_steps)
        if self._adapter.loss_scale != record.loss_scale:
            # Scales of the ranks move together, so all ranks come here.
            self._leave(record.step, f"the loss scale is {self._adapter.loss_scale:g}, not {record.loss_scale:g}")
        guard = self._guard
        guard.look_at_state()
        with guard.recorder.revisiting(record.events):
            fits = replay(
                self._adapter,
                guard.recorder,
                begin_micro_step=guard.begin_replayed_micro_step,
                begin_backward=guard.begin_replayed_backward,
                protected=guard.protected,
                boundary=(record.position, record.rng),
                anew=True,
            )
            if not fits:
                self._leave(record.step, "outputs that are no scalars did not come again")
            if record.script_groups is not None:
                self._adapter.set_hyperparameters(record.script_groups)
            guard.boundary.settle()
            guard.take(record.lr_kwargs)
        guard.end_attempts()
        guard.end_step()

    def _first(self, problem: str) -> str:
        """The first problem that a rank has. Collective."""
        problems = [decode(tuple[str, ...], content) for content in self._exchange.all_gather(encode((problem,)))]
        return next((f"rank {rank}: {text}" for rank, (text,) in enumerate(problems) if text), "")

    def _leave(self, step: int, problem: str) -> NoReturn:
        self._guard.leave_for_restart(f"the rewind failed at step {step}: {problem}")
