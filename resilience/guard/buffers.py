"""Which buffers of a model a forward mutates (batch statistics, counters), with copies of exactly those.

The first forwards copy every buffer and compare values, because some kernels write without touching the version counter
(batch normalisation's running statistics). A buffer that does not change then is only watched by its version counter.
"""

from __future__ import annotations

import torch

__all__ = ["BufferWatch"]

_TRIAL_FORWARDS = 2


class BufferWatch:
    """Watches the buffers of `module`: `capture` before each forward, `changed_unseen` after it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._num_captures = 0
        self._mutated: set[str] = set()
        self._marks: dict[str, tuple[torch.Tensor, int]] = {}
        self._copies: dict[str, torch.Tensor] = {}

    def capture(self) -> dict[str, torch.Tensor]:
        """Copies of the buffers that a forward may mutate, by name."""
        buffers = dict(self._module.named_buffers())
        self._num_captures += 1
        names = buffers if self._is_trial else self._mutated & buffers.keys()
        self._marks = {name: (buffer, buffer._version) for name, buffer in buffers.items()}
        self._copies = {name: buffers[name].detach().clone() for name in names}
        return self._copies

    def changed_unseen(self) -> str:
        """Why the forward cannot be run again, if it mutated a buffer that was not copied; else empty."""
        unseen = ""
        for name, buffer in self._module.named_buffers():
            if not self._has_changed(name, buffer):
                continue
            if name not in self._copies:
                unseen = unseen or f"buffer {name!r} was changed by the forward for the first time"
            self._mutated.add(name)
        return unseen

    @torch.no_grad()
    def restore(self, copies: dict[str, torch.Tensor]) -> None:
        """Put the copied values back, into the buffers as they are now."""
        if not copies:
            return
        buffers = dict(self._module.named_buffers())
        for name, copy in copies.items():
            buffers[name].copy_(copy)

    @property
    def _is_trial(self) -> bool:
        return self._num_captures <= _TRIAL_FORWARDS

    def _has_changed(self, name: str, buffer: torch.Tensor) -> bool:
        mark = self._marks.get(name)
        if mark is None or mark[0] is not buffer or mark[1] != buffer._version:
            return True
        return self._is_trial and not torch.equal(buffer, self._copies[name])
