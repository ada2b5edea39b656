"""What every rank of a data-parallel job keeps alike is compared among them every so many steps, by hashes.

It sees what at-rest hashes cannot: copies that came wrong out of an all-gather, and state that went astray in between.
The majority names the odd rank; two ranks that disagree blame nobody, unless the fp32 masters tell who is right. Blind
to what is wrong on all ranks alike: an error in a ZeRO shard is gathered into every copy. Never here: what is done
about it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from resilience.deepspeed.shards import Held
from resilience.guard.at_rest import Mark, integers
from resilience.guard.at_rest_schedule import odd_ones_out
from resilience.guard.exchange import Exchange
from resilience.guard.wire import decode, encode
from resilience.kernels.hashing import bit_hash

__all__ = ["Replicas"]


class Replicas:
    """The comparison among ranks.

    Args:
        interval_steps: `DetectionConfig.replica_interval_steps`.
    """

    def __init__(self, interval_steps: int) -> None:
        self._interval_steps = interval_steps
        self._agreed_step: int | None = None
        self.problem = ""
        """Why ranks are compared no more; empty while they are."""
        self._held: list[Held] = []
        self._hashes: list[int] = []

    def is_due(self, step: int) -> bool:
        """Whether to compare after `step` was taken."""
        return self.is_on and step % self._interval_steps == 0

    @property
    def is_on(self) -> bool:
        """Whether ranks are ever compared."""
        return bool(self._interval_steps) and not self.problem

    def digest(self, held: Sequence[Held]) -> int:
        """Hash all that is kept alike, and make one number of 62 bits of it."""
        self._held = [item for item in held if item.replicated]
        self._hashes = integers([bit_hash(item.read()) for item in self._held])
        content = b"".join(value.to_bytes(8, "little", signed=True) for value in self._hashes)
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 2

    def agreed(self, step: int) -> None:
        """All digests were equal after `step`, whose snapshot had been taken by then."""
        self._agreed_step = step

    def rewound(self, step: int) -> None:
        """All state was replaced by that of the end of `step`."""
        self._agreed_step = None if self._agreed_step is None else min(self._agreed_step, step)

    def differences(self, exchange: Exchange) -> list[Mark]:
        """The tensors of this rank that the other ranks keep otherwise. Collective; after digests that differ."""
        every = [decode(tuple[int, ...], content) for content in exchange.all_gather(encode(self._hashes))]
        if len({len(values) for values in every}) > 1:
            self.problem = "the ranks do not keep the same tensors"
            return []
        columns = list(zip(*every, strict=True))
        differing = [place for place, values in enumerate(columns) if len(set(values)) > 1]
        if self._agreed_step is None and 2 * len(differing) > len(columns):
            # Unlike processors round unlike: then each rank's own optimizer step gives other bits, from the start.
            self.problem = f"{len(differing)} of {len(columns)} tensors have never been bit-equal on all ranks"
            return []
        return [mark for place in differing if (mark := self._mark(place, columns[place], exchange.rank)) is not None]

    def _mark(self, place: int, values: Sequence[int], rank: int) -> Mark | None:
        odd = odd_ones_out(values)
        if odd and rank not in odd:
            return None
        held = self._held[place]
        majority = next(value for other, value in enumerate(values) if other not in odd) if odd else None
        return Mark(held, 0, held.length, majority, held.versions(), of_replicas=True, clean_step=self._agreed_step)
