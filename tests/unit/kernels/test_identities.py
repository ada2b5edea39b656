"""Comparison of sums and extremes: the compiled form is torch's, on any heads, and nothing that is not finite hides."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from resilience.kernels import identities as module
from resilience.kernels.identities import TINY, estimated, excess_ratio, identity_ratio

SPECIAL = (math.inf, -math.inf, math.nan, 3e38)


@pytest.fixture(params=["torch", "compiled"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(module, "_compiled", None)
    elif module._compiled is None:
        pytest.skip("not compiled here")
    return str(request.param)


def table(*shape: int, seed: int, front: int = 4) -> torch.Tensor:
    return torch.randn(front, *shape, generator=torch.Generator().manual_seed(seed))


def by_hand(one: torch.Tensor, other: torch.Tensor, random: float, coherent: float) -> float:
    """As the head of the module says, a component after the other, in float64."""
    worst, shared = 0.0, other.shape[2] // one.shape[2]

    def squares(sums: torch.Tensor, batch: int, head: int, component: int) -> float:
        own = sums[1:, batch, head].double().square().mean(0)
        return float(0.5 * own[component] + 0.5 * own.mean())

    for batch in range(one.shape[1]):
        for head in range(one.shape[2]):
            for component in range(one.shape[3]):
                theirs = range(head * shared, (head + 1) * shared)
                first = float(one[0, batch, head, component])
                second = sum(float(other[0, batch, number, component]) for number in theirs)
                energy = squares(one, batch, head, component)
                energy += sum(squares(other, batch, number, component) for number in theirs)
                tolerance = random * math.sqrt(energy) + coherent * min(abs(first), abs(second)) + TINY
                worst = max(worst, abs(first - second) / tolerance)
    return worst


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_the_worst_ratio_is_that_of_the_formula(form: str, heads: int, key_heads: int, width: int) -> None:
    one, other = table(2, key_heads, width, seed=1), table(2, heads, width, seed=2)
    assert identity_ratio(one, other, 0.3, 0.1) == pytest.approx(by_hand(one, other, 0.3, 0.1), rel=1e-5)


def test_rows_weigh_the_squares_of_the_other_side(form: str) -> None:
    one, other, rows = table(2, 2, 16, seed=1), table(2, 4, 16, seed=2), table(2, 4, 16, seed=3)
    squares = estimated(other).squares * 0.25 * estimated(rows).squares.sum(2, keepdim=True)
    squares = estimated(one).squares + squares.unflatten(1, (2, 2)).sum(2)
    wanted = float((one[0].abs() / (0.3 * squares.sqrt() + TINY)).max())
    found = identity_ratio(one, other, 0.3, 0.1, rows=rows, row_weight=0.25)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("vector", range(4))
@pytest.mark.parametrize("which", ["one", "other", "rows", "beside"])
def test_what_is_not_finite_or_nearly_so_is_within_no_tolerance(
    form: str, which: str, vector: int, value: float
) -> None:
    sums = {name: table(2, 2, 8, seed=number) for number, name in enumerate(("one", "other", "rows", "beside"))}

    def is_seen(*, weighed: bool) -> bool:
        rows = sums["rows"] if weighed else None
        found = identity_ratio(sums["one"], sums["other"], 0.5, 0.1, rows=rows, row_weight=1.0, beside=sums["beside"])
        return not found <= 1e6

    assert not is_seen(weighed=False)
    assert not is_seen(weighed=True)
    sums[which][vector, 1, 0, 5] = value
    assert is_seen(weighed=False) == (which != "rows")
    only_squares_count = which in ("other", "rows") and vector == 0
    assert is_seen(weighed=True) == (not only_squares_count)


@pytest.mark.skipif(module._compiled is None, reason="not compiled here")
@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(0, 99))
def test_both_forms_agree(batch: int, key_heads: int, shared: int, width: int, seed: int) -> None:
    one = table(batch, key_heads, width, seed=seed)
    other, rows = (table(batch, key_heads * shared, width, seed=seed + more) for more in (1, 2))
    inner = table(batch, key_heads * shared, width, seed=seed, front=2).sort(0).values
    outer = table(batch, key_heads, width, seed=seed + 1, front=2).sort(0).values

    def found() -> list[float]:
        return [
            identity_ratio(one, other, 0.2, 0.3),
            identity_ratio(one, other, 0.2, 0.3, rows=rows, row_weight=0.1, beside=rows),
            float(excess_ratio(inner, outer, 1e-3)),
            float(excess_ratio(inner, outer, 1e-3, with_zero=True)),
        ]

    compiled = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_compiled", None)
        torch.testing.assert_close(compiled, found(), rtol=1e-4, atol=1e-6)


def test_extremes_within_their_range_have_no_excess(form: str) -> None:
    outer = torch.stack([torch.full((1, 2, 3), -1.0), torch.full((1, 2, 3), 2.0)])
    inner = outer.repeat_interleave(2, dim=2)
    assert float(excess_ratio(inner, outer, 1e-3)) == 0.0
    inner[1, 0, 3, 2] = 2.02
    assert float(excess_ratio(inner, outer, 1e-3)) == pytest.approx(10.0, rel=1e-4)
    assert float(excess_ratio(torch.zeros_like(inner), outer.abs(), 1e-3)) == pytest.approx(500.0), "0 is below 1"
    assert float(excess_ratio(torch.zeros_like(inner), outer.abs(), 1e-3, with_zero=True)) == 0.0


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("which", ["inner", "outer"])
def test_an_extreme_that_is_not_a_number_is_beyond_every_range(form: str, which: str, side: int) -> None:
    outer = table(1, 2, 5, seed=1, front=2).sort(0).values
    inner = outer.clone()
    (inner if which == "inner" else outer)[side, 0, 1, 3] = math.nan
    assert math.isnan(float(excess_ratio(inner, outer, 1e-3)))


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.double,
        lambda sums: sums[:, :, :, ::2],
        lambda sums: sums[:3],
        lambda sums: sums.repeat(1, 1, 1, 129),
    ],
    ids=["another dtype", "gaps in memory", "fewer vectors", "wider than its stack"],
)
def test_what_the_compiled_form_does_not_know_is_done_by_torch(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    one, other = change(table(1, 2, 8, seed=1)), change(table(1, 2, 8, seed=2))
    assert module._compiled is None or module._compiled.identity(one, other, 0.5, 0.1, TINY, None, 0.0, None) is None
    assert math.isfinite(identity_ratio(one, other, 0.5, 0.1))


def test_heads_that_do_not_divide_are_not_compared() -> None:
    if module._compiled is None:
        pytest.skip("not compiled here")
    one, other = table(1, 2, 8, seed=1), table(1, 3, 8, seed=2)
    rows = table(1, 4, 8, seed=3)
    assert module._compiled.identity(one, rows, 0.5, 0.1, TINY, other, 1.0, None) is None
    assert module._compiled.identity(one, other, 0.5, 0.1, TINY, None, 0.0, None) is None
    assert module._compiled.excess(other[:2], one[:2], 0.5, TINY, False) is None
    with pytest.raises(TypeError, match="8 arguments"):
        module._compiled.identity(one, other)  # type: ignore[call-arg]
