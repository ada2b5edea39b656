"""A rank that is forked from the standby process cannot be told from one that was started anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from resilience.imported import ImportNote, installed_modules, read, shared_name
from resilience.launch.standby import Adopted
from resilience.launch.zygote import _RefusedError, require_no_shadow, require_same_environment, warm

AGENT = Path(__file__).parent / "standby_agent.py"

SHOW = """
import atexit, json, os, random, signal, sys, threading, warnings
atexit.register(lambda: print("at exit", flush=True))
import local_part
print(json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "name": __name__, "globals": sorted(globals()),
    "file": __file__, "has_spec": __spec__ is not None, "is_main": sys.modules["__main__"].__dict__ is globals(),
    "environment": dict(os.environ), "folder": os.getcwd(),
    "leads_session": os.getsid(0) == os.getpgid(0) == os.getpid(),
    "threads": threading.active_count(), "descriptors": sorted(os.listdir("/proc/self/fd"), key=int)[:-1],
    "flags": list(sys.flags), "filters": [str(item) for item in warnings.filters],
    "handlers": [str(signal.getsignal(number)) for number in (2, 13, 15)], "priority": os.nice(0),
    "streams": [sys.stdout.line_buffering, sys.stdout.write_through, sys.stderr.errors],
    "command": open("/proc/self/cmdline").read().rstrip(chr(0)), "local": local_part.WORD,
    "traced": sys.gettrace() is not None, "hash_seed": hash("word") if os.environ.get("PYTHONHASHSEED") else None,
}), flush=True)
"""
ENDINGS = {
    "returns": ("", 0),
    "exits": ("sys.exit(7)", 7),
    "raises": ("def deep():\n    raise ValueError('bad')\ndeep()", 1),
    "dies": ("os.kill(os.getpid(), 9)", -9),
    "terminated": ("os.kill(os.getpid(), 15)", -15),
    "interrupted": ("signal.raise_signal(2)", -2),
    "hook": ("sys.excepthook = lambda *error: print('my hook', error[0].__name__)\n1 / 0", 1),
}


def stand_in(folder: Path, *commands: list[str]) -> dict[str, Any]:
    """What standby_agent.py found."""
    note = {"modules": ["json", "random", "threading", "warnings"], "operators": [], "changed_variables": []}
    (folder / "imported.json").write_text(json.dumps(note))
    (folder / "commands.json").write_text(json.dumps(commands))
    answer = subprocess.run(
        [sys.executable, str(AGENT), str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": "5"},
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    found["said"] = answer.stderr
    return found


def shown(folder: Path, name: str) -> tuple[dict[str, Any], list[str]]:
    """What the script said of itself, and its further lines."""
    first, *others = (folder / f"{name}.out").read_text().splitlines()
    return json.loads(first), others


def test_a_forked_script_sees_and_leaves_what_a_fresh_one_does(tmp_path: Path) -> None:
    for ending, (code, _) in ENDINGS.items():
        (tmp_path / f"{ending}.py").write_text(SHOW + code)
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    (tmp_path / "trainer" / "run.py").write_text(SHOW + "raise ValueError('bad')")
    (tmp_path / "local_part.py").write_text("WORD = 'first'")
    commands = [[sys.executable, "-u", f"{ending}.py", "--local_rank=0", "x y"] for ending in ENDINGS]
    commands.append([sys.executable, "-u", "-m", "trainer.run", "a"])
    found = stand_in(tmp_path, *commands)
    for index, expected in enumerate([*(code for _, code in ENDINGS.values()), 1]):
        assert found[f"anew-{index}"] == {"is_forked": False, "code": expected}
        assert found[f"forked-{index}"] == {"is_forked": True, "code": expected}
        (anew, lines), (forked, lines_of_forked) = (shown(tmp_path, f"{name}-{index}") for name in ("anew", "forked"))
        generations = [each["environment"].pop("RESILIENCE_GENERATION") for each in (anew, forked)]
        assert generations == ["1", "2"]
        assert forked == anew
        assert lines_of_forked == lines
        errors = [(tmp_path / f"{name}-{index}.err").read_text() for name in ("anew", "forked")]
        if commands[index][2] == "-m" or expected == -2:  # frames of Python's own, or of ours, are shown there, too
            errors = [text.splitlines()[-1] for text in errors]
        assert errors[1] == errors[0]
    assert found["left"] == []


def test_the_scripts_own_modules_are_read_anew_each_time(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SHOW)
    (tmp_path / "local_part.py").write_text("WORD = 'first'")
    (tmp_path / "changed.py").write_text("WORD = 'second, which is longer'")
    found = stand_in(tmp_path, [sys.executable, "-u", "train.py"])
    assert found["again"] == {"is_forked": True, "code": 0}
    words = [shown(tmp_path, name)[0]["local"] for name in ("forked-0", "again")]
    assert words == ["first", "second, which is longer"]


def test_without_a_fit_standby_process_ranks_start_anew_and_it_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('here')")
    found = stand_in(tmp_path, [sys.executable, "-u", "train.py"])
    assert found["other_environment"] == {"is_forked": False, "code": 0}
    assert found["zygote_dead"] == {"is_forked": False, "code": 0}
    assert found["said"].count("LD_LIBRARY_PATH has changed") == 1
    assert found["said"].count("the standby process is gone") == 1
    assert (tmp_path / "dead.out").read_text() == "here\n"


def test_a_program_that_is_no_python_script_has_no_standby(tmp_path: Path) -> None:
    found = stand_in(tmp_path, ["/bin/sh", "-c", "exit 4"])
    assert found["forked-0"] == {"is_forked": False, "code": 4}
    assert found["said"] == ""


def test_a_module_beside_the_script_that_hides_an_installed_one_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    command = [sys.executable, "-u", str(tmp_path / "train.py")]
    require_no_shadow(command, "/", ["numpy", "json.decoder"])
    (tmp_path / "data").mkdir()
    require_no_shadow(command, "/", ["data"])  # a folder of files is no package in front of an installed one
    (tmp_path / "numpy.py").touch()
    with pytest.raises(_RefusedError, match=r"numpy\.py is imported by the script in place of"):
        require_no_shadow(command, "/", ["numpy"])


def test_variables_that_differ_by_design_are_no_difference() -> None:
    require_same_environment({"PATH": "/bin"}, {"PATH": "/bin", "RANK": "1", "RESILIENCE_GENERATION": "2"})
    with pytest.raises(_RefusedError, match="CUDA_VISIBLE_DEVICES has changed"):
        require_same_environment({"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "0"})
    assert not shared_name("TORCHELASTIC_RUN_ID")


@pytest.mark.parametrize(
    ("source", "changed", "problem"),
    [
        ("import os\nos.environ.get('LOCAL_RANK')", (), "reads LOCAL_RANK while it is imported"),
        ("import os\nos.environb.get(b'RANK')", (), "reads RANK while it is imported"),
        ("import os\nos.getenv('HF_HOME')", ("HF_HOME",), "reads HF_HOME while it is imported"),
        ("", ("OMP_NUM_THREADS",), "the script sets OMP_NUM_THREADS itself"),
    ],
)
def test_imports_that_would_be_others_in_a_rank_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, changed: tuple[str, ...], problem: str
) -> None:
    from resilience.imported import Imported

    (tmp_path / "asks_at_import.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "asks_at_import", raising=False)
    waited: list[float] = []
    with pytest.raises(_RefusedError, match=problem):
        warm(Imported(("asks_at_import",), (), changed), pause=waited.append)
    assert len(waited) == 1


def test_only_installed_modules_are_noted(tmp_path: Path) -> None:
    import numpy

    local = types.ModuleType("local_part")
    local.__spec__ = types.SimpleNamespace(origin=str(tmp_path / "local_part.py"), name="local_part")  # type: ignore[assignment]
    renamed = types.ModuleType("another_name")
    renamed.__spec__ = numpy.__spec__
    assert installed_modules({"numpy": numpy, "local_part": local, "another_name": renamed, "json": json}) == (
        "numpy",
        "json",
    )


def test_the_note_is_written_once_when_the_second_step_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_BY_THE_SCRIPT", "of-nobodys-business")
    path = tmp_path / "imported.json"
    note = ImportNote(path)
    note.begin(4, 0, 0)
    note.begin(4, 1, 0)
    assert read(path) is None
    note.begin(5, 0, 0)
    found = read(path)
    assert found is not None
    assert {"json", "pytest", "resilience.imported"} <= set(found.modules)
    assert __name__ not in found.modules
    assert "SET_BY_THE_SCRIPT" in found.changed_variables
    assert "of-nobodys-business" not in path.read_text()
    path.unlink()
    note.begin(6, 0, 0)
    assert not path.exists()


def test_an_adopted_child_ends_as_one_of_our_own() -> None:
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    child = Adopted(pid)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.0)
    child.send_signal(15)
    assert child.wait(10) == -15
    child.send_signal(9)  # nobody has this pid now, or somebody else
    assert child.poll() == -15
