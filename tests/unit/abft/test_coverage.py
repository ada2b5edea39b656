"""What is protected of a step, counted beside the checks; what cannot be checked runs as it does without protection."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from resilience.abft.coverage import CoverageReport, Operation, coverage

TOKENS = torch.arange(2 * 12).reshape(2, 12) % 40

Step = tuple[nn.Module, Callable[[], torch.Tensor]]


def report_of(model: nn.Module, run: Callable[[], torch.Tensor]) -> CoverageReport:
    return coverage(lambda: run().backward(), model)


# --- forms of products ------------------------------------------------------------------------------------------------


def plain(gpt: Any) -> Step:
    model = gpt()
    return model, lambda: model(TOKENS)


def fused(gpt: Any) -> Step:
    model = gpt(sdpa=True)
    return model, lambda: model(TOKENS)


def checkpointed(kind: str) -> Callable[[Any], Step]:
    def make(gpt: Any) -> Step:
        model = gpt(checkpointing=kind)
        return model, lambda: model(TOKENS)

    return make


def autocast(gpt: Any) -> Step:
    model = gpt(sdpa=True)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(TOKENS)

    return model, run


def tied(gpt: Any) -> Step:
    model = gpt()
    model.head.weight = model.embedding.weight
    return model, lambda: model(TOKENS)


def encoder(gpt: Any) -> Step:
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(2, 9, 16, requires_grad=True)
    return module, lambda: module(x).square().mean()


def multihead(gpt: Any) -> Step:
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 9, 16, requires_grad=True)
    return module, lambda: module(x, x, x)[0].square().mean()


def einsum(gpt: Any) -> Step:
    module = nn.ParameterList([nn.Parameter(torch.randn(4, 5, 6))])
    x = torch.randn(3, 4, 5)
    return module, lambda: torch.einsum("bij,ijk->bk", x, module[0]).square().mean()


def math_attention(gpt: Any) -> Step:
    model = gpt(sdpa=True)

    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return model(TOKENS)

    return model, run


class Experts(nn.Module):
    """Four experts of 8 → 12 → 8, each token to one of them: one by one, in batches, or as a grouped product."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.up = nn.Parameter(torch.randn(4, 8, 16) / 3)
        self.down = nn.Parameter(torch.randn(4, 16, 8) / 4)
        self.router = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, expert = self.router(x).softmax(-1).max(-1)
        order = expert.argsort()
        tokens, counts = x[order], torch.bincount(expert, minlength=4)
        if self.form == "loop":
            pieces = tokens.split(counts.tolist())
            out = torch.cat([(p @ up).relu() @ down for p, up, down in zip(pieces, self.up, self.down, strict=True)])
        elif self.form == "batched":
            every = (x.expand(4, -1, -1) @ self.up).relu() @ self.down
            out = every[expert, torch.arange(len(x))][order]
        else:
            ends = counts.cumsum(0).int()
            out = F.grouped_mm(tokens, self.up, offs=ends).relu()
            out = F.grouped_mm(out, self.down, offs=ends)
        return out * gate[order, None]


def experts(form: str) -> Callable[[Any], Step]:
    def make(gpt: Any) -> Step:
        torch.manual_seed(0)
        module = Experts(form)
        x = torch.randn(24, 8, requires_grad=True)
        return module, lambda: module(x).square().mean()

    return make


@pytest.mark.parametrize(
    "make",
    [
        plain, fused, checkpointed("reentrant"), checkpointed("non_reentrant"), autocast, tied, encoder, multihead,
        einsum, math_attention, experts("loop"), experts("batched"), experts("grouped"),
    ],
    ids=[
        "gpt", "sdpa", "reentrant", "non_reentrant", "autocast", "tied", "encoder", "multihead",
        "einsum", "sdpa-math", "experts", "experts-batched", "experts-grouped",
    ],
)  # fmt: skip
def test_every_product_is_protected(gpt: Any, make: Any) -> None:
    model, run = make(gpt)
    report = report_of(model, run)
    assert report.flops > 0
    assert report.unprotected == ()
    assert report.share == 1.0
    assert set(report.by_layer().values()) == {1.0}
    backward = [operation for operation in report.operations if operation.site in ("linear.dgrad", "linear.wgrad")]
    assert all(operation.layer >= 0 for operation in backward)


def test_zero_3s_linear_is_protected() -> None:
    linear = pytest.importorskip("deepspeed.runtime.zero.linear")
    module = nn.Linear(6, 10)
    x = torch.randn(4, 6, requires_grad=True)
    report = report_of(module, lambda: linear.zero3_linear_wrap(x, module.weight, module.bias).square().mean())
    assert report.share == 1.0
    assert len(report.operations) == 3


def test_the_flops_of_a_step_are_those_of_its_shapes(gpt: Any) -> None:
    model = gpt(layers=1, width=32, heads=4, vocabulary=50, dropout=0.0)
    tokens, width, length = 24, 32, 12
    linear = 2 * tokens * (width * 3 * width + width * width + 2 * 4 * width * width + width * 50)
    attention = 2 * 2 * (2 * 4 * length * length * 8)
    report = report_of(model, lambda: model(TOKENS))
    assert report.flops == 3 * (linear + attention)
    assert report.protected_flops == report.flops
    per_site = Counter(dict.fromkeys(("attention.dq", "attention.scores"), 0))
    for operation in report.operations:
        per_site[operation.site] += operation.flops
    assert per_site["attention.dq"] == per_site["attention.scores"] == attention // 2


def test_fused_attention_counts_as_the_products_it_is_made_of(gpt: Any) -> None:
    model = gpt(layers=1, sdpa=True, dropout=0.0)
    report = report_of(model, lambda: model(TOKENS))
    found = [operation for operation in report.operations if operation.check == "invariants"]
    assert Counter(operation.site for operation in found) == {
        "attention.scores": 2, "attention.context": 1, "attention.dp": 1, "attention.dv": 1, "attention.dq": 1,
        "attention.dk": 1,
    }  # fmt: skip
    assert len({operation.flops for operation in found}) == 1


def test_a_weaker_strength_is_reported_as_such(gpt: Any) -> None:
    from resilience.config import DetectionConfig

    model = gpt(sdpa=True, dropout=0.0)
    report = coverage(lambda: model(TOKENS).backward(), model, DetectionConfig(strength="invariants"))
    assert 0.0 < report.share < 0.2
    assert {operation.reason for operation in report.unprotected} == {"not seen by a check"}


def test_the_report_reads_as_a_table() -> None:
    report = CoverageReport(
        (
            *(Operation("aten::mm", "linear.out", layer, 1_000_000, "checksum") for layer in (0, 1, 2, 5)),
            Operation("aten::convolution", "convolution", -1, 1_000_000, None, "convolution"),
        )
    )
    lines = str(report).splitlines()
    assert lines[1].split() == ["linear.out", "0–2,", "5", "aten::mm", "4", "4.000", "80.0", "%", "checksum"]
    assert lines[2].endswith("20.0 %  none: convolution")
    assert lines[-1] == "protected: 80.00 % of 5.000 MFLOP"
    assert report.by_layer()["convolution", -1] == 0.0
    assert CoverageReport(()).share == 1.0


def test_it_is_offered_as_a_function_of_the_package(gpt: Any) -> None:
    package = importlib.import_module("resilience")
    model = gpt(layers=1)
    assert package.coverage(lambda: model(TOKENS).backward(), model).share == 1.0


# --- compiled code ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graphs_are_protected_and_labelled(gpt: Any, protect: Any, backend: str) -> None:
    """Inductor leaves products and fused attention to aten, through `.out` forms; weights are known by their memory."""
    torch.manual_seed(0)
    model = gpt(layers=2, sdpa=True, dropout=0.0)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    plain_loss = compiled(TOKENS)
    plain_loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    report = report_of(model, lambda: compiled(TOKENS))
    assert report.unprotected == ()
    layers = {
        site: [op.layer for op in report.operations if op.site == site]
        for site in {op.site for op in report.operations}
    }
    assert layers["attention.q"] == layers["attention.out"] == [0, 1]
    assert layers["linear.out"] == [0, 1, 2, 3, 4]
    assert sorted(layers["linear.wgrad"]) == sorted(layers["linear.dgrad"]) == list(range(9))
    assert layers["attention.dv"] == [1, 0]
    model.zero_grad()
    protection = protect()
    protection.attach(model)
    protection.begin_micro_step(1, 0, 0)
    with protection.active():
        loss = compiled(TOKENS)
        loss.backward()
    assert protection.drain() == []
    assert sum(protection.checks().values()) == 9 * 3 + 2 * 2
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_products_that_a_compiler_generates_are_reported_as_unprotected() -> None:
    """A backend that turns a product into other work, as C++ templates of inductor do."""
    module = nn.Linear(6, 6, bias=False)

    def generate(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return lambda weight, x: ((x.unsqueeze(1) * weight.unsqueeze(0)).sum(2),)

    compiled = torch.compile(module, backend=generate, fullgraph=True)
    report = report_of(module, lambda: compiled(torch.ones(4, 6)).square().mean())
    (lost,) = report.unprotected
    assert lost.reason == "generated code in place of an operator"
    assert lost.flops == report.flops == 2 * 2 * 4 * 6 * 6
    assert report.share == 0.0


# --- what cannot be checked -------------------------------------------------------------------------------------------


def test_an_operator_of_another_library_is_listed_since_nobody_knows_what_it_multiplies() -> None:
    library = torch.library.Library("resilience_test", "DEF")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", lambda x: torch.from_numpy(x.numpy() @ x.numpy()), "CPU")
    try:
        module = nn.Linear(6, 6)
        (unknown,) = coverage(
            lambda: torch.ops.resilience_test.opaque(torch.ones(6, 6)) + module(torch.ones(6)), module
        ).unprotected
    finally:
        library._destroy()
    assert (unknown.operator, unknown.reason) == ("resilience_test::opaque", "not known what it computes")


def sparse(layout: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = torch.eye(4)
        return dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()


UNPROTECTED: dict[str, tuple[Callable[[], Any], str]] = {
    "integers": (lambda: torch.mm(torch.ones(3, 4).int(), torch.ones(4, 2).int()), "product of torch.int32"),
    "complex": (lambda: torch.mm(torch.ones(3, 4) * 1j, torch.ones(4, 2) * 1j), "complex product"),
    "conjugated": (lambda: torch.mm((torch.ones(3, 4) * 1j).conj(), torch.ones(4, 2) * 1j), "complex product"),
    "zero rows": (lambda: torch.mm(torch.ones(0, 4), torch.ones(4, 2)), "empty product"),
    "zero inner": (lambda: torch.addmm(torch.ones(2), torch.ones(3, 0), torch.ones(0, 2)), "empty product"),
    "zero batch": (lambda: torch.bmm(torch.ones(0, 3, 4), torch.ones(0, 4, 2)), "empty product"),
    "dot": (lambda: torch.dot(torch.ones(4), torch.ones(4)), "matrix–vector product"),
    "vdot": (lambda: torch.vdot(torch.ones(4), torch.ones(4)), "matrix–vector product"),
    "mv": (lambda: torch.mv(torch.ones(3, 4), torch.ones(4)), "matrix–vector product"),
    "addmv": (lambda: torch.addmv(torch.ones(3), torch.ones(3, 4), torch.ones(4)), "matrix–vector product"),
    "int8": (
        lambda: torch._int_mm(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8)),
        "integer or quantised product",
    ),
    "activation": (
        lambda: torch._addmm_activation(torch.ones(2), torch.ones(3, 4), torch.ones(4, 2)), "fused with other work"
    ),
    "convolution": (lambda: F.conv1d(torch.ones(1, 2, 9), torch.ones(3, 2, 3)), "convolution"),
    "sparse": (lambda: torch.sparse.mm(sparse("coo"), torch.ones(4, 3)), "sparse product"),
    "sparse csr": (lambda: sparse("csr") @ torch.ones(4, 3), "sparse product"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("name", UNPROTECTED)
def test_what_no_check_understands_runs_as_it_is_and_is_counted(protect: Any, name: str) -> None:
    run, reason = UNPROTECTED[name]
    expected = run()
    protection = protect()
    with protection.active():
        result = run()
    assert torch.equal(result, expected)
    assert protection.unprotected() == {reason: 1}
    assert protection.drain() == []
    (operation,) = coverage(run, nn.Module()).operations
    assert operation.check is None
    assert reason in operation.reason


def test_meta_tensors_pass_by(protect: Any) -> None:
    protection = protect()
    with protection.active():
        assert (torch.ones(3, 4, device="meta") @ torch.ones(4, 2, device="meta")).shape == (3, 2)
    assert protection.checks() == protection.unprotected() == {}


def overlapping() -> torch.Tensor:
    return torch.arange(12.0).as_strided((5, 4), (2, 1)) / 7


@pytest.mark.parametrize(
    "run",
    [
        lambda: overlapping() @ torch.ones(4, 3),
        lambda: torch.ones(2, 5) @ overlapping(),
        lambda: torch.ones(3, 1).expand(3, 4) @ torch.ones(1, 2).expand(4, 2),
        lambda: torch.mm(torch.ones(3, 4), torch.ones(4, 4)[::2, ::2].repeat(2, 1), out=torch.empty(2, 3).t()),
        lambda: (x := torch.ones(3, 3) / 3).addmm_(torch.ones(3, 3), x.clone()),
        lambda: torch.ones(3, 5).t() @ torch.ones(3, 5).flip(0),
    ],
    ids=["overlapping-left", "overlapping-right", "expanded", "strided-out", "in-place", "transposed"],
)  # fmt: skip
def test_unusual_memory_is_checked_and_not_changed(protect: Any, run: Callable[[], torch.Tensor]) -> None:
    expected = run()
    protection = protect()
    with protection.active():
        result = run()
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()
    assert sum(protection.checks().values()) == 1
    assert protection.drain() == []


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.mm(torch.ones(3), torch.ones(3, 2)),
        lambda: torch.mm(torch.ones(3, 4), torch.ones(3, 2)),
        lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(3, 4, 2)),
        lambda: torch.mm(torch.ones(3, 4), torch.ones(4, 2).double()),
        lambda: torch.addmm(torch.ones(7), torch.ones(3, 4), torch.ones(4, 2)),
        lambda: torch.mm(torch.ones(3, 4), torch.ones(4, 2), out=torch.ones(3, 2, dtype=torch.int32)),
    ],
    ids=["vector", "inner", "batch", "dtype", "addend", "out"],
)
def test_a_mistake_of_the_script_gets_pytorchs_own_message(protect: Any, run: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError) as expected:
        run()
    protection = protect()
    with protection.active(), pytest.raises(RuntimeError) as found:
        run()
    assert str(found.value) == str(expected.value)
    assert protection.drain() == []


def test_passes_nested_in_a_backward_that_the_script_begins_are_protected(gpt: Any, protect: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4, requires_grad=True)
    protection = protect()
    for _ in range(2):
        y = checkpoint(module, x, use_reentrant=True)
        y.register_hook(lambda _: protection.admit_backward(torch._C._current_graph_task_id()))
        before = sum(protection.checks().values())
        y.square().mean().backward()
        assert sum(protection.checks().values()) - before == 2 + 4, "two forwards again, two gradients each"
        module(x).sum().backward()
        assert sum(protection.checks().values()) - before == 2 + 4, "a later pass is not let through"
