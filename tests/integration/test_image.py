"""The image's steps, replayed without an engine: what they install has no torch, serves as nobody, is probed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.integration.harness import free_port, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.long]

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
NOBODY = 10001
DROP = """
import ctypes, os, sys
PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 38, 65, 1
libc = ctypes.CDLL(None)
if {uid}:
    os.setgroups([]); os.setgid({uid}); os.setuid({uid})
libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)  # MemoryDenyWriteExecute= of the systemd unit
os.execv(sys.argv[1], sys.argv[1:])
"""


def steps() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", "\n".join(x for x in DOCKERFILE.read_text().splitlines() if not x.startswith("#")))
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def words_of(kind: str) -> list[str]:
    """The words of the only ENTRYPOINT, or of the command of the only HEALTHCHECK."""
    (found,) = (json.loads(words[words.index("[") :]) for name, words in steps() if name == kind)
    return list(found)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage, with another root in place of /."""
    root = tmp_path_factory.mktemp("image")
    os.chmod(root.parent, 0o755)
    os.chmod(root, 0o755)
    source = root / "source"
    source.mkdir()
    (root / "opt").mkdir()
    for kind, words in steps():
        if kind == "COPY" and not words.startswith("--from"):
            *froms, to = words.split()
            for name in froms:
                target = source / to / name if to.endswith("/") else source / to
                target.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
                else:
                    shutil.copy(ROOT / name, target)
        elif kind == "RUN" and "/opt/resilience" in words and "useradd" not in words:
            command = words.replace("/opt/", f"{root}/opt/").replace("python -m", f"{sys.executable} -m", 1)
            done = subprocess.run(
                ["sh", "-c", command], cwd=source, capture_output=True, text=True, timeout=280, check=False
            )
            if "No matching distribution" in done.stderr or "Temporary failure in name resolution" in done.stderr:
                pytest.skip("no index to install from")
            assert done.returncode == 0, done.stderr[-2000:]
    return root / "opt" / "resilience"


def test_what_the_image_installs_serves_without_torch_and_without_rights(image: Path, tmp_path: Path) -> None:
    found = subprocess.run([image / "bin" / "pip", "list"], capture_output=True, text=True, check=True, timeout=60)
    assert not re.search(r"(?m)^(torch|deepspeed|numpy) ", found.stdout)
    state = tmp_path / "state"
    state.mkdir()
    token = state / "token"
    token.touch(mode=0o600)
    token.write_text("a-token-that-is-long-enough")
    # Another user can be taken by root only, and only if that one may read this Python.
    python = Path(sys.executable).resolve()
    as_nobody = os.geteuid() == 0 and all(path.stat().st_mode & 0o001 for path in (python, *python.parents))
    if as_nobody:
        for path in (state, token):
            os.chown(path, NOBODY, NOBODY)
        for path in tmp_path.parents:
            if path.is_relative_to("/tmp/pytest-of-root"):
                os.chmod(path, 0o755)
        os.chmod(tmp_path, 0o755)
    environment = dict(re.findall(r"([A-Z_]+)=(\S+)", next(words for kind, words in steps() if kind == "ENV")))
    port, metrics_port = free_port(), free_port()
    environment |= {
        "PATH": f"{image}/bin:/usr/bin:/bin",
        "XDG_STATE_HOME": str(state / "state"),
        "RESILIENCE_COORDINATOR__PORT": str(port),
        "RESILIENCE_COORDINATOR__METRICS_PORT": str(metrics_port),
    }
    program, *words = words_of("ENTRYPOINT")
    words += ["--run-id", "r1", "--run-dir", str(state / "runs" / "r1"), "--token-file", str(token)]
    command = [str(image / "bin" / program), *words]
    command = [sys.executable, "-c", DROP.format(uid=NOBODY if as_nobody else 0), *command]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stderr=out, env=environment, cwd=state)
    check = [word.replace(":9464/", f":{metrics_port}/") for word in words_of("HEALTHCHECK")]
    try:
        probe = [str(image / "bin" / check[0]), *check[1:]]
        wait_for(
            lambda: subprocess.run(probe, capture_output=True, timeout=20, check=False).returncode == 0,
            what=f"a coordinator: {log.read_text()}",
            timeout_s=30,
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as answer:
            metrics = answer.read().decode()
        assert 'resilience_coordinator_up{run="r1"} 1.0' in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)
    assert json.loads((state / "runs" / "r1" / "report.json").read_text())["run_id"] == "r1"
    if as_nobody:
        assert (state / "runs" / "r1" / "report.json").stat().st_uid == NOBODY
