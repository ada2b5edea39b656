"""What this machine gives: shared memory, limits, ports, folders, its clock, its accelerators."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from resilience.clock import SystemClock
from resilience.coordinator.paths import state_home
from resilience.diagnosis.findings import Finding, Level, fail, ok, warn
from resilience.launch.network import is_free

__all__ = ["MAX_SKEW_S", "looks"]

METRICS_PORT = 9464
MASTER_PORT = 29500
MAX_SKEW_S = 2.0
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_PER_RANK = 70 << 20
"""DeepSpeed's all-reduce buffer on the CPU, 66 MiB, and room for gloo."""
NUM_SLOTS = 4
"""Copies of the state that an arena has room for, by default."""
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "fuse.sshfs", "ceph", "9p"}
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
_INFINIBAND = Path("/dev/infiniband")
_NVIDIA_SMI_S = 30.0


def looks() -> Iterator[Finding]:
    """All looks of this file."""
    yield _shared_memory_space()
    yield _shared_memory_leftovers()
    yield _locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_infiniband=_INFINIBAND.is_dir())
    yield _huge_pages(_HUGE_PAGES)
    yield _port("metrics port", METRICS_PORT, "another free port is taken; set coordinator.metrics_port to choose one")
    yield _port("master port", MASTER_PORT, "give another one with --master_port")
    yield _writable(
        "run directory", Path.cwd(), "start from a directory that you may write to, or use --resilience-dir"
    )
    yield _state_directory()
    yield _clock()
    yield _accelerator()
    yield from _driver()


def _shared_memory_space() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return warn("/dev/shm", "not there", "mount a tmpfs at /dev/shm")
    free = shutil.disk_usage(SHARED_MEMORY).free
    ranks = os.cpu_count() or 1
    detail = f"{free / 2**20:,.0f} MiB free"
    if free < 2 * SHARED_MEMORY_PER_RANK:
        fix = "give it more room (docker run --shm-size=1g), or remove what is left over"
        return fail("/dev/shm", f"{detail}: no room for two ranks on the CPU (140 MiB)", fix)
    state = free / NUM_SLOTS / 2**20
    return ok(
        "/dev/shm",
        f"{detail}: for up to {min(free // SHARED_MEMORY_PER_RANK, ranks)} CPU ranks, or for snapshots of up to "
        f"{state:,.0f} MiB of this node's training state ({NUM_SLOTS} copies)",
    )


def _shared_memory_leftovers() -> Finding:
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_"
    found = list(SHARED_MEMORY.glob(f"{prefix}*")) if SHARED_MEMORY.is_dir() else []
    if found:
        size = sum(path.stat().st_size for path in found) / 2**20
        fix = f"if no DeepSpeed run is going on: rm {SHARED_MEMORY}/{prefix}*"
        return warn("leftovers", f"{len(found)} DeepSpeed buffers of yours, {size:,.0f} MiB", fix)
    return ok("leftovers", "none in /dev/shm")


def _locked_memory(limit: int, *, has_infiniband: bool) -> Finding:
    if limit == resource.RLIM_INFINITY:
        return ok("locked memory", "no limit")
    detail = f"at most {limit / 2**20:,.0f} MiB"
    if not has_infiniband:
        return ok("locked memory", f"{detail}; matters with InfiniBand only, and there is none here")
    fix = "ulimit -l unlimited (LimitMEMLOCK=infinity in a systemd unit, --ulimit memlock=-1 in Docker)"
    return warn("locked memory", f"{detail}: NCCL cannot register its buffers with InfiniBand", fix)


def _huge_pages(folder: Path) -> Finding:
    """Memory that is set apart as huge pages and unused: neither ranks nor snapshots on tmpfs can have it."""
    idle = 0
    for size in folder.glob("hugepages-*kB"):
        try:
            kibibytes = int(size.name.removeprefix("hugepages-").removesuffix("kB"))
            idle += int((size / "free_hugepages").read_text()) * kibibytes << 10
        except (OSError, ValueError):
            continue
    if idle:
        fix = "sysctl vm.nr_hugepages=0, unless another program of this machine wants them"
        detail = f"{idle / 2**20:,.0f} MiB are set apart and unused: neither ranks nor snapshots can have them"
        return warn("huge pages", detail, fix)
    return ok("huge pages", "none set apart")


def _port(name: str, port: int, fix: str) -> Finding:
    if is_free("127.0.0.1", port):
        return ok(name, f"{port} is free")
    return warn(name, f"{port} is in use", fix)


def _writable(name: str, directory: Path, fix: str) -> Finding:
    probe = directory / f".resilience-probe.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return fail(name, f"{directory} cannot be written ({error.strerror})", fix)
    return ok(name, f"{directory} can be written")


def _state_directory() -> Finding:
    directory = state_home(os.environ)
    finding = _writable("state directory", directory, "set XDG_STATE_HOME to a local directory that you may write to")
    kind = _file_system(directory)
    if finding.level is Level.OK and kind in _NETWORK_FILE_SYSTEMS:
        fix = "set XDG_STATE_HOME to a local disk: SQLite's journal is unsafe on a network file system"
        return fail("state directory", f"{directory} lies on {kind}", fix)
    return finding if finding.level is not Level.OK else _owned("state directory", directory)


def _owned(name: str, directory: Path) -> Finding:
    """Who may write there can forge a journal, and with it cordon devices or have checkpoints taken for verified."""
    status = directory.stat()
    if status.st_uid != os.getuid():
        fix = "set XDG_STATE_HOME to a directory of your own"
        return warn(name, f"{directory} belongs to user {status.st_uid}", fix)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return warn(name, f"others may write to {directory}", f"chmod go-w {directory}")
    return ok(name, f"{directory} is yours, and only you can write there")


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
        return warn("clock", f"cannot be compared ({error.strerror})", "see the run directory above")
    if abs(skew_s) > MAX_SKEW_S:
        fix = "synchronise the clocks (chrony, ntpd): times in reports would contradict each other"
        return warn("clock", f"{skew_s:+.1f} s against the file system's", fix)
    return ok("clock", "agrees with the file system's")


def _accelerator() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return warn("accelerator", "unknown without torch", "see torch above")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ok("accelerator", f"{len(names)} × {names[0]}")
    if shutil.which("nvidia-smi"):
        fix = "install a CUDA build of torch (constraints/cuda.txt), or check the driver with nvidia-smi"
        return warn("accelerator", "a driver is there, and torch sees no GPU", fix)
    return ok("accelerator", f"CPU only, {os.cpu_count()} cores")


def _driver() -> Iterator[Finding]:
    """What NVML says through nvidia-smi, which opens no context on a device; nothing where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    query = ("--query-gpu=name,driver_version,ecc.mode.current", "--format=csv,noheader")
    try:
        answer = subprocess.run([program, *query], capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        fix = "run nvidia-smi by hand; in a container, start it with --gpus all"
        yield fail("GPU driver", f"nvidia-smi does not answer ({type(error).__name__})", fix)
        return
    yield from _gpus(answer.stdout)


def _gpus(text: str) -> Iterator[Finding]:
    """From nvidia-smi's lines of name, driver and ECC mode."""
    gpus = [[field.strip() for field in line.split(",")] for line in text.splitlines() if line.count(",") >= 2]
    if not gpus:
        yield warn("GPU driver", "nvidia-smi lists no GPU", "see CUDA_VISIBLE_DEVICES, or the container's --gpus")
        return
    yield ok("GPU driver", f"{gpus[0][-2]}, {len(gpus)} × {gpus[0][0]}")
    without = [str(index) for index, gpu in enumerate(gpus) if gpu[-1] == "Disabled"]
    if without:
        fix = "nvidia-smi -e 1, then a reset: with ECC off, flipped bits in memory go unseen"
        yield warn("GPU memory", f"ECC is off on GPU {', '.join(without)}", fix)
    else:
        yield ok("GPU memory", f"ECC {gpus[0][-1].lower()}")
