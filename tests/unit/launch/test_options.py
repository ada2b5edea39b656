"""Which source of the configuration wins, what is refused by name."""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path

import pytest

from resilience.errors import ConfigError, FaultPlanError, UsageError
from resilience.launch.options import Options, add_options, load, refuse_unsupported


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(words)


def test_absent_options_change_nothing() -> None:
    assert Options.of(parsed()) == Options()


@pytest.mark.parametrize("name", ["config", "faults", "dir"])
def test_our_options_need_resilience(name: str) -> None:
    with pytest.raises(UsageError, match=f"--resilience-{name} x: needs --resilience"):
        Options.of(parsed(f"--resilience-{name}", "x"))


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_sources_in_their_order(tmp_path: Path) -> None:
    deepspeed = write(
        tmp_path / "ds.json",
        {"resilience": {"policy": {"max_restarts": 7, "max_replays_per_step": 7}, "launch": {"dir": "/block"}}},
    )
    file = write(tmp_path / "r.toml", "[policy]\nmax_restarts = 9\n")
    environ = {"RESILIENCE_POLICY__MAX_RESTARTS": "1", "RESILIENCE_GUARD__REPLAY": "false"}
    options = Options(resilience=True, config=file, dir=Path("/explicit"))
    config = load(options, ["--deepspeed_config", str(deepspeed)], environ)
    assert config.policy.max_restarts == 9, "the file beats the block and the environment"
    assert config.policy.max_replays_per_step == 7, "the block beats the default"
    assert config.guard.replay is False, "the environment beats the default"
    assert config.launch.dir == Path("/explicit"), "an option beats the block"


@pytest.mark.parametrize("form", ["separate", "joined", "hugging_face", "base64"])
def test_deepspeed_config_is_found_among_the_scripts_arguments(tmp_path: Path, form: str) -> None:
    content = {"resilience": {"mode": "shadow"}, "padding": "x" * 400}
    path = str(write(tmp_path / "ds.json", content))
    words = {
        "separate": ["--deepspeed_config", path],
        "joined": [f"--deepspeed_config={path}"],
        "hugging_face": ["--deepspeed", path, "--other"],
        "base64": ["--deepspeed_config", base64.urlsafe_b64encode(json.dumps(content).encode()).decode()],
    }[form]
    assert load(Options(resilience=True), words, {}).mode == "shadow"


@pytest.mark.parametrize("words", [["--deepspeed"], ["--deepspeed", "--x"], ["--deepspeed_config", "absent.json"]])
def test_arguments_that_are_the_scripts_own_business(words: list[str]) -> None:
    assert load(Options(resilience=True), words, {}).mode == "enforce"


def test_unreadable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        load(Options(resilience=True, config=tmp_path / "absent.toml"), [], {})
    with pytest.raises(ConfigError, match=r"ds\.json: not JSON"):
        load(Options(resilience=True), ["--deepspeed_config", str(write(tmp_path / "ds.json", "{"))], {})
    with pytest.raises(FaultPlanError, match=r"absent\.toml"):
        load(Options(resilience=True, faults=tmp_path / "absent.toml"), [], {})


@pytest.mark.parametrize("launcher", ["mvapich", "mpich", "impi", "OpenMPI", "slurm"])
def test_launchers_that_start_ranks_are_refused_by_name(launcher: str) -> None:
    namespace = argparse.Namespace(launcher=launcher, autotuning="", no_python=False, module=False)
    with pytest.raises(UsageError, match=f"--launcher {launcher}: not supported"):
        refuse_unsupported(namespace)


def test_autotuning_and_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="--autotuning tune"):
        refuse_unsupported(argparse.Namespace(launcher="pdsh", autotuning="tune", no_python=False, module=False))
    with pytest.raises(UsageError, match="--no_python and --module"):
        refuse_unsupported(argparse.Namespace(launcher="pdsh", autotuning="", no_python=True, module=True))
