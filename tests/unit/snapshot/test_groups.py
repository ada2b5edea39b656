"""Groups and their stripes: spread over failure domains, and recoverable after any losses that they allow for."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.snapshot.groups import Layout, form_groups


def names(num: int) -> list[str]:
    return [f"worker-{i}" for i in range(num)]


def test_two_nodes_are_a_copy_at_the_peer() -> None:
    grouping = form_groups(names(2), size_max=8, losses=1)
    assert [group.nodes for group in grouping.groups] == [("worker-0", "worker-1")]
    assert grouping.remarks == ()
    layout = Layout.of([100, 90], 1)
    assert layout.segment_bytes == 100
    assert [(layout.keepers(t), layout.sources(t)) for t in range(2)] == [((0,), (1,)), ((1,), (0,))]


def test_six_nodes_and_two_losses_are_four_and_two() -> None:
    layout = Layout.of([1000] * 6, 2)
    assert layout.segment_bytes == 250
    assert all(len(layout.sources(t)) == 4 for t in range(6))
    assert all(len(layout.kept(member)) == 2 for member in range(6))


def test_one_node_has_no_group() -> None:
    assert form_groups(["alone"], size_max=8, losses=1).groups == ()
    assert form_groups(names(4), size_max=8, losses=0).groups == ()


def test_racks_are_spread_over_groups() -> None:
    racks = {node: f"rack {i // 4}" for i, node in enumerate(names(16))}
    grouping = form_groups(names(16), size_max=4, losses=1, domains=racks)
    assert grouping.remarks == ()
    assert [len(group.nodes) for group in grouping.groups] == [4, 4, 4, 4]
    for group in grouping.groups:
        assert len({racks[node] for node in group.nodes}) == 4


def test_smaller_groups_where_only_these_keep_a_domain_apart() -> None:
    racks = {node: f"rack {i // 4}" for i, node in enumerate(names(8))}
    grouping = form_groups(names(8), size_max=8, losses=1, domains=racks)
    assert [len(group.nodes) for group in grouping.groups] == [2, 2, 2, 2]
    assert grouping.remarks == ()


def test_a_domain_that_is_too_large_is_told() -> None:
    racks = dict.fromkeys(names(4), "rack 7") | {"worker-0": "rack 1"}
    grouping = form_groups(names(4), size_max=4, losses=1, domains=racks)
    assert any("rack 7 has 3 of the 4 nodes" in remark for remark in grouping.remarks)


def test_what_a_small_group_cannot_give_is_told() -> None:
    grouping = form_groups(names(2), size_max=8, losses=2)
    assert grouping.groups[0].losses == 1
    assert "too small for 2 losses" in grouping.remarks[0]
    grouping = form_groups(names(6), size_max=2, losses=2)
    assert "groups of 2" in grouping.remarks[0]


@given(
    num=st.integers(2, 40),
    size_max=st.integers(2, 10),
    losses=st.integers(1, 4),
    num_domains=st.integers(1, 40),
)
def test_groups_hold_every_node_once_and_bound_what_a_domain_hits(
    num: int, size_max: int, losses: int, num_domains: int
) -> None:
    domains = {node: f"d{i * i % num_domains}" for i, node in enumerate(names(num))}
    grouping = form_groups(names(num), size_max=size_max, losses=losses, domains=domains)
    counted = Counter(node for group in grouping.groups for node in group.nodes)
    missing = [node for node in names(num) if node not in counted]
    assert all(any(node in remark for remark in grouping.remarks) for node in missing)
    assert set(counted.values()) <= {1}
    too_much = False
    for group in grouping.groups:
        assert 2 <= len(group.nodes) <= size_max
        assert 1 <= group.losses < len(group.nodes)
        hits = Counter(domains[node] for node in group.nodes)
        too_much |= max(hits.values()) > group.losses
        for domain, count in hits.items():
            told = any(remark.startswith(f"{domain} has {count} ") for remark in grouping.remarks)
            assert told == (count > group.losses)
    largest = max(Counter(domains.values()).values())
    effective = min(losses, size_max - 1)
    if -(-largest // effective) <= num // (effective + 1) and not missing:
        assert not too_much, "groups that keep every domain apart exist"


@pytest.mark.parametrize(("num", "losses"), [(n, m) for n in range(2, 9) for m in range(1, n)])
def test_any_lost_members_leave_enough_of_every_stripe(num: int, losses: int) -> None:
    volumes = [1000 + 37 * member for member in range(num)]
    layout = Layout.of(volumes, losses)
    for lost in itertools.combinations(range(num), losses):
        for stripe in range(num):
            blocks = [*layout.sources(stripe), *layout.keepers(stripe)]
            assert sorted(blocks) == list(range(num))
            assert sum(member not in lost for member in blocks) >= len(layout.sources(stripe))


@given(num=st.integers(2, 8), losses=st.integers(1, 3), volume=st.integers(1, 10_000), data=st.data())
def test_extents_cover_a_range_once_and_in_order(num: int, losses: int, volume: int, data: st.DataObject) -> None:
    losses = min(losses, num - 1)
    layout = Layout.of([volume] * num, losses)
    member = data.draw(st.integers(0, num - 1))
    start = data.draw(st.integers(0, volume))
    end = data.draw(st.integers(start, volume))
    place = start
    for extent in layout.extents(member, start, end):
        assert 0 <= extent.start < extent.end <= layout.segment_bytes
        assert member in layout.sources(extent.stripe)
        assert layout.segment(member, extent.stripe) + extent.start == place
        place += extent.end - extent.start
    assert place == end


def test_a_layout_without_data_members_is_refused() -> None:
    with pytest.raises(ValueError, match="losses = 2"):
        Layout.of([1, 1], 2)
