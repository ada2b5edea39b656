"""Random lives of a run that keeps memory snapshots: damage to the state, and deaths while it is gone back from.

Spare nodes, parity, arenas that go with their node, coordinators that are killed; whatever happens, no generation
begins from a snapshot that holds damage that was seen. `RESILIENCE_SIM_SEED=<seed> pytest tests/sim` plays one again.
"""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

import pytest

from resilience.config import PolicyConfig
from resilience.coordinator.machine import Refused
from resilience.coordinator.machine import commands as c
from resilience.events import Action, Check, Outcome, Verdict
from resilience.testing import FakeRun, detection, evidence

SEEDS = [int(os.environ["RESILIENCE_SIM_SEED"])] if "RESILIENCE_SIM_SEED" in os.environ else list(range(40))


class Snapshotted:
    """A run whose nodes keep memory snapshots, and whose state is damaged now and then.

    Known here and to nobody in the run: which snapshots hold damage. No generation may begin from one of these.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.num_spares = self.random.choice([0, 1])
        self.run = FakeRun(
            num_nodes=3 + self.num_spares,
            num_devices=1,
            limits=PolicyConfig(max_restarts=40),
            num_spare_nodes=self.num_spares,
            lease_s=5.0,
        )
        self.bad: set[tuple[int, int]] = set()
        """(step, generation) of snapshots that hold damage."""
        self.seen: set[str] = set()
        self.pids = 1000

    @property
    def places(self) -> list[str]:
        return [name for name, _ in self.run.state.generations[-1].places]

    def start(self) -> None:
        for node in reversed(self.run.nodes):
            self.run.join_agent(node)
        self.run.join_ranks()

    def live(self) -> None:
        """Some steps with their snapshots, then damage or a death."""
        is_damaged_at = self.run.next_step + self.random.randrange(1, 4)
        for step in range(self.run.next_step, is_damaged_at):
            self.run.train(until=step)
            self.take(step, is_bad=False)
        if self.random.random() < 0.3:
            self.die(())
            return
        for step in range(is_damaged_at, is_damaged_at + self.random.randrange(3)):
            # Nobody sees it yet.
            self.run.train(until=step)
            self.take(step, is_bad=True)
        self.see(clean_step=is_damaged_at - 1)

    def take(self, step: int, *, is_bad: bool) -> None:
        key = (step, self.run.generation)
        self.bad |= {key} if is_bad else set()
        parity: dict[str, Any] = (
            {"parity_nodes": tuple(self.places), "parity_losses": 1} if self.random.random() < 0.7 else {}
        )
        for node in self.places:
            if self.random.random() < 0.9:
                self.run.holds(node, step=step, clean_through=0, **parity)
            kept = sorted(self.run.copies.get(node, ()), key=lambda copy: (copy.generation, copy.step))
            self.run.copies[node] = tuple(kept[-6:])

    def see(self, clean_step: int) -> None:
        """The damage is seen: all ranks, some, or none give up what is newer, and somebody dies or nobody does."""
        step, generation = self.run.next_step, self.run.generation
        found = detection(
            step=step, rank=self.random.randrange(3), number=step, generation=generation,
            check=Check.AT_REST, site="optimizer", layer=-1,
        )  # fmt: skip
        if self.random.random() < 0.2:
            self.run.report("rank:0", detections=(found,))
            self.seen.add("killed before the question")
            self.die(self.random.sample(self.places, self.random.randrange(4)), clean_step)
            return
        target = clean_step - self.random.choice([0, 0, 1])
        asked = self.run.ask(
            evidence(found, step=step, generation=generation, world_size=3, rewind_step=target if target > 0 else None)
        )
        if asked.action is Action.REWIND and self.random.random() < 0.3:
            self.give_up(self.places, target)
            self.run.conclude(
                dataclasses.replace(
                    asked, outcome=Outcome.SUCCEEDED, verdicts=((found.detection_id, Verdict.TRANSIENT),)
                )
            )
            self.seen.add("rewound")
            return
        self.seen.add(f"killed in a {asked.action}")
        self.die(self.random.sample(self.places, self.random.randrange(4)), target)

    def give_up(self, nodes: Any, target: int) -> None:
        generation = self.run.generation
        for node in nodes:
            held = self.run.copies.get(node, ())
            self.run.copies[node] = tuple(c for c in held if c.generation < generation or c.step <= target)
        if len(nodes) == len(self.places):
            self.bad = {(step, of) for step, of in self.bad if of < generation or step <= target}

    def die(self, gave_up: Any, target: int = 0) -> None:
        """A rank or a whole node is killed; agents ask for the next generation, perhaps of a new coordinator."""
        ended, places = self.run.generation, self.places
        self.give_up(gave_up, target)
        if self.random.random() < 0.3:
            self.run.restart_coordinator()
        lost = self.random.choice(places) if self.random.random() < 0.4 else None
        if lost is not None:
            self.run.copies[lost] = ()
            self.seen.add("a node with its arena")
            self.lose(lost)
        for node in places:
            if node != lost:
                own = [
                    self.run.exit_of(rank, -9) for rank, seat in self.run.state.seats.items() if seat.seat.node == node
                ]
                self.run.join_agent(node, last_generation=ended, exits=own)
        if self.run.generation == ended:
            self.run.pass_time(1.0)
        assert self.run.generation == ended + 1, "there is a node for each place"
        self.begin()

    def lose(self, node: str) -> None:
        """Its agent is started again elsewhere under its name, with an empty arena; or a spare one has its place."""
        if self.num_spares and self.random.random() < 0.5:
            self.run.silent.add(node)
            for _ in range(8):
                self.run.clock.advance(1.0)
                for name in self.run.nodes:
                    if name != node:
                        self.run.report(f"agent:{name}")
                self.run.submit(c.Tick())
            self.run.silent.discard(node)
            self.seen.add("a spare one")
        self.pids += 1
        self.run.join_agent(node, pid=self.pids)

    def begin(self) -> None:
        choice = self.run.state.generations[-1].restore
        assert choice is not None
        self.seen.add(str(choice.tier))
        assert (choice.step, choice.generation) not in self.bad or not choice.is_snapshot, (
            f"generation {self.run.generation} begins from damaged state: step {choice.step} of {choice.generation}"
        )
        for node in self.places:
            held = self.run.copies.get(node, ())
            # Guardians drop what the generation does not stand on.
            self.run.copies[node] = tuple(x for x in held if choice.is_snapshot and x.step <= choice.step)
        self.run.join_ranks()
        self.run.next_step = choice.step + 1


@pytest.mark.parametrize("seed", SEEDS)
def test_no_generation_begins_from_damaged_state(seed: int) -> None:
    life = Snapshotted(seed)
    try:
        life.start()
        for _ in range(12):
            life.live()
        assert life.run.recovered().state == life.run.state
    except (AssertionError, Refused) as error:
        raise AssertionError(f"RESILIENCE_SIM_SEED={seed}: {error}") from error


def test_the_seeds_meet_deaths_in_rewinds_and_all_tiers() -> None:
    seen: set[str] = set()
    for seed in range(20):
        life = Snapshotted(seed)
        life.start()
        for _ in range(12):
            life.live()
        seen |= life.seen
    wanted = {"killed in a rewind", "killed before the question", "rewound", "a spare one", "memory", "peer", "disk"}
    assert wanted <= seen, seen
