"""Traces of a run, where they are asked for. What knows of OpenTelemetry lies in `spans`, imported from here only."""

from __future__ import annotations

from typing import Literal, Protocol

from resilience.coordinator.machine.facts import Fact
from resilience.coordinator.machine.state import State
from resilience.errors import UsageError

__all__ = ["NoTracing", "Tracing", "open_tracing"]


class Tracing(Protocol):
    """An observer of a run that has something to deliver at the end."""

    def note(self, fact: Fact, at: float, state: State) -> None:
        """See `Observer`."""

    def close(self) -> None:
        """Deliver what is left, within seconds."""


class NoTracing:
    """Does nothing."""

    def note(self, fact: Fact, at: float, state: State) -> None:
        pass

    def close(self) -> None:
        pass


def open_tracing(where: Literal["off", "otlp"]) -> Tracing:
    """Spans to the collector that OpenTelemetry's own variables name (`OTEL_EXPORTER_OTLP_ENDPOINT`), or none.

    Raises:
        UsageError: they are asked for and OpenTelemetry is not installed.
    """
    if where == "off":
        return NoTracing()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        from resilience.coordinator.spans import Spans
    except ModuleNotFoundError as error:
        raise UsageError(
            f"coordinator.traces = {where!r}: {error.name} is not installed; pip install 'deepspeed-resilience[otel]'"
        ) from None
    return Spans(OTLPSpanExporter())
