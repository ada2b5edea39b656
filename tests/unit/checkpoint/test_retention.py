"""What is never deleted, whatever the policy and whatever lies there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.checkpoint.retention import Known, Policy, Standing, plan

POLICIES = st.builds(Policy, keep=st.integers(1, 5), keep_every=st.integers(0, 6), drop_bad=st.booleans())


@st.composite
def folders(draw: st.DrawFn) -> list[Known]:
    """Checkpoints of a save_dir in any order, of which `latest` names one or none."""
    standings = draw(st.lists(st.sampled_from(list(Standing)), max_size=12))
    latest = draw(st.integers(-1, max(len(standings) - 1, 0)))
    found = [
        Known(
            tag=f"step{number}",
            standing=standing,
            step=draw(st.integers(0, 40)),
            at=float(draw(st.integers(0, 10))),
            is_latest=number == latest,
        )
        for number, standing in enumerate(standings)
    ]
    return draw(st.permutations(found))


@given(folders(), POLICIES)
def test_every_one_is_planned_once_with_a_reason(found: list[Known], policy: Policy) -> None:
    planned = plan(found, policy)
    assert sorted(each.tag for each in planned) == sorted(each.tag for each in found)
    assert all(each.reason for each in planned)


@given(folders(), POLICIES)
def test_what_must_stay_stays(found: list[Known], policy: Policy) -> None:
    deleted = {each.tag for each in plan(found, policy) if each.delete}
    for each in found:
        if each.is_latest or each.standing in (Standing.UNFINISHED, Standing.UNKNOWN):
            assert each.tag not in deleted
        if each.standing is Standing.BAD and not policy.drop_bad:
            assert each.tag not in deleted
        if (
            each.standing is Standing.VERIFIED
            and policy.keep_every
            and each.step
            and each.step % policy.keep_every == 0
        ):
            assert each.tag not in deleted
    verified = [each for each in found if each.standing is Standing.VERIFIED]
    left = [each for each in verified if each.tag not in deleted]
    assert len(left) >= min(policy.keep, len(verified))
    if deleted:
        assert left, "something was deleted, and nothing that is known to be good is left"


@given(folders(), POLICIES)
def test_no_verified_one_goes_while_an_older_one_stays_without_a_reason_of_its_own(
    found: list[Known], policy: Policy
) -> None:
    planned = {each.tag: each for each in plan(found, policy)}
    kept = [each for each in found if "newest verified" in planned[each.tag].reason and not planned[each.tag].delete]
    gone = [each for each in found if each.standing is Standing.VERIFIED and planned[each.tag].delete]
    assert all((new.at, new.step) >= (old.at, old.step) for new in kept for old in gone)


@given(folders(), POLICIES)
def test_a_second_pass_deletes_nothing_more(found: list[Known], policy: Policy) -> None:
    deleted = {each.tag for each in plan(found, policy) if each.delete}
    left = [each for each in found if each.tag not in deleted]
    assert not [each for each in plan(left, policy) if each.delete]


def test_an_example() -> None:
    def known(step: int, standing: Standing = Standing.VERIFIED, is_latest: bool = False) -> Known:
        return Known(tag=f"step{step}", standing=standing, step=step, at=float(step), is_latest=is_latest)

    found = [known(step) for step in (10, 20, 30, 40)]
    found += [known(50, is_latest=True), known(60, Standing.UNFINISHED), known(25, Standing.BAD)]
    planned = plan(found, Policy(keep=2, keep_every=20, drop_bad=True))
    assert [(each.tag, each.delete) for each in planned] == [
        ("step60", False),
        ("step50", False),
        ("step40", False),
        ("step30", True),
        ("step25", True),
        ("step20", False),
        ("step10", True),
    ]


def test_to_keep_none_is_refused() -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        Policy(keep=0)
