"""What is installed: Python, packages against what this one requires, the start hook, compilers and what they built."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from resilience.deepspeed.versions import TESTED_VERSIONS
from resilience.diagnosis.findings import Finding, fail, ok, version_of, warn

__all__ = ["looks"]

TESTED_TORCH = "2.13"
_DISTRIBUTION = "deepspeed-resilience"


def looks() -> Iterator[Finding]:
    """All looks of this file."""
    yield _python()
    yield _torch()
    yield _deepspeed()
    yield _requirements(importlib.metadata.requires(_DISTRIBUTION) or [])
    yield _boot()
    yield from _compilers()
    yield _operator()
    yield _cpu_kernel()


def _python() -> Finding:
    # An older one cannot even read this file.
    return ok("python", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def _torch() -> Finding:
    version = version_of("torch")
    if version is None:
        return warn("torch", "not installed: ranks need it", "pip install 'deepspeed-resilience[train]'")
    if not version.startswith(f"{TESTED_TORCH}."):
        return fail("torch", f"{version}, tested is {TESTED_TORCH}", f"install torch=={TESTED_TORCH}.*")
    return ok("torch", version)


def _deepspeed() -> Finding:
    version = version_of("deepspeed")
    tested = ", ".join(TESTED_VERSIONS)
    if version is None:
        return warn("deepspeed", "not installed: runs need it", "pip install 'deepspeed-resilience[train]'")
    if version.partition("+")[0] not in TESTED_VERSIONS:
        return fail("deepspeed", f"{version}, tested is {tested}", f"install deepspeed=={tested}")
    return ok("deepspeed", version)


def _requirements(required: Sequence[str]) -> Finding:
    """What this package requires, of it and of `train`, against what is installed; what is not there is named above."""
    if importlib.util.find_spec("packaging") is None:
        return warn("requirements", "unknown without packaging", "pip install packaging")
    from packaging.requirements import Requirement

    wrong, count = [], 0
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "train"}):
            continue
        version = version_of(requirement.name)
        is_core = requirement.marker is None
        if version is None and is_core:
            wrong.append(f"{requirement.name} is missing")
        elif version is not None and not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        count += version is not None
    if wrong:
        fix = "pip install -c constraints/cpu.txt (on a GPU: cuda.txt) 'deepspeed-resilience[train]'"
        return fail("requirements", "; ".join(wrong), fix)
    return ok("requirements", f"{count} packages, all of versions that are known to work")


def _boot() -> Finding:
    """Whether a fresh interpreter with our option on its command line arms itself."""
    probe = "import sys; sys.exit(0 if 'resilience._boot' in sys.modules else 3)"
    code = subprocess.run([sys.executable, "-c", probe, "--resilience"], check=False, capture_output=True).returncode
    if code != 0:
        fix = "install the package with pip into this environment (not by PYTHONPATH), and do not use python -S or -I"
        return fail("start hook", "the .pth line is not active: --resilience would be unknown", fix)
    return ok("start hook", "the .pth line is active")


def _compilers() -> Iterator[Finding]:
    missing = "without it DeepSpeed's CPU all-reduce falls back to gloo"
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        yield warn("compiler", f"no C++ compiler on PATH: {missing}", "install g++")
    else:
        yield ok("compiler", compiler)
    ninja = shutil.which("ninja")
    if ninja is None:
        fix = "pip install ninja, and put this environment's bin directory on PATH"
        yield warn("ninja", f"not on PATH: {missing}", fix)
    else:
        yield ok("ninja", ninja)


def _operator() -> Finding:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    built = sorted(root.glob("**/deepspeed_shm_comm/*.so"))
    if not built:
        fix = "the first run on a CPU builds it, which takes about 30 s; scripts/setup does so beforehand"
        return warn("shm operator", f"not built below {root}", fix)
    return ok("shm operator", str(built[0]))


def _cpu_kernel() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return warn("CPU kernel", "unknown without torch", "see torch above")
    from resilience.kernels import sweep

    if sweep.is_compiled():
        return ok("CPU kernel", sweep.describe())
    fix = "only on a CPU: install gcc and Python's headers, then this package again (pip install --force-reinstall)"
    return warn("CPU kernel", f"{sweep.describe()}: checks on the CPU cost more", fix)
