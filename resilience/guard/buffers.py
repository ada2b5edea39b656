"""Which buffers of a model a forward mutates (batch statistics, counters), with copies of exactly those.

The first forwards copy every buffer; a buffer that does not change then is only watched by its version counter.
"""

from __future__ import annotations

import torch

__all__ = ["BufferWatch"]

_TRIAL_FORWARDS = 2


class BufferWatch:
    """Watches the buffers of `module`."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._num_captures = 0
        self._mutated: set[str] = set()
        self._marks: dict[str, tuple[torch.Tensor, int]] = {}

    def capture(self) -> dict[str, torch.Tensor]:
        """Copies of the buffers that a forward may mutate, by name. Called before each forward."""
        buffers = dict(self._module.named_buffers())
        self._num_captures += 1
        names = buffers if self._num_captures <= _TRIAL_FORWARDS else self._mutated & buffers.keys()
        self._marks = {name: (buffer, buffer._version) for name, buffer in buffers.items()}
        self._copied = set(names)
        return {name: buffers[name].detach().clone() for name in names}

    def changed_unseen(self) -> str:
        """After the forward: why it cannot be run again, if it mutated a buffer that was not copied; else empty."""
        unseen = ""
        for name, buffer in self._module.named_buffers():
            mark = self._marks.get(name)
            if mark is not None and mark[0] is buffer and mark[1] == buffer._version:
                continue
            if mark is None or name not in self._copied:
                unseen = unseen or f"buffer {name!r} was changed by the forward for the first time"
            self._mutated.add(name)
        return unseen if self._marks else ""

    @torch.no_grad()
    def restore(self, copies: dict[str, torch.Tensor]) -> None:
        """Put the copied values back, into the buffers as they are now."""
        if not copies:
            return
        buffers = dict(self._module.named_buffers())
        for name, copy in copies.items():
            buffers[name].copy_(copy)
