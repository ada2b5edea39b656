"""Compose, Docker, systemd and Slurm: files that their own tools take, and that say only what the command knows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from resilience.config import Config, load_config

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
UNIT = DEPLOY / "systemd" / "resilience-coordinator@.service"
SBATCH = DEPLOY / "slurm" / "train.sbatch"
MAX_EXPOSURE = 1.5
"""Of 10, as `systemd-analyze security` counts it; most services of a distribution have 9 and more."""


def options_of_serve() -> set[str]:
    shown = subprocess.run(
        [Path(sys.executable).parent / "resilience", "coordinator", "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    return set(re.findall(r"--[a-z-]+", shown.stdout))


def settings_in(text: str) -> dict[str, str]:
    """Every `RESILIENCE_…=value` of a file."""
    return dict(re.findall(r"\b(RESILIENCE_[A-Z]+__[A-Z_]+)[=:] ?([^\s\\#]+)", text))


def test_every_setting_in_every_file_is_one_that_exists() -> None:
    num_found = 0
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix not in (".json", ".png"):
            for name in re.findall(r"\bRESILIENCE_([A-Z]+)__([A-Z_]+)", path.read_text()):
                section, key = (part.lower() for part in name)
                assert key in type(getattr(Config(), section)).model_fields, f"{path}: {section}.{key}"
                num_found += 1
    assert num_found > 10


# ------ compose


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return content


def test_compose_is_what_the_compose_specification_describes(tools: Path, compose: dict[str, Any]) -> None:
    program = (
        "import sys, yaml; from compose_viz.spec.compose_spec import ComposeSpecification as Spec;"
        "Spec.model_validate(yaml.safe_load(sys.stdin))"
    )

    def check(content: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            input=yaml.safe_dump(content),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": str(tools / "compose")},
        )

    done = check(compose)
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = yaml.safe_load(COMPOSE.read_text())
    wrong["services"]["grafana"]["port"] = ["3000"]
    assert "port" in check(wrong).stderr


def test_compose_starts_what_is_there_and_nothing_as_root(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"token", "coordinator", "prometheus", "grafana"}
    words = [word.partition("=")[0] for word in services["coordinator"]["command"]]
    assert set(words) <= options_of_serve()
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            known = (COMPOSE.parent / source).exists() if source.startswith(".") else source in compose["volumes"]
            assert known, f"{name}: {source}"
    built = services["coordinator"]["build"]
    assert (COMPOSE.parent / built["context"]).resolve() == ROOT
    assert ROOT / built["dockerfile"] == DOCKERFILE
    assert services["coordinator"]["depends_on"] == {"token": {"condition": "service_completed_successfully"}}


def test_prometheus_and_grafana_look_where_compose_puts_things(compose: dict[str, Any]) -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert "coordinator:9464" in [
        t for job in scraped for each in job.get("static_configs", ()) for t in each["targets"]
    ]
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "resilience.yml").read_text())["providers"]
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    assert mounted["../grafana/dashboards"] == provider["options"]["path"]
    assert mounted["../grafana/provisioning"] == "/etc/grafana/provisioning"
    shared = [set(compose["services"][name]["networks"]) for name in ("coordinator", "prometheus", "grafana")]
    assert set.intersection(*shared)


def test_the_token_is_made_once_and_nobody_else_can_read_it(tmp_path: Path, compose: dict[str, Any]) -> None:
    service = compose["services"]["token"]
    command = [*service["entrypoint"], *service["command"]]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=20)
    made = (tmp_path / "token").read_text()
    assert len(made.strip()) >= 43
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    subprocess.run(command, cwd=tmp_path, check=True, timeout=20)
    assert (tmp_path / "token").read_text() == made
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


# ------ Docker


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", "\n".join(x for x in DOCKERFILE.read_text().splitlines() if not x.startswith("#")))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_is_made_of_what_is_let_through_and_runs_as_nobody() -> None:
    found = instructions()
    let_through = {
        line[1:] for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for kind, words in found:
        sources = shlex.split(words)[:-1]
        if kind == "COPY" and not words.startswith("--from"):
            assert all((ROOT / source).exists() for source in sources), words
            assert set(sources) <= let_through, words
    names = [kind for kind, _ in found]
    assert names.count("FROM") == 2
    assert names.index("USER") > names.index("ENV") > 0
    assert dict(found)["USER"] == "10001:10001"
    entry = dict(found)["ENTRYPOINT"]
    assert entry == '["resilience", "coordinator", "serve"]'
    environment = settings_in(DOCKERFILE.read_text())
    config = load_config(environ=environment).coordinator
    assert (config.bind, config.port, config.metrics_bind, config.metrics_port) == ("0.0.0.0", 9465, "0.0.0.0", 9464)
    assert f"127.0.0.1:{config.metrics_port}/readyz" in dict(found)["HEALTHCHECK"]
    assert set(shlex.split(dict(found)["EXPOSE"])) == {"9465", "9464"}


# ------ systemd


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit for run `r1`, with a program that is there."""
    if shutil.which("systemd-analyze") is None and os.getuid() == 0 and shutil.which("apt-get"):
        words = ["apt-get", "install", "--yes", "--no-install-recommends", "systemd"]
        subprocess.run(words, capture_output=True, timeout=240, check=False)
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed, and cannot be (Debian: systemd)")
    path = tmp_path / "resilience-coordinator@r1.service"
    path.write_text(UNIT.read_text().replace("/opt/resilience/bin/resilience", "/bin/true"))
    return path


def test_systemd_takes_the_unit(unit: Path) -> None:
    def verify() -> subprocess.CompletedProcess[str]:
        words = ["systemd-analyze", "verify", "--man=no", str(unit)]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)

    done = verify()
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("ProtectHome=yes", "ProtectHome=maybe"))
    assert "Failed to parse protect home value" in verify().stderr


def test_what_the_service_could_do_is_little(unit: Path) -> None:
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= MAX_EXPOSURE


def test_the_unit_starts_what_is_there() -> None:
    text = UNIT.read_text()
    found = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert found
    program, *words = found[1].split()
    assert program.endswith("/resilience")
    assert words[:2] == ["coordinator", "serve"]
    assert {word for word in words if word.startswith("--")} <= options_of_serve()
    config = load_config(environ=settings_in(text)).coordinator
    assert (config.bind, config.port, config.metrics_bind) == ("0.0.0.0", 9465, "127.0.0.1")
    assert "RestartPreventExitStatus=64" in text


# ------ Slurm

STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "n%s\\n" 1 2; else echo "$@" >>"$CALLS/scontrol"; fi',
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
worst=0
for node in 1 0; do SLURM_NODEID=$node "$@" || { code=$?; if [ $code -gt $worst ]; then worst=$code; fi; }; done
exit $worst""",
    "deepspeed": """
printf '%s\\n' "$@" >"$CALLS/deepspeed-$SLURM_NODEID"
env | grep ^RESILIENCE_ | sort >"$CALLS/env-$SLURM_NODEID" || true
if [ "$SLURM_NODEID" = 0 ] && [ "${LEAD_CODE:-}" = lost ]; then kill -9 $PPID; fi
if [ "$SLURM_NODEID" = 0 ]; then exit ${LEAD_CODE:-0}; else exit ${OTHER_CODE:-0}; fi""",
}


class Cluster:
    """Two nodes; Slurm's commands and deepspeed write down how they were called."""

    def __init__(self, tmp_path: Path) -> None:
        self.calls = tmp_path / "calls"
        self.root = tmp_path / "shared"
        binaries = tmp_path / "bin"
        for directory in (self.calls, binaries):
            directory.mkdir()
        for name, body in STUBS.items():
            (binaries / name).write_text(f"#!/bin/bash\n{body}\n")
            (binaries / name).chmod(0o755)
        self.environment = {
            "PATH": f"{binaries}:/usr/bin:/bin",
            "CALLS": str(self.calls),
            "RUN_ROOT": str(self.root),
            "SLURM_JOB_ID": "123",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_GPUS_ON_NODE": "4",
        }

    def submit(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", SBATCH, *words],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def told(self, name: str) -> list[str]:
        path = self.calls / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_shells_and_shellcheck_take_the_scripts(tools: Path) -> None:
    scripts = [SBATCH, DEPLOY / "make-certificates"]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True, timeout=20)
    words = [tools / "bin" / "shellcheck", *scripts]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_slurm_starts_one_launcher_a_node(cluster: Cluster) -> None:
    done = cluster.submit("train.py", "--name", "two words", OPTIONS="--resilience-config r.toml", SPARE_NODES="1")
    assert done.returncode == 0, done.stderr
    run_dir = cluster.root / "slurm-123-0"
    assert (run_dir / "hostfile").read_text() == "n1 slots=4\nn2 slots=4\n"
    for node in (0, 1):
        words = cluster.told(f"deepspeed-{node}")
        assert words[:6] == ["--resilience", "--resilience-dir", str(run_dir), "--no_ssh", "--node_rank", str(node)]
        assert words[words.index("--master_addr") + 1] == "n1"
        assert 20_000 <= int(words[words.index("--master_port") + 1]) < 29_000
        assert words[-5:] == ["--resilience-config", "r.toml", "train.py", "--name", "two words"]
        environment = dict(line.split("=", 1) for line in cluster.told(f"env-{node}"))
        config = load_config(environ=environment)
        assert (config.launch.run_id, config.launch.num_spare_nodes) == ("slurm-123-0", 1)
    assert not cluster.told("scontrol")


@pytest.mark.parametrize(
    ("lead", "other", "restarts", "code", "requeued"),
    [
        ("75", "75", "0", 75, True),
        ("75", "137", "4", 75, True),
        ("75", "75", "5", 75, False),  # often enough
        ("93", "75", "0", 93, False),
        ("64", "1", "0", 64, False),
        ("0", "137", "0", 0, False),  # a spare one took the place of the node that was lost
    ],
)
def test_slurm_requeues_after_75_only(
    cluster: Cluster, lead: str, other: str, restarts: str, code: int, requeued: bool
) -> None:
    done = cluster.submit("train.py", LEAD_CODE=lead, OTHER_CODE=other, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code, done.stderr
    assert cluster.told("scontrol") == (["requeue 123"] if requeued else [])
    assert (cluster.root / f"slurm-123-{restarts}" / "hostfile").exists()


def test_with_an_external_coordinator_its_run_is_served_and_nothing_requeued(cluster: Cluster) -> None:
    external = {"COORDINATOR": "c:9465", "RUN_ID": "mine", "TOKEN_FILE": "/t", "LEAD_CODE": "75"}
    done = cluster.submit("train.py", **external)
    assert done.returncode == 75
    assert not cluster.told("scontrol")
    config = load_config(environ=dict(line.split("=", 1) for line in cluster.told("env-1")))
    assert (config.coordinator.address, config.launch.run_id) == ("c:9465", "mine")
    assert config.coordinator.token_file == Path("/t")
    nameless = cluster.submit("train.py", COORDINATOR="c:9465")
    assert nameless.returncode != 0
    assert "RUN_ID: names the run" in nameless.stderr


def test_a_job_without_a_script_or_with_a_lost_head_says_so(cluster: Cluster) -> None:
    done = cluster.submit()
    assert done.returncode == 64
    assert "no training script" in done.stderr
    done = cluster.submit("train.py", LEAD_CODE="lost")
    assert done.returncode == 75
    assert "the node that leads n1 is gone" in done.stderr
    assert cluster.told("scontrol") == ["requeue 123"]
