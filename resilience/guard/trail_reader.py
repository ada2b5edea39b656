"""A trail read back: the steps that a script is led past, and generator states put where they were.

Nothing of a trail is used that its snapshot's manifest does not vouch for. Never here: engines, decisions.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from resilience.errors import SnapshotError
from resilience.guard.outputs import Node, Refuse, decode
from resilience.guard.rng import RngSource
from resilience.guard.trail_format import read_frames

__all__ = ["LedForward", "LedStep", "read_trail", "set_rng"]


@dataclasses.dataclass(frozen=True, slots=True)
class LedForward:
    """A forward that was recorded."""

    trains: bool
    micro_step: int
    inputs: str
    """Mark of its inputs."""
    outputs: Node
    tensors: tuple[Any, ...]
    rng: Mapping[str, Any]
    blob: bytes

    def result(self, refuse: Refuse) -> Any:
        """What it returned.

        Raises:
            SnapshotError: it cannot be built again.
        """
        return decode(self.outputs, [_tensor(record, self.blob) for record in self.tensors], refuse)


@dataclasses.dataclass(frozen=True, slots=True)
class LedStep:
    """An optimizer step that was recorded."""

    step: int
    forwards: tuple[LedForward, ...]
    applied: bool
    norm: Any
    deterministic: bool | None
    rng: Mapping[str, Any]
    blob: bytes

    @property
    def grad_norm(self) -> Any:
        """None, a number, or a tensor of one element, as the engine had it."""
        return _tensor(self.norm, self.blob) if isinstance(self.norm, list) else self.norm


def read_trail(content: bytes, *, after: int, through: int, source: str) -> dict[int, LedStep]:
    """The steps from `after` + 1 to `through`.

    Raises:
        SnapshotError: it is damaged, has ended before, or does not reach back so far.
    """
    steps: dict[int, LedStep] = {}
    for body, blob in read_frames(content, source=source):
        if "off" in body:
            raise SnapshotError(f"{source}: ended before step {through}: {body['off']}")
        try:
            step = _step(body, blob)
        except (KeyError, TypeError) as error:
            raise SnapshotError(f"{source}: not a trail of this version ({error!r})") from None
        if after < step.step <= through:
            steps[step.step] = step
    missing = next((step for step in range(after + 1, through + 1) if step not in steps), None)
    if missing is not None:
        raise SnapshotError(f"{source}: does not hold step {missing}, with which the script begins after {after}")
    return steps


def set_rng(record: Mapping[str, Any], blob: bytes, source: RngSource) -> None:
    """Put the generators that `record` names to where they were."""
    if "cpu" in record:
        torch.set_rng_state(_bytes(record["cpu"], blob))
    if record.get("devices") and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(record["devices"][0], blob))
    if "numpy" in record:
        name, (offset, size), position, has_gauss, gauss = record["numpy"]
        keys = np.frombuffer(blob[offset : offset + size], dtype="<u4")
        np.random.set_state((name, keys, position, has_gauss, gauss))
    if "python" in record:
        version, (offset, size), next_gauss = record["python"]
        words = np.frombuffer(blob[offset : offset + size], dtype="<u4")
        random.setstate((version, tuple(words.tolist()), next_gauss))
    if "tracked" in record:
        source.set_rng_states({name: _bytes(place, blob) for name, place in record["tracked"].items()})


def _step(body: Mapping[str, Any], blob: bytes) -> LedStep:
    forwards = tuple(
        LedForward(
            trains=event["trains"],
            micro_step=event["micro_step"],
            inputs=event["inputs"],
            outputs=event["outputs"],
            tensors=tuple(event["tensors"]),
            rng=event["rng"],
            blob=blob,
        )
        for event in body["events"]
    )
    return LedStep(
        step=body["step"],
        forwards=forwards,
        applied=body["applied"],
        norm=body["norm"],
        deterministic=body["deterministic"],
        rng=body["rng"],
        blob=blob,
    )


def _bytes(place: list[int], blob: bytes) -> torch.Tensor:
    offset, size = place
    return torch.frombuffer(bytearray(blob[offset : offset + size]), dtype=torch.uint8)


def _tensor(record: Any, blob: bytes) -> torch.Tensor:
    dtype, shape, place, device = record
    content = _bytes(place, blob) if place[1] else torch.empty(0, dtype=torch.uint8)
    return content.view(getattr(torch, dtype)).reshape(shape).to(device)
