"""Stable identities of a node's devices: a GPU's UUID, or host and slot for a CPU.

GPUs are asked through nvidia-smi, so that the agent never opens a CUDA context on a device that belongs to a rank.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Sequence

from resilience.rpc.v1 import coordinator_pb2 as pb

__all__ = ["identify", "parse_nvidia_smi"]

_QUERY = ("--query-gpu=index,uuid,name", "--format=csv,noheader")
_QUERY_S = 30.0


def identify(slots: Sequence[int], *, node: str, use_gpu: bool) -> list[pb.Device]:
    """The devices behind these slots of `node`, which is this machine, in their order."""
    known = _gpus() if use_gpu else {}
    host = socket.gethostname() if node == "localhost" else node
    return [known.get(slot) or _cpu(host, slot) for slot in slots]


def parse_nvidia_smi(text: str) -> dict[int, pb.Device]:
    """Read `nvidia-smi --query-gpu=index,uuid,name --format=csv,noheader`; lines that are none of it are left out."""
    found = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",", maxsplit=2)]
        if len(fields) == 3 and fields[0].isdigit() and fields[1].startswith("GPU-"):
            slot = int(fields[0])
            found[slot] = pb.Device(slot=slot, device=fields[1], name=fields[2])
    return found


def _gpus() -> dict[int, pb.Device]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    try:
        answer = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=_QUERY_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_nvidia_smi(answer.stdout)


def _cpu(host: str, slot: int) -> pb.Device:
    return pb.Device(slot=slot, device=f"cpu:{host}:{slot}", name=f"slot {slot} of {host}")
