"""What `resilience doctor` looks at: whether this machine has what a run needs. Changes nothing but a probe file.

Each look is a function that returns one finding. Nothing here imports torch unless it is there, or DeepSpeed at all.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from resilience.clock import SystemClock
from resilience.coordinator.paths import state_home
from resilience.deepspeed.versions import TESTED_VERSIONS
from resilience.launch.network import is_free

__all__ = ["Finding", "Level", "diagnose"]

TESTED_TORCH = "2.13"
METRICS_PORT = 9464
MASTER_PORT = 29500
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_PER_RANK = 70 << 20
"""DeepSpeed's all-reduce buffer on the CPU, 66 MiB, and room for gloo."""
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "fuse.sshfs", "ceph", "9p"}
_MAX_SKEW_S = 2.0


class Level(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    """A run works, with less."""
    FAIL = "fail"
    """A run does not start, or not well."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    level: Level
    name: str
    detail: str
    fix: str = ""


def diagnose() -> list[Finding]:
    """All findings, in a fixed order."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    yield _python()
    yield _torch()
    yield _deepspeed()
    yield _boot()
    yield from _compilers()
    yield _operator()
    yield _cpu_kernel()
    yield _shared_memory_space()
    yield _shared_memory_leftovers()
    yield _port("metrics port", METRICS_PORT, "another free port is taken; set coordinator.metrics_port to choose one")
    yield _port("master port", MASTER_PORT, "give another one with --master_port")
    yield _writable(
        "run directory", Path.cwd(), "start from a directory that you may write to, or use --resilience-dir"
    )
    yield _state_directory()
    yield _clock()
    yield _accelerator()


def _python() -> Finding:
    # An older one cannot even read this file.
    return Finding(Level.OK, "python", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding(Level.WARN, "torch", "not installed: ranks need it", "pip install 'deepspeed-resilience[train]'")
    if not version.startswith(f"{TESTED_TORCH}."):
        return Finding(Level.FAIL, "torch", f"{version}, tested is {TESTED_TORCH}", f"install torch=={TESTED_TORCH}.*")
    return Finding(Level.OK, "torch", version)


def _deepspeed() -> Finding:
    version = _version("deepspeed")
    tested = ", ".join(TESTED_VERSIONS)
    if version is None:
        return Finding(
            Level.WARN, "deepspeed", "not installed: runs need it", "pip install 'deepspeed-resilience[train]'"
        )
    if version.partition("+")[0] not in TESTED_VERSIONS:
        return Finding(Level.FAIL, "deepspeed", f"{version}, tested is {tested}", f"install deepspeed=={tested}")
    return Finding(Level.OK, "deepspeed", version)


def _boot() -> Finding:
    """Whether a fresh interpreter with our option on its command line arms itself."""
    probe = "import sys; sys.exit(0 if 'resilience._boot' in sys.modules else 3)"
    code = subprocess.run([sys.executable, "-c", probe, "--resilience"], check=False, capture_output=True).returncode
    if code != 0:
        fix = "install the package with pip into this environment (not by PYTHONPATH), and do not use python -S or -I"
        return Finding(Level.FAIL, "start hook", "the .pth line is not active: --resilience would be unknown", fix)
    return Finding(Level.OK, "start hook", "the .pth line is active")


def _compilers() -> Iterator[Finding]:
    missing = "without it DeepSpeed's CPU all-reduce falls back to gloo"
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        yield Finding(Level.WARN, "compiler", f"no C++ compiler on PATH: {missing}", "install g++")
    else:
        yield Finding(Level.OK, "compiler", compiler)
    ninja = shutil.which("ninja")
    if ninja is None:
        fix = "pip install ninja, and put this environment's bin directory on PATH"
        yield Finding(Level.WARN, "ninja", f"not on PATH: {missing}", fix)
    else:
        yield Finding(Level.OK, "ninja", ninja)


def _operator() -> Finding:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    built = sorted(root.glob("**/deepspeed_shm_comm/*.so"))
    if not built:
        fix = "the first run on a CPU builds it, which takes about 30 s; scripts/setup does so beforehand"
        return Finding(Level.WARN, "shm operator", f"not built below {root}", fix)
    return Finding(Level.OK, "shm operator", str(built[0]))


def _cpu_kernel() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(Level.WARN, "CPU kernel", "unknown without torch", "see torch above")
    from resilience.kernels import sweep

    if sweep.is_compiled():
        return Finding(Level.OK, "CPU kernel", sweep.describe())
    fix = "only on a CPU: install gcc and Python's headers, then this package again (pip install --force-reinstall)"
    return Finding(Level.WARN, "CPU kernel", f"{sweep.describe()}: checks on the CPU cost more", fix)


def _shared_memory_space() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return Finding(Level.WARN, "/dev/shm", "not there", "mount a tmpfs at /dev/shm")
    free = shutil.disk_usage(SHARED_MEMORY).free
    ranks = os.cpu_count() or 1
    detail = f"{free / 2**20:,.0f} MiB free"
    if free < 2 * SHARED_MEMORY_PER_RANK:
        fix = "give it more room (docker run --shm-size=1g), or remove what is left over"
        return Finding(Level.FAIL, "/dev/shm", f"{detail}: no room for two ranks on the CPU (140 MiB)", fix)
    return Finding(Level.OK, "/dev/shm", f"{detail}, for up to {min(free // SHARED_MEMORY_PER_RANK, ranks)} CPU ranks")


def _shared_memory_leftovers() -> Finding:
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_"
    found = list(SHARED_MEMORY.glob(f"{prefix}*")) if SHARED_MEMORY.is_dir() else []
    if found:
        size = sum(path.stat().st_size for path in found) / 2**20
        fix = f"if no DeepSpeed run is going on: rm {SHARED_MEMORY}/{prefix}*"
        return Finding(Level.WARN, "leftovers", f"{len(found)} DeepSpeed buffers of yours, {size:,.0f} MiB", fix)
    return Finding(Level.OK, "leftovers", "none in /dev/shm")


def _port(name: str, port: int, fix: str) -> Finding:
    if is_free("127.0.0.1", port):
        return Finding(Level.OK, name, f"{port} is free")
    return Finding(Level.WARN, name, f"{port} is in use", fix)


def _writable(name: str, directory: Path, fix: str) -> Finding:
    probe = directory / f".resilience-probe.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return Finding(Level.FAIL, name, f"{directory} cannot be written ({error.strerror})", fix)
    return Finding(Level.OK, name, f"{directory} can be written")


def _state_directory() -> Finding:
    directory = state_home(os.environ)
    finding = _writable("state directory", directory, "set XDG_STATE_HOME to a local directory that you may write to")
    kind = _file_system(directory)
    if finding.level is Level.OK and kind in _NETWORK_FILE_SYSTEMS:
        fix = "set XDG_STATE_HOME to a local disk: SQLite's journal is unsafe on a network file system"
        return Finding(Level.FAIL, "state directory", f"{directory} lies on {kind}", fix)
    return finding


def _file_system(directory: Path) -> str:
    """Type of the file system that holds `directory`; empty where it cannot be known."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    resolved = str(directory.resolve())
    above = [mount for mount in mounts if f"{resolved}/".startswith(f"{mount[1].rstrip('/')}/")]
    return max(above, key=lambda mount: len(mount[1]))[2] if above else ""


def _clock() -> Finding:
    """This machine's clock against that of the file system: facts of several nodes are put in order by their times."""
    probe = Path.cwd() / f".resilience-probe.{os.getpid()}"
    try:
        probe.touch()
        skew_s = probe.stat().st_mtime - SystemClock().wall()
        probe.unlink()
    except OSError as error:
        return Finding(Level.WARN, "clock", f"cannot be compared ({error.strerror})", "see the run directory above")
    if abs(skew_s) > _MAX_SKEW_S:
        fix = "synchronise the clocks (chrony, ntpd): times in reports would contradict each other"
        return Finding(Level.WARN, "clock", f"{skew_s:+.1f} s against the file system's", fix)
    return Finding(Level.OK, "clock", "agrees with the file system's")


def _accelerator() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(Level.WARN, "accelerator", "unknown without torch", "see torch above")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding(Level.OK, "accelerator", f"{len(names)} × {names[0]}")
    if shutil.which("nvidia-smi"):
        fix = "install a CUDA build of torch (constraints/cuda.txt), or check the driver with nvidia-smi"
        return Finding(Level.WARN, "accelerator", "a driver is there, and torch sees no GPU", fix)
    return Finding(Level.OK, "accelerator", f"CPU only, {os.cpu_count()} cores")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
