"""Random lives of a run, from a seed: kills, alarms, lost and doubled messages, coordinators that die at any moment.

After every event the invariants must hold, and the journal must give back the same state. A failure prints its seed;
`RESILIENCE_SIM_SEED=<seed> pytest tests/sim` plays it again.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from resilience.config import PolicyConfig
from resilience.coordinator.accounting import account, settled_badput_s
from resilience.coordinator.machine import Refused
from resilience.coordinator.machine import commands as c
from resilience.coordinator.scrape import samples
from resilience.events import Action, Check, DetectionKind, Outcome, Verdict
from resilience.metrics import METRICS, Kind
from resilience.testing import Delivery, FakeLink, FakeRun

SEEDS = [int(os.environ["RESILIENCE_SIM_SEED"])] if "RESILIENCE_SIM_SEED" in os.environ else list(range(60))
NUM_EVENTS = 60
COUNTERS = [metric.name for metric in METRICS if metric.kind is Kind.COUNTER]


class Life:
    """One run with a run of bad luck."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        deliveries = [Delivery.ARRIVES] * 6 + [Delivery.REQUEST_LOST, Delivery.REPLY_LOST, Delivery.TWICE]
        self.run = FakeRun(
            num_nodes=self.random.choice([1, 2, 3]),
            num_devices=self.random.choice([1, 2]),
            limits=PolicyConfig(max_restarts=self.random.choice([0, 2, 5]), restart_window_s=500.0),
            link=FakeLink(lambda: self.random.choice(deliveries)),
        )
        self.newest_generation = 0
        self.answers: dict[str, tuple[Action, str]] = {}
        self.counters: dict[tuple[str, tuple[str, ...]], float] = {}
        self.known: dict[str, Any] = {"deterministic": self.random.choice([None, True, False])}

    def happen(self) -> None:
        """One random event."""
        events = [
            (10, self.train),
            (3, self.alarm),
            (2, self.kill_rank),
            (2, self.kill_coordinator),
            (2, self.speak_from_the_past),
            (1, self.pass_time),
            (1, self.cordon),
        ]
        weights, choices = zip(*events, strict=True)
        self.random.choices(choices, weights)[0]()

    def train(self) -> None:
        if self.run.state.generation_ended:
            self.begin_again()
            return
        self.run.train(until=self.run.next_step + self.random.randrange(3), **self.known)

    def alarm(self) -> None:
        rank = self.random.randrange(max(1, len(self.run.state.seats)))
        check, kind = self.random.choice(
            [
                (Check.CHECKSUM, DetectionKind.MISMATCH),
                (Check.INVARIANT, DetectionKind.INF),
                (Check.SCREEN, DetectionKind.NAN),
                (Check.NORM, DetectionKind.NORM_SPIKE),
            ]
        )
        self.run.script.at(step=self.run.next_step + self.random.randrange(2), rank=rank).alarms(
            times=self.random.choice([1, 1, 2, -1]),
            check=check,
            kind=kind,
            device=f"device-{rank}",
            mended=self.random.random() < 0.2,
        )

    def kill_rank(self) -> None:
        if self.run.state.generation_ended:
            return
        victims = self.random.sample(sorted(self.run.state.seats), 1)
        code = self.random.choice([-9, -11, 1, 1, 75 if self.random.random() < 0.1 else 1])
        exits = [self.run.exit_of(rank, code) for rank in victims]
        if self.random.random() < 0.5:
            self.run.report(f"agent:{exits[0].node}", exits=tuple(exits))
        self.begin_again(exits)

    def begin_again(self, exits: Any = ()) -> None:
        self.run.restart(from_step=self.random.randrange(self.run.next_step), exits=exits)

    def kill_coordinator(self) -> None:
        before = self.run.state
        self.run.machine = self.run.recovered()
        assert self.run.state == before, "the journal tells the same story"
        self.run.submit(c.Recover(pid=self.random.randrange(1000)))

    def speak_from_the_past(self) -> None:
        generation = self.run.generation - 1
        if generation < 1:
            return
        with pytest.raises(Refused, match="has ended"):
            self.run.join_rank(0, generation=generation)
        with pytest.raises(Refused, match="has ended"):
            self.run.report("rank:0", generation=generation, heartbeat=c.Heartbeat(step=99))

    def pass_time(self) -> None:
        self.run.pass_time(self.random.choice([0.5, 3.0, 20.0]))

    def cordon(self) -> None:
        if self.random.random() < 0.05:
            self.run.submit(c.SetCordon(target="device-0", cordoned=True, reason="by chance"))

    def check(self) -> None:
        """What must hold after every event."""
        state = self.run.state
        assert self.newest_generation <= state.generation <= self.newest_generation + 1, "generations grow one by one"
        self.newest_generation = state.generation
        assert len(state.generations) == state.generation
        for decision in state.decisions.values():
            assert decision.reason
            same = self.answers.setdefault(decision.decision_id, (decision.action, decision.reason))
            assert same == (decision.action, decision.reason), "the first answer to an attempt stays"
        replays = [d for d in state.decisions.values() if d.action is Action.REPLAY]
        assert all(d.attempt < state.limits.max_replays_per_step for d in replays), "replays end"
        assert len(state.failures) <= state.generation, "a generation fails once"
        for found in state.detections.values():
            assert found.verdict is Verdict.PROPAGATED or found.caused_by is None or found.verdict is Verdict.PENDING
            pending_step = found.verdict is Verdict.PENDING and found.check is not Check.PROCESS and not found.mended
            later = [d for d in replays if (d.generation, d.step) == (found.generation, found.step)]
            if pending_step and any(d.outcome is Outcome.SUCCEEDED for d in later):
                raise AssertionError(f"{found.detection_id} was cleared by a replay and has no verdict")
        self.check_numbers()

    def check_numbers(self) -> None:
        now = self.run.clock.wall()
        books = account(self.run.state, now)
        assert 0.0 <= books.goodput_ratio <= 1.0
        assert all(seconds >= 0 for seconds in settled_badput_s(self.run.state).values())
        found = samples(self.run.machine, now)
        for name in COUNTERS:
            for labels, value in found[name].items():
                before = self.counters.get((name, labels), 0)
                assert value >= before - 1e-9, f"{name}{labels} fell from {before} to {value}"
                self.counters[name, labels] = value


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_life(seed: int) -> None:
    life = Life(seed)
    try:
        life.run.start()
        life.check()
        for _ in range(NUM_EVENTS):
            life.happen()
            life.check()
            if life.run.state.ending is not None:
                break
        life.run.submit(c.Close(reason="the end of the test"))
        life.check()
        assert life.run.recovered().state == life.run.state
    except (AssertionError, Refused) as error:
        raise AssertionError(f"RESILIENCE_SIM_SEED={seed}: {error}") from error


def test_the_seeds_meet_what_they_should() -> None:
    """A simulation that never restarts, replays or stops would prove nothing."""
    seen: set[str] = set()
    for seed in range(60):
        life = Life(seed)
        life.run.start()
        for _ in range(NUM_EVENTS):
            life.happen()
            if life.run.state.ending is not None:
                break
        state = life.run.state
        seen |= {f"{d.action}:{d.rule}" for d in state.decisions.values()}
        seen |= {str(d.verdict) for d in state.detections.values()}
        seen |= {f"restart {d.outcome}" for d in state.decisions.values() if d.action is Action.RESTART}
    assert {"replay:replay", "stop:persistent", "restart:restart-processes", "stop:budget-used-up"} <= seen, seen
    assert {"transient", "persistent", "deterministic", "false_positive", "pending"} <= seen, seen
    assert {"restart succeeded", "restart failed"} <= seen, seen
