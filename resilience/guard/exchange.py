"""What the ranks of a job tell each other at a step's boundary: one small reduction, and bytes when there is cause.

On a process group of our own over gloo and CPU tensors, so that neither a GPU nor DeepSpeed's own groups are waited on.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["Exchange"]


class Exchange:
    """Collectives among all ranks. Making one is a collective itself: every rank makes it at the same place."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self.rank, self.world_size = 0, 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def close(self) -> None:
        """Give the process group back."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def maximum(self, values: list[int]) -> list[int]:
        """The largest of each value over all ranks."""
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def agree(self, value: int) -> bool:
        """Whether all ranks give the same."""
        largest, negative_smallest = self.maximum([value, -value])
        return largest == -negative_smallest

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of each value over all ranks, of tensors on the CPU; all ranks must give as many."""
        if self._group is None:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self._group)
        return values

    def all_gather(self, content: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order."""
        if self._group is None:
            return [content]
        size_max = self.maximum([len(content)])[0]
        own = torch.zeros(size_max + 8, dtype=torch.uint8, device="cpu")
        framed = len(content).to_bytes(8, "little") + content
        own[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(every, own, group=self._group)
        return [_unframe(tensor) for tensor in every]

    def broadcast(self, content: bytes, source: int = 0) -> bytes:
        """The bytes of rank `source`, on every rank; what the others pass is not read."""
        if self._group is None:
            return content
        size = self.maximum([len(content) if self.rank == source else 0])[0]
        buffer = torch.zeros(size, dtype=torch.uint8, device="cpu")
        if self.rank == source and size:
            buffer[:] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(buffer, src=source, group=self._group)
        return bytes(buffer.numpy().tobytes())


def _unframe(tensor: torch.Tensor) -> bytes:
    content = tensor.numpy().tobytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]
