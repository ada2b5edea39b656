"""ATTNChecker's sections: equal to plain attention without a fault, and every fault in every GEMM named and mended."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resilience.abft.patterns import (
    PROPAGATION,
    Pattern,
    Section,
    classify_elements,
    classify_lines,
    culprit,
)
from resilience.abft.sections import AttentionWeights, SectionReport, attend

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["inf", "nan", "near_inf", "moderate"]
AT_THE_END_OF = {
    "attention.q": (Section.SCORES, Pattern.ROW, "attention.q"),
    "attention.k": (Section.SCORES, Pattern.COLUMN, "attention.k"),
    "attention.scores": (Section.SCORES, Pattern.ELEMENT, "attention.scores"),
    "attention.v": (Section.CONTEXT, Pattern.COLUMN, "attention.v"),
    "attention.context": (Section.CONTEXT, Pattern.ELEMENT, "attention.context"),
    "merged": (Section.OUTPUT, Pattern.ROW, "attention.context"),
    "attention.out": (Section.OUTPUT, Pattern.ELEMENT, "attention.out"),
}


def problem(
    dtype: torch.dtype, *, heads: int = 4, kv_heads: int = 2, width: int = 8, batch: int = 2, length: int = 24
) -> tuple[torch.Tensor, AttentionWeights]:
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    size = 32

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    weights = AttentionWeights(
        q=draw(heads * width, size, scale=size**-0.5),
        k=draw(kv_heads * width, size, scale=size**-0.5),
        v=draw(kv_heads * width, size, scale=size**-0.5),
        out=draw(20, heads * width, scale=(heads * width) ** -0.5),
        q_bias=draw(heads * width),
        k_bias=draw(kv_heads * width),
        v_bias=draw(kv_heads * width),
        out_bias=draw(20),
    )
    return draw(batch, length, size), weights


def plain(
    x: torch.Tensor, w: AttentionWeights, heads: int, kv_heads: int, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The same operations, as Hugging Face's eager attention writes them."""
    q = F.linear(x, w.q, w.q_bias).unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (
        F.linear(x, weight, bias).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        for weight, bias in ((w.k, w.k_bias), (w.v, w.v_bias))
    )
    if heads != kv_heads:  # a copy lies differently, and on some processors a product's last bit depends on that
        k, v = (one.repeat_interleave(heads // kv_heads, 1) for one in (k, v))
    scores = q @ k.mT * (1.0 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores + mask
    return F.linear((scores.softmax(-1).to(x.dtype) @ v).transpose(1, 2).flatten(2), w.out, w.out_bias)


def faults(reports: list[SectionReport]) -> list[SectionReport]:
    return [report for report in reports if report.pattern is not Pattern.CLEAN]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1), (3, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_fault_it_is_plain_attention_bit_for_bit(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    x, weights = problem(dtype, heads=heads, kv_heads=kv_heads, width=7, length=13)
    mask = torch.where(torch.arange(13) > 9, -math.inf, 0.1 * torch.arange(13.0)).to(dtype)
    out, reports = attend(x, weights, num_heads=heads, num_kv_heads=kv_heads, mask=mask)
    assert torch.equal(out, plain(x, weights, heads, kv_heads, mask=mask))
    assert [report.section for report in reports] == list(Section)
    assert not faults(reports)
    assert all(report.clean and 0.0 < report.max_ratio < 0.5 for report in reports)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_it_agrees_with_float64_and_with_sdpa(is_causal: bool, dropout_p: float) -> None:
    x, weights = problem(torch.float64, kv_heads=4)
    generator = torch.Generator().manual_seed(5)
    out, reports = attend(
        x, weights, num_heads=4, is_causal=is_causal, dropout_p=dropout_p, generator=generator, scale=0.4
    )
    assert not faults(reports)
    single = AttentionWeights(**{name: getattr(weights, name).float() for name in AttentionWeights.__slots__})
    generator.manual_seed(5)
    rough, reports = attend(
        x.float(), single, num_heads=4, is_causal=is_causal, dropout_p=dropout_p, generator=generator, scale=0.4
    )
    assert not faults(reports)
    if dropout_p == 0.0:
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (4, -1)).transpose(1, 2)
            for weight, bias in ((weights.q, weights.q_bias), (weights.k, weights.k_bias), (weights.v, weights.v_bias))
        )
        context = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.4)
        torch.testing.assert_close(out, F.linear(context.transpose(1, 2).flatten(2), weights.out, weights.out_bias))
        torch.testing.assert_close(rough.double(), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sums", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", AT_THE_END_OF)
def test_each_fault_in_each_gemm_is_named_and_mended(
    site: str, kind: str, dtype: torch.dtype, sums: torch.dtype
) -> None:
    x, weights = problem(dtype)
    largest = float(torch.finfo(dtype).max)
    value = {"inf": math.inf, "nan": math.nan, "near_inf": 0.9 * largest, "moderate": 40.0}[kind]

    def strike(where: str, tensor: torch.Tensor) -> None:
        if where == site:
            tensor.view(-1)[tensor.numel() // 3 + 2] = value

    options: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "is_causal": True, "sums": sums}
    clean, _ = attend(x, weights, **options)
    out, reports = attend(x, weights, strike=strike, **options)
    found = faults(reports)
    assert [(each.section, each.pattern, each.culprit) for each in found] == [AT_THE_END_OF[site]]
    assert found[0].clean
    assert found[0].num_rebuilt > 0
    eps = float(torch.finfo(dtype).eps if sums == torch.float64 else max(torch.finfo(dtype).eps, 1e-6))
    assert float((out - clean).abs().max()) < 40 * eps * float(clean.abs().max())


def test_several_faults_in_a_section_are_left_and_said_so() -> None:
    x, weights = problem(torch.float32)

    def strike(where: str, tensor: torch.Tensor) -> None:
        if where == "attention.scores":
            tensor[1, 2, 3:6, 4:7] = math.inf

    _, reports = attend(x, weights, num_heads=4, num_kv_heads=2, strike=strike)
    assert (reports[0].pattern, reports[0].clean, reports[0].num_rebuilt) == (Pattern.SPREAD, False, 0)
    assert reports[0].culprit is None


@pytest.mark.parametrize("site", PROPAGATION)
def test_an_unmended_fault_spreads_as_the_table_says(site: str) -> None:
    x, w = problem(torch.float64, kv_heads=4, batch=1)

    def run(struck: bool) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}

        def keep(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if struck and name == site:
                tensor[0, 1, 5, 3] += 2.0
            made[name] = tensor[0, 1] if name != "attention.out" else tensor[0]
            return tensor

        def heads(weight: torch.Tensor) -> torch.Tensor:
            return F.linear(x, weight).unflatten(-1, (4, -1)).transpose(1, 2).contiguous()

        q, k = keep("attention.q", heads(w.q)), keep("attention.k", heads(w.k))
        probabilities = keep("attention.probs", keep("attention.scores", q @ k.mT).softmax(-1))
        context = keep("attention.context", probabilities @ keep("attention.v", heads(w.v)))
        keep("attention.out", F.linear(context.transpose(1, 2).flatten(2), w.out))
        return made

    clean, faulty = run(False), run(True)
    for after, pattern in PROPAGATION[site].items():
        assert classify_elements(clean[after] != faulty[after]) is pattern, after


@pytest.mark.parametrize(
    ("rows", "columns", "pattern"),
    [
        (0, 0, Pattern.CLEAN),
        (1, 0, Pattern.ELEMENT),
        (1, 1, Pattern.ELEMENT),
        (0, 5, Pattern.ROW),
        (1, 5, Pattern.ROW),
        (4, 0, Pattern.COLUMN),
        (4, 1, Pattern.COLUMN),
        (2, 2, Pattern.SPREAD),
    ],
)
def test_patterns_follow_from_the_lines_that_are_off(rows: int, columns: int, pattern: Pattern) -> None:
    assert classify_lines(torch.arange(4) < rows, torch.arange(6) < columns) is pattern


def test_a_fault_that_has_spread_accuses_nobody() -> None:
    assert all(culprit(section, Pattern.SPREAD) is None for section in Section)
    assert all(culprit(section, Pattern.CLEAN) is None for section in Section)


def test_nothing_to_compute_is_no_error_and_wrong_heads_are_one() -> None:
    x, weights = problem(torch.float32)
    out, reports = attend(x[:, :0], weights, num_heads=4, num_kv_heads=2)
    assert out.shape == (2, 0, 20)
    assert not faults(reports)
    with pytest.raises(ValueError, match="num_heads = 3"):
        attend(x, weights, num_heads=3)
    with pytest.raises(ValueError, match="int64"):
        attend(x.long(), weights, num_heads=4, num_kv_heads=2)
