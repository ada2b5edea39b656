"""The outbox loses nothing and keeps the order, whatever is acknowledged when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilience.events import Strike
from resilience.guard.outbox import MAX_FACTS_PER_REPORT, Outbox
from resilience.rpc.v1 import coordinator_pb2 as pb


def outbox() -> Outbox:
    return Outbox(run_id="run", generation=2, member="rank:1")


def strike(number: int) -> Strike:
    return Strike(
        strike_id=f"f0-n{number}", step=1, micro_step=0, rank=0, site="gradient", layer=0, kind="inf", struck_at=0.0
    )


def test_report_says_who_sends_it() -> None:
    report = outbox().next_report(pb.Heartbeat(step=3))
    assert (report.run_id, report.generation, report.member, report.sequence) == ("run", 2, "rank:1", 1)
    assert report.heartbeat.step == 3


def test_heartbeats_alone_are_not_kept() -> None:
    box = outbox()
    box.next_report(pb.Heartbeat(step=3))
    assert box.is_empty


def test_numbers_are_sent_once_and_then_forgotten() -> None:
    box = outbox()
    box.add_badput({"replay": 1.0})
    box.add_badput({"replay": 0.5})
    box.add_skipped_step()
    box.set_deterministic(True)
    report = box.next_report()
    assert report.badput_seconds["replay"] == 1.5
    assert report.num_skipped_steps == 1
    assert report.deterministic
    again = box.next_report()
    assert not again.badput_seconds
    assert not again.HasField("deterministic")


@given(st.lists(st.one_of(st.just("put"), st.just("report"), st.integers(0, 40)), max_size=80))
def test_every_fact_is_waiting_or_kept_until_acknowledged(script: list[str | int]) -> None:
    box = outbox()
    num_put, carried, acknowledged = 0, {}, 0
    for action in script:
        if action == "put":
            box.put(strike(num_put))
            num_put += 1
        elif action == "report":
            report = box.next_report()
            carried[report.sequence] = [s.strike_id for s in report.strikes]
        else:
            assert isinstance(action, int)
            acknowledged = max(acknowledged, action)
            box.acknowledge(action)
            for sequence in [s for s in carried if s <= action]:
                del carried[sequence]
    kept = [s.strike_id for report in box.unacknowledged() for s in report.strikes]
    assert kept == [name for sequence in sorted(carried) for name in carried[sequence]]
    rest = [s.strike_id for s in box.next_report().strikes]
    assert (kept + rest)[-1:] == [f"f0-n{num_put - 1}"] or not kept + rest


def test_a_report_is_bounded() -> None:
    box = outbox()
    for number in range(MAX_FACTS_PER_REPORT + 1):
        box.put(strike(number))
    assert len(box.next_report().strikes) == MAX_FACTS_PER_REPORT
    assert [s.strike_id for s in box.next_report().strikes] == [f"f0-n{MAX_FACTS_PER_REPORT}"]
