"""What agents and ranks say of memory snapshots, from the wire to the state and back."""

from __future__ import annotations

from resilience.coordinator import translate
from resilience.coordinator.machine.answers import answer_join
from resilience.policy import Copy, Tier
from resilience.rpc.v1 import coordinator_pb2 as pb
from resilience.testing import FakeRun


def test_an_inventory_comes_in_as_it_was_told() -> None:
    told = pb.SnapshotCopy(
        step=54,
        generation=2,
        world_size=4,
        ranks=[3, 2],
        clean_through=52,
        parity_nodes=["a", "b"],
        parity_losses=1,
        num_bytes=1 << 40,
        at=7.0,
    )
    info = pb.AgentInfo(node="b", num_nodes=2, snapshots=[told], guardian_address="10.0.0.2:7000")
    command = translate.join_agent_command(pb.JoinRequest(run_id="run", agent=info))
    assert command.guardian_address == "10.0.0.2:7000"
    assert command.copies == (
        Copy(
            step=54,
            generation=2,
            world_size=4,
            ranks=(2, 3),
            clean_through=52,
            parity_nodes=("a", "b"),
            parity_losses=1,
            num_bytes=1 << 40,
            at=7.0,
        ),
    )


def test_an_assignment_says_what_to_load_and_who_holds_it() -> None:
    run = FakeRun(num_nodes=2, num_devices=1)
    run.start()
    first = translate.join_response(answer_join(run.state, "a", 0)).assignment
    assert not first.HasField("restore")
    assert [(p.node, p.guardian_address, list(p.ranks)) for p in first.peers] == [
        ("a", "guardian-of-a:7000", [0]),
        ("b", "guardian-of-b:7000", [1]),
    ]
    run.train(until=3)
    run.holds("a", step=3, parity_nodes=("a", "b"), parity_losses=1)
    run.restart(from_step=3, exits=[run.exit_of(1, -9)])
    answer = answer_join(run.state, "b", 1)
    assert answer.restore is not None
    assert answer.restore.tier is Tier.PEER
    restore = translate.join_response(answer).assignment.restore
    assert (restore.step, restore.generation) == (3, 1)
    assert [(p.node, p.guardian_address, list(p.ranks)) for p in restore.peers] == [
        ("a", "guardian-of-a:7000", [0]),
        ("b", "guardian-of-b:7000", []),
    ]


def test_without_a_snapshot_the_state_is_left_to_the_script() -> None:
    run = FakeRun()
    run.start()
    run.restart(from_step=0, exits=[run.exit_of(1, -9)])
    answer = answer_join(run.state, "a", 1)
    assert answer.restore is not None
    assert not translate.join_response(answer).assignment.HasField("restore")
