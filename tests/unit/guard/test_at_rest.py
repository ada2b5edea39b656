"""What this rank's hashes see, what a script may do without an alarm, and where faults of a plan strike."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.deepspeed.shards import Held, Role
from resilience.errors import FaultPlanError
from resilience.events import Check
from resilience.faults.ledger import Ledger
from resilience.faults.plan import FaultPlan
from resilience.faults.tensor import TensorInjector
from resilience.guard.at_rest import AtRest
from resilience.guard.at_rest_schedule import period
from resilience.guard.at_rest_settle import give_up, settle
from resilience.guard.exchange import Exchange
from resilience.guard.replicas import Replicas

pytestmark = pytest.mark.filterwarnings("error")


def held(
    name: str, tensor: torch.Tensor, *, role: Role = Role.WEIGHT, parameter: str = "w", frozen: bool = False
) -> Held:
    return Held(
        name=name,
        parameter=parameter,
        index=0,
        role=role,
        offset=0,
        length=tensor.numel(),
        width=tensor.element_size(),
        replicated=True,
        is_frozen=frozen,
        read=lambda: tensor.detach().view(-1),
        owners=lambda: (tensor,),
    )


@functools.cache
def _values(num_elements: int) -> torch.Tensor:
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(3))


class State:
    """A bfloat16 weight of 999 elements, its master, one moment; as the optimizer leaves them."""

    def __init__(self, share: float = 1.0, injector: TensorInjector | None = None) -> None:
        self.master = _values(999).clone()
        self.moment = _values(999).square()
        self.weight = self.master.bfloat16()
        self.at_rest = AtRest(self.holdings, share=share, injector=injector)

    def holdings(self) -> list[Held]:
        return [
            held("w", self.weight),
            held("master of w", self.master, role=Role.MASTER),
            held("exp_avg of w", self.moment, role=Role.MOMENT),
        ]


def flip(tensor: torch.Tensor, element: int) -> None:
    """As hardware does: no version counter moves."""
    tensor.data.view(torch.int16 if tensor.element_size() == 2 else torch.int32)[element] ^= 1


def settled(state: State, *, repair: bool = True) -> list[tuple[str, str | None, bool]]:
    findings = settle(state.at_rest, Exchange(), repair=repair)
    assert all(finding.check is Check.AT_REST for finding in findings)
    return [(finding.site, finding.param, finding.mended) for finding in findings]


@pytest.mark.parametrize("element", [0, 500, 998])
def test_a_weight_is_rebuilt_from_its_master(element: int) -> None:
    state = State()
    state.at_rest.after_step(1)
    expected = state.weight.clone()
    flip(state.weight, element)
    assert state.at_rest.look([Role.WEIGHT]) == 1
    assert settled(state) == [("weight", "w", True)]
    assert torch.equal(state.weight, expected)
    assert state.at_rest.look() == 0


@pytest.mark.parametrize(("name", "attribute"), [("master of w", "master"), ("exp_avg of w", "moment")])
def test_damaged_optimizer_state_is_named_once(name: str, attribute: str) -> None:
    state = State()
    state.at_rest.after_step(1)
    flip(getattr(state, attribute), 17)
    assert state.at_rest.look([Role.WEIGHT]) == 0
    assert state.at_rest.look() == 1
    assert settled(state) == [("optimizer", name, False)]
    assert state.at_rest.look() == 0


def test_the_only_copy_of_a_weight_on_the_only_rank_may_be_written_through_data() -> None:
    state = State()
    only = [held("w", state.weight), held("exp_avg of w", state.moment, role=Role.MOMENT)]
    state.at_rest = AtRest(lambda: only, share=1.0)
    state.at_rest.after_step(1)
    state.weight.data.clamp_(-0.5, 0.5)
    assert state.at_rest.look([Role.WEIGHT]) == 1
    assert settled(state) == []
    assert state.at_rest.was_edited
    flip(state.moment, 5)
    assert state.at_rest.look() == 1
    assert settled(state) == [("optimizer", "exp_avg of w", False)]


def test_a_weight_whose_master_is_damaged_too_is_not_rebuilt_from_it() -> None:
    state = State()
    state.at_rest.after_step(1)
    flip(state.weight, 3)
    state.master.data[3] += 1.0
    assert state.at_rest.look() == 2
    assert settled(state) == [("weight", "w", False), ("optimizer", "master of w", False)]


def test_a_rebuild_that_does_not_give_the_same_bits_is_undone() -> None:
    state = State()
    state.master += 0.5  # so that it does not fit the weight, without being a difference itself
    state.at_rest.after_step(1)
    flip(state.weight, 3)
    struck = state.weight.clone()
    state.at_rest.look()
    assert settled(state) == [("weight", "w", False)]
    assert torch.equal(state.weight, struck)


def test_nothing_is_written_where_nothing_may_be() -> None:
    state = State()
    state.at_rest.after_step(1)
    flip(state.weight, 3)
    struck = state.weight.clone()
    state.at_rest.look()
    assert settled(state, repair=False) == [("weight", "w", False)]
    assert torch.equal(state.weight, struck)


def test_what_a_replay_meets_is_not_rebuilt() -> None:
    state = State()
    state.at_rest.after_step(1)
    flip(state.weight, 3)
    state.at_rest.look()
    assert [finding.mended for finding in give_up(state.at_rest)] == [False]
    assert state.at_rest.look() == 0


def test_edits_that_show_raise_no_alarm() -> None:
    state = State()
    state.at_rest.after_step(1)
    state.weight.mul_(0.5)
    state.master.copy_(torch.zeros(999))
    state.moment = torch.ones(999)
    assert state.at_rest.look() == 0
    assert state.at_rest.was_edited


def test_edits_through_deepspeed_are_forgotten() -> None:
    state = State()
    state.at_rest.after_step(1)
    state.master.data.mul_(0.5)
    state.at_rest.forget()
    assert state.at_rest.look() == 0
    state.at_rest.after_step(2)
    flip(state.master, 0)
    assert state.at_rest.look() == 1


def test_with_a_share_a_struck_byte_is_seen_in_its_turn_alone() -> None:
    seen = []
    for step in range(period(0.25)):
        state = State(share=0.25)
        state.at_rest.after_step(step)
        flip(state.weight, 400)
        seen.append(state.at_rest.look())
    assert sorted(seen) == [0, 0, 0, 1]


def test_a_frozen_weight_is_held_against_what_it_was_for_a_whole_rotation() -> None:
    frozen = _values(4096).clone()
    at_rest = AtRest(lambda: [held("w", frozen, frozen=True)], share=0.25)
    for step in range(8):
        at_rest.after_step(step)
        assert at_rest.look() == 0
    flip(frozen, 1500)  # between two steps whose turn is elsewhere, or not
    found = []
    for step in range(8, 12):
        at_rest.after_step(step)
        found.append(at_rest.look())
        at_rest.drop(list(at_rest.differences))
    assert sum(found) == 1


def injector_of(tmp_path: Path, **fault: Any) -> TensorInjector:
    plan = FaultPlan.model_validate({"fault": [{"step": 4, "kind": "nan", **fault}]})
    return TensorInjector(plan, rank=0, ledger=Ledger(tmp_path, 0))


@pytest.mark.parametrize(
    ("fault", "struck"),
    [
        ({"site": "weight", "param": "w"}, "weight"),
        ({"site": "weight", "layer": 0}, "weight"),
        ({"site": "optimizer", "param": "w"}, "master"),
        ({"site": "optimizer", "param": "exp_avg of w"}, "moment"),
    ],
)
def test_a_fault_strikes_after_the_hashes_and_is_recorded(tmp_path: Path, fault: dict[str, Any], struck: str) -> None:
    injector = injector_of(tmp_path, index=5, **fault)
    state = State(injector=injector)
    state.at_rest.after_step(3)
    assert state.at_rest.look() == 0
    state.at_rest.after_step(4)
    assert {name for name in ("weight", "master", "moment") if getattr(state, name).isnan().any()} == {struck}
    assert getattr(state, struck).isnan().nonzero().tolist() == [[5]]
    assert state.at_rest.look() == 1, "the strike moved a version counter"
    [strike] = Ledger(tmp_path, 0).strikes()
    assert (strike.step, strike.site, strike.no_effect) == (4, fault["site"], False)


def test_a_fault_in_what_a_rank_does_not_keep_is_a_mistake(tmp_path: Path) -> None:
    state = State(injector=injector_of(tmp_path, site="optimizer", param="v"))
    with pytest.raises(FaultPlanError, match="site 'optimizer': rank 0 keeps nothing of 'v'"):
        state.at_rest.after_step(4)


class ThreeRanks(Exchange):
    """This rank is 0; the others hold `others`."""

    def __init__(self, others: list[bytes]) -> None:
        self._others = others
        self.rank, self.world_size = 0, 3

    def all_gather(self, content: bytes) -> list[bytes]:
        return [content, *self._others]


def hashes_of(*tensors: torch.Tensor) -> bytes:
    import json

    from resilience.kernels.hashing import bit_hash

    return json.dumps([int(bit_hash(tensor)) for tensor in tensors]).encode()


def test_the_majority_names_the_odd_rank() -> None:
    tensors = [_values(100).clone() for _ in range(5)]
    good = hashes_of(*tensors)
    kept = [held(f"w{place}", tensor, parameter=f"w{place}") for place, tensor in enumerate(tensors)]
    replicas = Replicas(10)
    assert replicas.is_due(20)
    assert not replicas.is_due(21)
    flip(tensors[2], 7)
    digest = replicas.digest(kept)
    assert 0 <= digest < 1 << 62
    assert [mark.held.name for mark in replicas.differences(ThreeRanks([good, good]))] == ["w2"]
    assert replicas.differences(ThreeRanks([hashes_of(*tensors)] * 2)) == []


def test_ranks_that_were_never_equal_are_not_compared_again() -> None:
    tensors = [_values(100).clone() for _ in range(5)]
    others = hashes_of(*(tensor + 1e-7 for tensor in tensors))
    kept = [held(f"w{place}", tensor, parameter=f"w{place}") for place, tensor in enumerate(tensors)]
    replicas = Replicas(10)
    replicas.digest(kept)
    assert replicas.differences(ThreeRanks([others, others])) == []
    assert replicas.problem == "5 of 5 tensors have never been bit-equal on all ranks"
    assert not replicas.is_due(20)
