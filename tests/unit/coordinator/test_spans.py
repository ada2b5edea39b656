"""Spans: one trace a run, a span a recovery, the same after the coordinator was killed; nothing where nobody asks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from resilience.coordinator.machine import commands as c
from resilience.coordinator.spans import Spans
from resilience.coordinator.tracing import NoTracing, open_tracing
from resilience.errors import UsageError
from tests.unit.coordinator.observed import ObservedRun


def finish(run: ObservedRun, code: int = 0) -> None:
    run.submit(c.Leave(run_id=run.run_id, generation=0, member="launcher", exit_code=code, reason="told to"))


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    spans = exporter.get_finished_spans()
    found = {str((span.attributes or {}).get("resilience.decision_id", span.name)): span for span in spans}
    assert len(found) == len(spans), "nothing is told twice"
    return found


def observed(run: ObservedRun, exporter: InMemorySpanExporter) -> Spans:
    spans = Spans(exporter)
    run.observers = [spans]
    return spans


def test_a_trace_for_the_run_and_a_span_for_each_recovery() -> None:
    run, exporter = ObservedRun(), InMemorySpanExporter()
    spans = observed(run, exporter)
    run.hurt_and_restarted()
    finish(run)
    spans.close()
    found = by_name(exporter)
    assert set(found) == {"g1-s2-a0", "g1-s2-a1", "g1-exit", "run"}
    root = found.pop("run")
    assert root.parent is None
    assert (root.start_time, root.end_time) == (int(run.state.started_at * 1e9), int(run.state.finished_at * 1e9))
    assert root.attributes["resilience.exit_code"] == 0
    assert root.attributes["resilience.num_generations"] == 2
    assert root.resource.attributes["service.name"] == "resilience-coordinator"
    for name, span in found.items():
        decision = run.state.decisions[name]
        assert span.context.trace_id == root.context.trace_id
        assert span.parent.span_id == root.context.span_id
        assert span.name == f"recovery {decision.action}"
        assert span.start_time == int(decision.decided_at * 1e9) <= span.end_time
        for key in ("reason", "rule", "step", "generation", "latency_ms", "lost_s"):
            assert span.attributes[f"resilience.{key}"] == getattr(decision, key)
        assert span.attributes["resilience.outcome"] == "succeeded"
        assert span.status.status_code is StatusCode.UNSET
    replay, restart = found["g1-s2-a0"], found["g1-exit"]
    assert replay.attributes["resilience.ranks"] == (1,)
    assert replay.attributes["resilience.devices"] == ("device-1",)
    (alarm,) = replay.events
    assert alarm.name == "detection"
    assert alarm.timestamp <= replay.start_time
    assert "generation" in [event.name for event in restart.events]
    assert restart.attributes["resilience.resumed_step"] == 3


def test_a_coordinator_killed_in_the_middle_of_a_recovery_goes_on_with_its_trace() -> None:
    run, first, second = ObservedRun(), InMemorySpanExporter(), InMemorySpanExporter()
    before = observed(run, first)
    run.start()
    run.script.at(step=1, rank=0).alarms(times=1)
    run.train(until=2)
    run.join_agent("a", last_generation=1, exits=[run.exit_of(1, -9)], reason="ranks ended")
    before.close()
    run.observers = []
    run.restart_coordinator()
    after = observed(run, second)
    run.join_agent("a", last_generation=1)
    run.join_ranks()
    run.train(until=3)
    finish(run, 75)
    after.close()
    assert set(by_name(first)) == {"g1-s1-a0", "g1-s1-a1"}
    later = by_name(second)
    assert set(later) == {"g1-exit", "run"}
    assert later["g1-exit"].start_time == int(run.state.decisions["g1-exit"].decided_at * 1e9)
    assert {span.context.trace_id for span in (*by_name(first).values(), *later.values())} == {
        later["run"].context.trace_id
    }
    assert by_name(first)["g1-s1-a0"].parent.span_id == later["run"].context.span_id
    assert later["run"].status.status_code is StatusCode.ERROR
    assert later["run"].status.description == "told to"


def test_a_recovery_that_the_end_cut_off_is_told_all_the_same() -> None:
    run, exporter = ObservedRun(), InMemorySpanExporter()
    spans = observed(run, exporter)
    run.start()
    run.train(until=2)
    run.join_agent("a", last_generation=1, exits=[run.exit_of(0, 1)], reason="ranks ended")
    finish(run, 75)
    spans.close()
    assert by_name(exporter)["g1-exit"].attributes["resilience.outcome"] == "pending"


def test_two_runs_of_one_name_have_two_traces() -> None:
    traces = set()
    for start_s in (0.0, 1.0):
        run, exporter = ObservedRun(), InMemorySpanExporter()
        run.state.started_at += start_s
        spans = observed(run, exporter)
        run.start()
        finish(run)
        spans.close()
        traces.add(by_name(exporter)["run"].context.trace_id)
    assert len(traces) == 2


def test_off_imports_nothing_of_it_and_on_without_the_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = "import sys, resilience.coordinator.runtime; sys.exit(any('opentelemetry' in m for m in sys.modules))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert isinstance(open_tracing("off"), NoTracing)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"traces = 'otlp': opentelemetry.* not installed; pip install .*\[otel\]"):
        open_tracing("otlp")
