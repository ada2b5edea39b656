"""detections · decisions · explain"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from resilience.cli import output
from resilience.cli.complete import decision_ids
from resilience.cli.options import Address, Json, RunDir, TokenFile, source
from resilience.events import Decision, Detection

if TYPE_CHECKING:
    from resilience.rpc.v1 import operator_pb2 as op

__all__ = ["decision_fields", "detection_row", "register"]

Limit = Annotated[int, typer.Option("--limit", "-n", metavar="N", help="Only the newest N; 0 for all.", min=0)]

DETECTION_COLUMNS = (">step", ">micro", ">rank", "site", "alarm", ">residual", "verdict")


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("detections")(detections)
    app.command("decisions")(decisions)
    app.command("explain")(explain)


def detections(
    limit: Limit = 0,
    everything: Annotated[bool, typer.Option("--all", help="Also alarms that only propagate another one.")] = False,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """What the checks saw, oldest first."""
    found = source(address, token_file, run_dir).detections(include_propagated=everything, limit=limit).detections
    if as_json:
        output.print_json(found)
        return
    from resilience.rpc.codec import from_proto

    rows = [detection_row(from_proto(detection)) for detection in found]
    output.print_table(DETECTION_COLUMNS, rows, empty="nothing was detected")


def detection_row(detection: Detection) -> tuple[str, ...]:
    """A detection under `DETECTION_COLUMNS`."""
    place = f" {detection.param}" if detection.param else f"[{detection.layer}]" if detection.layer >= 0 else ""
    mended = ", mended" if detection.mended else ""
    return (
        str(detection.step),
        str(detection.micro_step),
        str(detection.rank),
        f"{detection.site}{place}",
        f"{detection.check} {detection.kind}" + (f", replay {detection.attempt}" if detection.attempt else ""),
        output.number(detection.residual_ratio),
        f"{detection.verdict}{mended}",
    )


def decisions(
    limit: Limit = 0,
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """What was done about them, oldest first."""
    found = source(address, token_file, run_dir).decisions(limit=limit).decisions
    if as_json:
        output.print_json(found)
        return
    from resilience.rpc.codec import from_proto

    output.print_table(
        ["decision", "action", "outcome", ">latency", ">lost", "reason"],
        [
            (
                decision.decision_id,
                str(decision.action),
                str(decision.outcome),
                output.duration(decision.latency_ms / 1000),
                output.duration(decision.lost_s),
                decision.reason,
            )
            for decision in map(from_proto, found)
        ],
        empty="nothing was decided",
    )


def explain(
    decision_id: Annotated[
        str,
        typer.Argument(metavar="DECISION_ID", help="As `resilience decisions` shows it.", autocompletion=decision_ids),
    ],
    address: Address = None,
    token_file: TokenFile = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Why a decision was taken: its evidence, the row of the policy table, the cheaper rungs that were ruled out."""
    explanation = source(address, token_file, run_dir).explain(decision_id)
    if as_json:
        output.print_json(explanation)
        return
    _print_explanation(explanation)


def _print_explanation(explanation: op.Explanation) -> None:
    from resilience.rpc.codec import from_proto

    rule = f"{explanation.rule}: {explanation.rule_text}" if explanation.rule else None
    ruled_out = "\n".join(explanation.considered)
    fields = decision_fields(from_proto(explanation.decision))
    output.print_fields([*fields, ("rule", rule), ("ruled out", ruled_out)])
    print()
    rows = [detection_row(from_proto(detection)) for detection in explanation.detections]
    output.print_table(DETECTION_COLUMNS, rows, empty="no detection: the decision is about processes")


def decision_fields(decision: Decision) -> list[tuple[str, str | None]]:
    """A decision, name by name."""
    return [
        ("decision", decision.decision_id),
        ("action", str(decision.action)),
        ("reason", decision.reason),
        ("exit code", None if decision.exit_code is None else str(decision.exit_code)),
        ("cordoned", ", ".join(decision.cordon)),
        ("decided by", f"{decision.origin}, {output.clock_time(decision.decided_at)}".rstrip(", ")),
        ("outcome", f"{decision.outcome}, after {output.duration(decision.latency_ms / 1000)}"),
        ("work lost", output.duration(decision.lost_s)),
    ]
