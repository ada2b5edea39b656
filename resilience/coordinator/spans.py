"""OpenTelemetry: a trace for each run, and in it a span for each recovery, from its decision to what it restored.

A span is made when it has ended, from what the state remembers of its beginning, and its identity follows from the run
and the decision: so a coordinator that was killed in the middle of a recovery goes on with the same trace, and nothing
is told twice. Needs the extra `otel`; only `tracing` imports this file.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping

from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import Status, StatusCode

from resilience.coordinator.machine.facts import Concluded, Fact, Finished, RestartSettled
from resilience.coordinator.machine.state import State
from resilience.events import Action, Decision, Detection, Outcome

__all__ = ["Spans"]

_CLOSE_S = 5.0
_PREFIX = "resilience."
_NEW_PROCESSES = frozenset({Action.RESTART, Action.RESTORE, Action.QUARANTINE})
"""What is over only when training goes on in the next generation."""

_Value = str | int | float | tuple[str, ...] | tuple[int, ...]


class _Ids(IdGenerator):
    """Gives what was set last."""

    next_trace = 0
    next_span = 0

    def generate_trace_id(self) -> int:
        return self.next_trace

    def generate_span_id(self) -> int:
        return self.next_span


class Spans:
    """Makes spans of what happened, for one exporter."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._ids = _Ids()
        # What is known of the process (OTEL_RESOURCE_ATTRIBUTES) is added by the library.
        resource = Resource.create({"service.name": "resilience-coordinator"})
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("resilience")

    def note(self, fact: Fact, at: float, state: State) -> None:
        """Make the span of what `fact` ends, if it ends something."""
        if isinstance(fact, RestartSettled):
            self._recovery(state, state.decisions[fact.decision_id], at, {"resumed_step": fact.resumed_step})
        elif isinstance(fact, Concluded):
            decision = state.decisions[fact.decision.decision_id]
            if decision.outcome is not Outcome.PENDING and decision.action not in _NEW_PROCESSES:
                self._recovery(state, decision, at, {})
        elif isinstance(fact, Finished):
            for decision in state.decisions.values():
                if decision.outcome is Outcome.PENDING:
                    self._recovery(state, decision, at, {})
            self._run(state, fact, at)

    def close(self) -> None:
        """Deliver what is left, for a few seconds at most."""
        # The exporter waits longer than that for a collector that is away, and cannot be told not to.
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(_CLOSE_S)

    def _recovery(self, state: State, decision: Decision, at: float, more: dict[str, int]) -> None:
        seen = [state.detections[name] for name in decision.evidence if name in state.detections]
        self._ids.next_trace, self._ids.next_span = _trace_id(state), _span_id(state, decision.decision_id)
        root = trace.SpanContext(_trace_id(state), _span_id(state, "run"), False, trace.TraceFlags(1))
        about: dict[str, _Value] = {"run_id": state.run_id, **_of_decision(decision), **_of_detections(seen), **more}
        span = self._tracer.start_span(
            f"recovery {decision.action}",
            context=trace.set_span_in_context(trace.NonRecordingSpan(root)),
            start_time=_ns(decision.decided_at),
            attributes=_named(about),
        )
        for detection in seen:
            told: dict[str, _Value] = {"detection_id": detection.detection_id, "rank": detection.rank}
            told |= {"site": detection.site, "kind": str(detection.kind)}
            span.add_event("detection", _named(told), _ns(detection.detected_at))
        for record in state.generations:
            if decision.decided_at <= record.began_at <= at:
                span.add_event("generation", _named({"generation": record.generation}), _ns(record.began_at))
        if decision.outcome is Outcome.FAILED or decision.action is Action.STOP:
            span.set_status(Status(StatusCode.ERROR, decision.reason))
        span.end(_ns(max(at, decision.decided_at)))

    def _run(self, state: State, fact: Finished, at: float) -> None:
        self._ids.next_trace, self._ids.next_span = _trace_id(state), _span_id(state, "run")
        about: dict[str, _Value] = {
            "run_id": state.run_id,
            "mode": str(state.mode),
            "outcome": fact.outcome,
            "exit_code": fact.exit_code,
            "num_generations": state.generation,
            "num_decisions": len(state.decisions),
        }
        span = self._tracer.start_span(
            "run", context=context.Context(), start_time=_ns(state.started_at), attributes=_named(about)
        )
        if fact.exit_code:
            span.set_status(Status(StatusCode.ERROR, fact.reason))
        span.end(_ns(at))


def _of_decision(decision: Decision) -> dict[str, _Value]:
    return {
        "decision_id": decision.decision_id,
        "generation": decision.generation,
        "step": decision.step,
        "attempt": decision.attempt,
        "action": str(decision.action),
        "reason": decision.reason,
        "rule": decision.rule,
        "origin": str(decision.origin),
        "outcome": str(decision.outcome),
        "latency_ms": decision.latency_ms,
        "lost_s": decision.lost_s,
        "cordoned": decision.cordon,
    }


def _of_detections(seen: Iterable[Detection]) -> dict[str, _Value]:
    roots = [d for d in seen if d.caused_by is None]
    return {
        "num_detections": len(roots),
        "sites": tuple(sorted({d.site for d in roots})),
        "devices": tuple(sorted({d.device for d in roots})),
        "ranks": tuple(sorted({d.rank for d in roots})),
    }


def _named(about: Mapping[str, _Value]) -> dict[str, _Value]:
    return {f"{_PREFIX}{name}": value for name, value in about.items()}


def _trace_id(state: State) -> int:
    return _number(state, "", 16)


def _span_id(state: State, name: str) -> int:
    return _number(state, f" {name}", 8)


def _number(state: State, name: str, num_bytes: int) -> int:
    """Never 0, which stands for none."""
    digest = hashlib.sha256(f"{state.run_id} {state.started_at!r}{name}".encode()).digest()
    return int.from_bytes(digest[:num_bytes], "big") or 1


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
