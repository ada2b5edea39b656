"""The identities behind the checks, in float64 under every mask that the kernels support, and the oracle itself."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from resilience.kernels.attention.oracle import attend, residuals

CASES = {
    "square": ((2, 2, 17, 8), (2, 2, 17, 8), False),
    "causal": ((2, 2, 17, 8), (2, 2, 17, 8), True),
    "grouped heads": ((1, 6, 13, 8), (1, 2, 13, 8), True),
    "more keys": ((1, 2, 5, 8), (1, 2, 19, 8), True),
    "more queries": ((1, 2, 19, 8), (1, 1, 5, 8), True),
    "one key": ((1, 2, 3, 8), (1, 1, 1, 8), False),
}


def operands(case: str) -> tuple[tuple[torch.Tensor, ...], bool, float]:
    torch.manual_seed(len(case))
    of_q, of_k, causal = CASES[case]
    q, k, v, d_out = (torch.randn(shape, dtype=torch.float64) for shape in (of_q, of_k, of_k, of_q))
    return (q, k, v, d_out), causal, 1.0 / math.sqrt(of_q[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_is_attention_and_its_gradients(case: str) -> None:
    (q, k, v, d_out), causal, _ = operands(case)
    run = attend(q, k, v, d_out, causal=causal)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
    gradients = torch.autograd.grad(out, leaves, d_out)
    torch.testing.assert_close(run.out, out.detach(), atol=1e-12, rtol=0)
    for ours, theirs in zip((run.dq, run.dk, run.dv), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_every_identity_holds_to_round_off(case: str) -> None:
    (q, k, v, d_out), causal, scale = operands(case)
    run = attend(q, k, v, d_out, causal=causal)
    for name, residual in residuals(run, q, k, v, d_out, scale=scale).items():
        assert residual.abs().max() < 2e-13, name


@pytest.mark.parametrize(
    ("faulty", "seen_by"),
    [
        ("scores", {"scores", "scores_again", "quotient"}),
        ("out", {"context", "ds_rows", "quotient"}),
        ("probs", {"context", "mass", "ds_rows", "dv", "quotient"}),
        ("d_probs", {"dp", "dp_rows", "ds_rows", "quotient"}),
        ("d_scores", {"ds", "ds_rows", "quotient", "dq", "dk"}),
        ("dq", {"dq"}),
        ("dk", {"dk"}),
        ("dv", {"dv"}),
    ],
)
def test_a_wrong_element_breaks_the_identities_that_hold_it(faulty: str, seen_by: set[str]) -> None:
    (q, k, v, d_out), causal, scale = operands("grouped heads")
    run = attend(q, k, v, d_out, causal=causal)
    wrong = getattr(run, faulty).clone()
    wrong[0, 1, 7, 3] += 1e-3
    found = residuals(dataclasses.replace(run, **{faulty: wrong}), q, k, v, d_out, scale=scale)
    assert {name for name, residual in found.items() if residual.abs().max() > 1e-9} == seen_by


def test_queries_without_keys_give_nothing() -> None:
    empty = torch.zeros(1, 2, 0, 8)
    q = torch.ones(1, 2, 3, 8)
    run = attend(q, empty, empty, q)
    assert not run.out.any()
    assert not run.dq.any()
    assert run.lse.isneginf().all()
