"""Rules, runbook and dashboards name the same things: alerts, sections, links, metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from resilience.metrics import BY_NAME, PREFIX, Kind

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "prometheus" / "rules"
BOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))


def rules(kind: str) -> dict[str, dict[str, Any]]:
    groups = (group for path in RULES.glob("*.yml") for group in yaml.safe_load(path.read_text())["groups"])
    return {rule[kind]: rule for group in groups for rule in group["rules"] if kind in rule}


ALERTS = rules("alert")
RECORDED = rules("record")


def texts() -> list[str]:
    boards = [value for path in BOARDS for value in strings(json.loads(path.read_text()))]
    return [rule["expr"] for rule in (*ALERTS.values(), *RECORDED.values())] + boards


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def panels(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((BOARDS[0].parent / f"{name}.json").read_text())["panels"]
    return found


def test_each_alert_has_a_section_of_the_runbook_and_each_section_an_alert() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text()
    sections = re.findall(r"^## (\S+)$", page, flags=re.MULTILINE)
    assert sections == [*ALERTS]
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        for answer in ("Means:", "Done already:", "Look at:", "Do:", "Pull the device"):
            assert f"**{answer}" in part, f"{part.splitlines()[0]} does not say {answer}"


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_says_how_grave_it_is_what_it_means_and_where_to_read_on(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "none")
    told = rule["annotations"]
    assert {"summary", "description"} <= {name for name, text in told.items() if text}
    assert told["runbook_url"].endswith(f"docs/runbook.md{{{{ end }}}}#{name.lower()}")
    uid = told["dashboard"].split("?")[0].removeprefix("/d/")
    assert uid in {json.loads(path.read_text())["uid"] for path in BOARDS}


def test_each_alert_has_a_test_that_shows_it_firing() -> None:
    tests = (RULES.parent / "tests" / "alerts.yml").read_text() + (RULES.parent / "tests" / "clean.yml").read_text()
    for name in ALERTS:
        assert re.search(rf'labels: \'ALERTS{{alertname="{name}", alertstate="firing"', tests), name


def test_only_metrics_that_are_exported_are_asked_for() -> None:
    suffixes = ("_bucket", "_sum", "_count")
    known = {PREFIX + name for name in BY_NAME}
    known |= {PREFIX + row.name + end for row in BY_NAME.values() if row.kind is Kind.HISTOGRAM for end in suffixes}
    asked = {name for text in texts() for name in re.findall(r"(?<![\w:/-])resilience_\w+", text)}
    assert asked - known == set()
    named = {name for text in texts() for name in re.findall(r"\b(?:run|device|run_\w+):resilience_\w+:\w+", text)}
    assert named - RECORDED.keys() == set()


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_say_what_they_show_and_lead_to_sections_that_exist(path: Path) -> None:
    numbers = {panel["id"]: panel["title"] for panel in panels("runbook")}
    assert [*numbers.values()] == [*ALERTS]
    board = json.loads(path.read_text())
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "text":
            assert panel["type"] == "heatmap" or panel["fieldConfig"]["defaults"]["unit"]
        for link in panel.get("links", []):
            alert, number = link["title"].removeprefix("Runbook: "), link["url"].split("viewPanel=")[1]
            assert numbers[int(number)] == alert


def test_every_alert_is_reached_from_a_panel() -> None:
    linked = {
        link["title"].removeprefix("Runbook: ")
        for path in BOARDS
        for panel in panels(path.stem)
        for link in panel.get("links", [])
    }
    assert linked == ALERTS.keys()


def test_dashboards_are_those_of_their_code_and_a_wrong_word_is_refused() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    command = ROOT / "scripts" / "gen-dashboards"
    done = subprocess.run([command, "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run([command, "--chek"], capture_output=True, text=True, timeout=60, check=False)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (64, 1)
