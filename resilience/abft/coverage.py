"""What share of a training step's matrix arithmetic is protected: every product with its site, layer and check.

Two counts that know nothing of each other meet here: a dispatch mode sees what the step executes and takes its
multiplications from the shapes by PyTorch's formulas; the labels tell what reached a check. What the first has and the
second has not is unprotected. A diagnostic: it slows the step down, and finds no faults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from resilience.abft.labels import Label
from resilience.abft.protection import Protection
from resilience.config import DetectionConfig
from resilience.events import Check

__all__ = ["CoverageReport", "Operation", "coverage"]


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One matrix product of the step; fused attention counts as the products it is made of."""

    operator: str
    """As the dispatcher names it: `aten::addmm`."""
    site: str
    """As in a fault plan; the operator's name where nothing names it better."""
    layer: int
    """Which call of that site in the forward order; −1 where it has no meaning."""
    flops: int
    """Two for each multiplication of the dense product; masks are not subtracted."""
    check: str | None
    """`checksum` or `invariants`; None if unprotected."""
    reason: str = ""
    """Why it is unprotected."""


@dataclasses.dataclass(frozen=True, slots=True)
class CoverageReport:
    """The products of one step, in the order in which they ran. `print(report)` shows a table by site."""

    operations: tuple[Operation, ...]

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)

    @property
    def protected_flops(self) -> int:
        return sum(operation.flops for operation in self.operations if operation.check is not None)

    @property
    def share(self) -> float:
        """Protected ÷ all FLOPs; 1 for a step without products."""
        return self.protected_flops / self.flops if self.flops else 1.0

    @property
    def unprotected(self) -> tuple[Operation, ...]:
        return tuple(operation for operation in self.operations if operation.check is None)

    def by_layer(self) -> dict[tuple[str, int], float]:
        """Share of FLOPs protected of every (site, layer)."""
        all_flops: Counter[tuple[str, int]] = Counter()
        protected: Counter[tuple[str, int]] = Counter()
        for operation in self.operations:
            key = operation.site, operation.layer
            all_flops[key] += operation.flops
            protected[key] += operation.flops if operation.check is not None else 0
        return {key: protected[key] / flops if flops else 1.0 for key, flops in all_flops.items()}

    def __str__(self) -> str:
        rows = [("site", "layers", "operator", "calls", "MFLOP", "share", "protection")]
        groups: dict[tuple[str, str, str], list[Operation]] = {}
        for operation in self.operations:
            protection = operation.check or f"none: {operation.reason}"
            groups.setdefault((operation.site, operation.operator, protection), []).append(operation)
        for (site, operator, protection), members in groups.items():
            flops = sum(member.flops for member in members)
            share = f"{100 * flops / max(self.flops, 1):.1f} %"
            layers = _ranges(member.layer for member in members)
            rows.append((site, layers, operator, str(len(members)), f"{flops / 1e6:.3f}", share, protection))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"protected: {100 * self.share:.2f} % of {self.flops / 1e6:.3f} MFLOP"])


def coverage(
    step: Callable[[], object], model: torch.nn.Module, config: DetectionConfig | None = None
) -> CoverageReport:
    """Run one step under protection and report what was protected.

    Args:
        step: a forward and backward pass of `model`: `lambda: model(x, labels=y).loss.backward()`. It is called a
            second time if torch.compile is in use: first as plain PyTorch, to know what there is to do, then as it is.
        model: its modules give the labels.
        config: what to check; by default all, at strength `checksum`.
    """
    protection = Protection(config or DetectionConfig())
    protection.install()
    protection.attach(model)
    try:
        count = _Count(protection)
        protection.begin_micro_step(1, 0, 0)
        with _without_compilation(), count, protection.active():
            step()
        if "torch._dynamo" in sys.modules:
            seen, num_failed = _Seen(protection), protection.num_failed_checks()
            protection.begin_micro_step(2, 0, 0)
            with seen, protection.active():
                step()
            if protection.num_failed_checks() == num_failed:
                count.replace(seen.products)
    finally:
        protection.uninstall()
    return CoverageReport(tuple(count.operations))


def _without_compilation() -> contextlib.AbstractContextManager[object]:
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


class _Product(NamedTuple):
    label: Label
    multiplications: int
    check: Check


class _Seen:
    """Products that reached a check while it was entered."""

    def __init__(self, protection: Protection) -> None:
        self._protection = protection
        self.products: list[_Product] = []

    def __enter__(self) -> _Seen:
        self._protection.observe(lambda *product: self.products.append(_Product(*product)))
        return self

    def __exit__(self, *_: object) -> None:
        self._protection.observe(None)


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotation
    """Lists every product that is dispatched, and what the checks saw of it."""

    supports_higher_order_operators = True

    def __init__(self, protection: Protection) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation
        self._protection = protection
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if not _is_product(packet) and isinstance(func, torch._ops.OpOverload):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        unprotected, checks = Counter(self._protection.unprotected()), sum(self._protection.checks().values())
        with _Seen(self._protection) as seen:
            result = func(*args, **kwargs)
        checked = sum(self._protection.checks().values()) > checks
        reasons = Counter(self._protection.unprotected()) - unprotected
        self._note(packet, _flops(packet, args, kwargs, result), seen.products if checked else [], reasons)
        return result

    def _note(self, packet: Any, flops: int, products: list[_Product], reasons: Counter[str]) -> None:
        name = str(packet).replace(".", "::", 1)
        self.operations += [_operation(name, product) for product in products]
        missing = flops - sum(2 * product.multiplications for product in products)
        if missing > 0 or (reasons and not products):
            reason = ", ".join(sorted(reasons)) or "not seen by a check"
            self.operations.append(Operation(name, packet.__name__, -1, max(missing, 0), None, reason))
        elif not products and name.partition("::")[0] not in _KNOWN_LIBRARIES:
            self.operations.append(Operation(name, packet.__name__, -1, 0, None, "not known what it computes"))

    def replace(self, products: list[_Product]) -> None:
        """Take what was checked in the step as it is, where parts of it are compiled, for what was in plain PyTorch."""
        checked = [operation for operation in self.operations if operation.check is not None]
        lost = sum(operation.flops for operation in checked) - sum(2 * product.multiplications for product in products)
        if lost == 0 and Counter((op.site, op.layer) for op in checked) == Counter(p.label for p in products):
            return
        self.operations = [operation for operation in self.operations if operation.check is None]
        self.operations += [_operation("any", product) for product in products]
        if lost > 0:
            reason = "generated code in place of an operator"
            self.operations.append(Operation("none", "compiled", -1, lost, None, reason))


def _operation(name: str, product: _Product) -> Operation:
    return Operation(name, *product.label, 2 * product.multiplications, _CHECKS[product.check])


_CHECKS = {Check.CHECKSUM: "checksum", Check.INVARIANT: "invariants"}


# --- multiplications by shapes ----------------------------------------------------------------------------------------

aten = torch.ops.aten


def _size(tensor: Any) -> int:
    return int(tensor.numel()) if isinstance(tensor, torch.Tensor) else 0


def _inner(position: int) -> Callable[..., int]:
    """Result elements × the last dimension of the operand at `position`."""
    return lambda args, result: 2 * _size(result) * int(args[position].shape[-1])


def _of_addbmm(args: Any, result: Any) -> int:
    return 2 * _size(args[1]) * int(args[2].shape[-1])


def _of_grouped(args: Any, result: Any) -> int:
    """Groups of rows or columns, or, for two matrices, groups of the dimension that is summed over."""
    one, other = args[0], args[1]
    shared = one.dim() == other.dim() == 2
    return 2 * (_size(one) * int(other.shape[-1]) if shared else _size(result) * int(one.shape[-1]))


def _of_attention(args: Any, result: Any) -> int:
    query, key, value = args[:3]
    return 2 * int(query.shape[:-1].numel()) * int(key.shape[-2]) * int(query.shape[-1] + value.shape[-1])


def _of_attention_backward(args: Any, result: Any) -> int:
    """The scores again, dQ and dK over the width of the keys; dP and dV over that of the values."""
    query, key, value = args[1:4]
    widths = 3 * int(query.shape[-1]) + 2 * int(value.shape[-1])
    return 2 * int(query.shape[:-1].numel()) * int(key.shape[-2]) * widths


_FORMULAS: dict[Any, Callable[[Any, Any], int]] = {
    aten.addmm_: _inner(1),
    aten.baddbmm_: _inner(1),
    aten.addbmm: _of_addbmm,
    aten.addbmm_: _of_addbmm,
    aten.mv: _inner(0),
    aten.addmv: _inner(1),
    aten.addmv_: _inner(1),
    aten.dot: _inner(0),
    aten.vdot: _inner(0),
    aten._int_mm: _inner(0),
    aten._addmm_activation: _inner(1),
    aten._grouped_mm: _of_grouped,
    aten._weight_int8pack_mm: _inner(0),
    aten.mkldnn_linear: _inner(0),
    aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable: _of_attention,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _of_attention_backward,
}
"""What PyTorch's own registry of formulas does not have."""


_KNOWN_LIBRARIES = frozenset({"aten", "prim", "prims", "c10d", "_c10d_functional", "profiler"})
"""Whose products all have a formula; what another library's operator multiplies cannot be told from outside."""


def _is_product(packet: Any) -> bool:
    return packet in flop_registry or packet in _FORMULAS


def _flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    formula = _FORMULAS.get(packet)
    return formula(args, result) if formula is not None else 0


def _ranges(numbers: Iterable[int]) -> str:
    """`0–3, 7` of 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in parts)
