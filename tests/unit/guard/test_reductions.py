"""The comparison of reductions among ranks, without ranks: an exchange that knows what the others have."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch

from resilience.clock import SystemClock
from resilience.events import Check, DetectionKind
from resilience.guard.exchange import Exchange
from resilience.guard.reductions import Reductions, _on_host


class Ranks(Exchange):
    """All ranks of a job in one process."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.shared: torch.Tensor | None = None

    def total(self, values: torch.Tensor) -> torch.Tensor:
        assert self.shared is not None
        return self.shared


def reductions_of(ranks: Ranks) -> Reductions:
    reductions = Reductions(ranks, SystemClock(), tell=pytest.fail)
    reductions.listen()
    return reductions


def seen_by(
    ranks: Ranks, parts: list[torch.Tensor], results: list[torch.Tensor | None], *, shards: int = 1
) -> list[Reductions]:
    """What every rank has seen of one reduction; what their exchange adds up is known afterwards."""
    seen = [reductions_of(ranks) for _ in parts]
    for rank, (reductions, part, result) in enumerate(zip(seen, parts, results, strict=True)):
        reductions.goes_in(part.view(shards, -1))
        reductions.comes_out(result, rank if shards > 1 else 0)
    vectors = []
    for reductions in seen:
        record = reductions._seen[0]
        vectors.append(torch.cat([part.flatten() for part in record.part]))
    ranks.shared = torch.stack(vectors).sum(0)
    return seen


@pytest.mark.parametrize("form", ["all_reduce", "reduce", "reduce_scatter"])
def test_only_the_rank_with_a_wrong_result_sees_it(form: str) -> None:
    ranks = Ranks(3)
    parts = [torch.randn(3 * 20_000, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    total = parts[0] + parts[1] + parts[2]
    results: list[torch.Tensor | None] = {
        "all_reduce": [total.clone() for _ in range(3)],
        "reduce": [None, total.clone(), None],
        "reduce_scatter": [shard.clone() for shard in total.view(3, -1)],
    }[form]  # type: ignore[assignment]
    shards = 3 if form == "reduce_scatter" else 1
    clean = seen_by(ranks, parts, results, shards=shards)
    assert [reductions.findings() for reductions in clean] == [[], [], []]
    assert [reductions.num_checks for reductions in clean] == ([0, 1, 0] if form == "reduce" else [1, 1, 1])
    assert results[1] is not None
    results[1][12_345] += 1.0
    first, second, third = (reductions.findings() for reductions in seen_by(ranks, parts, results, shards=shards))
    assert first == third == []
    (finding,) = second
    assert (finding.site, finding.layer, finding.check, finding.kind) == (
        "gradient.sum", 0, Check.REPLICA, DetectionKind.MISMATCH,
    )  # fmt: skip
    assert 1.0 < finding.residual_ratio < math.inf


def test_what_went_in_bad_is_no_evidence_about_the_sum() -> None:
    ranks = Ranks(2)
    parts = [torch.randn(500), torch.randn(500)]
    parts[0][7] = math.nan
    seen = seen_by(ranks, parts, [parts[0] + parts[1]] * 2)
    assert [reductions.findings() for reductions in seen] == [[], []]


def test_a_result_that_is_not_finite_is_a_nan_of_the_sum() -> None:
    ranks = Ranks(2)
    parts = [torch.randn(500), torch.randn(500)]
    struck = parts[0] + parts[1]
    struck[3] = math.inf
    first, second = (reductions.findings() for reductions in seen_by(ranks, parts, [struck, parts[0] + parts[1]]))
    assert [finding.kind for finding in first] == [DetectionKind.NAN]
    assert second == []


def test_a_new_attempt_forgets_the_last_one() -> None:
    ranks = Ranks(2)
    reductions = reductions_of(ranks)
    reductions.goes_in(torch.ones(1, 5))
    reductions.forget()
    ranks.shared = torch.empty(0)
    assert reductions.findings() == []
    assert reductions.num_checks == 0


class Others(Ranks):
    """They took part in another reduction."""

    def agree(self, value: int) -> bool:
        return False


def test_what_ranks_did_not_take_part_in_together_is_not_compared_and_that_is_said_once() -> None:
    said: list[str] = []
    reductions = Reductions(Others(2), SystemClock(), tell=said.append)
    for _ in range(2):
        reductions.listen()
        reductions.goes_in(torch.ones(1, 5))
        reductions.comes_out(torch.ones(5), 0)
        assert reductions.findings() == []
        reductions.forget()
    (text,) = said
    assert "not compared" in text
    assert reductions.num_checks == 0


@pytest.mark.parametrize(("size", "is_seen"), [(1.0, True), (6e4, False)])
def test_an_overflow_is_a_finding_only_where_the_range_was_large_enough(size: float, is_seen: bool) -> None:
    ranks = Ranks(2)
    parts = [torch.full((500,), size, dtype=torch.float16) for _ in range(2)]
    result = parts[0] + parts[1]
    result[3] = math.inf
    first, _ = (reductions.findings() for reductions in seen_by(ranks, parts, [result, result]))
    assert bool(first) is is_seen


@pytest.mark.parametrize(("value", "is_seen"), [(1.0, False), (math.nan, True)])
def test_a_larger_threshold_lets_more_pass_but_no_nan(value: float, is_seen: bool) -> None:
    ranks = Ranks(2)
    parts = [torch.ones(500), torch.ones(500)]
    result = parts[0] + parts[1]
    result[3] += value
    first, _ = seen_by(ranks, parts, [result, result])
    assert first.findings()
    first._threshold_scale = 1e9
    assert bool(first.findings()) is is_seen


def test_its_own_sums_are_taken_apart_from_the_script() -> None:
    entered = []

    @contextlib.contextmanager
    def apart() -> Iterator[None]:
        entered.append(True)
        yield

    reductions = Reductions(Ranks(2), SystemClock(), tell=pytest.fail, apart=apart)
    reductions.listen()
    reductions.goes_in(torch.ones(1, 5))
    reductions.comes_out(torch.ones(5), 0)
    assert len(entered) == 2


def test_what_is_reduced_between_the_steps_and_after_the_end_belongs_to_others() -> None:
    ranks = Ranks(2)
    ranks.shared = torch.empty(0)
    reductions = reductions_of(ranks)
    reductions.forget()
    reductions.goes_in(torch.ones(1, 5))
    reductions.comes_out(torch.ones(5), 0)
    assert reductions.findings() == []
    reductions.listen()
    reductions.remove()
    reductions.goes_in(torch.ones(1, 5))  # where another engine watches too, ours is still called
    reductions.comes_out(torch.ones(5), 0)
    reductions.listen()
    assert reductions.findings() == []
    assert reductions.num_checks == 0


def test_all_that_lies_on_a_device_is_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits for the device; a step has thousands of such tensors."""
    num_copies = 0

    class OnDevice(torch.Tensor):
        is_cpu = False  # type: ignore[assignment]

        def cpu(self, *_: object, **__: object) -> torch.Tensor:
            nonlocal num_copies
            num_copies += 1
            return self.as_subclass(torch.Tensor)

    here = [torch.arange(float(size)) + size for size in (3, 1, 4)]
    there = [torch.arange(float(size)).as_subclass(OnDevice).view(-1, 2) for size in (2, 6)]
    found = _on_host([here[0], there[0], here[1], there[1], here[2]])
    assert num_copies == 1
    assert [one.tolist() for one in found] == [
        here[0].tolist(), [[0.0, 1.0]], here[1].tolist(), [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], here[2].tolist(),
    ]  # fmt: skip
    assert not any(isinstance(one, OnDevice) for one in found)
