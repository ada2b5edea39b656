"""The memory tier in report, metrics and answers: told by events, kept by the journal, gone with the snapshots."""

from __future__ import annotations

import dataclasses
from typing import Any

from resilience.coordinator import queries
from resilience.coordinator.accounting import account
from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.answers import directives_for
from resilience.coordinator.machine.facts import Wish
from resilience.coordinator.memory_tier import num_restores
from resilience.coordinator.report import as_report
from resilience.events import (
    Action,
    CheckpointFact,
    CheckpointKind,
    OrderAnswer,
    Outcome,
    SnapshotFact,
    SnapshotKind,
)
from resilience.rpc.v1 import operator_pb2 as op
from resilience.testing import FakeRun, evidence

TAKEN, PROTECTED, FLUSHED = SnapshotKind.TAKEN, SnapshotKind.PROTECTED, SnapshotKind.FLUSHED


def running(**options: Any) -> FakeRun:
    run = FakeRun(num_nodes=2, num_devices=1, **options)
    run.start()
    return run


def tell(run: FakeRun, step: int, *kinds: SnapshotKind, nodes: str = "ab", clean: int = 0) -> None:
    """Guardians tell of their parts of a snapshot of this generation."""
    for node in nodes:
        facts = tuple(
            SnapshotFact(
                kind=kind, step=step, generation=run.generation, node=node, num_bytes=10, clean_through=clean,
                redundancy=int(kind is PROTECTED), seconds=0.5, at=run.clock.wall(),
            )
            for kind in kinds
        )  # fmt: skip
        run.report(f"agent:{node}", snapshots=facts)


def copied(run: FakeRun, *seconds: float) -> None:
    """All ranks tell of copies that they made."""
    for rank in run.state.seats:
        beat = c.Heartbeat(step=run.next_step - 1, snapshot_seconds_since=seconds, snapshot_interval_steps=2)
        run.report(f"rank:{rank}", heartbeat=beat, badput_seconds=(("snapshot", sum(seconds)),))
    run.pass_time(1.25)


def summary(run: FakeRun) -> dict[str, Any]:
    found = as_report(run.state, run.clock.wall())["snapshots"]
    assert isinstance(found, dict)
    return found


def test_the_report_sums_up_what_ranks_and_guardians_told() -> None:
    run = running()
    run.train(until=6)
    copied(run, 0.2, 0.3)
    tell(run, 2, TAKEN, PROTECTED, FLUSHED, clean=1)
    tell(run, 4, TAKEN, PROTECTED, clean=3)
    tell(run, 6, TAKEN, clean=4)
    tell(run, 8, TAKEN, nodes="a", clean=4)
    run.pass_time(1.25)
    found = summary(run)
    assert (found["num_taken"], found["interval_steps"], found["blocked_s"]) == (2, 2, 0.5)
    assert found["newest_step"] == {"disk": 2, "memory": 6, "peer": 4}, "one that a node lacks is not there"
    assert found["newest_clean_step"] == 4
    assert (found["rewinds"], found["restores"], found["num_steps_lost"]) == ([], [], 0)
    books = account(run.state, run.clock.wall())
    assert books.badput_s["snapshot"] == 0.5
    assert abs(books.kept_s + sum(books.badput_s.values()) - books.lifetime_s) < 1e-6
    run.restart_coordinator()
    assert summary(run) == found, "it is in the journal"


def test_what_a_restart_goes_back_behind_is_not_there_any_more() -> None:
    run = running()
    run.train(until=6)
    for step in (2, 4, 6):
        tell(run, step, TAKEN, PROTECTED, clean=step)
    run.pass_time(1.25)
    assert summary(run)["newest_clean_step"] == 6
    for node in "ab":
        run.holds(node, step=4, parity_nodes=("a", "b"), parity_losses=1)
    run.restart(from_step=4, exits=[run.exit_of(1, -9)])
    run.pass_time(1.25)
    assert run.generation == 2
    assert summary(run)["newest_step"] == {"memory": 4, "peer": 4}
    assert summary(run)["newest_clean_step"] == 4
    assert [each.step for each in queries.list_snapshots(run.machine).snapshots] == [4, 2]
    run.train(until=7)
    run.pass_time(1.25)
    assert summary(run)["num_steps_lost"] == 2, "steps 5 and 6 were taken twice"
    run.copies.clear()
    run.restart(from_step=0, exits=[run.exit_of(1, -9)])
    assert run.generation == 3
    assert summary(run)["newest_step"] == {}
    assert summary(run)["newest_clean_step"] is None
    assert not queries.list_snapshots(run.machine).snapshots


def loaded(run: FakeRun, step: int) -> SnapshotFact:
    return SnapshotFact(
        kind=SnapshotKind.LOADED, step=step, generation=1, node="", seconds=0.25, at=run.clock.wall()
    )  # fmt: skip


def test_a_restore_counts_for_the_tier_that_its_files_came_from() -> None:
    run = running()
    run.train(until=4)
    run.holds("a", step=4, parity_nodes=("a", "b"), parity_losses=1)
    run.holds("b", step=4)
    run.restart(from_step=4, exits=[run.exit_of(1, -9)])
    run.report("rank:0", snapshots=(loaded(run, 4),))
    run.report("rank:0", snapshots=(loaded(run, 4),))  # sent again
    run.train(until=5)
    run.copies["b"] = ()
    run.restart(from_step=4, exits=[run.exit_of(1, -9)])
    run.report("rank:0", snapshots=(loaded(run, 4),))
    point = CheckpointFact(
        kind=CheckpointKind.LOADED, directory="d", tag="t", step=3, generation=1, last_verified_step=3, seconds=2.0,
        at=run.clock.wall() + 1,
    )  # fmt: skip
    for rank in (0, 1):
        run.report(f"rank:{rank}", checkpoints=(point,))
    refused = dataclasses.replace(loaded(run, 4), kind=SnapshotKind.REFUSED, node="b", reason="torn")
    run.report("agent:b", snapshots=(refused,))
    assert num_restores(run.state) == {
        ("memory", "succeeded"): 1,
        ("peer", "succeeded"): 1,
        ("disk", "succeeded"): 1,
        ("peer", "refused"): 1,
    }
    assert [(each["tier"], each["step"], each["seconds"]) for each in summary(run)["restores"]] == [
        ("memory", 4, 0.25),
        ("peer", 4, 0.25),
        ("disk", 3, 2.0),
    ]


def test_a_checkpoint_that_is_loaded_in_two_generations_was_restored_twice() -> None:
    run = running()
    for _ in range(2):
        point = CheckpointFact(
            kind=CheckpointKind.LOADED, directory="d", tag="t", step=3, generation=1, last_verified_step=3,
            at=run.clock.wall(),
        )  # fmt: skip
        run.report("rank:0", checkpoints=(point,))
        run.train(until=run.next_step)
        run.restart(from_step=0, exits=[run.exit_of(1, -9)])
    assert num_restores(run.state) == {("disk", "succeeded"): 2}


def test_rewinds_are_reported_with_what_they_cost() -> None:
    run = running()
    run.train(until=5)
    asked = run.ask(dataclasses.replace(evidence(step=6), rewind_step=3))
    run.conclude(dataclasses.replace(asked, action=Action.REWIND, outcome=Outcome.SUCCEEDED, lost_s=1.5))
    (found,) = summary(run)["rewinds"]
    assert (found["step"], found["to_step"], found["num_steps_again"], found["seconds"]) == (6, 3, 2, 1.5)
    assert (found["tier"], found["outcome"]) == ("memory", "succeeded")
    local = dataclasses.replace(asked, decision_id="g1-s9-a0", step=9, action=Action.REWIND, decided_at=2e9)
    run.conclude(local)
    assert summary(run)["rewinds"][1]["to_step"] is None, "what the coordinator was not asked about it does not know"


def test_what_a_rewind_gave_up_is_not_there_until_it_is_taken_again() -> None:
    run = running()
    run.train(until=6)
    for step in (2, 4, 6):
        tell(run, step, TAKEN, clean=2)
    run.pass_time(1.25)
    asked = run.ask(dataclasses.replace(evidence(step=7), rewind_step=3))
    back = dataclasses.replace(asked, action=Action.REWIND, decided_at=run.clock.wall())
    run.conclude(dataclasses.replace(back, outcome=Outcome.FAILED))
    assert [each.step for each in queries.list_snapshots(run.machine).snapshots] == [6, 4, 2], "nothing was given up"
    run.conclude(dataclasses.replace(back, decision_id="g1-s7-w1-a0", outcome=Outcome.SUCCEEDED))
    assert [each.step for each in queries.list_snapshots(run.machine).snapshots] == [6, 4, 2], "to an unknown step"
    run.state.evidence["g1-s7-w1-a0"] = run.state.evidence[asked.decision_id]
    assert [each.step for each in queries.list_snapshots(run.machine).snapshots] == [2]
    run.train(until=7)
    run.pass_time(1.25)
    assert summary(run)["newest_step"] == {"memory": 2}
    tell(run, 4, TAKEN, clean=2)
    assert [each.step for each in queries.list_snapshots(run.machine).snapshots] == [4, 2]


def test_parity_of_an_older_snapshot_went_with_the_next_one() -> None:
    run = running()
    tell(run, 2, TAKEN, PROTECTED)
    tell(run, 4, TAKEN, PROTECTED)
    tell(run, 6, TAKEN)
    shown = [(each.step, each.tier, each.redundancy) for each in queries.list_snapshots(run.machine).snapshots]
    assert shown == [(6, "memory", 0), (4, "peer", 1), (2, "memory", 0)]


# ------ orders


def ask(run: FakeRun) -> None:
    run.submit(c.AskRanks(wish=Wish.SNAPSHOT, reason="before maintenance"))


def orders(run: FakeRun) -> list[str]:
    found = directives_for(run.state, "rank:0", run.generation, run.clock.wall())
    return [directive.directive_id for directive in found]


def answer(run: FakeRun, generation: int = 1) -> tuple[int, int, str] | None:
    found = queries.snapshot_answer(run.state, generation)
    return None if found is None else (found.answer, found.step, found.reason)


def test_an_order_is_told_until_it_is_answered() -> None:
    run = running()
    ask(run)
    assert orders(run) == ["snapshot-1"]
    assert answer(run) is None
    run.report("rank:0", answers=(OrderAnswer(directive_id="snapshot-1", step=4, at=1.0),))
    assert orders(run) == []
    assert answer(run) == (op.TakeSnapshotNowResponse.TAKEN, 4, "")
    run.restart_coordinator()
    assert answer(run) == (op.TakeSnapshotNowResponse.TAKEN, 4, "")
    assert any("order snapshot-1 carried out after step 4" in line.text for line in run.state.story)


def test_only_the_first_answer_to_the_newest_order_counts() -> None:
    run = running()
    run.report("rank:0", answers=(OrderAnswer(directive_id="snapshot-1", step=1),))
    assert Wish.SNAPSHOT not in run.state.asked, "nobody has asked"
    ask(run)
    ask(run)
    run.report("rank:0", answers=(OrderAnswer(directive_id="snapshot-1", step=2),))
    assert answer(run) is None
    run.report("rank:0", answers=(OrderAnswer(directive_id="snapshot-2", problem="no room"),))
    run.report("rank:0", answers=(OrderAnswer(directive_id="snapshot-2", step=3),))
    assert answer(run) == (op.TakeSnapshotNowResponse.NOT_TAKEN, 0, "no room")


def test_ranks_that_end_before_they_answer_are_an_answer() -> None:
    run = running()
    run.train(until=2)
    ask(run)
    run.restart(from_step=0, exits=[run.exit_of(1, -9)])
    found = answer(run)
    assert found is not None
    assert found[0] == op.TakeSnapshotNowResponse.NOT_TAKEN
    assert "generation 1 ended" in found[2]
