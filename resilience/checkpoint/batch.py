"""How many samples an optimizer step takes, and how that is kept when the number of ranks changes. Pure.

DeepSpeed holds train_batch_size = micro-batch × accumulation × data-parallel ranks. A script's data loader is made for
the micro-batch, so that is kept; the accumulation follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from resilience.errors import CheckpointError

__all__ = ["Batch", "parse", "possible_world_sizes", "rescale"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """DeepSpeed's three numbers, and for how many ranks they hold."""

    train_batch_size: int
    """Samples of one optimizer step, over all ranks."""
    micro_batch_size: int
    """Samples of one forward on one rank."""
    accumulation: int
    """Micro-batches of one optimizer step on one rank."""
    world_size: int
    """Data-parallel ranks."""

    def __post_init__(self) -> None:
        if min(self.train_batch_size, self.micro_batch_size, self.accumulation, self.world_size) < 1:
            raise ValueError(f"{self} has a number below 1")
        if self.train_batch_size != self.micro_batch_size * self.accumulation * self.world_size:
            raise ValueError(f"{self}: the first is not the product of the others")

    def __str__(self) -> str:
        return (
            f"train_batch_size {self.train_batch_size} = {self.micro_batch_size} (micro-batch) × {self.accumulation} "
            f"(accumulation) × {self.world_size} (ranks)"
        )


def rescale(before: Batch, world_size: int, *, micro_batch_size: int | None = None) -> Batch:
    """The same samples for each optimizer step on another number of ranks.

    Args:
        before: what held.
        world_size: data-parallel ranks from now on.
        micro_batch_size: what they are going to use, if that is not what held.

    Raises:
        CheckpointError: the ranks and the micro-batch do not divide train_batch_size; the line says what would.
    """
    micro = before.micro_batch_size if micro_batch_size is None else micro_batch_size
    if world_size < 1 or before.train_batch_size % (micro * world_size):
        sizes = possible_world_sizes(before.train_batch_size, micro)
        with_micro = f"with micro-batch {micro} use {_listed(sizes)} ranks" if sizes else ""
        micros = possible_world_sizes(before.train_batch_size, world_size) if world_size >= 1 else ()
        with_world = f"for {world_size} ranks set train_micro_batch_size_per_gpu to {_listed(micros)}" if micros else ""
        fix = ", or ".join(each for each in (with_micro, with_world) if each)
        raise CheckpointError(
            f"{world_size} ranks with micro-batch {micro} cannot keep train_batch_size {before.train_batch_size}: "
            + (fix or f"no number of ranks with micro-batch {micro} divides it; choose another train_batch_size")
        )
    accumulation = before.train_batch_size // (micro * world_size)
    return Batch(
        train_batch_size=before.train_batch_size,
        micro_batch_size=micro,
        accumulation=accumulation,
        world_size=world_size,
    )


def possible_world_sizes(train_batch_size: int, micro_batch_size: int) -> tuple[int, ...]:
    """Every number of ranks that can keep `train_batch_size` with this micro-batch, in order; empty if none can."""
    if train_batch_size % micro_batch_size:
        return ()
    return _divisors(train_batch_size // micro_batch_size)


def parse(content: Mapping[str, Any] | None) -> Batch | None:
    """What a save recorded; None if it recorded nothing that makes sense."""
    if content is None:
        return None
    try:
        return Batch(**{field.name: int(content[field.name]) for field in dataclasses.fields(Batch)})
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _divisors(number: int) -> tuple[int, ...]:
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return tuple(sorted({*small, *(number // each for each in small)}))


def _listed(numbers: tuple[int, ...], most: int = 12) -> str:
    shown = [str(number) for number in numbers[:most]] + (["…"] if len(numbers) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
