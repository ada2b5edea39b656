"""Names for operations: the site and the layer of each GEMM, softmax and fused attention, forward and backward.

Forward: module hooks keep a stack of the modules that matter; the innermost one names the operation.

* A module whose class name contains "attention" or "attn" is an attention. Linear modules below it are named after
  themselves by `PROJECTIONS`: attention.q, .k, .v, .out. A fused projection (c_attn, qkv, in_proj) is attention.q.
* In the attention's own code, the batched products before the softmax are attention.scores, the softmax is
  attention.probs, products after it attention.context. Plain products there (MultiheadAttention projects so) are
  attention.q, .k, .v in their order before the softmax, and attention.out after it.
* Every other linear module, or product with a parameter, is linear.out; every other product is matmul. A softmax of as
  many numbers as the last batched product gave, in rows as long, is attention.probs there, too.

`layer` counts the calls of a site in the order of the forward pass of a micro-step, from 0. A recomputation inside
backward (activation checkpointing) takes the numbers that its module had in the forward pass; outside of modules that a
product with its weight had, or with its lengths.

Backward: the autograd node that is being executed leads to the forward operation by its sequence number. The gradients
of a linear operation are linear.dgrad and linear.wgrad, with the number of that operation among *all* linear
operations; those of scores are attention.dq and .dk, of context attention.dp and .dv, with the layer of their forward.
Which of the two it is follows from the dimension that is summed over, or where that is ambiguous (square products)
from the order in which autograd computes them.

No arithmetic, and nothing that a wrong label could break: labels address faults and explain alarms, and tell which sums
a gradient may use; whether they are its own is seen by the operands (`expectation`).
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from resilience.abft.gemm import Gemm
from resilience.abft.modules import Hook, own_weight
from resilience.abft.node_numbers import NodeNumbers
from resilience.abft.sums import is_parameter
from resilience.events import Check

__all__ = ["PROJECTIONS", "Label", "Labels", "Observer"]

PROJECTIONS = {
    "attention.q": (
        "q_proj",
        "query",
        "q",
        "wq",
        "to_q",
        "q_lin",
        "c_attn",
        "qkv",
        "qkv_proj",
        "wqkv",
        "w_qkv",
        "in_proj",
        "query_key_value",
    ),
    "attention.k": ("k_proj", "key", "k", "wk", "to_k", "k_lin"),
    "attention.v": ("v_proj", "value", "v", "wv", "to_v", "v_lin"),
    "attention.out": ("o_proj", "out_proj", "c_proj", "proj", "dense", "wo", "to_out", "out_lin", "out", "o"),
}
"""Site of a linear module by its own name, within an attention."""

_PROJECTION_SITES = {name: site for site, names in PROJECTIONS.items() for name in names}
_ATTENTION_WORDS = ("attention", "attn")
_LINEAR_CLASSES = ("Linear", "Conv1D")
_MAX_NODES = 1 << 16
_MAX_CALLS = 1 << 12
_COMPILED_NODE = "CompiledFunction"


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query (…, tq, d), key (…, tk, d) and value (…, tk, dv) of an attention."""


class Label(NamedTuple):
    """Where an operation is in the model."""

    site: str
    layer: int


Observer = Callable[[Label, int, Check], None]
"""Told the label, the number of multiplications and the check of every matrix product, also of those that fused
attention is made of.
"""


class _Phase(enum.Enum):
    BEFORE_SCORES = enum.auto()
    SCORED = enum.auto()
    NORMALISED = enum.auto()
    DONE = enum.auto()


@dataclasses.dataclass(slots=True)
class _Frame:
    """A module that is being executed."""

    module: int
    site: str | None
    """Of a linear module; None for an attention."""
    phase: _Phase = _Phase.BEFORE_SCORES
    num_projections: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Forward:
    """What backward needs to know of a forward operation."""

    left_site: str
    right_site: str
    layer: int
    m: int = 0
    k: int = 0
    n: int = 0
    weight: int = 0
    """Address of the weight, where that was what gave the operation its site."""


class Labels:
    """Labels of one process's operations; one thread at a time executes the model."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._stack: list[_Frame] = []
        self._linears: list[tuple[torch.nn.Module, str]] = []
        self._weights: dict[int, str] | None = None
        self._numbers = NodeNumbers()
        self._nodes: defaultdict[int, list[_Forward]] = defaultdict(list)
        self._compiled_asked: set[tuple[int, int, str, int]] = set()
        """Operations of compiled graphs whose gradients were computed: by pass, node, site and place under the node."""
        self._counters: Counter[str] = Counter()
        self._given: defaultdict[tuple[str, object], list[int]] = defaultdict(list)
        self._recomputed: Counter[tuple[str, object]] = Counter()
        self._last_node: tuple[int, int] = (-1, 0)
        self._last_batched = (0, 0)
        """Elements of the last batched product outside of all attentions, and those of its rows."""
        self.observer: Observer | None = None
        self.sequence = -1
        """Number (see `NodeNumbers`) of the last product's or fused attention's autograd node, forward and
        backward."""
        self.original: int | None = None
        """Where that may be a recomputation's: the number of the node it belonged to in the forward."""
        self._made: dict[Label, int] = {}
        """Numbers of the nodes of this micro-step's products and fused attentions."""
        self.is_left: bool | None = None
        """Whether the last product is the gradient of its forward's left operand; None in forward."""

    def attach(self, model: torch.nn.Module) -> None:
        """Put hooks on the attentions and the linear modules of `model`."""
        self.detach()
        if not isinstance(model, torch.jit.ScriptModule):
            self._hook_root(model)
        attentions = [name for name, module in model.named_modules() if _is_attention(module)]
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks, and keeps its parameters elsewhere
            if _is_attention(module):
                self._hook(module, None)
            elif type(module).__name__.endswith(_LINEAR_CLASSES):
                inside = any(name.startswith(f"{attention}." if attention else "") for attention in attentions)
                site = _PROJECTION_SITES.get(name.rpartition(".")[2].lower()) if inside else None
                self._linears.append((module, site or "linear.out"))
                self._hook(module, site or "linear.out")

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._linears.clear()
        self._stack.clear()
        self._weights = None

    def begin_micro_step(self) -> None:
        """Count layers from 0 again. Backward of earlier micro-steps keeps its labels."""
        self._counters.clear()
        self._given.clear()
        self._recomputed.clear()
        self._compiled_asked.clear()
        self._made.clear()
        self._last_batched = (0, 0)
        self._stack.clear()
        self._weights = None
        for sequence in list(itertools.islice(self._nodes, max(0, len(self._nodes) - _MAX_NODES))):
            del self._nodes[sequence]

    # --- operations ---------------------------------------------------------------------------------------------------

    def gemm(self, gemm: Gemm) -> Label:
        """The label of a product that is about to run."""
        label = self._gemm(gemm)
        if self.observer is not None:
            self.observer(label, gemm.left.numel() * gemm.n, Check.CHECKSUM)
        return label

    def _gemm(self, gemm: Gemm) -> Label:
        node = self._backward_node()
        if node is not None:
            return self._backward_gemm(gemm, node)
        self.is_left = None
        self._last_batched = (0, 0)
        site, linear, weight = self._forward_site(gemm)
        which = None if self._stack else _which(gemm)
        layer = self._next(site, which)
        left, right, backward_layer = "matmul", "matmul", layer
        if linear:
            left, right, backward_layer = "linear.dgrad", "linear.wgrad", self._next("linear", which)
        elif site == "attention.scores":
            left, right = "attention.dq", "attention.dk"
        elif site == "attention.context":
            left, right = "attention.dp", "attention.dv"
        self._remember(_Forward(left, right, backward_layer, gemm.m, gemm.k, gemm.n, weight))
        return self._made_first(Label(site, layer))

    def _made_first(self, label: Label) -> Label:
        """Find where an operation that runs forward was made the first time; give its label."""
        if torch._C._current_graph_task_id() == -1:
            self._made[label], self.original = self.sequence, None
        else:
            self.original = self._made.get(label)
        return label

    def softmax(self, scores: torch.Tensor) -> Label | None:
        """The label of a softmax over the last dimension that is about to run; None where it is no attention's."""
        frame = self._stack[-1] if self._stack else None
        if frame is not None and frame.site is None:
            frame.phase = _Phase.NORMALISED
        elif self._last_batched != (scores.numel(), scores.shape[-1]):
            return None
        self._last_batched = (0, 0)
        layer = self._next("attention.probs")
        self._remember(_Forward("attention.ds", "attention.ds", layer))
        return Label("attention.probs", layer)

    def softmax_backward(self) -> Label | None:
        """The label of a softmax's backward that is about to run; None where its forward had none."""
        forward = self._forward_under(torch._C._current_autograd_node(), "attention.ds")
        return None if forward is None else Label("attention.ds", forward.layer)

    def fused_attention(self, operands: Operands | None = None) -> Label:
        """The label of a fused attention that is about to run; `operands` are there to be counted."""
        if self._stack and self._stack[-1].site is None:
            self._stack[-1].phase = _Phase.DONE
        layer = self._next("attention.context")
        self._remember(_Forward("attention.dq", "attention.dk", layer))
        self._observe_fused(("attention.scores",), ("attention.context",), layer, operands)
        return self._made_first(Label("attention.context", layer))

    def fused_attention_backward(self, operands: Operands | None = None) -> int:
        """The layer of a fused attention's backward; −1 if its forward was not seen."""
        forward = self._forward_under(torch._C._current_autograd_node(), "attention.dq")
        layer = -1 if forward is None else forward.layer
        # The scores are computed once more.
        self._observe_fused(
            ("attention.scores", "attention.dq", "attention.dk"), ("attention.dp", "attention.dv"), layer, operands
        )
        return layer

    def _forward_under(self, node: Any | None, left_site: str) -> _Forward | None:
        """The operation whose gradient a node is about to compute, if that is of this site. A compiled graph is one
        node: there it is the last one that was not asked for.
        """
        number, forwards = self._executed(node)
        self.sequence = number
        if node is None or not node.name().startswith(_COMPILED_NODE):
            return forwards[0] if forwards and forwards[0].left_site == left_site else None
        for index, forward in reversed(list(enumerate(forwards))):
            if forward.left_site == left_site and self._is_first_asked(number, left_site, index):
                return forward
        return None

    def _is_first_asked(self, number: int, site: str, index: int) -> bool:
        """Whether this backward pass asks for the first time after an operation of a compiled graph; it has, then."""
        asked = torch._C._current_graph_task_id(), number, site, index
        if asked in self._compiled_asked:
            return False
        self._compiled_asked.add(asked)
        return True

    def _observe_fused(
        self, over_keys: tuple[str, ...], over_values: tuple[str, ...], layer: int, operands: Operands | None
    ) -> None:
        if self.observer is None or operands is None:
            return
        query, key, value = operands
        for sites, width in ((over_keys, query.shape[-1]), (over_values, value.shape[-1])):
            for site in sites:
                multiplications = query.shape[:-1].numel() * key.shape[-2] * width
                self.observer(Label(site, layer), multiplications, Check.INVARIANT)

    # --- forward ------------------------------------------------------------------------------------------------------

    def _forward_site(self, gemm: Gemm) -> tuple[str, bool, int]:
        """(site, whether it is a linear operation, address of its weight if it took that) by the innermost module."""
        frame = self._stack[-1] if self._stack else None
        if frame is None:
            return self._site_without_module(gemm)
        if frame.site is not None:
            return frame.site, True, 0
        if gemm.left.dim() == 2:
            if frame.phase in (_Phase.NORMALISED, _Phase.DONE):
                return "attention.out", True, 0
            frame.num_projections += 1
            return ("attention.q", "attention.k", "attention.v")[min(frame.num_projections, 3) - 1], True, 0
        if frame.phase is _Phase.NORMALISED:
            frame.phase = _Phase.DONE
            return "attention.context", False, 0
        if frame.phase is _Phase.DONE:
            return "matmul", False, 0
        frame.phase = _Phase.SCORED
        return "attention.scores", False, 0

    def _site_without_module(self, gemm: Gemm) -> tuple[str, bool, int]:
        """Compiled code runs no modules; its operands are views that autograd does not know, but of known memory."""
        if gemm.left.dim() != 2:
            self._last_batched = gemm.left.shape[:-1].numel() * gemm.n, gemm.n
            return "matmul", False, 0
        address = gemm.right.data_ptr()
        site = self._weight_sites().get(address)
        if site is not None:
            return site, True, address
        linear = is_parameter(gemm.right)
        return ("linear.out" if linear else "matmul"), linear, address if linear else 0

    def _weight_sites(self) -> dict[int, str]:
        if self._weights is None:
            # Parameters may move between micro-steps (ZeRO-3); a partitioned one has no elements.
            weights = ((own_weight(module), site) for module, site in self._linears)
            self._weights = {weight.data_ptr(): site for weight, site in weights if weight is not None}
        return self._weights

    def _next(self, site: str, which: object = None) -> int:
        """The number of this call of `site`; the number of the first forward if it is a recomputation. `which` tells
        those apart that no module does.
        """
        key = (site, self._stack[-1].module if self._stack else which)
        given = self._given[key]
        if given and torch._C._current_graph_task_id() != -1:
            # Checkpointed blocks are recomputed last to first, so a module that is shared takes its numbers backwards.
            self._recomputed[key] += 1
            return given[-min(self._recomputed[key], len(given))]
        layer = self._counters[site]
        self._counters[site] += 1
        given.append(layer)
        return layer

    def _remember(self, forward: _Forward) -> None:
        # The first operation under a number keeps it: operations without a node (no_grad) come later under the same
        # number. A compiled graph is one node.
        self.sequence = self._numbers.made()
        forwards = self._nodes[self.sequence]
        if len(forwards) < _MAX_CALLS:
            forwards.append(forward)

    # --- backward -----------------------------------------------------------------------------------------------------

    def _backward_node(self) -> Any | None:
        """The node that backward executes, unless a forward pass is being recomputed inside it."""
        if torch._C._current_graph_task_id() == -1 or self._stack or torch.is_grad_enabled():
            return None
        return torch._C._current_autograd_node()

    def _backward_gemm(self, gemm: Gemm, node: Any) -> Label:
        sequence, forwards = self._executed(node)
        num_calls = self._last_node[1] + 1 if self._last_node[0] == sequence else 0
        self._last_node = (sequence, num_calls)
        self.sequence, self.is_left = sequence, False
        if not forwards:
            return Label("matmul", -1)
        if node.name().startswith(_COMPILED_NODE):
            return self._compiled_backward_gemm(gemm, sequence, forwards)
        forward = forwards[0]
        self.is_left = is_left = self._is_left_gradient(gemm, forward, node, num_calls)
        return Label(forward.left_site if is_left else forward.right_site, forward.layer)

    def _executed(self, node: Any | None) -> tuple[int, list[_Forward]]:
        """Number of a node that backward executes, and the operations under it; −1 and none where there is none."""
        if node is None:
            return -1, []
        first, second = self._numbers.executed(node)
        number = second if first not in self._nodes and second in self._nodes else first
        return number, self._nodes.get(number, [])

    def _compiled_backward_gemm(self, gemm: Gemm, sequence: int, forwards: list[_Forward]) -> Label:
        """One node is the whole graph: dA multiplies by a known weight, dB has the shape of one."""
        operands = gemm.left.data_ptr(), gemm.right.data_ptr()
        for index, forward in reversed(list(enumerate(forwards))):
            if not forward.weight:
                continue
            is_left = forward.weight in operands
            if not is_left and (gemm.k != forward.m or {gemm.m, gemm.n} != {forward.k, forward.n}):
                continue
            site = forward.left_site if is_left else forward.right_site
            if self._is_first_asked(sequence, site, index):
                self.is_left = is_left
                return Label(site, forward.layer)
        return Label("matmul", -1)

    @staticmethod
    def _is_left_gradient(gemm: Gemm, forward: _Forward, node: Any, num_calls: int) -> bool:
        """dA = dC·Bᵀ sums over n; dB = Aᵀ·dC sums over m."""
        if forward.m != forward.n and gemm.k in (forward.m, forward.n):
            return gemm.k == forward.n
        wanted = [function is not None for function, _ in node.next_functions[-2:]]
        # A node of a function that is no product, such as a script's own, may have one input only, or none.
        if len(wanted) == 2 and wanted[0] != wanted[1]:
            return wanted[0]
        right_first = node.name().startswith(("MmBackward", "BmmBackward"))
        return (num_calls % 2 == 1) if right_first else (num_calls % 2 == 0)

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _hook_root(self, model: torch.nn.Module) -> None:
        """A forward that raises, or that keeps nothing for a backward, takes no numbers from the one that counts."""
        before: list[Counter[str]] = []

        def enter(module: torch.nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():
                before.append(self._counters.copy())

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or not before:
                return
            counters = before.pop()
            if output is None or not torch.is_grad_enabled():
                self._counters = counters
                for (site, _), given in self._given.items():
                    given[:] = [layer for layer in given if layer < counters[site]]

        self._put(model, enter, leave)

    def _hook(self, module: torch.nn.Module, site: str | None) -> None:
        def enter(module: torch.nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():
                self._stack.append(_Frame(id(module), site))

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling():
                return
            while self._stack and self._stack.pop().module != id(module):
                pass

        self._put(module, enter, leave)

    def _put(self, module: torch.nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(Hook(enter)))
        # Also when forward raises: early stop ends a recomputation with an exception.
        self._handles.append(module.register_forward_hook(Hook(leave), always_call=True))


def _is_attention(module: torch.nn.Module) -> bool:
    name = type(module).__name__.lower()
    return any(word in name for word in _ATTENTION_WORDS) and any(True for _ in module.children())


def _which(gemm: Gemm) -> object:
    """What a product has in common with its recomputation and with few others: its weight, or else its lengths."""
    right = gemm.right
    if not is_parameter(right):
        return gemm.m, gemm.k, gemm.n
    base = right if right._base is None else right._base
    return id(base), right.data_ptr() - base.data_ptr(), right.stride()
