"""Where a new generation's state comes from: memory snapshots of its nodes, parity, the script's checkpoint. Pure.

Candidates of all tiers are ranked by step and trust. A memory snapshot serves when

    it lies on the path of training that is being gone on with: no generation since then went on from an older step,
    the part of every node that it was taken on can be had: from the node itself, where it has its ranks again, or from
    the members of its parity group that are left,
    nobody refused it before,
    no generation that ended in the middle of a rewind was going back behind it, and
    after damage to the state, it is known to be clean.

The newest that serves is taken, and every newer one that was not is told with its reason.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Mapping, Sequence

__all__ = ["Ancestor", "Choice", "Copy", "Holder", "Tier", "choose_restore"]

_MAX_PASSED_OVER = 8
"""Newer snapshots that were not taken, told one by one."""


class Tier(enum.StrEnum):
    """Where a state comes from, most at hand first."""

    MEMORY = "memory"
    PEER = "peer"
    DISK = "disk"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A node's part of a memory snapshot, whole and hashed, as its guardian told of it."""

    step: int
    generation: int
    world_size: int
    ranks: tuple[int, ...]
    clean_through: int = 0
    """Newest step that was known to be clean when it was last told of."""
    parity_nodes: tuple[str, ...] = ()
    """The parity group whose exchange for this step is complete here, the node itself included."""
    parity_losses: int = 0
    """Losses within the group that the others can make up for."""
    num_bytes: int = 0
    at: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A node that took part in a snapshot, or holds parity for one that did."""

    node: str
    ranks: tuple[int, ...]
    """Ranks whose files it holds; empty where its part must be rebuilt by the others."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """A generation that has begun, as far as its snapshots are concerned."""

    generation: int
    places: tuple[tuple[str, tuple[int, ...]], ...]
    """Its nodes with their ranks."""
    resumed_after: int | None = None
    """The step after which it went on; None where that is not known, or where it was the first one."""
    damaged: bool = False
    """Whether its state could not be trusted when it ended."""
    rewinding_to: int | None = None
    """The snapshot that it was going back to when it ended, by its step: newer ones may hold the damage, and not every
    rank may have given them up."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Where a generation's state comes from."""

    tier: Tier
    """`memory`; `peer` where parts of a memory snapshot come from other nodes; `disk`: what the script loads itself."""
    step: int
    """The snapshot's, or the newest verified checkpoint's; 0 where there is none."""
    generation: int
    """Generation that wrote it; 0 with `disk`."""
    reason: str
    """For `generation n begins from …`."""
    passed_over: tuple[str, ...] = ()
    """Newer snapshots that do not serve, each with its reason, newest first."""
    holders: tuple[Holder, ...] = ()
    """With a memory snapshot: its nodes in their order."""

    @property
    def is_snapshot(self) -> bool:
        return self.tier is not Tier.DISK


def choose_restore(
    copies: Mapping[str, Sequence[Copy]],
    places: Mapping[str, tuple[int, ...]],
    ancestors: Sequence[Ancestor],
    *,
    refused: Collection[tuple[int, int, str]] = (),
    checkpoint_step: int = 0,
) -> Choice:
    """Pick where the next generation's state comes from.

    Args:
        copies: what the guardian of each node of the new generation holds.
        places: the ranks of each node in the new generation.
        ancestors: the generations so far, oldest first.
        refused: (step, generation, node) that could not be loaded; an empty node refuses the whole snapshot.
        checkpoint_step: step of the newest verified checkpoint; 0 where there is none.
    """
    inquiry = _Inquiry(copies, places, ancestors, refused)
    found = {(copy.step, copy.generation) for node in places for copy in copies.get(node, ())}
    passed_over: list[str] = []
    for step, generation in sorted(found, reverse=True):
        holders, why_not = inquiry.holders(step, generation)
        if why_not:
            passed_over.append(f"snapshot of step {step} (generation {generation}): {why_not}")
            continue
        rebuilt = [holder.node for holder in holders if not holder.ranks]
        return Choice(
            tier=Tier.PEER if rebuilt else Tier.MEMORY,
            step=step,
            generation=generation,
            reason=_reason(step, rebuilt, checkpoint_step),
            passed_over=_told(passed_over),
            holders=holders,
        )
    return Choice(
        tier=Tier.DISK,
        step=checkpoint_step,
        generation=0,
        reason=f"the last verified checkpoint (step {checkpoint_step})"
        if checkpoint_step
        else "what the script begins with",
        passed_over=_told(passed_over),
    )


def _reason(step: int, rebuilt: Sequence[str], checkpoint_step: int) -> str:
    text = f"the memory snapshot of step {step}"
    if rebuilt:
        text += f", the part of {', '.join(rebuilt)} rebuilt from parity"
    if checkpoint_step > step:
        text += f" (a script that loads the checkpoint of step {checkpoint_step} goes on from there)"
    return text


def _told(passed_over: Sequence[str]) -> tuple[str, ...]:
    more = len(passed_over) - _MAX_PASSED_OVER
    return (*passed_over[:_MAX_PASSED_OVER], *([f"and {more} older ones"] if more > 0 else []))


@dataclasses.dataclass(frozen=True)
class _Inquiry:
    copies: Mapping[str, Sequence[Copy]]
    places: Mapping[str, tuple[int, ...]]
    ancestors: Sequence[Ancestor]
    refused: Collection[tuple[int, int, str]]

    def holders(self, step: int, generation: int) -> tuple[tuple[Holder, ...], str]:
        """Who has what of a snapshot; or why it does not serve, in words."""
        taker = next((a for a in self.ancestors if a.generation == generation), None)
        if taker is None:
            return (), f"generation {generation} is not one of this run's"
        why_not = self._off_the_path(step, generation) or self._gone_behind(step, generation)
        why_not = why_not or self._other_world(taker)
        if not why_not and (step, generation, "") in self.refused:
            why_not = "it could not be loaded before"
        if why_not:
            return (), why_not
        holders, sources = [], set()
        for node, ranks in taker.places:
            if self._copy(node, step, generation, ranks) is not None and self.places.get(node) == ranks:
                holders.append(Holder(node=node, ranks=ranks))
                sources.add(node)
                continue
            helpers, why_not = self._helpers(node, step, generation)
            if why_not:
                return (), f"the part of {node} ({_ranks(ranks)}) is gone{why_not}"
            holders.append(Holder(node=node, ranks=()))
            sources |= helpers
        return tuple(holders), self._unclean(step, generation, sources)

    def _off_the_path(self, step: int, generation: int) -> str:
        for later in self.ancestors:
            if later.generation > generation and later.resumed_after is not None and later.resumed_after < step:
                return f"generation {later.generation} went on after step {later.resumed_after}"
        return ""

    def _gone_behind(self, step: int, generation: int) -> str:
        for later in self.ancestors:
            if later.generation >= generation and later.rewinding_to is not None and later.rewinding_to < step:
                return f"generation {later.generation} ended in the middle of a rewind to step {later.rewinding_to}"
        return ""

    def _other_world(self, taker: Ancestor) -> str:
        num_then = sum(len(ranks) for _, ranks in taker.places)
        num_now = sum(len(ranks) for ranks in self.places.values())
        return f"taken by {num_then} ranks, this generation has {num_now}" if num_then != num_now else ""

    def _copy(self, node: str, step: int, generation: int, ranks: tuple[int, ...] = ()) -> Copy | None:
        """The part of a snapshot that `node`, a node of the new generation, holds and that was not refused."""
        if node not in self.places or (step, generation, node) in self.refused:
            return None
        for copy in self.copies.get(node, ()):
            if (copy.step, copy.generation) == (step, generation) and set(ranks) <= set(copy.ranks):
                return copy
        return None

    def _helpers(self, lost: str, step: int, generation: int) -> tuple[set[str], str]:
        """The members of the parity group of `lost` that hold this snapshot; or why they are not enough."""
        held = {node: self._copy(node, step, generation) for node in self.places if node != lost}
        groups = {copy.parity_nodes for copy in held.values() if copy is not None and lost in copy.parity_nodes}
        why_not = ", and no parity group holds it"
        for group in sorted(groups):
            members = {node: copy for node, copy in held.items() if copy is not None and copy.parity_nodes == group}
            num_needed = len(group) - min(copy.parity_losses for copy in members.values())
            if len(members) >= num_needed:
                return set(members), ""
            why_not = f", and of its parity group {len(members)} of the {num_needed} members needed are left"
        return set(), why_not

    def _unclean(self, step: int, generation: int, sources: Collection[str]) -> str:
        """After damage: what is known of the state since then, by whoever knows least."""
        if not any(a.damaged and a.generation >= generation for a in self.ancestors):
            return ""
        # Copies of later generations lie on the same path: what they know of it holds for this snapshot as well.
        known = min(
            max((copy.clean_through for copy in self.copies.get(node, ()) if copy.generation >= generation), default=0)
            for node in sources
        )
        return f"the state was damaged, and only steps up to {known} are known to be clean" if known < step else ""


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {ranks[0]}–{ranks[-1]}"
