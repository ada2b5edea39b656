"""What goes wrong on the command line: one line, the right code. And the verbs that need no run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from resilience.checkpoint.publish import MANIFEST
from resilience.events import Check, DetectionKind

from .conftest import Command

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["status", "--bogus"], "No such option: --bogus"),
        (["explain"], "Missing argument"),
        (["detections", "--limit", "-1"], "'--limit' / '-n'"),
        (["status"], "no run there (no coordinator.json)"),
        (["policy", "check", "missing.toml"], "missing.toml: cannot be read"),
        (["policy", "simulate", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_a_wrong_command_line_is_64_and_one_line(command: Command, arguments: list[str], said: str) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (64, "")
    assert err.startswith("resilience: ")
    assert said in err
    assert err.count("\n") == 1


def test_nobody_at_an_address_is_69(command: Command) -> None:
    code, _, err = command("status", "--address", "127.0.0.1:9")
    assert code == 69
    assert err == "resilience: coordinator 127.0.0.1:9 does not answer; is it running, and the address right?\n"


def test_a_token_that_cannot_be_read(command: Command) -> None:
    code, _, err = command("status", "--address", "127.0.0.1:9", "--token-file", "none")
    assert code == 64
    assert "none: token cannot be read" in err


def test_a_damaged_coordinator_file_is_named(command: Command, here: Path) -> None:
    (here / "coordinator.json").write_text("{")
    code, _, err = command("status", "--run-dir", ".")
    assert code == 1
    assert "coordinator.json: is not what a launcher wrote" in err


def test_version_and_help(command: Command) -> None:
    import resilience

    assert command("--version")[:2] == (0, f"{resilience.__version__}\n")
    for arguments in (["--help"], ["checkpoints", "--help"], ["coordinator", "serve", "--help"]):
        code, out, _ = command(*arguments)
        assert code == 0
        assert "Usage: resilience" in out


def test_it_runs_without_torch_and_deepspeed() -> None:
    """As on a head node: importing them is made to fail."""
    program = (
        "import sys; sys.modules.update(torch=None, deepspeed=None, numpy=None)\n"
        "from resilience.cli.main import main; sys.exit(main(['policy', 'show', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "clean" in [row["name"] for row in json.loads(done.stdout)["steps"]]


def test_policy_show_is_the_table(command: Command) -> None:
    shown = json.loads(command("policy", "show", "--json")[1])
    assert [row["action"] for row in shown["steps"] if row["name"] == "persistent"] == ["stop"]
    assert "### One attempt of one step" in command("policy", "show", "--markdown")[1]


def test_policy_check_says_what_differs(command: Command, here: Path) -> None:
    (here / "c.toml").write_text("[policy]\nmax_restarts = 7\n")
    code, out, _ = command("policy", "check", "c.toml")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("policy.max_restarts")]
    assert "7  (default 3)" in line
    settings = json.loads(command("policy", "check", "c.toml", "--json")[1])
    assert settings["policy.max_restarts"] == {"value": 7, "default": 3}
    (here / "c.toml").write_text("[policy]\nmax_restart = 7\n")
    code, _, err = command("policy", "check", "c.toml")
    assert code == 64
    assert "did you mean 'max_restarts'?" in err


@pytest.mark.parametrize(
    ("options", "action", "rule"),
    [
        (["--mended"], "corrected", "mended"),
        ([], "replay", "replay"),
        (["--attempt", "1", "--cleared"], "continue", "replayed-clean"),
        (["--attempt", "2"], "stop", "persistent"),
        (["--no-replay"], "restart", "restart"),
        (["--no-replay", "--restarts-left", "0"], "stop", "nothing-left"),
        (["--check", "screen", "--kind", "nan", "--attempt", "1", "--deterministic"], "continue", "data-non-finite"),
    ],
)
def test_policy_simulate_with_options(command: Command, options: list[str], action: str, rule: str) -> None:
    simulated = json.loads(command("policy", "simulate", *options, "--json")[1])
    assert (simulated["decision"]["action"], simulated["rule"]) == (action, rule)


def test_policy_simulate_with_evidence(command: Command, here: Path) -> None:
    alarm = {
        "detection_id": "g1-r0-1",
        "generation": 1,
        "step": 3,
        "micro_step": 0,
        "attempt": 0,
        "rank": 0,
        "node": "a",
        "device": "d",
        "site": "linear.out",
        "layer": 1,
        "check": Check.CHECKSUM,
        "kind": DetectionKind.INF,
        "residual_ratio": 2.0,
    }
    evidence = {"run_id": "r", "generation": 1, "step": 3, "attempt": 0, "world_size": 2, "detections": [alarm]}
    (here / "e.json").write_text(json.dumps(evidence))
    code, out, _ = command("policy", "simulate", "e.json")
    assert code == 0
    assert out.split()[:2] == ["action", "replay"]
    (here / "e.json").write_text(json.dumps(evidence | {"step": "three"}))
    code, _, err = command("policy", "simulate", "e.json")
    assert code == 64
    assert err.startswith("resilience: e.json: step: ")


def checkpoint(here: Path) -> Path:
    tag_dir = here / "ck" / "global_step1"
    tag_dir.mkdir(parents=True)
    (tag_dir / "mp_rank_00_model_states.pt").write_bytes(b"not a zip file, so only seen to be there")
    return tag_dir


def test_checkpoints_on_disk(command: Command, here: Path) -> None:
    tag_dir = checkpoint(here)
    (found,) = json.loads(command("checkpoints", "list", "ck", "--json")[1])
    assert (found["tag"], found["state"], found["good"]) == ("global_step1", "plain", True)
    (tag_dir / MANIFEST).parent.mkdir()
    (tag_dir / MANIFEST).write_text("{}")
    code, out, _ = command("checkpoints", "verify", "ck")
    assert code == 1
    assert "the manifest has version None" in out.replace("\n", " ")
    code, _, err = command("checkpoints", "verify", "nowhere")
    assert code == 1
    assert "nowhere: no such directory" in err


def test_digest_of_nothing_and_of_something_damaged(command: Command, here: Path) -> None:
    code, _, err = command("digest", "nowhere")
    assert code == 1
    assert "no checkpoint there" in err
    tag_dir = checkpoint(here)
    (tag_dir / MANIFEST).parent.mkdir()
    (tag_dir / MANIFEST).write_text("{}")
    code, out, err = command("digest", str(tag_dir))
    assert (code, out) == (1, "")
    assert "the manifest has version None" in err


def test_doctor_reports_every_look(command: Command) -> None:
    code, out, _ = command("doctor", "--json")
    findings = json.loads(out)
    assert code == int(any(finding["level"] == "fail" for finding in findings))
    assert {"python", "torch", "deepspeed", "start hook", "/dev/shm", "clock"} <= {f["name"] for f in findings}
    assert all(finding["fix"] for finding in findings if finding["level"] != "ok")


@pytest.mark.parametrize(("compiled", "level"), [(True, "ok"), (False, "warn")])
def test_doctor_says_whether_the_cpu_kernel_is_compiled(
    command: Command, monkeypatch: pytest.MonkeyPatch, compiled: bool, level: str
) -> None:
    from resilience.kernels import sweep

    if compiled and not sweep.is_compiled():
        pytest.skip("not compiled here")
    if not compiled:
        monkeypatch.setattr(sweep, "_compiled", None)
    _, out, _ = command("doctor", "--json")
    (finding,) = (finding for finding in json.loads(out) if finding["name"] == "CPU kernel")
    assert finding["level"] == level
    assert finding["detail"].startswith("compiled" if compiled else "not compiled")
