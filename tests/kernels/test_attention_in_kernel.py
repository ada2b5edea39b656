"""Strength `kernel`, wired through the dispatcher on CPU tensors: the kernels run in Triton's interpreter.

What PyTorch calls on a GPU cannot be called here: of those operators, the form of the results is held against PyTorch's
own shape functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from resilience.abft import in_kernel
from resilience.abft.fused import bind
from resilience.abft.handlers import Context
from resilience.abft.in_kernel import REPLACED_OPERATORS, InKernelAttention
from resilience.abft.labels import Labels
from resilience.abft.protection import Protection
from resilience.abft.record import Record
from resilience.abft.seam import Gate, Seam
from resilience.clock import SystemClock
from resilience.config import DetectionConfig
from resilience.events import DetectionKind
from resilience.kernels.attention import api
from resilience.kernels.attention.records import CheckBit, Site
from tests.kernels.attention_cases import SMALL, bits_of

ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"

Wire = Callable[..., tuple[InKernelAttention, Record, Gate]]


class Striker:
    """Has the interface of the fault plan's injector."""

    def __init__(self) -> None:
        self.armed = False

    def strike(self, site: str, layer: int, tensor: torch.Tensor, call: int | None = None) -> bool:
        if site != "attention.dk":
            return False
        tensor[0, 0, 0, 0] = math.inf
        self.armed = False
        return True


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[Wire]:
    """Install the handlers at the CPU key; orders to strike go to the kernels."""
    if device.type != "cpu":
        pytest.skip("the wiring at the CPU key is for the interpreter")
    monkeypatch.setattr(api, "DEVICE_TYPES", {"cuda", "cpu"})
    seams: list[Seam] = []

    def make(*orders: api.Strike, injector: Striker | None = None) -> tuple[InKernelAttention, Record, Gate]:
        record, gate = Record(share=1.0, clock=SystemClock()), Gate()
        context = Context(DetectionConfig(max_mends=1), Labels(), record, injector)
        kernels = SimpleNamespace(
            supports=api.supports,
            Ring=api.Ring,
            Checks=api.Checks,
            attention_forward=functools.partial(api.attention_forward, tiling=SMALL, strikes=orders),
            attention_backward=functools.partial(api.attention_backward, tiling=SMALL, strikes=orders),
        )
        attention = InKernelAttention(context, find=lambda *_: kernels)
        seam = Seam(gate)
        seam.add(ON_CPU, attention.forward(ON_CPU), keys=("CPU",))
        seam.add(f"{ON_CPU}_backward", attention.backward(ON_CPU), keys=("CPU",))
        seam.install()
        seams.append(seam)
        return attention, record, gate

    yield make
    for seam in seams:
        seam.uninstall()


def operands(length: int = 24, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 2, length, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def step(gate: Gate, leaves: list[torch.Tensor], **options: object) -> tuple[torch.Tensor, ...]:
    """O and the gradients of a fixed weighting of it."""
    with gate.opened():
        out = F.scaled_dot_product_attention(*leaves, **options)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
        return (out.detach(), *torch.autograd.grad(out, leaves, weights))


ORDER = api.Strike(
    kernel="forward", site=Site.CONTEXT, block=3, tile=0, row=2, column=5, kind=0, bits=bits_of(math.inf)
)  # fmt: skip


def test_attention_is_replaced_and_gives_the_same_within_round_off(wire: Wire) -> None:
    leaves = operands()
    expected = step(Gate(), [leaf.detach().float().requires_grad_() for leaf in leaves], is_causal=True)
    attention, record, gate = wire()
    results = step(gate, leaves, is_causal=True)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=0.03, rtol=0.02)
    attention.drain()
    assert record.drain() == []
    assert not attention.fallbacks
    assert record.checks == {"attention.context": 1, "attention.dv": 1}


def test_a_repaired_block_is_a_mended_finding_and_changes_nothing(wire: Wire) -> None:
    _, _, gate = wire()
    clean = step(gate, operands())
    attention, record, gate = wire(ORDER)
    struck = step(gate, operands())
    assert all(torch.equal(a, b) for a, b in zip(clean, struck, strict=True))
    attention.drain()
    (finding,) = record.drain()
    assert (finding.site, finding.layer, finding.kind) == ("attention.context", 0, DetectionKind.NAN)
    assert finding.mended
    assert finding.bit_exact
    attention.drain()
    assert record.drain() == []


def test_what_backward_sees_of_the_forward_asks_for_a_replay(wire: Wire) -> None:
    order = api.Strike(
        kernel="forward", site=Site.PROBS, block=1, tile=0, row=2, column=5, kind=0, bits=bits_of(0.7)
    )  # fmt: skip
    attention, record, gate = wire(order)
    step(gate, operands())
    attention.drain()
    (finding,) = record.drain()
    assert (finding.site, finding.mended, finding.inputs_bad) == ("attention.probs", False, False)


@pytest.mark.parametrize(
    ("kernel", "struck", "site"),
    [
        ("dq", Site.DP, "attention.dp"),
        ("dq", Site.DS, "attention.ds"),
        ("dkdv", Site.PROBS, "attention.ds"),
        ("dkdv", Site.DS, "attention.ds"),
    ],
)
def test_what_only_an_inner_check_sees_is_a_mended_finding_of_its_site(
    wire: Wire, kernel: str, struck: Site, site: str
) -> None:
    order = api.Strike(kernel=kernel, site=struck, block=1, tile=0, row=2, column=5, kind=2, bits=bits_of(1.25))
    attention, record, gate = wire(order)
    step(gate, operands())
    attention.drain()
    (finding,) = record.drain()
    assert (finding.site, finding.mended) == (site, True)


def test_every_check_of_the_kernels_belongs_to_a_site() -> None:
    assert set(in_kernel._SITES) == {check.name for check in CheckBit}


def test_bad_inputs_make_one_finding_a_call_that_blames_nobody(wire: Wire) -> None:
    attention, record, gate = wire()
    leaves = operands()
    with torch.no_grad():
        leaves[1][0, 1, 3, 3] = math.nan
    step(gate, leaves)
    attention.drain()
    findings = record.drain()
    assert len(findings) <= 6
    assert all(finding.inputs_bad and not finding.mended for finding in findings)


def test_what_found_no_room_in_the_ring_is_reported(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, record, gate = wire(ORDER)
    monkeypatch.setattr(in_kernel, "_RING_CAPACITY", 1)
    step(gate, operands())
    step(gate, operands())
    attention.drain()
    findings = record.drain()
    assert [(f.mended, f.layer) for f in findings] == [(True, 0), (False, -1)]


def test_an_armed_fault_plan_is_seen_by_the_invariants(wire: Wire) -> None:
    striker = Striker()
    attention, record, gate = wire(injector=striker)
    striker.armed = True
    step(gate, operands())
    attention.drain()
    (finding,) = record.drain()
    assert finding.site == "attention.dk"
    assert finding.mended


@pytest.mark.parametrize(
    ("options", "length_k", "dtype", "reason"),
    [
        ({"attn_mask": torch.zeros(24, 24, dtype=torch.bfloat16)}, 24, torch.bfloat16, "an additive mask"),
        ({"is_causal": True}, 17, torch.bfloat16, "a causal mask over unequal lengths"),
        ({}, 24, torch.float32, "dtype torch.float32"),
    ],
)
def test_the_rest_goes_to_the_operator_and_is_counted(
    wire: Wire, options: dict[str, object], length_k: int, dtype: torch.dtype, reason: str
) -> None:
    leaves = [operands(24, dtype)[0], *operands(length_k, dtype)[1:]]
    expected = step(Gate(), leaves, **options)
    attention, record, gate = wire()
    results = step(gate, leaves, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert attention.fallbacks == {reason: 2}
    attention.drain()
    assert record.drain() == []


def test_heads_beyond_the_kernels_offsets_go_to_the_operator(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilience.abft.in_kernel._LARGEST_OFFSET", 24 * 16 - 1)
    attention, _, gate = wire()
    step(gate, operands())
    assert attention.fallbacks == {"heads that lie too far apart": 2}


def test_without_triton_everything_goes_to_the_operator(wire: Wire) -> None:
    attention, _, gate = wire()
    attention._find = lambda *_: None
    step(gate, operands())
    assert attention.fallbacks == {"no GPU, or no Triton": 2}


def test_arguments_that_are_not_known_go_to_the_operator(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another version of torch."""

    def unknown(*_: object) -> None:
        raise KeyError("query")

    expected = step(Gate(), operands())
    attention, _, gate = wire()
    monkeypatch.setattr(in_kernel, "bind", unknown)
    results = step(gate, operands())
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    assert attention.fallbacks == {"its arguments are not known (KeyError)": 2}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_kernel_that_cannot_run_leaves_its_place_to_the_operator(wire: Wire, direction: str) -> None:
    """As where a device has no room for it."""
    errors = pytest.importorskip("triton.runtime.errors")

    def refused(*_: object, **__: object) -> None:
        raise errors.OutOfResources(300000, 232448, "shared memory")

    expected = step(Gate(), operands())
    attention, record, gate = wire()
    setattr(attention._find("", torch.empty(0)), f"attention_{direction}", refused)
    for _ in range(2):
        for ours, theirs in zip(step(gate, operands()), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0.02)
    assert attention.fallbacks["its kernel failed (OutOfResources)"] > 0, "it is not tried again"
    site = {"forward": "attention.context", "backward": "attention.dv"}[direction]
    assert record.unprotected == {f"the check of {site} failed (OutOfResources)": 1}
    attention.drain()
    assert record.drain() == []


@pytest.mark.parametrize("operator", REPLACED_OPERATORS)
def test_results_have_the_form_of_the_replaced_operator(operator: str) -> None:
    for strides in ((0, 1, 2, 3), (0, 2, 1, 3)):
        real = torch.empty(2, 3, 40, 16, dtype=torch.bfloat16).permute(strides).contiguous().permute(strides)
        like = real.to("meta")
        extra = () if "flash" in operator else (None, True)
        expected = getattr(torch.ops.aten, operator)(like, like, like, *extra)
        out = in_kernel._like(operator, real)
        bound = bind(operator, (real, real, real, *extra), {})
        ours = in_kernel._PACKERS[operator](bound, out, torch.zeros(real.shape[:3]))
        assert len(ours) == len(expected)
        for mine, theirs in zip(ours, expected, strict=True):
            if isinstance(theirs, torch.Tensor) and mine is not None:
                assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
                assert mine.stride() == theirs.stride()
            elif isinstance(theirs, int):
                assert mine == theirs


@pytest.mark.parametrize("operator", REPLACED_OPERATORS)
def test_log_sum_exps_of_all_forms_are_read_alike(operator: str) -> None:
    query = torch.zeros(2, 3, 40, 16)
    lse = torch.arange(240.0).view(2, 3, 40)
    bound = bind(operator, (query, query, query, *(() if "flash" in operator else (None, True))), {})
    packed = in_kernel._PACKERS[operator](bound, query, lse)[1]
    read = in_kernel._plain_lse(packed, query)
    assert torch.equal(read, lse)
    assert read.is_contiguous()


def test_without_a_gpu_strength_kernel_is_checksum_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    kernel = Protection(DetectionConfig(strength="kernel"))
    assert "no CUDA device" in caplog.text
    assert kernel._seam.operators == Protection(DetectionConfig())._seam.operators
    kernel.install()
    try:
        with kernel.active():
            step(Gate(), operands())
    finally:
        kernel.uninstall()
    assert kernel.drain() == []
    assert kernel.checks()["attention.context"] == 1
