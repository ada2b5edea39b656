"""The trail of a rank: what a restarted script is led forward with, written beside the snapshots as training goes on.

For each optimizer step: the forwards in their order, each with a mark of its inputs, what it returned as far as that is
small, and the generators' states where it drew from them; and what became of the step. A few hundred bytes for each
forward, five thousand more where it draws on the CPU. Values on a device are read at the end of the step, where the
optimizer has waited for the device already. Never here: reading a trail back (`fast_forward.py`), decisions.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resilience.guard.input_mark import InputMark
from resilience.guard.outputs import Node, encode, tensors_in
from resilience.guard.recorder import ForwardEvent
from resilience.guard.rng import RngSnapshot, RngSource, capture_rng
from resilience.guard.trail_format import Blob, frame

__all__ = ["Began", "StepOutcome", "TrailWriter"]

TRAINING_BYTES_MAX = 4 << 10
"""Outputs of a training forward up to this size are kept by value: a small classifier's answers, not logits of text."""
EVALUATION_BYTES_MAX = 64 << 10

RngRecord = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Began:
    """What was so just before a forward."""

    mark: InputMark
    rng: RngSnapshot


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of an optimizer step, as scripts ask the engine for it."""

    applied: bool
    grad_norm: Any
    """None, a number, or a tensor of one element."""


@dataclasses.dataclass(slots=True)
class _Forward:
    micro_step: int
    event: ForwardEvent | None
    """The recorder's record of it; None in evaluation."""
    mark: InputMark
    outputs: Node
    tensors: list[torch.Tensor]
    differentiable: list[int | None]
    """For each differentiable output, in order, which of `tensors` it is; None where it was too large."""
    before: RngSnapshot
    after: RngSnapshot

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors) + 200


class TrailWriter:
    """Implements `resilience.guard.memory.Trail`.

    Args:
        path: `trail.bin` of this rank in the arena.
        bytes_max: where the trail ends, and says so.
        source: of DeepSpeed's generator states.
        outcome: what became of the step that was just taken.
        tell: called once with the reason, if the trail ends.
    """

    def __init__(
        self,
        path: Path,
        *,
        bytes_max: int,
        source: RngSource,
        outcome: Callable[[], StepOutcome],
        tell: Callable[[str], None],
    ) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._source = source
        self._outcome = outcome
        self._tell = tell
        self._pending: list[_Forward] = []
        self._num_pending_bytes = 0
        self._last_step: int | None = None
        self._num_bytes = 0
        self._has_begun = self._has_ended = False

    @property
    def num_bytes(self) -> int:
        """Size of the file; what a snapshot taken now needs of it."""
        return self._num_bytes

    def continue_from(self, content: bytes, step: int) -> None:
        """Begin with an earlier generation's trail, which ends with `step`. Where it cannot be written, the trail ends.

        The file is replaced, not cut: the prepared folder may hold links to it.
        """
        temporary = self._path.with_name(f".{self._path.name}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._give_up(error)
            return
        self._has_begun, self._num_bytes = True, len(content)
        self._last_step = step if content else None

    def before_forward(self, args: Any, kwargs: Any) -> Began | None:
        """A forward of the engine begins. None where nothing is kept any more."""
        return None if self._has_ended else Began(InputMark((args, kwargs)), capture_rng(self._source))

    def after_forward(self, began: Began | None, micro_step: int, event: ForwardEvent | None, outputs: Any) -> None:
        """It has run; `event` is what the recorder has of it, None in evaluation."""
        if began is None:
            return
        limit = TRAINING_BYTES_MAX if event is not None else EVALUATION_BYTES_MAX
        node, kept = encode(outputs, bytes_max=limit)
        forward = _Forward(
            micro_step=micro_step,
            event=event,
            mark=began.mark,
            outputs=node,
            tensors=kept,
            differentiable=_differentiable(outputs, limit) if event is not None else [],
            before=began.rng,
            after=capture_rng(self._source),
        )
        self._pending.append(forward)
        self._num_pending_bytes += forward.num_bytes
        if self._num_bytes + self._num_pending_bytes > self._bytes_max:
            self._end("budget")

    def forward_replayed(self, event: ForwardEvent, outputs: list[torch.Tensor]) -> None:
        """A replay gave this training forward other differentiable outputs; those of earlier steps stay as told."""
        forward = next((each for each in self._pending if each.event is event), None)
        if forward is None:
            return
        for place, output in zip(forward.differentiable, outputs, strict=False):
            if place is not None:
                forward.tensors[place] = output.detach().clone()

    def step_taken(self, step: int, *, deterministic: bool | None) -> None:
        """`engine.step()` is about to return after the optimizer step `step`.

        Args:
            step: its number.
            deterministic: whether replays were measured to be bit-equal; None where nobody knows yet.
        """
        if self._has_ended:
            return
        if self._last_step is not None and step != self._last_step + 1:
            self._end(f"the script went from step {self._last_step} to step {step}")
            return
        content = self._frame(step, deterministic)
        self._pending, self._num_pending_bytes = [], 0
        if self._num_bytes + len(content) > self._bytes_max:
            self._end("budget")
            return
        self._append(content)
        self._last_step = step

    def _frame(self, step: int, deterministic: bool | None) -> bytes:
        blob, outcome = Blob(), self._outcome()
        events = [
            {
                "micro_step": forward.micro_step,
                "trains": forward.event is not None,
                "inputs": forward.mark.value(),
                "outputs": forward.outputs,
                "tensors": [_tensor_record(tensor, blob) for tensor in forward.tensors],
                "rng": rng_record(forward.before, forward.after, blob),
            }
            for forward in self._pending
        ]
        # What the script itself drew meanwhile is in here too: it is led to where it was.
        before = self._pending[-1].after if self._pending else None
        norm, num_norms = outcome.grad_norm, isinstance(outcome.grad_norm, torch.Tensor)
        body = {
            "step": step,
            "events": events,
            "rng": rng_record(before, capture_rng(self._source), blob),
            "applied": outcome.applied,
            "norm": _tensor_record(norm.detach(), blob) if num_norms else None if norm is None else float(norm),
            "deterministic": deterministic,
        }
        return frame(body, bytes(blob))

    def _append(self, content: bytes) -> None:
        if not self._has_begun:
            self.continue_from(b"", 0)
        if self._has_ended:
            return
        try:
            with self._path.open("ab") as file:
                file.write(content)
        except OSError as error:
            self._give_up(error)
            return
        self._num_bytes += len(content)

    def _give_up(self, error: OSError) -> None:
        """The arena takes no more: training goes on, and a restart begins from what the script loads by itself."""
        self._pending, self._num_pending_bytes = [], 0
        self._has_ended = True
        self._tell(f"the trail {self._path} cannot be written ({error.strerror})")

    def _end(self, why: str) -> None:
        if why == "budget":
            why = f"the trail has reached snapshot.trail_max_mib = {self._bytes_max / (1 << 20):g}"
        self._pending, self._num_pending_bytes = [], 0
        self._append(frame({"off": why}))
        if not self._has_ended:
            self._has_ended = True
            self._tell(why)


def _differentiable(outputs: Any, bytes_max: int) -> list[int | None]:
    """Which of the tensors that `encode` keeps each differentiable output is."""
    places: list[int | None] = []
    num_kept = 0
    for tensor in tensors_in(outputs):
        is_kept = tensor.layout is torch.strided and (tensor.numel() == 1 or tensor.nbytes <= bytes_max)
        if tensor.grad_fn is not None:
            places.append(num_kept if is_kept else None)
        num_kept += is_kept
    return places


def _tensor_record(tensor: torch.Tensor, blob: Blob) -> list[Any]:
    """[dtype, shape, place of the bytes, device]."""
    content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), blob.put(content), str(tensor.device)]


def rng_record(before: RngSnapshot | None, after: RngSnapshot, blob: Blob) -> RngRecord:
    """The generator states that differ between two moments, all of them without a `before`; empty where none does."""
    record: RngRecord = {}
    if before is None or not torch.equal(before.cpu, after.cpu):
        record["cpu"] = blob.put(after.cpu.numpy().tobytes())
    if before is None or not _equal(before.devices, after.devices):
        record["devices"] = [blob.put(state.cpu().numpy().tobytes()) for state in after.devices]
    if before is None or not _is_same_numpy(before.numpy, after.numpy):
        name, keys, *rest = after.numpy
        record["numpy"] = [name, blob.put(keys.astype("<u4").tobytes()), *rest]
    if before is None or before.python != after.python:
        version, words, gauss = after.python
        record["python"] = [version, blob.put(np.array(words, dtype="<u4").tobytes()), gauss]
    if before is None or not _equal(tuple(before.tracked.values()), tuple(after.tracked.values())):
        record["tracked"] = {key: blob.put(state.cpu().numpy().tobytes()) for key, state in after.tracked.items()}
    return record


def _equal(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _is_same_numpy(first: Any, second: Any) -> bool:
    return bool(first[2:] == second[2:] and np.array_equal(first[1], second[1]))
