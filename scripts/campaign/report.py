"""What a campaign says: counts by site and kind, by relative error, false alarms, outcomes. JSON in and out, a table.

Rates that a sample cannot tell apart from 0 or 1 have their 95 % bound by the rule of three.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from campaign.outcomes import Outcome
from campaign.trials import Trial
from rich.console import Console
from rich.table import Table

__all__ = ["LARGE", "cells", "check_of", "curve", "outcome_summary", "show"]

LARGE = 1e-2
"""Relative change from which on nothing that matters may be missed in float32: there each miss is followed up."""

DECADES = [-math.inf, *range(-7, 3)]
"""Lower ends of the bins of relative change, as powers of ten; the last one is open and holds what is not finite."""

EXTREME = ("nan", "inf", "-inf", "near_inf")


def check_of(site: str) -> str:
    """Which check looks at a site."""
    if site.endswith("(fused)"):
        return "fused attention"
    return "softmax" if site in ("attention.probs", "attention.ds") else "product"


def cells(dtype: str, trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """One row for each site and kind; trials that changed no bit count apart."""
    groups: defaultdict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[trial.site, trial.damage.kind].append(trial)
    rows = []
    for (site, kind), members in sorted(groups.items()):
        effective = [trial for trial in members if trial.damage.relative_change > 0]
        rows.append(
            {
                "dtype": dtype,
                "site": site,
                "kind": kind,
                "trials": len(effective),
                "no_effect": len(members) - len(effective),
                "detected": sum(trial.detected for trial in effective),
                "detected_late": sum(trial.late for trial in effective),
                "corrected": sum(trial.detected and trial.bit_exact for trial in effective),
            }
        )
    return rows


def curve(dtype: str, trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Detection by decade of relative change, for each check."""
    groups: defaultdict[tuple[str, int], list[Trial]] = defaultdict(list)
    for trial in trials:
        change = trial.damage.relative_change
        if change > 0:
            place = max(i for i, decade in enumerate(DECADES) if change >= 10.0**decade)
            groups[check_of(trial.site), place].append(trial)
    return [
        {
            "dtype": dtype,
            "check": check,
            "from": 10.0 ** DECADES[place],
            "to": 10.0 ** DECADES[place + 1] if place + 1 < len(DECADES) else None,
            "trials": len(members),
            "detected": sum(trial.detected for trial in members),
            "harmless": sum(trial.harmless is True for trial in members),
        }
        for (check, place), members in sorted(groups.items())
    ]


GROUPS = ("seen", "not seen", "missed")
"""Of unrepaired faults, see `Outcome`."""


def outcome_summary(dtype: str, found: list[Outcome]) -> list[dict[str, Any]]:
    """Of unrepaired faults, by group: how many end the training, and how far the others lead it astray."""
    rows = []
    for group in GROUPS:
        members = [outcome for outcome in found if outcome.group == group]
        if not members:
            continue
        lost = sum(math.isinf(outcome.loss_change) or math.isinf(outcome.weight_change) for outcome in members)
        row: dict[str, Any] = {"dtype": dtype, "group": group, "faults": len(members), "not_finite": lost}
        for name in ("loss_change", "weight_change"):
            values = sorted(value for outcome in members if math.isfinite(value := getattr(outcome, name)))
            for label, share in (("median", 0.5), ("p95", 0.95), ("most", 1.0)):
                row[f"{name}_{label}"] = values[min(int(share * len(values)), len(values) - 1)] if values else None
        rows.append(row)
    return rows


def show(result: dict[str, Any]) -> None:
    """Print the campaign as tables."""
    console = Console(width=120)
    for title, names, rows in _tables(result):
        table = Table(title=title)
        for name in names:
            table.add_column(name)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    alarms = result["false_positives"]
    bound = _number(alarms["bound_95"])
    print(f"checks without a fault: {alarms['checks']:,}, false alarms: {alarms['alarms']}, 95 % bound {bound} a check")
    control = result["control"]
    print(f"steps that ended in the bits of a clean one: {control['equal']:,} of {control['steps']:,}")
    print(f"{result['num_trials']:,} trials in {result['seconds']:.0f} s, {result['machine']}")


def _tables(result: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    groups: defaultdict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in result["cells"]:
        kind = "extreme" if cell["kind"] in EXTREME else "one bit" if cell["kind"].startswith("bit") else cell["kind"]
        groups[cell["dtype"], check_of(cell["site"]), kind].append(cell)
    rows = []
    for key, members in sorted(groups.items()):
        trials, detected, late, corrected = (
            sum(cell[name] for cell in members) for name in ("trials", "detected", "detected_late", "corrected")
        )
        rows.append([*key, str(trials), _share(detected, trials), _share(late, trials), _share(corrected, detected)])
    names = ["dtype", "check", "kind", "trials", "detected", "of them late", "corrected in place"]
    yield "Detection by kind", names, rows
    rows = [
        [
            row["dtype"], row["check"], f"{row['from']:.0e}", str(row["trials"]),
            _share(row["detected"], row["trials"]), str(row["harmless"]),
            _share(row["detected"] + row["harmless"], row["trials"]),
        ]
        for row in result["curve"]
    ]  # fmt: skip
    names = ["dtype", "check", "from", "trials", "detected", "missed, harmless", "detected or harmless"]
    yield "Detection by relative change of the result", names, rows
    yield f"Changes of {LARGE:g} and more", names[:2] + names[3:], _large(result["curve"])
    rows = [
        [
            row["dtype"], row["group"], str(row["faults"]), str(row["not_finite"]),
            *(_number(row[name]) for name in ("loss_change_median", "loss_change_most")),
            *(_number(row[name]) for name in ("weight_change_median", "weight_change_most")),
        ]
        for row in result["outcomes"]
    ]  # fmt: skip
    names = ["dtype", "faults", "number", "training ends", "Δ loss, median", "most", "Δ weights, median", "most"]
    yield "Unrepaired faults after five steps", names, rows


def _large(curve_rows: list[dict[str, Any]]) -> list[list[str]]:
    groups: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in curve_rows:
        if row["from"] >= 0.99 * LARGE:
            groups[row["dtype"], row["check"]].append(row)
            groups[row["dtype"], "all"].append(row)
    rows = []
    for key, members in sorted(groups.items()):
        trials, detected, harmless = (sum(row[name] for row in members) for name in ("trials", "detected", "harmless"))
        either = _share(detected + harmless, trials)
        rows.append([*key, str(trials), _share(detected, trials), str(harmless), either])
    return rows


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
