"""report.json as rows. Reports of older and newer versions are read as far as they go: what is missing takes its
default, what has another form than expected is left out and counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

import pydantic

__all__ = [
    "CheckpointRow",
    "DecisionRow",
    "DetectionRow",
    "GenerationRow",
    "NoteRow",
    "Report",
    "RestoreRow",
    "SnapshotsRow",
    "StrikeRow",
    "read_report",
]

_MAX_TIME = 32503680000.0
"""The year 3000: what is later is no time."""


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _time(value: float) -> float:
    return value if math.isfinite(value) and 0 <= value < _MAX_TIME else 0.0


Time = Annotated[float, pydantic.AfterValidator(_time)]
"""Seconds since the Unix epoch; 0 where it is not known."""
Seconds = Annotated[float, pydantic.AfterValidator(_finite)]
Count = Annotated[int, pydantic.Field(ge=-(10**15), le=10**15)]


class _Row(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)


class RestoreRow(_Row):
    """Where a generation's state came from, as it was chosen."""

    tier: str = ""
    step: Count = 0
    reason: str = ""
    passed_over: list[str] = []


class GenerationRow(_Row):
    """One set of processes."""

    generation: Count = 0
    began_at: Time = 0.0
    world_size: Count = 0
    reason: str = ""
    first_step_at: Time = 0.0
    ended_at: Time = 0.0
    ended_by: str = ""
    restore: RestoreRow | None = None
    resumed_after: Count | None = None


class StrikeRow(_Row):
    """One strike of an injected fault."""

    step: Count = 0
    micro_step: Count = 0
    rank: Count = 0
    site: str = "unknown"
    layer: Count = -1
    kind: str = "unknown"
    struck_at: Time = 0.0
    no_effect: bool = False


class DetectionRow(_Row):
    """One alarm."""

    detection_id: str = ""
    generation: Count = 0
    step: Count = 0
    micro_step: Count = 0
    rank: Count = 0
    node: str = ""
    device: str = ""
    site: str = "unknown"
    layer: Count = -1
    check: str = ""
    kind: str = "unknown"
    residual_ratio: float | None = None
    verdict: str = "pending"
    mended: bool = False
    bit_exact: bool = False
    param: str = ""
    detected_at: Time = 0.0
    latency_ms: Seconds = 0.0


class DecisionRow(_Row):
    """One decision."""

    decision_id: str = ""
    generation: Count = 0
    step: Count = 0
    attempt: Count = 0
    action: str = "unknown"
    reason: str = ""
    evidence: list[str] = []
    cordon: list[str] = []
    exit_code: int | None = None
    origin: str = ""
    outcome: str = ""
    latency_ms: Seconds = 0.0
    lost_s: Seconds = 0.0
    decided_at: Time = 0.0
    rule: str = ""


class CheckpointRow(_Row):
    """A checkpoint was published, loaded or refused."""

    kind: str = "unknown"
    directory: str = ""
    tag: str = ""
    step: Count = 0
    reason: str = ""
    seconds: Seconds = 0.0
    at: Time = 0.0


class SnapshotsRow(_Row):
    """What the memory tier took, cost and gave back."""

    num_taken: Count = 0
    interval_steps: float | None = None
    blocked_s: Seconds = 0.0
    newest_step: dict[str, Count] = {}
    newest_clean_step: Count | None = None
    num_steps_lost: Count | None = None


class NoteRow(_Row):
    """Something that a person should read."""

    kind: str = ""
    message: str = ""
    step: Count = 0
    at: Time = 0.0


class Report(_Row):
    """A run."""

    schema_version: Count = 0
    run_id: str = "without a name"
    mode: str = ""
    versions: dict[str, str] = {}
    started_at: Time = 0.0
    finished_at: Time = 0.0
    deterministic: bool | None = None
    outcome: str = ""
    exit_code: int | None = None
    reason: str = ""
    num_steps: Count = 0
    last_verified_step: Count = 0
    goodput_ratio: float | None = None
    badput_s: dict[str, Seconds] = {}
    generations: list[GenerationRow] = []
    faults_injected: list[StrikeRow] = []
    detections: list[DetectionRow] = []
    propagated: list[DetectionRow] = []
    decisions: list[DecisionRow] = []
    checkpoints: list[CheckpointRow] = []
    snapshots: SnapshotsRow | None = None
    notes: list[NoteRow] = []


R = TypeVar("R", bound=_Row)


def read_report(content: Mapping[str, Any]) -> tuple[Report, int]:
    """The report, and how many entries of it could not be read."""
    found: dict[str, Any] = {}
    num_unread = 0
    for name, field in Report.model_fields.items():
        if content.get(name) is None:
            continue
        rows = _row_type(field.annotation)
        try:
            if rows is not None:
                found[name], missed = _read_rows(rows, content[name])
                num_unread += missed
            else:
                found[name] = _adapter(name).validate_python(content[name])
        except pydantic.ValidationError:
            num_unread += 1
    return Report.model_construct(**found), num_unread


def _row_type(annotation: Any) -> type[_Row] | None:
    """What the list holds, where it is a list of rows."""
    if get_origin(annotation) is not list:
        return None
    (inner,) = get_args(annotation)
    return inner if isinstance(inner, type) and issubclass(inner, _Row) else None


def _read_rows(kind: type[R], values: Any) -> tuple[list[R], int]:
    rows, num_unread = [], 0
    for value in values if isinstance(values, list) else [None]:
        try:
            # A null is what was not known: the default says so.
            known = {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value
            rows.append(kind.model_validate(known))
        except pydantic.ValidationError:
            num_unread += 1
    return rows, num_unread


@functools.cache
def _adapter(name: str) -> pydantic.TypeAdapter[Any]:
    field = Report.model_fields[name]
    annotation: Any = field.annotation
    return pydantic.TypeAdapter(Annotated[annotation, *field.metadata] if field.metadata else annotation)
