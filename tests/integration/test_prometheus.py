"""Dashboards and rules against a real Prometheus that scrapes a real faulty run: every query, and the numbers."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.debian import command_of
from tests.integration.harness import BIN, free_port, launched, wait_for
from tests.integration.prometheus import DEPLOY, Prometheus, prometheus

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

BOARDS = DEPLOY.parent / "grafana" / "dashboards"
TOKEN = "a-token-that-is-long-enough"
FAULTS = """
[[fault]]
step = 4
rank = 0
site = "attention.scores"
layer = 1
kind = "inf"

[[fault]]
step = 8
rank = 1
site = "gradient"
param = "head.weight"
kind = "nan"

[[fault]]
step = 14
rank = 1
site = "process"
kind = "kill"
"""
VARIABLES = {"$__rate_interval": "1m", "$run": ".*", "$node": ".*", "$device": ".*"}
EMPTY = {
    "Fleet overview: Devices to pull": "no device was cordoned",
    "Fleet overview: What fires": "nothing fired",
    "Devices: Out of use (table)": "no device was cordoned",
    "Run: Mended, replayed, rewound, restored C": "nothing was rewound",
}
"""Queries without an answer in this run, and why. Alerts that do not fire have none either."""


@pytest.fixture(scope="module")
def program() -> str:
    return command_of("prometheus", "prometheus")


@pytest.fixture(scope="module")
def ran(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, dict[str, Any]]]:
    """A run with three faults whose external coordinator is served on after its end, and what watched it."""
    at = tmp_path_factory.mktemp("watched")
    token = at / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    port, metrics_port = free_port(), free_port()
    words = ["--run-id", "watched", "--run-dir", at / "coordinator", "--token-file", token]
    words += ["--port", str(port), "--metrics-port", str(metrics_port)]
    environment = {**os.environ, "XDG_STATE_HOME": str(at / "state")}
    with (at / "coordinator.log").open("wb") as log:
        coordinator = subprocess.Popen(
            [str(word) for word in (BIN / "resilience", "coordinator", "serve", *words)], stderr=log, env=environment
        )
    config = "\n".join(
        [
            '[launch]\nrun_id = "watched"',
            f"[coordinator]\naddress = {json.dumps(f'127.0.0.1:{port}')}\ntoken_file = {json.dumps(str(token))}",
        ]
    )
    try:
        with prometheus(program, at / "prometheus", target=f"127.0.0.1:{metrics_port}") as server:
            wait_for(lambda: server.samples("resilience_coordinator_up"), what="the first scrape", timeout_s=30)
            arguments = ["--steps", "24", "--save-every", "8"]
            with launched(at / "job", script_args=arguments, faults=FAULTS, resilience=config) as run:
                assert run.wait() == 0, run.output()
                run.assert_nothing_left()
            ended_at = time.time()
            newest = "min(timestamp(run:resilience_goodput:ratio))"
            wait_for(lambda: server.value(newest) > ended_at + 3, what="rules on the last samples", timeout_s=60)
            server.at = server.value(newest)
            coordinator.terminate()  # what came late is in the report that it writes when it ends
            assert coordinator.wait(30) == 0
            report = json.loads((at / "coordinator" / "report.json").read_text())
            yield server, report
    finally:
        coordinator.terminate()
        coordinator.wait(30)


def queries() -> dict[str, str]:
    """Every query of every panel, annotation and rule, by a name that a person finds it by."""
    found = {}
    for path in sorted(BOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        for annotation in board.get("annotations", {}).get("list", []):
            found[f"{board['title']}: {annotation['name']}"] = annotation["expr"]
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                mark = f" {target['refId']}" if len(panel["targets"]) > 1 else ""
                name = f"{board['title']}: {panel['title']}{mark}"
                found[name if name not in found else f"{name} ({panel['type']})"] = target["expr"]
    for path in sorted((DEPLOY / "rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                found[rule.get("record") or f"alert {rule['alert']}"] = rule["expr"]
    for name, query in found.items():
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        assert "$" not in query, f"{name}: {query}"
        found[name] = query
    return found


def answered(server: Prometheus, query: str) -> bool:
    """Whether the query has an answer at some time of the last five minutes, as a panel would draw it."""
    assert server.at is not None
    found = server.get("query_range", query=query, start=server.at - 300, end=server.at, step=5)["result"]
    return any(value != "NaN" for series in found for _, value in series["values"])


def test_every_query_of_panels_and_rules_parses_and_has_an_answer(ran: tuple[Prometheus, dict[str, Any]]) -> None:
    server, _ = ran
    asked = queries()
    empty = {name for name, query in asked.items() if not answered(server, query)}
    quiet = {name for name in asked if name.startswith("alert ") and name != "alert ResilienceWatchdog"}
    assert empty - quiet == EMPTY.keys()


def test_the_numbers_are_those_of_the_report(ran: tuple[Prometheus, dict[str, Any]]) -> None:
    server, report = ran
    assert report["num_generations"] == 2
    assert server.value("run:resilience_restarts:total") == report["num_generations"] - 1
    assert server.value("run:resilience_restarts:increase1h") == 1
    told = collections.Counter(tuple(d[key] for key in ("site", "kind", "verdict")) for d in report["detections"])
    found = server.samples("sum by (site, kind, verdict) (resilience_detections_total)")
    assert {tuple(dict(labels)[key] for key in ("site", "kind", "verdict")): n for labels, n in found.items()} == told
    actions = collections.Counter(decision["action"] for decision in report["decisions"])
    assert {"corrected", "replay", "restart"} <= actions.keys()
    found = server.samples("sum by (action) (resilience_decisions_total)")
    assert {dict(labels)["action"]: n for labels, n in found.items()} == actions
    assert server.value("run:resilience_goodput:ratio") == pytest.approx(report["goodput_ratio"], abs=1e-6)
    lost = {dict(k)["cause"]: n for k, n in server.samples("resilience_badput_seconds_total").items()}
    assert lost == pytest.approx({cause: report["badput_s"][cause] for cause in lost}, abs=1e-5)
    assert {"init", "recovery", "replay"} <= {cause for cause, seconds in lost.items() if seconds > 0}
    settled = [d for d in report["detections"] if d["verdict"] in ("transient", "persistent")]
    assert server.value("run:resilience_faults:total") == len(settled)
    latencies = [decision["latency_ms"] / 1000 for decision in report["decisions"]]
    assert server.value("sum(resilience_decision_seconds_count)") <= len(latencies)
    assert server.value("run:resilience_mttr:seconds") <= max(latencies)


def test_rules_load_and_what_fires_is_what_should(ran: tuple[Prometheus, dict[str, Any]]) -> None:
    server, _ = ran
    groups = server.get("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    firing = {dict(labels)["alertname"] for labels in server.samples('ALERTS{alertstate="firing"}')}
    assert firing == {"ResilienceWatchdog"}, "one restart and two mended faults are the service's own business"


@pytest.mark.parametrize("words", [["check", "config", "prometheus.yml"], ["check", "rules"], ["test", "rules"]])
def test_promtool_passes(program: str, words: list[str]) -> None:
    files = {"check rules": "rules/*.yml", "test rules": "tests/*.yml"}.get(" ".join(words), "")
    paths = sorted(map(str, DEPLOY.glob(files))) if files else []
    command = [str(Path(program).with_name("promtool")), *words, *paths]
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
