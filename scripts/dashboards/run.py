"""One run: how it gets on, what was detected, what the service decided, what that took."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from dashboards.fleet import GOOD, RUN
from dashboards.parts import SOURCE, curves, heat, number, page

__all__ = ["build"]

BUDGET = 0.1
"""Share of the step that checks may take: the number of the alert ResilienceOverheadOverBudget."""


def build() -> builders.Dashboard:
    """The page; decisions and new generations are marked on every curve."""
    board = page("resilience-run", "Run", "One run: progress, detections, decisions, repair, snapshots, cost of checks")
    decided = f"sum by (run, action) (resilience_decisions_total{{{RUN}}})"
    was = f"(sum by (run, action) (resilience_decisions_total{{{RUN}}} offset 1m) or {decided} * 0)"
    for name, color, expr in (
        ("Decisions", "orange", f"({decided} - {was}) > 0"),
        ("New generations", "red", f"changes(run:resilience_restarts:total{{{RUN}}}[1m]) > 0"),
    ):
        board = board.annotation(
            builders.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(expr)
        )
    for panel in (*_numbers(), *_progress(), *_faults(), *_repair(), *_cost()):
        board = board.with_panel(panel)
    return board


def _rate(by: str, metric: str) -> str:
    return f"sum by ({by}) (rate(resilience_{metric}{{{RUN}}}[$__rate_interval]))"


def _numbers() -> list[object]:
    return [
        number(
            "Goodput", f"run:resilience_goodput:ratio{{{RUN}}}", unit="percentunit", limits=GOOD,
            says="Share of the run's lifetime spent on steps that were kept",
        ),
        number(
            "Verified step", f'max by (run) (resilience_last_verified_step{{{RUN}, tier="live"}})', unit="short",
            says="Newest step whose checks have all reported",
        ),
        number(
            "Time to detect", f"run:resilience_mttd:seconds{{{RUN}}}", unit="s",
            says="Mean from the end of a faulty operation to its alarm",
        ),
        number(
            "Time to repair", f"run:resilience_mttr:seconds{{{RUN}}}", unit="s",
            says="Mean from the first detection to the end of the repair",
        ),
        number(
            "Restarts left", f"min by (run) (resilience_retry_budget_remaining{{{RUN}}})", unit="short",
            says="Restarts that the policy still allows in its window",
            limits=((None, "red"), (1, "yellow"), (2, "green")),
            alerts=["ResilienceRetryBudgetLow"],
        ),
        number(
            "False positives", f"sum by (run) (resilience_false_positives_total{{{RUN}}})", unit="short",
            says="Alarms that proved to be no fault", limits=((None, "green"), (1, "yellow"), (3, "red")),
            alerts=["ResilienceFalsePositives"],
        ),
    ]  # fmt: skip


def _progress() -> list[object]:
    taken = _rate("run", "steps_total")
    mean = f"{_rate('run', 'step_seconds_sum')} / {_rate('run', 'step_seconds_count')}"
    slow = f"histogram_quantile(0.99, {_rate('run, le', 'step_seconds_bucket')})"
    return [
        curves(
            "Steps per second", [(taken, "{{run}}")], unit="short",
            says="Optimizer steps, repeated ones included", alerts=["ResilienceNoActivity"],
        ),
        curves(
            "Step time", [(mean, "mean {{run}}"), (slow, "99 % {{run}}")], unit="s",
            says="Duration of an optimizer step, of all ranks",
        ),
        curves(
            "Badput by cause", [(f"run_cause:resilience_badput_seconds:rate5m{{{RUN}}}", "{{cause}} {{run}}")],
            unit="percentunit", says="Seconds lost per second, over five minutes", stacked=True,
        ),
        curves(
            "Silence of ranks",
            [(f"max by (run, rank) (resilience_heartbeat_age_seconds{{{RUN}}})", "rank {{rank}} {{run}}")],
            unit="s", says="Seconds since the last heartbeat", limits=((None, "green"), (60, "red")),
            alerts=["ResilienceRankSilent", "ResilienceCoordinatorUnreachable"],
        ),
    ]  # fmt: skip


def _faults() -> list[object]:
    return [
        curves(
            "Detections by site and kind",
            [(f"sum by (site, kind, verdict) (resilience_detections_total{{{RUN}}})", "{{site}} {{kind}} {{verdict}}")],
            unit="short", says="Root causes with a verdict, since the run's start",
        ),
        curves(
            "Decisions", [(f"sum by (action) (resilience_decisions_total{{{RUN}}})", "{{action}}")], unit="short",
            says="By the rung they chose; `resilience explain DECISION_ID` tells why",
        ),
        heat(
            "Residual ÷ threshold", _rate("le", "abft_residual_ratio_bucket"),
            unit="none", says="Of clean checks, a sample. What comes near 1 will raise false positives",
            alerts=["ResilienceFalsePositives"],
        ),
        curves(
            "Checks per second by site", [(_rate("site", "abft_checks_total"), "{{site}}")],
            unit="ops", says="Protected operations that were checked, of all ranks",
        ),
    ]  # fmt: skip


def _repair() -> list[object]:
    costly = 'cause=~"replay|rewind|recovery|lost_work"'
    return [
        curves(
            "Mended, replayed, rewound, restored",
            [
                (f"sum by (outcome) (resilience_corrections_total{{{RUN}}})", "mended in place: {{outcome}}"),
                (f"sum by (outcome) (resilience_replays_total{{{RUN}}})", "replays: {{outcome}}"),
                (f"sum by (outcome) (resilience_rewinds_total{{{RUN}}})", "rewinds: {{outcome}}"),
                (f"sum by (tier, outcome) (resilience_restores_total{{{RUN}}})", "restores from {{tier}}: {{outcome}}"),
            ],
            unit="short", says="Since the run's start", alerts=["ResilienceReplayMismatch", "ResilienceRestoreRefused"],
        ),
        curves(
            "What repair took",
            [(f"sum by (cause) (resilience_badput_seconds_total{{{RUN}, {costly}}})", "{{cause}}")],
            unit="s", says="Seconds since the run's start, by what was done", stacked=True,
        ),
    ]  # fmt: skip


def _cost() -> list[object]:
    age = f"max by (run) (resilience_snapshot_age_steps{{{RUN}}})"
    taken = _rate("phase", "snapshot_seconds_sum")
    number_taken = _rate("phase", "snapshot_seconds_count")
    return [
        curves("Snapshot age", [(age, "{{run}}")], unit="short", says="Steps since the newest memory snapshot"),
        curves(
            "Snapshot duration", [(f"{taken} / ({number_taken} > 0)", "{{phase}}")], unit="s",
            says="Mean of each phase; training waits for copy only",
        ),
        curves(
            "Overhead of checks against budget",
            [(f"max by (run, rank) (resilience_abft_overhead_ratio{{{RUN}}})", "rank {{rank}} {{run}}")],
            unit="percentunit", says="Time in checks ÷ time of the step, where sampled",
            limits=((None, "green"), (BUDGET, "red")), alerts=["ResilienceOverheadOverBudget"],
        ),
        curves(
            "Verified steps by tier",
            [(f"max by (run, tier) (resilience_last_verified_step{{{RUN}}})", "{{tier}} {{run}}")],
            unit="short", says="What a rewind, a restart and a restore would go back to",
            alerts=["ResilienceRestartsWithoutProgress"],
        ),
    ]  # fmt: skip
