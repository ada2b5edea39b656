"""What the inputs of a GEMM say that its row sums must be, each tensor read once. No verdicts.

C = A·B, A (m, k), B (k, n), or b of each; V and U are the checksum vectors of length n and k.

* Forward: E = A·(B·V). The pass over A also gives A·U, and the one over B gives Bᵀ·U; both are kept until backward.
* Backward: dA = dC·Bᵀ has the row sums dC·(Bᵀ·U), and dBᵀ = dCᵀ·A has dCᵀ·(A·U). One pass over dC gives both, when the
  first of the two gradients is computed; the second one finds its own ready.

Where nothing was carried (the forward was not checked, or an operand is no longer the one that was) a gradient is
checked like any other product, with one pass more. Sums that were carried but do not belong to the operands cannot hide
a fault: they raise an alarm that the confirmation dismisses.
"""

from __future__ import annotations

import dataclasses

import torch

from resilience.abft.gemm import Gemm
from resilience.abft.sums import WeightSums, is_parameter, sums_of, vectors

__all__ = ["Expectation", "Expectations"]

_MAX_CARRIED = 4096
"""Forward operations whose sums wait for their backward; of graphs that never run backward, the oldest are dropped."""


@dataclasses.dataclass(slots=True)
class Expectation:
    """Row sums that a product must have."""

    gemm: Gemm
    """The product in the orientation that is checked: itself, or its transpose."""
    transposed: bool
    sums: torch.Tensor
    """E, (m, c) or (b, m, c) in float32 (float64 for float64)."""
    unknown: torch.Tensor | None = None
    """Rows, broadcastable to (…, m, 1), in which an addend like −∞ has swallowed elements of the product: their sums
    are 0 in E and in O.
    """

    def oriented(self, out: torch.Tensor) -> torch.Tensor:
        """`out` in the orientation that is checked."""
        return out.mT if self.transposed else out

    def observed(self, out: torch.Tensor) -> torch.Tensor:
        """O, the row sums that `out` has; one pass over it."""
        out = self.oriented(out)
        sums = sums_of(out, right=vectors(out.shape[-1], out)).rows
        assert sums is not None
        return sums if self.unknown is None else sums.masked_fill(self.unknown, 0.0)


@dataclasses.dataclass(slots=True)
class _Carried:
    """Sums of a forward product's operands."""

    shape: tuple[int, int, int]
    """(m, k, n)"""
    left_address: int
    right_address: int
    of_left: torch.Tensor
    """A·U, (m, c)"""
    of_right: torch.Tensor
    """Bᵀ·U, (n, c)"""
    waiting: dict[tuple[object, ...], torch.Tensor] = dataclasses.field(default_factory=dict)
    """Row sums of the gradient that comes second: by which gradient it is, the pass, and the dC that they are of."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Role:
    """Which gradient a product is, and on which side dC stands."""

    of_left: bool
    """Whether it is dA; else dB."""
    transposed: bool
    """Whether the product must be transposed to have dC (for dA) or dCᵀ (for dB) on its left."""


class Expectations:
    """Expected row sums of the GEMMs of one process.

    Args:
        sums: of weights, kept for a step.
    """

    def __init__(self, sums: WeightSums) -> None:
        self._sums = sums
        self._carried: dict[int, _Carried | None] = {}
        """By the number of the autograd node; None where a node stands for many products, as a compiled graph does."""
        self._passed_over: set[int] = set()

    def clear(self) -> None:
        """Forget all that was carried."""
        self._carried.clear()
        self._passed_over.clear()

    def pass_over(self, node: int) -> None:
        """A product outside backward is not checked."""
        self._passed_over.add(node)

    def was_checked(self, node: int) -> bool | None:
        """Whether the product under `node` was checked; None where that is not known, or it stands for several."""
        if self._carried.get(node) is not None:
            return True
        return False if node in self._passed_over and node not in self._carried else None

    def forward(self, gemm: Gemm, out: torch.Tensor, node: int) -> Expectation:
        """Expectation of a product outside backward; `node` is the sequence number of its autograd node."""
        if node in self._carried:
            self._carried[node] = None
            return self.alone(gemm, out)
        operand = self._sums.of_right(gemm.right, carried=True)
        assert operand.left is not None
        sums = sums_of(gemm.left, right=operand.both).rows
        assert sums is not None
        num_vectors = operand.right.shape[-1]
        self._carried[node] = _Carried(
            (gemm.m, gemm.k, gemm.n),
            gemm.left.data_ptr(),
            gemm.right.data_ptr(),
            sums[..., num_vectors:],
            operand.left,
        )
        if len(self._carried) > _MAX_CARRIED:
            del self._carried[next(iter(self._carried))]
        return self._complete(gemm, out, sums[..., :num_vectors])

    def backward(self, gemm: Gemm, out: torch.Tensor, node: int) -> Expectation:
        """Expectation of a gradient of the product under `node`."""
        carried = self._carried.get(node)
        role = None if carried is None or gemm.addend is not None else _role(gemm, carried)
        if carried is None or role is None:
            return self.alone(gemm, out)
        if role.transposed:
            gemm = Gemm(gemm.right.mT, gemm.left.mT, alpha=gemm.alpha, repeatable=gemm.repeatable)
        d_out = gemm.left if role.of_left else gemm.left.mT
        # The next backward pass through the same graph may have another dC at the same address.
        task = torch._C._current_graph_task_id()
        place = task, d_out.data_ptr(), d_out.shape, d_out.stride()
        sums = carried.waiting.pop((role.of_left, *place), None)
        if sums is not None:
            del self._carried[node]  # both gradients are done
        else:
            rows, columns = sums_of(d_out, right=carried.of_right, left=carried.of_left)
            assert rows is not None
            assert columns is not None
            sums, other = (rows, columns) if role.of_left else (columns, rows)
            carried.waiting = {(not role.of_left, *place): other}
        return Expectation(gemm, role.transposed, sums * gemm.alpha if gemm.alpha != 1.0 else sums)

    def alone(self, gemm: Gemm, out: torch.Tensor) -> Expectation:
        """Expectation from the operands only."""
        operand = self._sums.of_right(gemm.right)
        sums = sums_of(gemm.left, right=operand.right).rows
        assert sums is not None
        return self._complete(gemm, out, sums)

    def discard(self, gemm: Gemm, node: int) -> None:
        """Forget what was kept of a product's operands: it may be stale."""
        self._carried.pop(node, None)
        for operand in (gemm.left, gemm.right, gemm.addend):
            if operand is not None:
                self._sums.discard(operand)

    def _complete(self, gemm: Gemm, out: torch.Tensor, sums: torch.Tensor) -> Expectation:
        if gemm.alpha != 1.0:
            sums = sums * gemm.alpha
        if gemm.addend is None:
            return Expectation(gemm, False, sums)
        sums = torch.add(sums, self._sums.of_addend(gemm.addend, out), alpha=gemm.beta)
        if _is_settled_at_once(out) or is_parameter(gemm.addend):
            return Expectation(gemm, False, sums)
        unknown = _swallows(gemm.addend)
        return Expectation(gemm, False, sums.masked_fill(unknown, 0.0), unknown)


_MASKED = 1e15
"""Elements of an addend beyond it, infinite or not, leave nothing of the product beside them."""


def _swallows(addend: torch.Tensor) -> torch.Tensor:
    """Rows of an addend in which a mask stands, (…, m, 1) or (1,)."""
    return (addend.abs() > _MASKED).any(-1, keepdim=True)


def _is_settled_at_once(out: torch.Tensor) -> bool:
    """Whether a suspicion is settled by another computation, to which a mask is nothing special."""
    return out.is_cpu


def _role(gemm: Gemm, carried: _Carried) -> _Role | None:
    """dA = dC·Bᵀ is (m, n) by (n, k) and dB = Aᵀ·dC is (k, m) by (m, n), or the transpose of either; None if neither.

    Which one it is, and which way round, follows from the operand of the forward that it reads again. A recomputation
    (activation checkpointing) has made that anew, elsewhere in memory: its gradients are checked alone.
    """
    m, k, n = carried.shape
    on_left, on_right = gemm.left.data_ptr(), gemm.right.data_ptr()
    matches = [
        (of_left, on_left == address)
        for of_left, address in ((True, carried.right_address), (False, carried.left_address))
        if (on_left == address) != (on_right == address)
    ]
    if len(matches) != 1:
        return None
    role = _Role(*matches[0])
    straight = (m, n, k) if role.of_left else (n, m, k)
    shape = (gemm.n, gemm.k, gemm.m) if role.transposed else (gemm.m, gemm.k, gemm.n)
    return role if shape == straight else None
