"""Programs that a test needs and Python's registry has not: Debian's packages, installed where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

__all__ = ["command_of"]

_INSTALL_S = 240


def command_of(program: str, package: str) -> str:
    """The path of `program`; `package` is installed where it is missing, or the test is skipped."""
    found = shutil.which(program)
    if found is not None:
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"no {program} here, and apt-get needs root to install it")
    if not _apt_get("install", "-y", "--no-install-recommends", package):
        _apt_get("update")
        _apt_get("install", "-y", "--no-install-recommends", package)
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"no {program} here, and the package {package} cannot be installed")
    return found


def _apt_get(*words: str) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    answer = subprocess.run(["apt-get", *words], env=environment, capture_output=True, timeout=_INSTALL_S, check=False)
    return answer.returncode == 0
