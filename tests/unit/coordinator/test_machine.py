"""What transcripts cannot say well: bounds, refusals, merging, sampling, accounting."""

from __future__ import annotations

import dataclasses

import pytest

from resilience.config import PolicyConfig
from resilience.coordinator import queries
from resilience.coordinator.accounting import account, settled_badput_s
from resilience.coordinator.machine import RefusalKind, Refused
from resilience.coordinator.machine import commands as c
from resilience.coordinator.machine.answers import directives_for, is_deterministic, skips_in_a_row
from resilience.coordinator.machine.facts import FACTS, Note, Wish
from resilience.coordinator.machine.pulse import sample_interval_s
from resilience.events import (
    Action,
    Check,
    CheckpointFact,
    CheckpointKind,
    Decision,
    Mode,
    Origin,
    Outcome,
    Strike,
    Verdict,
)
from resilience.testing import FakeRun, detection, evidence


@pytest.fixture
def run() -> FakeRun:
    found = FakeRun()
    found.start()
    return found


def corrected(rank: int, number: int, **changes: object) -> Decision:
    known = Decision(
        decision_id="g1-s2-a0",
        generation=1,
        step=2,
        attempt=0,
        action=Action.CORRECTED,
        reason="mended",
        verdicts=((f"g1-r{rank}-{number}", Verdict.TRANSIENT),),
        evidence=(f"g1-r{rank}-{number}",),
        origin=Origin.RANK,
        outcome=Outcome.SUCCEEDED,
        latency_ms=0.4,
        decided_at=1.0,
        rule="mended",
    )
    return dataclasses.replace(known, **changes)  # type: ignore[arg-type]


def checkpoint(kind: CheckpointKind, step: int, **fields: object) -> CheckpointFact:
    known = {"directory": "d", "tag": f"s{step}", "generation": 1, "last_verified_step": step, "at": 3.0, **fields}
    return CheckpointFact(kind=kind, step=step, **known)  # type: ignore[arg-type]  # a test's own fields


def test_the_first_answer_to_an_attempt_stays(run: FakeRun) -> None:
    first = run.ask(evidence(detection(step=1), step=1))
    again = run.ask(evidence(step=1))
    assert again == first
    assert first.action is Action.REPLAY


def test_what_several_ranks_mended_in_one_step_is_one_decision(run: FakeRun) -> None:
    for rank in (0, 1):
        seen = detection(step=2, rank=rank, number=1, mended=True)
        run.report(f"rank:{rank}", detections=(seen,), decisions=(corrected(rank, 1),))
    (decision,) = run.state.decisions.values()
    assert decision.evidence == ("g1-r0-1", "g1-r1-1")
    assert {d.verdict for d in run.state.detections.values()} == {Verdict.TRANSIENT}
    assert run.state.telemetry.histogram("decision_seconds").counts == [1] + [0] * 12


def test_a_verdict_may_come_before_its_detection(run: FakeRun) -> None:
    run.conclude(corrected(0, 1))
    run.report("rank:0", detections=(detection(step=2, mended=True),))
    assert run.state.detections["g1-r0-1"].verdict is Verdict.TRANSIENT
    assert [fault.verdict for fault in run.remembered] == [Verdict.TRANSIENT]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("check", "mended", "blames"),
    [(Check.AT_REST, False, True), (Check.REPLICA, True, True), (Check.REPLICA, False, False)],
)
def test_copies_that_differ_are_held_against_no_device(run: FakeRun, check: Check, mended: bool, blames: bool) -> None:
    run.conclude(corrected(0, 1))
    run.report("rank:0", detections=(detection(step=2, site="weight", check=check, mended=mended),))
    assert run.state.detections["g1-r0-1"].verdict is Verdict.TRANSIENT
    assert bool(run.remembered) is blames


def test_facts_that_are_sent_again_are_told_once(run: FakeRun) -> None:
    strike = Strike(
        strike_id="f0-n1", step=2, micro_step=0, rank=0, site="linear.out", layer=0, kind="inf", struck_at=1.0
    )
    point = CheckpointFact(
        kind=CheckpointKind.PUBLISHED, directory="d", tag="t", step=2, generation=1, last_verified_step=2, at=3.0
    )
    for _ in range(3):
        run.report("rank:0", strikes=(strike,), checkpoints=(point,), detections=(detection(step=2),))
    assert sum(1 for kind, _, _ in run.journal if kind == "Reported") == 1
    assert (len(run.state.strikes), len(run.state.checkpoints), len(run.state.detections)) == (1, 1, 1)
    assert run.state.newest_checkpoint_step == 2


def test_increments_of_a_report_that_is_sent_again_count_once(run: FakeRun) -> None:
    beat = c.Heartbeat(step=1, step_seconds_since=(1.0,), checks=(("linear.out", 7),))
    command = c.Report(
        run_id="run", generation=1, member="rank:0", sequence=1, heartbeat=beat, num_skipped_steps=1,
        badput_seconds=(("replay", 4.0), ("an invented cause", 9.0), ("init", 9.0)),
    )  # fmt: skip
    run.submit(command)
    run.restart_coordinator()
    run.submit(command)
    run.pass_time(1.25)
    telemetry = run.state.telemetry
    assert (telemetry.num_steps_taken, telemetry.num_skipped_steps, telemetry.checks) == (1, 1, {"linear.out": 7})
    assert telemetry.badput_s == {"replay": 2.0}, "half of what one of two ranks waited; no other cause"


def test_a_detection_that_comes_first_with_a_question_has_its_line_and_only_one(run: FakeRun) -> None:
    alarm = detection(step=1)
    run.ask(evidence(alarm, step=1))
    run.report("rank:0", detections=(alarm,))
    lines = [line for line in run.state.story if line.kind in ("detection", "decision")]
    assert [line.kind for line in lines] == ["detection", "decision"]
    assert lines[0].about["detection_id"] == alarm.detection_id


def test_while_a_run_resumes_its_step_is_the_one_that_it_resumes_after(run: FakeRun) -> None:
    run.train(until=6)
    run.holds("a", step=4)
    run.restart(from_step=4, exits=[run.exit_of(1, -9)])
    for state, step in (("starting", 0), ("fast_forwarding", 2), ("training", 4)):
        run.beat(step=step, state=state)
        run.pass_time(1.25)
        assert (run.state.newest_step, queries.newest_step(run.machine)) == (4, 4), state
    run.beat(step=5)
    run.pass_time(1.25)
    assert run.state.newest_step == 5


def test_while_a_run_resumes_from_a_checkpoint_its_step_is_that_of_the_checkpoint(run: FakeRun) -> None:
    run.train(until=6)
    run.restart(from_step=4, exits=[run.exit_of(1, -9)])
    assert run.state.newest_step == 0, "no script has said yet where it begins"
    run.report("rank:0", checkpoints=(checkpoint(CheckpointKind.LOADED, 4),))
    assert run.state.newest_step == 4


@pytest.mark.parametrize("kind", [CheckpointKind.DOUBTED, CheckpointKind.REFUSED])
def test_a_checkpoint_that_is_not_trusted_any_more_is_none_to_go_on_from(run: FakeRun, kind: CheckpointKind) -> None:
    run.report("rank:0", checkpoints=(checkpoint(CheckpointKind.PUBLISHED, 2), checkpoint(CheckpointKind.PUBLISHED, 4)))
    assert run.state.newest_checkpoint_step == 4
    run.report("rank:0", checkpoints=(checkpoint(kind, 4, reason="damaged"),))
    assert run.state.newest_checkpoint_step == 2
    assert run.state.story[-1].text == f"checkpoint s4 in d {kind}: damaged"
    run.report("rank:0", checkpoints=(checkpoint(CheckpointKind.PUBLISHED, 4, at=5.0),))
    assert run.state.newest_checkpoint_step == 4, "saved once more"


def test_what_one_generation_measured_the_next_on_the_same_nodes_need_not(run: FakeRun) -> None:
    assert not is_deterministic(run.state)
    run.report("rank:0", deterministic=True)
    run.restart(from_step=0, exits=[run.exit_of(1, -9)])
    assert run.generation == 2
    assert is_deterministic(run.state)
    run.state.generations[0].places = (("elsewhere", (0, 1)),)
    assert not is_deterministic(run.state), "another machine is measured for itself"
    run.state.generations[0].places = run.state.generations[1].places
    run.report("rank:0", notes=(Note(kind="replay_off", message="not faithful", step=3, at=1.0),))
    assert not is_deterministic(run.state), "a replay that differs from the original must be found again"


def test_checks_add_up_over_generations(run: FakeRun) -> None:
    run.report("rank:0", heartbeat=c.Heartbeat(step=1, checks=(("linear.out", 7),)))
    run.pass_time(1.25)
    run.restart(from_step=0, exits=[run.exit_of(0, -9)])
    run.report("rank:0", heartbeat=c.Heartbeat(step=1, checks=(("linear.out", 3),)))
    run.pass_time(1.25)
    assert run.state.telemetry.checks == {"linear.out": 10}


@pytest.mark.parametrize(
    ("command", "kind", "text"),
    [
        (c.Decide(evidence=evidence(step=1, run_id="other")), RefusalKind.STALE, "serves run 'run', not 'other'"),
        (c.Decide(evidence=evidence(step=1, generation=2)), RefusalKind.STALE, "which has not begun"),
        (c.Decide(evidence=evidence(step=1, world_size=5)), RefusalKind.INVALID, "of 5 ranks"),
        (c.Decide(evidence=evidence(detection(step=1, rank=9), step=1)), RefusalKind.UNKNOWN, "rank 9 is not one"),
        (c.Report(run_id="run", generation=1, member="rank:x", sequence=1), RefusalKind.UNKNOWN, "rank:x is not"),
        (c.Report(run_id="run", generation=1, member="launcher", sequence=1), RefusalKind.UNKNOWN, "join first"),
        (c.Report(run_id="run", generation=2, member="agent:a", sequence=1), RefusalKind.STALE, "has not begun"),
        (
            c.JoinRank(run_id="run", generation=1, rank=0, world_size=3, node="a"),
            RefusalKind.INVALID,
            "does not match its place",
        ),
        (c.SetCordon(target="nobody", cordoned=True), RefusalKind.UNKNOWN, "neither a device nor a node"),
    ],
)
def test_what_is_refused_changes_nothing(run: FakeRun, command: c.Command, kind: RefusalKind, text: str) -> None:
    before = len(run.journal)
    with pytest.raises(Refused, match=text) as refusal:
        run.submit(command)
    assert refusal.value.kind is kind
    assert len(run.journal) == before


def test_agents_that_do_not_fit_are_refused() -> None:
    run = FakeRun(num_nodes=2)
    run.join_agent("a")
    own = run.agent("b")
    for agent, text in [
        (dataclasses.replace(own, num_nodes=3), "started for 3 nodes, this run has 2"),
        (dataclasses.replace(own, node_rank=0), "node rank 0 of b is taken by a"),
        (dataclasses.replace(own, devices=()), "offers 0 devices"),
    ]:
        with pytest.raises(Refused, match=text):
            run.submit(c.JoinAgent(run_id="run", agent=agent))
    with pytest.raises(Refused, match="comes from generation 4"):
        run.submit(c.JoinAgent(run_id="run", agent=own, last_generation=4))
    run.join_agent("b")
    with pytest.raises(Refused, match="node c is not one of this run's: a, b"):
        run.submit(c.JoinAgent(run_id="run", agent=dataclasses.replace(own, node="c", node_rank=2)))


def test_ending_generations_takes_no_decisions(run: FakeRun) -> None:
    run.report("agent:a", exits=(run.exit_of(1, -9),))
    with pytest.raises(Refused, match="generation 1 has ended: rank 1 on a ended with signal SIGKILL"):
        run.ask(evidence(detection(step=1), step=1))


def test_neighbours_that_fall_with_the_first_one_join_its_detection(run: FakeRun) -> None:
    first, second = run.exit_of(1, -9), run.exit_of(0, 1, message="connection reset")
    run.report("agent:a", exits=(second, first))
    found = run.state.detections
    assert found["g1-r1-exit"].caused_by is None
    assert (found["g1-r0-exit"].caused_by, found["g1-r0-exit"].verdict) == ("g1-r1-exit", Verdict.PROPAGATED)
    assert run.state.decisions["g1-exit"].evidence == ("g1-r1-exit", "g1-r0-exit")


def test_processes_that_were_ended_by_the_agent_are_no_detections(run: FakeRun) -> None:
    run.report("agent:a", exits=(run.exit_of(1, -9), run.exit_of(0, -15)))
    assert list(run.state.detections) == ["g1-r1-exit"]


def test_mode_off_decides_nothing() -> None:
    run = FakeRun(mode=Mode.OFF)
    run.start()
    with pytest.raises(Refused, match="mode off"):
        run.ask(evidence(detection(step=1), step=1))


def test_skips_in_a_row_reach_the_next_generation(run: FakeRun) -> None:
    from resilience.events import Check, DetectionKind

    run.script.at(step=2).alarms(times=-1, check=Check.SCREEN, kind=DetectionKind.NAN, site="gradient", layer=-1)
    run.train(until=1)
    run.step(deterministic=True, consecutive_skips=3)
    assert skips_in_a_row(run.state) == 4
    run.train(until=4)
    run.pass_time(1.25)
    assert skips_in_a_row(run.state) == 0


def test_a_restart_is_settled_with_what_it_cost(run: FakeRun) -> None:
    run.train(until=6)
    run.pass_time(1.25)
    failed_at = run.clock.wall()
    run.report("agent:a", exits=(run.exit_of(1, -9),))
    run.clock.advance(4.0)
    run.restart(from_step=4)
    run.train(until=7)
    run.pass_time(1.25)
    restart = run.state.decisions["g1-exit"]
    assert restart.outcome is Outcome.SUCCEEDED
    assert restart.lost_s == pytest.approx(2.0), "steps 5 and 6 are taken again"
    assert restart.latency_ms == pytest.approx(5000.0), "4 s until the agents asked, 1 s for the first step"
    books = account(run.state, run.clock.wall())
    assert books.badput_s["lost_work"] == pytest.approx(2.0)
    assert books.badput_s["recovery"] == pytest.approx(4.0)
    assert books.kept_s == pytest.approx(7.0)
    assert books.kept_s + sum(books.badput_s.values()) == pytest.approx(run.clock.wall() - run.state.started_at)
    assert settled_badput_s(run.state)["recovery"] == pytest.approx(4.0)
    assert run.state.failures[0].at == failed_at


def test_steps_that_no_heartbeat_told_of_are_lost_work_too(run: FakeRun) -> None:
    run.train(until=6)
    run.pass_time(1.25)
    died_at = dataclasses.replace(run.exit_of(1, -9), step=9)
    run.restart(from_step=4, exits=[died_at])
    assert run.state.failures[0].step == 9, "what the agent read from the dead rank is exact"
    assert run.state.detections["g1-r1-exit"].step == 9
    run.train(until=7)
    assert run.state.decisions["g1-exit"].lost_s == pytest.approx(4.0), "5 and 6 are known, 7 and 8 were not told of"


def test_badput_that_goes_on_is_not_in_counters_yet() -> None:
    run = FakeRun()
    run.pass_time(5.0)
    assert account(run.state, run.clock.wall()).badput_s["init"] == pytest.approx(5.0)
    assert settled_badput_s(run.state)["init"] == 0


def test_the_story_of_a_long_run_stays_bounded() -> None:
    from resilience.coordinator.machine.state import MAX_STORY, State

    state = State()
    for number in range(MAX_STORY + 5):
        state.tell(1.0, "note", str(number))
    assert len(state.story) <= MAX_STORY
    assert state.story[-1].sequence == MAX_STORY + 5


def test_large_runs_are_sampled_less_often() -> None:
    assert sample_interval_s(2) == 1.0
    assert sample_interval_s(2048) == 32.0


def test_every_fact_is_named_once() -> None:
    assert len(FACTS) == len({cls.__name__ for cls in FACTS.values()})


def test_queries_see_heartbeats_before_they_are_sampled(run: FakeRun) -> None:
    run.beat(step=9)
    now = run.clock.wall()
    found = queries.get_run(run.machine, now=now)
    assert (found.step, found.state, found.restarts_left, found.loss) == (9, "training", 3, 1.0)
    ranks = queries.list_ranks(run.machine, now=now + 20).ranks
    assert [(rank.rank, rank.step, rank.state) for rank in ranks] == [(0, 9, "lost"), (1, 9, "lost")]


def test_an_explanation_names_row_evidence_and_what_was_ruled_out(run: FakeRun) -> None:
    run.script.at(step=1, rank=1).alarms(times=1)
    run.train(until=1, replay_available=False, replay_reason="pipeline parallelism")
    explanation = queries.explain_decision(run.state, "g1-s1-a0")
    assert explanation is not None
    assert explanation.rule == "restart"
    assert "new generation from the newest snapshot or checkpoint that can be trusted" in explanation.rule_text
    assert [d.detection_id for d in explanation.detections] == ["g1-r1-1"]
    assert any("replay: off, pipeline parallelism" in text for text in explanation.considered)
    assert queries.explain_decision(run.state, "g9-s1-a0") is None


def test_a_restart_with_a_spare_node_is_not_explained_by_what_there_is_without_one() -> None:
    run = FakeRun(num_nodes=3, num_devices=1, num_spare_nodes=1, limits=PolicyConfig(max_replays_per_step=1))
    for node in reversed(run.nodes):
        run.join_agent(node)
    run.join_ranks()
    run.script.at(step=1, rank=1).alarms(times=-1)
    run.train(until=1)
    explanation = queries.explain_decision(run.state, "g1-s1-a1")
    assert explanation is not None
    assert explanation.rule == "persistent-spare"
    assert not any(text.startswith("restart:") for text in explanation.considered)


def test_answers_fit_into_a_message(run: FakeRun) -> None:
    from resilience.rpc.codec import MAX_MESSAGE_BYTES

    for number in range(8000):
        found = detection(step=1, number=number, param="p" * 150)
        run.state.detections[found.detection_id] = found
    answer = queries.list_detections(run.state)
    assert answer.ByteSize() < MAX_MESSAGE_BYTES
    assert answer.detections[-1].detection_id == "g1-r0-7999", "the newest stay"
    assert len(queries.list_detections(run.state, limit=3).detections) == 3


def test_nothing_begins_before_an_agent_has_come() -> None:
    run = FakeRun()
    run.pass_time(2.0)
    assert run.machine.state.generation == 0


def test_what_a_person_asks_of_the_ranks_is_told_to_rank_0_for_a_minute(run: FakeRun) -> None:
    run.train(until=2)
    run.submit(c.AskRanks(wish=Wish.REWIND, reason="suspicious", step=1))
    run.submit(c.AskRanks(wish=Wish.SNAPSHOT))

    def told(member: str) -> list[tuple[str, int | None]]:
        found = directives_for(run.machine.state, member, 1, run.clock.wall())
        return [(directive.directive_id, directive.step) for directive in found]

    assert told("rank:0") == [("rewind-1", 1), ("snapshot-1", None)]
    assert told("rank:1") == told("agent:node-0") == []
    run.submit(c.AskRanks(wish=Wish.REWIND, reason="again"))
    assert told("rank:0") == [("rewind-2", None), ("snapshot-1", None)]
    run.clock.advance(61.0)
    assert told("rank:0") == []


def test_nobody_is_asked_for_a_rewind_where_nothing_is_enforced() -> None:
    run = FakeRun(mode=Mode.SHADOW)
    run.start()
    with pytest.raises(Refused, match="shadow"):
        run.submit(c.AskRanks(wish=Wish.REWIND))
