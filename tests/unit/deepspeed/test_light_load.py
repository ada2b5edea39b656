"""Loading without the optimizer's shards: what comes back of the optimizer all the same, and where it is not done."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch

from resilience.deepspeed import light_load


def engine(*groups: dict[str, Any], stage: int = 2, fp16: bool = False, moe: bool = False) -> Any:
    return types.SimpleNamespace(
        optimizer=types.SimpleNamespace(param_groups=list(groups)),
        zero_optimization_stage=lambda: stage,
        fp16_enabled=lambda: fp16,
        has_moe_layers=moe,
    )


def test_hyperparameters_come_back_bit_for_bit_and_parameters_stay() -> None:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    saved = torch.optim.AdamW([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:]}], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(saved, 0.7)
    for _ in range(3):
        saved.step()
        scheduler.step()
    content = json.loads(json.dumps(light_load.capture(engine(*saved.param_groups))))
    fresh = torch.optim.AdamW([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:]}], lr=1e-3)
    light_load.restore(engine(*fresh.param_groups), content)
    for one, other in zip(fresh.param_groups, saved.param_groups, strict=True):
        assert one == other
        assert isinstance(one["betas"], tuple)
    assert fresh.param_groups[1]["params"][0] is weights[1]


def test_lists_stay_lists_where_the_optimizer_has_them() -> None:
    """As DeepSpeed's own optimizers do, whose betas come from its configuration."""
    content = json.loads(json.dumps(light_load.capture(engine({"params": [], "betas": [0.9, 0.95], "lr": 0.5}))))
    fresh = engine({"params": [], "betas": [0.9, 0.999], "lr": 0.1})
    light_load.restore(fresh, content)
    assert fresh.optimizer.param_groups == [{"params": [], "betas": [0.9, 0.95], "lr": 0.5}]


def test_what_is_no_number_and_no_word_is_not_kept() -> None:
    assert light_load.capture(engine({"params": [], "lr": torch.tensor(0.1)})) is None
    assert light_load.capture(engine({"params": [], "betas": (0.9, object())})) is None
    assert light_load.capture(engine({"params": [], "betas": [0.9, object()]})) is None


@pytest.mark.parametrize(
    ("given", "function", "supported"),
    [
        ({"stage": 1}, None, True),
        ({"stage": 2}, None, True),
        ({"stage": 0}, None, False),
        ({"stage": 3}, None, False),
        ({"fp16": True}, None, False),
        ({"moe": True}, None, False),
        ({}, print, False),
    ],
)
def test_only_where_the_shards_hold_nothing_but_the_optimizer(
    given: dict[str, Any], function: Any, supported: bool
) -> None:
    assert light_load.is_supported(engine(**given), {"custom_load_fn": function}) is supported


def test_deepspeed_is_told_that_there_are_no_shards_and_only_within() -> None:
    class Engine:
        def _load_zero_checkpoint(self, *_: Any, **__: Any) -> bool:
            return True

    subject = Engine()
    with light_load.without_shards(subject):
        assert not subject._load_zero_checkpoint("dir", "tag", load_optimizer_states=True)
    assert subject._load_zero_checkpoint("dir", "tag")


def test_shards_are_known_by_their_names() -> None:
    assert light_load.is_shard("zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert light_load.is_shard("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert not light_load.is_shard("mp_rank_00_model_states.pt")
    assert not light_load.is_shard("random_states_0.json")
