"""Where a new generation's state comes from: steps against trust, parity against loss, and why not the newer one."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.policy import Ancestor, Copy, Tier, choose_restore

PLACES = {"a": (0, 1), "b": (2, 3)}
FIRST = Ancestor(generation=1, places=tuple(PLACES.items()))


def copy(node: str, step: int, generation: int = 1, **fields: Any) -> Copy:
    known = {"ranks": PLACES[node], "world_size": 4, **fields}
    return Copy(step=step, generation=generation, **known)


def both(step: int, generation: int = 1, **fields: Any) -> dict[str, list[Copy]]:
    return {node: [copy(node, step, generation, **fields)] for node in PLACES}


def merged(*inventories: dict[str, list[Copy]]) -> dict[str, list[Copy]]:
    return {node: list(itertools.chain(*(each.get(node, []) for each in inventories))) for node in PLACES}


def test_the_newest_whole_one_is_taken_and_newer_torn_ones_are_told() -> None:
    held = merged(both(3), both(5), {"a": [copy("a", 6)]}, {"b": [copy("b", 7, ranks=(2,))]})
    chosen = choose_restore(held, PLACES, [FIRST], checkpoint_step=2)
    assert (chosen.tier, chosen.step, chosen.generation) == (Tier.MEMORY, 5, 1)
    assert [(h.node, h.ranks) for h in chosen.holders] == list(PLACES.items())
    assert chosen.passed_over == (
        "snapshot of step 7 (generation 1): the part of a (ranks 0–1) is gone, and no parity group holds it",
        "snapshot of step 6 (generation 1): the part of b (ranks 2–3) is gone, and no parity group holds it",
    )


@pytest.mark.parametrize("rewinding_to", [5, 4, 3, 2])
def test_nothing_newer_than_the_target_of_a_rewind_cut_short_serves(rewinding_to: int) -> None:
    held = merged(both(3, clean_through=9), both(5, clean_through=9))
    chosen = choose_restore(held, PLACES, [dataclasses.replace(FIRST, rewinding_to=rewinding_to)])
    assert chosen.step == {5: 5, 4: 3, 3: 3, 2: 0}[rewinding_to]
    if rewinding_to < 5:
        assert f"ended in the middle of a rewind to step {rewinding_to}" in chosen.passed_over[0]


def test_what_later_generations_take_does_not_suffer_from_a_rewind_cut_short_before() -> None:
    cut_short = dataclasses.replace(FIRST, rewinding_to=3)
    second = Ancestor(generation=2, places=FIRST.places, resumed_after=3)
    assert choose_restore(both(5, 2), PLACES, [cut_short, second]).step == 5


def test_without_any_the_script_loads_what_it_loads() -> None:
    assert choose_restore({}, PLACES, [FIRST]).tier is Tier.DISK
    chosen = choose_restore({}, PLACES, [FIRST], checkpoint_step=40)
    assert (chosen.step, chosen.reason) == (40, "the last verified checkpoint (step 40)")
    assert not chosen.is_snapshot


def test_a_newer_checkpoint_is_told_but_takes_nothing_away_from_a_script_that_loads_none() -> None:
    chosen = choose_restore(both(5), PLACES, [FIRST], checkpoint_step=6)
    assert chosen.step == 5
    assert "loads the checkpoint of step 6 goes on from there" in chosen.reason


def test_another_world_and_an_unknown_generation_do_not_serve() -> None:
    smaller = {"a": (0, 1)}
    assert "taken by 4 ranks, this generation has 2" in choose_restore(both(5), smaller, [FIRST]).passed_over[0]
    assert "generation 9 is not one of this run's" in choose_restore(both(5, 9), PLACES, [FIRST]).passed_over[0]


def test_ranks_that_changed_their_node_do_not_find_their_files_there() -> None:
    swapped = {"b": (0, 1), "a": (2, 3)}
    assert choose_restore(both(5), swapped, [FIRST]).tier is Tier.DISK


@pytest.mark.parametrize(("num_losses", "tier"), [(1, Tier.DISK), (2, Tier.PEER)])
def test_parity_makes_up_for_as_many_losses_as_it_was_made_for(num_losses: int, tier: Tier) -> None:
    nodes = ("a", "b", "c", "d")
    places = {node: (rank,) for rank, node in enumerate(nodes)}
    old = Ancestor(generation=1, places=tuple(places.items()))
    held = {
        node: [
            Copy(step=5, generation=1, world_size=4, ranks=places[node], parity_nodes=nodes, parity_losses=num_losses)
        ]
        for node in ("a", "c")
    }
    # A spare sits where b sat, and d came back empty.
    new = {"a": (0,), "spare": (1,), "c": (2,), "d": (3,)}
    chosen = choose_restore(held, new, [old])
    assert chosen.tier is tier
    if tier is Tier.PEER:
        assert [h.node for h in chosen.holders if not h.ranks] == ["b", "d"]
        assert "the part of b, d rebuilt from parity" in chosen.reason


def test_who_refuses_loses_his_part_and_nobody_in_particular_refuses_all() -> None:
    grouped: dict[str, Any] = {"parity_nodes": ("a", "b"), "parity_losses": 1}
    assert choose_restore(both(5, **grouped), PLACES, [FIRST], refused={(5, 1, "b")}).tier is Tier.PEER
    assert choose_restore(both(5), PLACES, [FIRST], refused={(5, 1, "b")}).tier is Tier.DISK
    assert choose_restore(both(5, **grouped), PLACES, [FIRST], refused={(5, 1, "")}).tier is Tier.DISK
    # What a node refused is no help for others either.
    assert choose_restore({"a": both(5, **grouped)["a"]}, PLACES, [FIRST], refused={(5, 1, "a")}).tier is Tier.DISK


def test_after_damage_the_node_that_knows_least_decides_what_is_clean() -> None:
    damaged = Ancestor(generation=1, places=FIRST.places, damaged=True)
    held = {"a": [copy("a", 4), copy("a", 6, clean_through=4)], "b": [copy("b", 4), copy("b", 6, clean_through=3)]}
    chosen = choose_restore(held, PLACES, [damaged])
    assert chosen.tier is Tier.DISK
    assert "only steps up to 3 are known to be clean" in chosen.passed_over[1]
    held["b"].append(copy("b", 7, clean_through=4))
    assert choose_restore(held, PLACES, [damaged]).step == 4
    assert choose_restore(held, PLACES, [FIRST]).step == 6, "without damage the newest serves"


def test_snapshots_after_the_step_that_a_later_generation_went_on_from_are_off_the_path() -> None:
    second = Ancestor(generation=2, places=FIRST.places, resumed_after=4)
    held = merged(both(4), both(6), both(5, 2))
    assert (choose_restore(held, PLACES, [FIRST, second]).step, 2) == (5, 2)
    assert choose_restore(merged(both(4), both(6)), PLACES, [FIRST, second]).step == 4


def test_not_every_snapshot_that_was_passed_over_is_told() -> None:
    torn = {"a": [copy("a", step) for step in range(20)]}
    told = choose_restore(torn, PLACES, [FIRST]).passed_over
    assert len(told) == 9
    assert told[-1] == "and 12 older ones"


NODES = ("a", "b", "c")
SPREAD = {node: (rank,) for rank, node in enumerate(NODES)}


@st.composite
def inventories(draw: st.DrawFn) -> dict[str, list[Copy]]:
    held: dict[str, list[Copy]] = {node: [] for node in NODES}
    for node, step in itertools.product(NODES, range(1, 5)):
        if draw(st.booleans()):
            group = NODES if draw(st.booleans()) else ()
            held[node].append(
                Copy(
                    step=step,
                    generation=draw(st.integers(1, 2)),
                    world_size=3,
                    ranks=SPREAD[node],
                    clean_through=draw(st.integers(0, 4)),
                    parity_nodes=group,
                    parity_losses=1 if group else 0,
                )
            )
    return held


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    held=inventories(),
    resumed=st.one_of(st.none(), st.integers(0, 4)),
    damaged=st.booleans(),
    refused=st.sets(st.tuples(st.integers(1, 4), st.integers(1, 2), st.sampled_from(["", *NODES])), max_size=3),
)
def test_what_is_chosen_can_be_had(
    held: dict[str, list[Copy]], resumed: int | None, damaged: bool, refused: set[tuple[int, int, str]]
) -> None:
    ancestors = [
        Ancestor(generation=1, places=tuple(SPREAD.items()), damaged=damaged),
        Ancestor(generation=2, places=tuple(SPREAD.items()), resumed_after=resumed),
    ]
    chosen = choose_restore(held, SPREAD, ancestors, refused=refused)
    assert chosen.reason
    if not chosen.is_snapshot:
        return
    assert (chosen.step, chosen.generation, "") not in refused
    owners = [h.node for h in chosen.holders if h.ranks]
    for node in owners:
        assert any((c.step, c.generation) == (chosen.step, chosen.generation) for c in held[node])
        assert (chosen.step, chosen.generation, node) not in refused
    assert len(owners) >= 2, "parity of one loss makes up for one"
    assert resumed is None or chosen.generation == 2 or chosen.step <= resumed
    if damaged and chosen.generation == 1:
        helpers = [c for node in owners for c in held[node]]
        assert max(c.clean_through for c in helpers) >= chosen.step
