"""The Helm chart as Helm installs it: each value's effect, and every object against the schema of Kubernetes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from resilience.config import load_config

ROOT = Path(__file__).parents[3]
CHART = ROOT / "deploy" / "kubernetes" / "resilience-coordinator"
EXAMPLE = ROOT / "deploy" / "kubernetes" / "examples" / "training-job.yaml"
RENDER = Path(__file__).with_name("render_chart.py")
VALIDATE = """
import json, sys, kubernetes_validate
for item in json.load(sys.stdin):
    if item["apiVersion"].split("/")[0] not in ("monitoring.coreos.com", "cert-manager.io"):  # they bring their own
        kubernetes_validate.validate(item, sys.argv[1], strict=True)
"""
Objects = dict[str, dict[str, Any]]
Install = Callable[..., Objects]


@pytest.fixture(scope="module")
def install(helm_library: Path) -> Install:
    def run(**values: Any) -> Objects:
        words = [sys.executable, RENDER, helm_library, CHART, "run1", json.dumps({"runId": "run1", **values})]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        answer = json.loads(done.stdout)
        assert not answer["lint"]["Errors"], answer["lint"]
        if "error" in answer:
            raise ValueError(answer["error"])
        return {f"{o['kind']}/{o['metadata']['name']}": o for o in answer["objects"]}

    return run


@pytest.fixture(scope="module")
def plain(install: Install) -> Objects:
    return install()


@pytest.fixture(scope="module")
def full(install: Install) -> Objects:
    return install(
        tls={"enabled": True, "certManager": {"enabled": True, "issuerRef": {"name": "ca"}}},
        token={"existingSecret": "mine"},
        serviceMonitor={"enabled": True, "labels": {"release": "prometheus"}},
        prometheusRule={"enabled": True},
        dashboards={"enabled": True},
        persistence={"existingClaim": "history"},
        otlpEndpoint="http://collector:4317",
        config={"mode": "shadow", "policy": {"max_restarts": 7}},
        networkPolicy={"egress": [{"ports": [{"port": 4317}]}]},
        priorityClassName="high",
        nodeSelector={"pool": "system"},
    )


def validate(tools: Path, items: list[dict[str, Any]], version: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE, version],
        input=json.dumps(items),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tools)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("version", ["1.27", "1.31", "1.37"])
def test_what_is_installed_is_what_kubernetes_takes(tools: Path, plain: Objects, full: Objects, version: str) -> None:
    validate(tools, [*plain.values(), *full.values()], version)
    if version != "1.27":  # a Job's podFailurePolicy is stable since 1.31
        validate(tools, list(yaml.safe_load_all(EXAMPLE.read_text())), version)
    broken = json.loads(json.dumps(plain["StatefulSet/run1-coordinator"]))
    broken["spec"]["replica"] = 1
    with pytest.raises(AssertionError, match="replica"):
        validate(tools, [broken], version)


def container(objects: Objects) -> dict[str, Any]:
    (found,) = objects["StatefulSet/run1-coordinator"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_the_coordinator_gets_what_its_command_knows(plain: Objects, full: Objects) -> None:
    assert set(plain) == {
        f"{kind}/run1-coordinator" for kind in ("NetworkPolicy", "ConfigMap", "Service", "StatefulSet")
    } | {"Secret/run1-coordinator-token"}
    shown = subprocess.run(
        [Path(sys.executable).parent / "resilience", "coordinator", "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    for objects in (plain, full):
        options = [word.partition("=")[0] for word in container(objects)["args"]]
        assert options == ["--run-id", "--run-dir", "--config", "--token-file"]
        assert all(option in shown for option in options)
        named = {each["name"]: each["value"] for each in container(objects)["env"]}
        config = yaml.safe_load(objects["ConfigMap/run1-coordinator"]["data"]["config.yaml"])
        loaded = load_config(overrides=config, environ=named).coordinator
        assert loaded.log == "json"
    assert str(loaded.tls_key) == "/etc/resilience/tls/tls.key"
    assert loaded.tls_name == "run1-coordinator"
    assert loaded.traces == "otlp"
    assert named["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4317"
    assert config == {"mode": "shadow", "policy": {"max_restarts": 7}}


def test_nothing_in_it_runs_as_root_or_writes_beside_its_volume(plain: Objects) -> None:
    pod = plain["StatefulSet/run1-coordinator"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    security = container(plain)["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    (claim,) = plain["StatefulSet/run1-coordinator"]["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "state"
    (token,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "token")
    assert token == {"secretName": "run1-coordinator-token", "defaultMode": 0o440}
    made = base64.b64decode(plain["Secret/run1-coordinator-token"]["data"]["token"])
    assert len(made) >= 32


def test_probes_and_scrapes_go_where_something_answers(plain: Objects, full: Objects) -> None:
    found = container(plain)
    ports = {port["name"]: port["containerPort"] for port in found["ports"]}
    assert ports == {"grpc": 9465, "metrics": 9464}
    paths = {kind: found[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in paths.items()} == {
        "startup": "/readyz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    assert {probe["port"] for probe in paths.values()} == {"metrics"}
    monitor = full["ServiceMonitor/run1-coordinator"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    labels = full["Service/run1-coordinator"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in full["Service/run1-coordinator"]["spec"]["ports"]}


def test_only_who_trains_and_who_scrapes_gets_in(plain: Objects, full: Objects) -> None:
    calls, scrapes = plain["NetworkPolicy/run1-coordinator"]["spec"]["ingress"]
    assert calls["from"] == [{"podSelector": {"matchLabels": {"resilience/run": "run1"}}}]
    assert [port["port"] for port in calls["ports"]] == ["grpc"]
    assert [port["port"] for port in scrapes["ports"]] == ["metrics"]
    (lookups,) = plain["NetworkPolicy/run1-coordinator"]["spec"]["egress"]
    assert {port["port"] for port in lookups["ports"]} == {53}
    assert full["NetworkPolicy/run1-coordinator"]["spec"]["egress"][1] == {"ports": [{"port": 4317}]}
    job = list(yaml.safe_load_all(EXAMPLE.read_text()))[-1]
    assert (
        calls["from"][0]["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    )


def test_with_certificates_the_pod_mounts_what_cert_manager_makes(full: Objects) -> None:
    certificate = full["Certificate/run1-coordinator"]["spec"]
    assert "run1-coordinator.training.svc" in certificate["dnsNames"]
    volumes = full["StatefulSet/run1-coordinator"]["spec"]["template"]["spec"]["volumes"]
    secrets = {volume["name"]: volume["secret"] for volume in volumes if "secret" in volume}
    assert secrets["tls"] == {"secretName": certificate["secretName"], "defaultMode": 0o440}
    assert secrets["token"]["secretName"] == "mine"
    assert "Secret/run1-coordinator-token" not in full
    assert not full["StatefulSet/run1-coordinator"]["spec"].get("volumeClaimTemplates")


def test_dashboards_and_rules_are_those_of_the_repository(full: Objects) -> None:
    shown = {path.name: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
    assert shown
    found: dict[str, Any] = {}
    for item in full.values():
        if item["kind"] == "ConfigMap" and "grafana_dashboard" in item["metadata"]["labels"]:
            found |= {name: json.loads(text) for name, text in item["data"].items()}
    assert found == shown
    rules = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))]
    assert rules
    assert [o["spec"] for name, o in sorted(full.items()) if name.startswith("PrometheusRule/")] == rules


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"runId": ""}, "runId is the name of the run"),
        ({"runId": "a b"}, "runId"),
        ({"runID": "r"}, "runID"),
        ({"tls": {"enabled": True}}, r"tls.enabled needs tls.existingSecret"),
        ({"log": "xml"}, "log"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(install: Install, values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        install(**values)


def test_the_example_configures_what_exists() -> None:
    _, files, job = yaml.safe_load_all(EXAMPLE.read_text())
    config = load_config(overrides=yaml.safe_load(files["data"]["resilience.yaml"]))
    assert config.coordinator.address == "run1-coordinator:9465"
    assert config.launch.run_id == "run1"
    assert len(files["data"]["hostfile"].splitlines()) == job["spec"]["completions"] == job["spec"]["parallelism"]
    subprocess.run(["sh", "-n"], input=files["data"]["launch.sh"], text=True, check=True)
