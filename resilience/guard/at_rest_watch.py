"""When state is looked at: after a step, before the next forward, before the next step, before a checkpoint is saved.

Brings the hashes of this rank and the comparison among ranks together. On the clean path one reduction of four numbers
before the first forward of each step; what is seen at the boundary rides on the reduction that is there already. Never
here: hashing itself, decisions.
"""

from __future__ import annotations

from collections.abc import Callable

from resilience.abft.finding import Finding
from resilience.deepspeed.shards import Role
from resilience.events import Check
from resilience.guard.at_rest import AtRest
from resilience.guard.at_rest_settle import give_up, not_finite, settle, spoiled_gradients
from resilience.guard.exchange import Exchange
from resilience.guard.replicas import Replicas

__all__ = ["StateWatch"]


class StateWatch:
    """State at rest of one rank, and what the other ranks keep alike.

    Args:
        at_rest: this rank's hashes.
        replicas: the comparison among ranks.
        exchange: to the other ranks.
        repair: whether anything may be written.
        tell: called with one line when something is switched off.
    """

    def __init__(
        self, at_rest: AtRest, replicas: Replicas, exchange: Exchange, *, repair: bool, tell: Callable[[str], None]
    ) -> None:
        self._at_rest = at_rest
        self._replicas = replicas
        self._exchange = exchange
        self._repair = repair
        self._tell = tell
        self._is_due = False

    @property
    def num_differences(self) -> int:
        """Differences of this rank that wait to be settled."""
        return len(self._at_rest.differences)

    @property
    def was_edited(self) -> bool:
        """Whether the script wrote to weights or optimizer state since the last step, as far as that shows."""
        return self._at_rest.was_edited

    @property
    def agreed_through(self) -> int | None:
        """See `AtRest.agreed_through`."""
        return self._at_rest.agreed_through

    def watch_edits(self) -> None:
        """From the next step on, see edits of all state, not only of the slice whose turn it is."""
        self._at_rest.watches_edits = True

    def moved(self) -> None:
        """See `AtRest.moved`."""
        self._at_rest.moved()

    def rewound(self, step: int) -> None:
        """All state was replaced by that of the end of `step`."""
        self._at_rest.rewound(step)
        self._replicas.rewound(step)

    def checks(self) -> dict[str, int]:
        """See `AtRest.checks`."""
        return self._at_rest.checks()

    def after_step(self, step: int) -> None:
        """`step` was taken, or skipped. On every rank alike."""
        self._at_rest.after_step(step)
        self._is_due = True

    def before_forward(self, step: int) -> list[Finding]:
        """Called before each forward of a training step; collective before the first one after `step` was taken."""
        if not self._is_due:
            return []
        self._is_due = False
        self._at_rest.look((Role.WEIGHT,))
        return self._settle_all(step if self._replicas.is_due(step) else None)

    def before_save(self) -> list[Finding]:
        """Called where a script saves a checkpoint: what is damaged must not be published. Collective."""
        if not self._at_rest.has_begun:
            return []
        self._at_rest.look()
        return self._settle_all(None)

    def at_boundary(self, attempt: int) -> list[Finding]:
        """Look at everything just before the optimizer step. Differences are left to `settle`, but for a replay's."""
        self._is_due = False
        self._at_rest.look()
        return give_up(self._at_rest) if attempt else []

    def not_finite(self, *, clean_step: int) -> list[Finding]:
        """What of this rank's state is INF or NaN. Reads all of it: for when a gradient is not finite.

        Args:
            clean_step: newest step whose state was computed with since, and gave finite gradients.
        """
        return not_finite(self._at_rest, clean_step=max(0, clean_step))

    def settle(self) -> list[Finding]:
        """Settle what `at_boundary` saw on any rank; what a spoiled weight went into is run again. Collective."""
        findings = self._settle_with_the_rest()
        return [*findings, *spoiled_gradients(findings)]

    def _settle_with_the_rest(self) -> list[Finding]:
        """Settle the differences of all ranks; what hit one slice may have hit the others as well. Collective."""
        findings = settle(self._at_rest, self._exchange, repair=self._repair)
        was_hit, was_edited = self._exchange.maximum([len(findings), int(self._at_rest.was_edited)])
        # Weights that the script wrote are not what their masters say.
        if not was_hit or was_edited or self._at_rest.sees_all or not self._repair:
            return findings
        if findings:
            self._at_rest.suspect()
        rest = settle(self._at_rest, self._exchange, repair=self._repair)
        known = {finding.param for finding in findings}
        findings += [finding for finding in rest if finding.param not in known or not finding.mended]
        if not self._replicas.is_on:
            return findings
        digest = self._replicas.digest(self._at_rest.holdings())
        largest, smallest = self._exchange.maximum([digest, -digest])
        return findings if largest == -smallest else findings + self._settle_replicas()

    def _settle_all(self, step: int | None) -> list[Finding]:
        """Settle what was just seen, and compare the ranks where `step` is one to do so after. Collective."""
        digest = self._replicas.digest(self._at_rest.holdings()) if step is not None else 0
        own = [len(self._at_rest.differences), int(self._at_rest.was_edited), digest, -digest]
        num_differences, was_edited, largest, smallest = self._exchange.maximum(own)
        findings = self._settle_with_the_rest() if num_differences else []
        if step is None or was_edited:
            return findings
        if num_differences:
            # What was rebuilt is not what was hashed a moment ago.
            digest = self._replicas.digest(self._at_rest.holdings())
            largest, smallest = self._exchange.maximum([digest, -digest])
        if largest == -smallest:
            self._replicas.agreed(step)
            return findings
        return findings + self._settle_replicas()

    def _settle_replicas(self) -> list[Finding]:
        self._at_rest.add_differences(self._replicas.differences(self._exchange))
        if self._replicas.problem:
            self._tell(f"ranks are not compared: {self._replicas.problem}")
            return []
        return settle(self._at_rest, self._exchange, repair=self._repair, check=Check.REPLICA)
