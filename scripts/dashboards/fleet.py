"""Fleet overview: is training healthy, what fires, which run to open, which device to pull."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from dashboards.parts import curves, number, page, rows

__all__ = ["build"]

RUN = 'run=~"$run"'
TO_RUN = ("Open the run", "/d/resilience-run?var-run=${__data.fields.run}&${__url_time_range}")
TO_DEVICE = ("Open the device", "/d/resilience-devices?var-device=${__data.fields.device}&${__url_time_range}")
TO_RUNBOOK = ("Runbook", "/d/resilience-runbook")
GOOD = ((None, "red"), (0.8, "yellow"), (0.9, "green"))
NONE_IS_GOOD = ((None, "green"), (1, "red"))


def build() -> dashboard.Dashboard:
    """The page."""
    board = page("resilience-fleet", "Fleet overview", "All runs: health, goodput, what fires, devices out of use")
    for panel in (*_numbers(), *_tables(), *_courses()):
        board = board.with_panel(panel)
    return board


def _numbers() -> list[object]:
    return [
        number(
            "Runs", f"count(max by (run) (resilience_coordinator_up{{{RUN}}}))", unit="short", legend="runs",
            says="Runs whose coordinator answers", alerts=["ResilienceCoordinatorUnreachable"],
        ),
        number(
            "Goodput", f"avg(run:resilience_goodput:ratio{{{RUN}}})", unit="percentunit", legend="mean",
            says="Share of the runs' lifetimes spent on steps that were kept, mean of the runs", limits=GOOD,
        ),
        number(
            "Alerts", 'count(ALERTS{alertstate="firing", severity=~"critical|warning"}) or vector(0)', unit="short",
            legend="firing", says="Alerts that fire, without the dead man's switch", limits=NONE_IS_GOOD,
            alerts=["ResilienceWatchdog"],
        ),
        number(
            "Devices out of use", f"count(max by (device) (resilience_quarantined{{{RUN}}}) == 1) or vector(0)",
            unit="short", legend="devices", says="Devices to pull: cordoned by the service or by an operator",
            limits=NONE_IS_GOOD, alerts=["ResilienceDeviceQuarantined"],
        ),
        number(
            "Restarts, 1 h", f"sum(run:resilience_restarts:increase1h{{{RUN}}})", unit="short",
            legend="restarts", says="New generations of all runs within the last hour",
            limits=((None, "green"), (1, "yellow"), (5, "red")),
            alerts=["ResilienceRestartsTooOften"],
        ),
        number(
            "Faults, 1 h", f"sum(run:resilience_faults:increase1h{{{RUN}}})", unit="short", legend="faults",
            says="Detections of the last hour that proved to be hardware", limits=((None, "green"), (1, "yellow")),
        ),
    ]  # fmt: skip


def _tables() -> list[object]:
    return [
        rows(
            "What fires", 'ALERTS{alertstate="firing", severity=~"critical|warning"}', opens=[TO_RUN, TO_RUNBOOK],
            says="Each alert with its run, rank or device; a click leads to the run and to what to do",
            alerts=["ResilienceWatchdog"],
        ),
        rows(
            "Devices to pull", f"max by (run, device) (resilience_quarantined{{{RUN}}}) == 1", opens=[TO_DEVICE],
            says="Devices that no job may use", limits=((None, "red"),), alerts=["ResilienceDeviceQuarantined"],
        ),
        rows(
            "Goodput of each run", f"sort(run:resilience_goodput:ratio{{{RUN}}})", unit="percentunit", limits=GOOD,
            opens=[TO_RUN], says="The worst first; a click opens the run",
        ),
        rows(
            "Faults of devices, 1 day", "sort_desc(device:resilience_faults:increase1d > 0)", opens=[TO_DEVICE],
            says="Over all runs that used the device", limits=((None, "yellow"), (2, "red")),
            alerts=["ResilienceRepeatedFaultsOnDevice"],
        ),
    ]  # fmt: skip


def _courses() -> list[object]:
    return [
        curves(
            "Goodput over time", [(f"run:resilience_goodput:ratio_rate5m{{{RUN}}}", "{{run}}")], unit="percentunit",
            says="Share of the last five minutes that was spent on steps that were kept", limits=GOOD,
        ),
        curves(
            "Badput by cause", [(f"sum by (cause) (run_cause:resilience_badput_seconds:rate5m{{{RUN}}})", "{{cause}}")],
            unit="percentunit", says="Seconds lost per second, summed over the runs", stacked=True,
        ),
        curves(
            "Generations", [(f"max by (run) (resilience_generation{{{RUN}}})", "{{run}}")], unit="short",
            says="Each step up is a restart of a run's processes", alerts=["ResilienceRestartsTooOften"],
        ),
        curves(
            "Steps per second", [(f"run:resilience_steps:rate5m{{{RUN}}}", "{{run}}")], unit="short",
            says="Optimizer steps, repeated ones included", alerts=["ResilienceNoActivity"],
        ),
    ]  # fmt: skip
