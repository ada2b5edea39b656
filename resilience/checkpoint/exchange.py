"""Small facts between the ranks, as JSON in byte tensors: no pickle, and an error of one rank reaches all.

Collective: every rank of the default group calls each function, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed

from resilience.errors import CheckpointError, FencedError, ResilienceError

__all__ = ["agree", "attempt", "broadcast", "gather"]

T = TypeVar("T")


def gather(value: Any, device: torch.device) -> list[Any]:
    """Every rank's value, in rank order, on every rank.

    Args:
        value: anything that JSON can hold.
        device: where the process group's backend can communicate.
    """
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    world_size = torch.distributed.get_world_size()
    length = torch.tensor([content.numel()], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(world_size)]
    torch.distributed.all_gather(lengths, length)
    num_bytes = [int(each.item()) for each in lengths]
    padded = torch.zeros(max(num_bytes), dtype=torch.uint8, device=device)
    padded[: content.numel()] = content
    rows = [torch.zeros_like(padded) for _ in range(world_size)]
    torch.distributed.all_gather(rows, padded)
    return [json.loads(bytes(row[:count].cpu().numpy())) for row, count in zip(rows, num_bytes, strict=True)]


def broadcast(value: Any, device: torch.device) -> Any:
    """Rank 0's value on every rank; what the others pass is ignored."""
    content = bytearray(json.dumps(value).encode())
    length = torch.tensor([len(content)], dtype=torch.int64, device=device)
    torch.distributed.broadcast(length, 0)
    if torch.distributed.get_rank() == 0:
        row = torch.frombuffer(content, dtype=torch.uint8).to(device)
    else:
        row = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(row, 0)
    return json.loads(bytes(row.cpu().numpy()))


def agree(what: str, failure: BaseException | None, device: torch.device) -> None:
    """Raise on every rank if any rank failed: nobody is left waiting in a later collective.

    Raises:
        FencedError: some rank was fenced off.
        CheckpointError: some rank failed; the message names the first one and its failure.
    """
    mine = None if failure is None else {"text": _text(failure), "fenced": isinstance(failure, FencedError)}
    failures = [(rank, each) for rank, each in enumerate(gather(mine, device)) if each is not None]
    if not failures:
        return
    rank, first = failures[0]
    if any(each["fenced"] for _, each in failures):
        text = next(each["text"] for _, each in failures if each["fenced"])
        raise FencedError(text) from failure
    raise CheckpointError(f"{what} failed on rank {rank}: {first['text']}") from failure


def attempt(what: str, work: Callable[[], T], device: torch.device) -> T:
    """Do `work` on this rank; if it fails on any rank, raise on all (see `agree`).

    Only failures of the disk and of this package are shared: any other is a defect that must end the process.
    """
    failure: Exception | None = None
    try:
        result = work()
    except (OSError, ResilienceError) as error:
        failure = error
    agree(what, failure, device)
    return result


def _text(failure: BaseException) -> str:
    words = " ".join(str(failure).split())
    return words if isinstance(failure, ResilienceError) else f"{type(failure).__name__}: {words}"
