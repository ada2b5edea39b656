"""The `.pth` line: which processes it acts in, that it costs nothing in others, and that it is installed at all."""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from resilience import _boot

RUNNER = "deepspeed.launcher.runner"


@pytest.mark.parametrize(
    "command",
    [
        ["python", "/opt/bin/deepspeed", "--resilience", "train.py"],
        ["python", "-u", "bin/ds", "train.py"],
        ["python", "-X", "dev", "-W", "error", "deepspeed.pt"],
        ["python", "-m", RUNNER, "train.py"],
        ["python", "-u", "-m", RUNNER],
        ["python", f"-m{RUNNER}"],
    ],
)
def test_runner_is_recognized(command: list[str]) -> None:
    assert _boot._is_runner(command)


@pytest.mark.parametrize(
    "command",
    [
        ["python"],
        ["python", "train.py", "deepspeed"],
        ["python", "-c", "deepspeed", "deepspeed"],
        ["python", "-m", "deepspeed.launcher.launch", "deepspeed"],
        ["python", "-m", "pytest", RUNNER],
        ["python", "/opt/bin/deepspeed_helper"],
    ],
)
def test_other_processes_are_not_the_runner(command: list[str]) -> None:
    assert not _boot._is_runner(command)


def test_hooks_are_put_only_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(sys, "orig_argv", ["python", "bin/deepspeed", "train.py"])
    for variable in ("RESILIENCE_CONTEXT", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    _boot.arm()
    assert sys.meta_path == [], "a launch without our options must not be touched"
    monkeypatch.setattr(sys, "orig_argv", ["python", "bin/deepspeed", "--resilience", "train.py"])
    _boot.arm()
    assert [finder._name for finder in sys.meta_path] == [RUNNER]  # type: ignore[attr-defined]
    sys.meta_path.clear()
    monkeypatch.setenv("RESILIENCE_CONTEXT", "/run/context.json")
    _boot.arm()
    assert sys.meta_path == [], "a process of a run that is no rank must not be touched"
    monkeypatch.setenv("RANK", "0")
    _boot.arm()
    assert [finder._name for finder in sys.meta_path] == ["deepspeed"]  # type: ignore[attr-defined]


def test_hook_acts_once_after_the_module_was_executed(tmp_path: Path) -> None:
    """In a fresh interpreter: a module that is imported with the hook in place, and its loader afterwards."""
    (tmp_path / "target.py").write_text("done = True\n")
    program = (
        "import sys; from resilience import _boot; seen = []\n"
        "sys.meta_path.insert(0, _boot._AfterImport('target', lambda m: seen.append(m.done)))\n"
        "import target, importlib\n"
        "assert seen == [True], seen\n"
        "assert type(target.__loader__).__name__ == 'SourceFileLoader'\n"
        "assert target.__spec__.loader is target.__loader__\n"
        "assert not any(isinstance(f, _boot._AfterImport) for f in sys.meta_path)\n"
        "importlib.reload(target); assert seen == [True], seen\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})


def installed_line() -> str:
    return (Path(sysconfig.get_path("purelib")) / "deepspeed_resilience.pth").read_text()


def test_line_is_installed_as_setup_writes_it() -> None:
    tree = ast.parse((Path(__file__).parents[3] / "setup.py").read_text())
    written = {
        ast.unparse(statement.targets[0]): ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]).startswith("PTH_")
    }
    assert installed_line() == written["PTH_LINE"]
    assert written["PTH_NAME"] == "deepspeed_resilience.pth"


def test_line_costs_far_less_than_a_millisecond() -> None:
    line = compile(installed_line(), "pth", "exec")
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        exec(line, {})
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.0005


def test_other_interpreters_import_nothing_of_ours() -> None:
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import sys; assert 'resilience' not in sys.modules"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "resilience._boot" not in answer.stderr
