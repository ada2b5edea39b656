"""Devices: which one is faulty, since when, in which runs."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from dashboards.fleet import NONE_IS_GOOD, RUN
from dashboards.parts import choice, curves, number, page, rows

__all__ = ["build"]

DEVICE = f'{RUN}, device=~"$device"'
# The name of a GPU does not tell where it is.
PLACED = f'* on (run, device) group_left (node) resilience_device_info{{{DEVICE}, node=~"$node"}}'
REPEATED = ((None, "green"), (1, "yellow"), (2, "red"))


def build() -> dashboard.Dashboard:
    """The page."""
    board = page("resilience-devices", "Devices", "Faults, verdicts and history of each device, over all runs")
    names = 'label_values(resilience_quarantined{run=~"$run"}, device)'
    board = board.with_variable(choice("device", "Device", names, "UUID of a GPU, or cpu:NODE:SLOT"))
    for panel in _panels():
        board = board.with_panel(panel)
    return board


def _panels() -> list[object]:
    out = f"resilience_quarantined{{{DEVICE}}} {PLACED}"
    devices = f"max by (device) ({out})"
    faults = f"resilience_device_faults_total{{{DEVICE}}} {PLACED}"
    verdicts = f"sum by (node, device, verdict) ({faults})"
    share = f"sum by (verdict) ({faults})"
    history = f"sum by (node, device) (run_device:resilience_faults:total{{{DEVICE}}} {PLACED})"
    return [
        number(
            "Devices", f"count({devices})", unit="short", legend="devices", width=8,
            says="Devices that runs offer or have cordoned"
        ),
        number(
            "Out of use", f"count({devices} == 1) or vector(0)", unit="short", legend="devices",
            limits=NONE_IS_GOOD, width=8,
            says="Devices to pull", alerts=["ResilienceDeviceQuarantined"],
        ),
        number(
            "Faults by verdict", share, unit="short", legend="{{verdict}}", width=8,
            limits=((None, "green"), (1, "yellow")),
            says="Transient ones were gone on replay; persistent ones take a device out of use",
        ),
        rows(
            "Out of use", f"max by (run, node, device) ({out}) == 1", limits=((None, "red"),),
            says="`resilience uncordon DEVICE` brings one back", alerts=["ResilienceDeviceQuarantined"],
        ),
        rows(
            "Faults by device and verdict", f"sort_desc({verdicts})", limits=REPEATED,
            says="Settled faults in these runs; alarms of one step are one fault",
            alerts=["ResilienceRepeatedFaultsOnDevice"],
        ),
        curves(
            "History", [(history, "{{node}} {{device}}")], unit="short", width=24,
            says="Settled faults of each device since its runs began", alerts=["ResilienceRepeatedFaultsOnDevice"],
        ),
        curves(
            "Faults within a day", [('device:resilience_faults:increase1d{device=~"$device"}', "{{device}}")],
            unit="short", width=24, says="Over all runs that used the device, ended ones too", limits=REPEATED,
            alerts=["ResilienceRepeatedFaultsOnDevice"],
        ),
    ]  # fmt: skip
