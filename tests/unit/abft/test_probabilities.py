"""Row sums of softmax: silent on clean ones, loud on faults that change a row's mass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resilience.abft.probabilities import (
    confirm_gradient,
    confirm_softmax,
    screen_gradient,
    screen_softmax,
    unusable_for_gradient,
    unusable_for_softmax,
)
from resilience.events import DetectionKind

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def detected(scores: torch.Tensor, out: torch.Tensor) -> DetectionKind | None:
    ratio = screen_softmax(out)
    return None if float(ratio.max()) <= 1.0 else confirm_softmax(scores, out, ratio).kind


def scores_of(dtype: torch.dtype, n: int = 128, *, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(2, 3, 50, n, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 17, 128, 1000, 8192])
def test_clean_rows_pass_the_screen_itself(dtype: torch.dtype, n: int) -> None:
    for scale in (0.0, 0.1, 3.0, 100.0, 1e4):
        scores = scores_of(dtype, n, scale=scale)[:, :, :8]
        assert float(screen_softmax(scores.softmax(-1)).max()) <= 0.75


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_no_fault(dtype: torch.dtype) -> None:
    scores = scores_of(dtype).masked_fill(torch.ones(50, 128, dtype=torch.bool).triu(3), float("-inf"))
    assert detected(scores, scores.softmax(-1)) is None
    scores[1, 2, 7] = float("-inf")
    out = scores.softmax(-1)
    ratio = screen_softmax(out)
    confirmation = confirm_softmax(scores, out, ratio)
    assert confirmation.kind is None
    assert not confirmation.inputs_bad, "a row that sees no key is no bad input"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (float("inf"), DetectionKind.INF),
        (float("nan"), DetectionKind.NAN),
        (1.5, DetectionKind.MISMATCH),
        (0.2, DetectionKind.MISMATCH),
    ],
)
def test_faults_are_found(dtype: torch.dtype, value: float, kind: DetectionKind) -> None:
    for place in range(0, 2 * 3 * 50 * 128, 1777):
        scores = scores_of(dtype)
        out = scores.softmax(-1)
        out.view(-1)[place] = value
        assert detected(scores, out) is kind


@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=str)
def test_the_smallest_change_of_mass_that_is_always_found(dtype: torch.dtype, change: float) -> None:
    for seed in range(30):
        scores = scores_of(dtype, seed=seed)
        out = scores.softmax(-1)
        out[1, 1, seed, out[1, 1, seed].argmax()] += change
        assert detected(scores, out) is DetectionKind.MISMATCH


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_scores_are_propagation(bad: float) -> None:
    scores = scores_of(torch.float32)
    scores[0, 0, 3, 4] = bad
    out = scores.softmax(-1)
    confirmation = confirm_softmax(scores, out, screen_softmax(out))
    assert confirmation.kind is None
    assert confirmation.inputs_bad


def test_a_softmax_that_widens_is_held_by_its_own_dtype() -> None:
    scores = scores_of(torch.bfloat16)
    out = torch.softmax(scores, -1, dtype=torch.float32)
    assert detected(scores, out) is None
    out[0, 1, 2, 3] += 1e-3
    assert detected(scores, out) is DetectionKind.MISMATCH


def gradient_of(dtype: torch.dtype, n: int, *, seed: int, offset: float) -> tuple[torch.Tensor, ...]:
    """(dP, P, dS) of a causal softmax as the library computes them."""
    scores = scores_of(dtype, n, scale=2.0, seed=seed)
    scores = scores.masked_fill(torch.ones(50, n, dtype=torch.bool).triu(3), float("-inf"))
    probabilities = scores.softmax(-1)
    incoming = (scores_of(torch.float32, n, seed=seed + 50) + offset).to(dtype)
    return incoming, probabilities, torch._softmax_backward_data(incoming, probabilities, -1, dtype)


def gradient_kind(incoming: torch.Tensor, weights: torch.Tensor, gradient: torch.Tensor) -> DetectionKind | None:
    ratio = screen_gradient(gradient)
    return None if float(ratio.max()) <= 1.0 else confirm_gradient(incoming, weights, gradient, ratio).kind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 17, 128, 1000])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
def test_clean_gradients_of_softmax_raise_no_alarm(dtype: torch.dtype, n: int, offset: float) -> None:
    for seed in range(8):
        assert gradient_kind(*gradient_of(dtype, n, seed=seed, offset=offset)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("factor", "least"), [(float("inf"), 1.0), (float("nan"), 1.0), (1e38, 1.0), (1.5, 0.95), (0.0, 1.0)]
)
def test_faults_in_gradients_of_softmax_are_found(dtype: torch.dtype, factor: float, least: float) -> None:
    found, trials = 0, 40
    for seed in range(trials):
        incoming, weights, gradient = gradient_of(dtype, 128, seed=seed, offset=0.0)
        row = gradient[1, 2, 20 + seed % 30]
        place = int(row.abs().argmax())
        row[place] = row[place] * factor
        found += gradient_kind(incoming, weights, gradient) is not None
    assert found >= least * trials


def test_inputs_of_a_gradient_that_are_not_finite_are_no_fault_of_it() -> None:
    incoming, weights, _ = gradient_of(torch.float32, 64, seed=1, offset=0.0)
    incoming[0, 1, 7, 3] = float("inf")
    gradient = torch._softmax_backward_data(incoming, weights, -1, torch.float32)
    confirmation = confirm_gradient(incoming, weights, gradient, screen_gradient(gradient))
    assert confirmation.kind is None
    assert confirmation.inputs_bad


def keyless(num_rows: int) -> torch.Tensor:
    scores = scores_of(torch.float32)
    scores.view(-1, 128)[:num_rows] = float("-inf")
    return scores


@pytest.mark.parametrize("num_rows", [0, 20, 200])
def test_rows_without_keys_hide_no_fault_in_others(num_rows: int) -> None:
    scores = keyless(num_rows)
    probabilities = scores.softmax(-1)
    probabilities[1, 2, 49, 3] += 0.5
    assert detected(scores, probabilities) is DetectionKind.MISMATCH
    probabilities[1, 2, 49, 3] = float("nan")
    assert detected(scores, probabilities) is DetectionKind.NAN
    clean, incoming = keyless(num_rows).softmax(-1), scores_of(torch.float32, seed=1)
    gradient = torch.ops.aten._softmax_backward_data(incoming, clean, -1, torch.float32)
    gradient[1, 2, 49, 3] += 10.0
    confirmation = confirm_gradient(incoming, clean, gradient, screen_gradient(gradient))
    assert confirmation.kind is DetectionKind.MISMATCH
    assert not confirmation.inputs_bad


def test_rows_without_keys_are_no_alarm_where_nothing_waits_for_the_device() -> None:
    from resilience.abft.labels import Label
    from resilience.abft.softmax import _RowCheck

    def forward(scores: torch.Tensor, out: torch.Tensor) -> list[float]:
        label = Label("attention.probs", 0)
        check = _RowCheck(label, lambda: unusable_for_softmax(scores), screen_softmax, lambda *_: pytest.fail("waits"))
        return check._deferred(out).tolist()

    def backward(incoming: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> list[float]:
        label = Label("attention.ds", 0)
        check = _RowCheck(
            label,
            lambda: unusable_for_gradient(incoming, weights),
            screen_gradient,
            lambda *_: pytest.fail("waits"),
        )
        return check._deferred(out).tolist()

    scores = keyless(20)
    out, incoming = scores.softmax(-1), scores_of(torch.float32, seed=1)
    gradient = torch.ops.aten._softmax_backward_data(incoming, out, -1, torch.float32)
    for ratio, bad in (forward(scores, out), backward(incoming, out, gradient)):
        assert ratio <= 1.0
        assert not bad
    for place in ((0, 0, 30, 5), (1, 2, 49, 127)):
        struck, struck_gradient = out.clone(), gradient.clone()
        struck[place] = struck_gradient[place] = float("nan")
        for ratio, bad in (forward(scores, struck), backward(incoming, out, struck_gradient)):
            assert not ratio <= 1.0
            assert not bad
    scores[1, 1, 1, 1] = incoming[1, 1, 1, 1] = float("nan")
    out = scores.softmax(-1)
    gradient = torch.ops.aten._softmax_backward_data(incoming, keyless(20).softmax(-1), -1, torch.float32)
    for ratio, bad in (forward(scores, out), backward(incoming, keyless(20).softmax(-1), gradient)):
        assert not ratio <= 1.0
        assert bad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_gradient_cannot_be_checked_for_is_found_by_reductions_alone(dtype: torch.dtype) -> None:
    """On a GPU this is asked of every call: nothing of the size of P may be made for it."""
    probabilities = scores_of(dtype).softmax(-1).view(-1, 128)
    incoming = scores_of(dtype, seed=1).view(-1, 128)
    probabilities[3] = torch.nan
    probabilities[[5, 6], [7, 8]] = torch.nan
    probabilities[9, 9] = torch.inf
    probabilities[14] = probabilities[15] = 0.0
    probabilities[14, 0] = torch.nan  # the first row under a causal mask, broken
    incoming[[3, 11, 12, 13], [0, 1, 2, 3]] = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    with Largest() as made:
        keyless, bad = unusable_for_gradient(incoming, probabilities)
    assert keyless.nonzero().flatten().tolist() == [3]
    assert bad.nonzero().flatten().tolist() == [5, 6, 9, 11, 12, 13, 14]
    assert made.num_elements <= 8 * len(probabilities)


class Largest(TorchDispatchMode):
    """Of the tensors that are made, views aside."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor) and result._base is None and not func.is_view:
                self.num_elements = max(self.num_elements, result.numel())
        return results
