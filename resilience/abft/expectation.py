"""What the inputs of a GEMM say that its row sums must be, each tensor read once. No verdicts.

C = A·B, A (m, k), B (k, n), or b of each; V and U are the checksum vectors of length n and k.

* Forward: E = A·(B·V). The pass over A also gives A·U, and the one over B gives Bᵀ·U; both are kept until backward.
* Backward: dA = dC·Bᵀ has the row sums dC·(Bᵀ·U), and dBᵀ = dCᵀ·A has dCᵀ·(A·U). One pass over dC gives both, when the
  first of the two gradients is computed; the second one finds its own ready.

A recomputation (activation checkpointing) has made the operands anew: what is carried from it takes the place of what
was carried from the forward, if it may be the same product. Where nothing was carried (the forward was not checked, or
an operand is no longer the one that was) a gradient is checked like any other product, with one pass more. Sums of
another matrix could not hide a fault, but would raise false alarms, which nothing dismisses on a GPU: an operand is
known by its memory (not by its address alone, which may be another tensor's by then) and by how it lies there.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from resilience.abft.gemm import Gemm
from resilience.abft.sums import WeightSums, is_parameter, sums_of, vectors

__all__ = ["Expectation", "Expectations", "swallowing"]

_MAX_CARRIED = 4096
"""Forward operations whose sums wait for their backward; of graphs that never run backward, the oldest are dropped."""


@dataclasses.dataclass(slots=True)
class Expectation:
    """Row sums that a product must have."""

    call: Gemm
    transposed: bool
    """Whether the rows of its transpose are checked."""
    product: torch.Tensor
    """Row sums of left·right, (m, c) or (b, m, c) in float32 (float64 for float64), maybe with more columns behind."""
    addend: torch.Tensor | None = None
    """D·V, broadcastable to them."""
    unknown: torch.Tensor | None = None
    """Rows, broadcastable to (…, m, 1), in which an addend like −∞ has swallowed elements of the product: their sums
    are 0 in E and in O.
    """
    is_masked: bool = False
    """Whether an addend has swallowed elements of the product, and the check must settle that (`masked`)."""

    @property
    def gemm(self) -> Gemm:
        """The product in the orientation that is checked."""
        call = self.call
        if not self.transposed:
            return call
        return Gemm(call.right.mT, call.left.mT, alpha=call.alpha, repeatable=call.repeatable)

    @property
    def sums(self) -> torch.Tensor:
        """E = alpha·left·right·V + beta·D·V, (m, c) or (b, m, c)."""
        call = self.call
        sums = self.product[..., : vectors(self.width, call.left).shape[1]]
        if call.alpha != 1.0:
            sums = sums * call.alpha
        if self.addend is not None:
            sums = torch.add(sums, self.addend, alpha=call.beta)
        return sums if self.unknown is None else sums.masked_fill(self.unknown, 0.0)

    @property
    def width(self) -> int:
        """Elements of a row that is checked."""
        return self.call.m if self.transposed else self.call.n

    def oriented(self, out: torch.Tensor) -> torch.Tensor:
        """`out` in the orientation that is checked."""
        return out.mT if self.transposed else out

    def observed(self, out: torch.Tensor) -> torch.Tensor:
        """O, the row sums that `out` has; one pass over it."""
        out = self.oriented(out)
        sums = sums_of(out, right=vectors(out.shape[-1], out)).rows
        assert sums is not None
        return sums if self.unknown is None else sums.masked_fill(self.unknown, 0.0)


class _Operand(NamedTuple):
    """Which matrix an operand is, by what a tensor that is read later can be asked."""

    storage: int
    """Whose memory it is in."""
    address: int
    strides: tuple[int, ...]
    parameter: weakref.ref[torch.Tensor] | None
    """To the parameter that it is, or is a view of. A tensor has one such reference as long as it lives."""
    offset: int
    """Bytes from where that begins."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Operand:
        storage, address, strides = tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor.stride()
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, torch.nn.Parameter):
            return cls(storage, address, strides, weakref.ref(base), address - base.data_ptr())
        return cls(storage, address, strides, None, 0)

    @property
    def is_frozen(self) -> bool:
        """Whether it is a parameter of which no gradient will be asked."""
        parameter = None if self.parameter is None else self.parameter()
        return parameter is not None and not parameter.requires_grad

    def is_same(self, other: _Operand, *, transposed: bool = False) -> bool:
        """Whether both are one matrix, or (`transposed`) the other one is its transpose. ZeRO-3 gathers a parameter
        into other memory for backward than for forward.
        """
        strides = other.strides
        if transposed:
            strides = (*strides[:-2], strides[-1], strides[-2])
        if self.strides != strides:
            return False
        if self.storage == other.storage and self.address == other.address:
            return True
        return self.parameter is not None and self.parameter is other.parameter and self.offset == other.offset


@dataclasses.dataclass(slots=True)
class _Carried:
    """Sums of a forward product's operands."""

    nodes: tuple[int, ...]
    """Numbers of the autograd nodes whose gradients may ask for them: one, or that of a recomputation with it."""
    shape: tuple[int, int, int]
    """(m, k, n)"""
    left: _Operand
    right: _Operand
    memory: tuple[StorageWeakRef, ...]
    """Of the operands: while it is referred to, no other storage takes its number."""
    of_left: torch.Tensor
    """A·U, (m, c)"""
    of_right: torch.Tensor
    """Bᵀ·U, (n, c)"""
    waiting: dict[tuple[object, ...], torch.Tensor] = dataclasses.field(default_factory=dict)
    """Row sums of the gradient that comes second: by which gradient it is, the pass, and the dC that they are of."""

    def is_again(self, first: _Carried) -> bool:
        """Whether this may be the product of `first`, computed again: by its weight, if it has one, and its shape."""
        is_weight = first.right.parameter is not None or self.right.parameter is not None
        return self.shape == first.shape and (not is_weight or self.right.is_same(first.right))


def _weak(operand: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(operand.untyped_storage())  # type: ignore[no-untyped-call]  # torch has no annotation


class _Role(NamedTuple):
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

    def clear(self) -> None:
        """Forget all that was carried."""
        self._carried.clear()

    def forward(self, gemm: Gemm, out: torch.Tensor, node: int, *, recomputed: int | None = None) -> Expectation:
        """Expectation of a product that runs forward.

        Args:
            gemm: the product.
            out: its result.
            node: the number of its autograd node.
            recomputed: where it may be one that is computed again for a backward pass, that of the first time. That
                one's gradients may read the operands of this one.
        """
        if node in self._carried:
            self._carried[node] = None
            return self.alone(gemm, out)
        operand = self._sums.of_right(gemm.right, carried=True)
        assert operand.left is not None
        sums = sums_of(gemm.left, right=operand.both).rows
        assert sums is not None
        carried = _Carried(
            (node,),
            (gemm.m, gemm.k, gemm.n),
            _Operand.of(gemm.left),
            _Operand.of(gemm.right),
            (_weak(gemm.left), _weak(gemm.right)),
            sums[..., operand.right.shape[-1] :],
            operand.left,
        )
        first = None if recomputed is None else self._carried.get(recomputed)
        if recomputed is not None and first is not None and carried.is_again(first):
            # The gradients are those of the recomputation's own node (reentrant checkpointing), or of the first one.
            self._forget(recomputed)
            carried.nodes = node, recomputed
        self._carried.update(dict.fromkeys(carried.nodes, carried))
        if len(self._carried) > _MAX_CARRIED:
            self._forget(next(iter(self._carried)))
        return self._complete(gemm, out, sums)

    def backward(self, gemm: Gemm, out: torch.Tensor, node: int) -> Expectation:
        """Expectation of a gradient of the product under `node`."""
        carried = self._carried.get(node)
        role = None if carried is None or gemm.addend is not None else _role(gemm, carried)
        if carried is None or role is None:
            return self.alone(gemm, out)
        d_out = gemm.right if role.transposed else gemm.left
        if role.transposed == role.of_left:
            d_out = d_out.mT
        # The next backward pass through the same graph may have another dC at the same address.
        task = torch._C._current_graph_task_id()
        place = task, d_out.data_ptr(), d_out.shape, d_out.stride()
        sums = carried.waiting.pop((role.of_left, *place), None)
        if sums is not None:
            self._forget(node)  # both gradients are done
        elif role.of_left and carried.right.is_frozen:
            self._forget(node)  # there is but one
            sums = sums_of(d_out, right=carried.of_right).rows
            assert sums is not None
        else:
            rows, columns = sums_of(d_out, right=carried.of_right, left=carried.of_left)
            assert rows is not None
            assert columns is not None
            sums, other = (rows, columns) if role.of_left else (columns, rows)
            carried.waiting = {(not role.of_left, *place): other}
        return Expectation(gemm, role.transposed, sums)

    def alone(self, gemm: Gemm, out: torch.Tensor) -> Expectation:
        """Expectation from the operands only."""
        operand = self._sums.of_right(gemm.right)
        sums = sums_of(gemm.left, right=operand.right).rows
        assert sums is not None
        return self._complete(gemm, out, sums)

    def discard(self, gemm: Gemm, node: int) -> None:
        """Forget what was kept of a product's operands: it may be stale."""
        self._forget(node)
        for operand in (gemm.left, gemm.right, gemm.addend):
            if operand is not None:
                self._sums.discard(operand)

    def _forget(self, node: int) -> None:
        carried = self._carried.pop(node, None)
        for name in () if carried is None else carried.nodes:
            if self._carried.get(name) is carried:
                del self._carried[name]

    def _complete(self, gemm: Gemm, out: torch.Tensor, product: torch.Tensor) -> Expectation:
        if gemm.addend is None:
            return Expectation(gemm, False, product)
        addend = self._sums.of_addend(gemm.addend, out)
        if is_parameter(gemm.addend):
            return Expectation(gemm, False, product, addend)
        if _is_settled_at_once(out):
            # Sums are fewer, and a mask stands out in them.
            may_be = not bool((addend.abs() < _largest(gemm.addend.dtype)).all())
            is_masked = may_be and bool(swallowing(gemm.addend).any())
            return Expectation(gemm, False, product, addend, is_masked=is_masked)
        unknown = swallowing(gemm.addend).any(-1, keepdim=True)
        return Expectation(gemm, False, product, addend, unknown)


_MASKED = 1e15
"""Elements of an addend beyond it, infinite or not, leave nothing of the product beside them."""


def swallowing(addend: torch.Tensor) -> torch.Tensor:
    """Where a mask stands in an addend, in its shape."""
    return addend.abs() > _largest(addend.dtype)


def _largest(dtype: torch.dtype) -> float:
    return min(_MASKED, torch.finfo(dtype).max / 4.0)


def _is_settled_at_once(out: torch.Tensor) -> bool:
    """Whether a suspicion is settled by another computation, to which a mask is nothing special."""
    return out.is_cpu


def _role(gemm: Gemm, carried: _Carried) -> _Role | None:
    """dA = dC·Bᵀ is (m, n) by (n, k) and dB = Aᵀ·dC is (k, m) by (m, n), or the transpose of either; None if neither.

    Which one it is, and which way round, follows from the operand of the forward that it reads again.
    """
    left, right = _Operand.of(gemm.left), _Operand.of(gemm.right)
    is_role = {
        _Role(of_left=True, transposed=False): carried.right.is_same(right, transposed=True),
        _Role(of_left=True, transposed=True): carried.right.is_same(left),
        _Role(of_left=False, transposed=False): carried.left.is_same(right),
        _Role(of_left=False, transposed=True): carried.left.is_same(left, transposed=True),
    }
    roles = [role for role, is_it in is_role.items() if is_it]
    if len(roles) != 1:
        return None
    role = roles[0]
    m, k, n = carried.shape
    straight = (m, n, k) if role.of_left else (n, m, k)
    shape = (gemm.n, gemm.k, gemm.m) if role.transposed else (gemm.m, gemm.k, gemm.n)
    return role if shape == straight else None
