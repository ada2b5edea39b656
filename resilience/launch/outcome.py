"""What became of each fault: the report's faults, detections and decisions, joined into rows. Pure.

A fault of a plan may strike several times (when its operation is run again); it stays one row. A detection belongs to
the fault that struck the same step, best on the same rank, site and layer; a process that dies in step s is seen by
its agent, which knows only that step s − 1 was the last one taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["Row", "join"]

_PROCESS = "process"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fault, or one thing that was detected or decided without an injected one."""

    fault: str
    """What struck, where and when; empty where nothing was injected."""
    detected_by: str
    """The check and where it alarmed; empty where nothing did."""
    decision: str
    """The actions, in their order; empty where nothing was decided."""
    reason: str
    """Why: that of the last decision."""
    outcome: str
    verdict: str
    latency_ms: float | None
    """From the first detection to the end of the last decision's execution."""
    lost_s: float
    """Training thrown away or repeated."""
    undetected: bool
    """A fault that changed something and that no check saw."""


def join(report: Mapping[str, Any]) -> list[Row]:
    """The rows of a report: faults in the order in which they struck, then what came without one.

    Args:
        report: the content of report.json.
    """
    detections: list[Mapping[str, Any]] = list(report["detections"])
    decisions: list[Mapping[str, Any]] = list(report["decisions"])
    left = {detection["detection_id"]: detection for detection in detections}
    rows = []
    for strikes in _faults(report["faults_injected"]):
        found = _belonging(strikes, left.values())
        for detection in found:
            del left[detection["detection_id"]]
        rows.append(_row(strikes, found, _settling(found, decisions)))
    rows += [_row([], group, _settling(group, decisions)) for group in _grouped(left.values(), decisions)]
    told = {id(decision) for decision in _settling(detections, decisions)}
    rows += [_row([], [], [decision]) for decision in decisions if id(decision) not in told]
    return rows


def _faults(strikes: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The strikes, one list for each fault of the plan and step, in the order of their first ones."""
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for strike in sorted(strikes, key=lambda strike: float(strike["struck_at"])):
        fault = str(strike["strike_id"]).partition("-")[0]
        groups.setdefault((fault, strike["step"], strike["rank"]), []).append(strike)
    return list(groups.values())


def _belonging(
    strikes: Sequence[Mapping[str, Any]], detections: Iterable[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The detections of one fault: of those that fit best, the alarm of each execution."""
    ranked = sorted(((_fit(strikes[0], detection), detection) for detection in detections), key=lambda pair: -pair[0])
    if not ranked or ranked[0][0] == 0:
        return []
    best = ranked[0][0]
    found = [detection for fit, detection in ranked if fit == best]
    if len(strikes) == 1:
        # One strike, one alarm in each execution at most: a second one has another cause.
        return found[:1]
    return found


def _fit(strike: Mapping[str, Any], detection: Mapping[str, Any]) -> int:
    """0 where the detection cannot be the strike's, else the higher the better."""
    if strike["site"] == _PROCESS or detection["site"] == _PROCESS:
        same = strike["site"] == detection["site"] and strike["rank"] == detection["rank"]
        return int(same and detection["step"] in (strike["step"] - 1, strike["step"]))
    if strike["step"] != detection["step"]:
        return 0
    same_rank, same_site, same_layer, same_micro_step = (
        bool(strike[name] == detection[name]) for name in ("rank", "site", "layer", "micro_step")
    )
    return 1 + 8 * same_rank + 4 * same_site + 2 * (same_site and same_layer) + same_micro_step


def _settling(
    detections: Iterable[Mapping[str, Any]], decisions: Iterable[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The decisions about these detections: they are its evidence, or get their verdict from it."""
    ids = {detection["detection_id"] for detection in detections}
    return [each for each in decisions if ids & ({*each["evidence"]} | {*each["verdicts"]})]


def _grouped(
    detections: Iterable[Mapping[str, Any]], decisions: Sequence[Mapping[str, Any]]
) -> list[list[Mapping[str, Any]]]:
    """Detections that the same decisions settled are one thing to a reader."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for detection in detections:
        key = tuple(decision["decision_id"] for decision in _settling([detection], decisions))
        groups.setdefault(key or (detection["detection_id"],), []).append(detection)
    return list(groups.values())


def _row(
    strikes: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
    decisions: Sequence[Mapping[str, Any]],
) -> Row:
    last = decisions[-1] if decisions else None
    no_effect = bool(strikes) and all(strike["no_effect"] for strike in strikes)
    return Row(
        fault=_fault_text(strikes, no_effect),
        detected_by=_detected_text(detections),
        decision=" → ".join(str(decision["action"]) for decision in decisions),
        reason="" if last is None else str(last["reason"]),
        outcome="" if last is None else str(last["outcome"]),
        verdict=str(detections[0]["verdict"]) if detections else "",
        latency_ms=None if last is None else max(float(decision["latency_ms"]) for decision in decisions),
        lost_s=sum(float(decision["lost_s"]) for decision in decisions),
        undetected=bool(strikes) and not detections and not no_effect,
    )


def _fault_text(strikes: Sequence[Mapping[str, Any]], no_effect: bool) -> str:
    if not strikes:
        return ""
    first = strikes[0]
    layer = f"[{first['layer']}]" if _has_layer(first) else ""
    times = f", {len(strikes)} times" if len(strikes) > 1 else ""
    void = " (no effect)" if no_effect else ""
    return f"step {first['step']}, rank {first['rank']}{times}: {first['kind']} in {first['site']}{layer}{void}"


def _detected_text(detections: Sequence[Mapping[str, Any]]) -> str:
    if not detections:
        return ""
    first = detections[0]
    layer = f"[{first['layer']}]" if _has_layer(first) else ""
    more = f" (and {len(detections) - 1} more)" if len(detections) > 1 else ""
    return f"{first['check']}, rank {first['rank']}: {first['kind']} in {first['site']}{layer}{more}"


def _has_layer(place: Mapping[str, Any]) -> bool:
    return place["layer"] >= 0 and place["site"] not in (_PROCESS, "gradient", "weight", "optimizer")
