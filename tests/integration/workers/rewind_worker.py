"""Trains, has committed damage done to it, and goes back in the live processes; writes what it found as JSON lines.

One rank of two, with a guardian's eyes on the arena in a thread of rank 0. Every case runs in the same two processes:
importing torch and DeepSpeed takes longer than training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ending import leave
from late_streams import LateStreams
from matrix_cases import Case
from matrix_worker import build_engine, is_equal, state_of, train_step

from resilience import policy
from resilience.config import Config, PolicyConfig
from resilience.context import ARENA_VARIABLE, RunContext
from resilience.deepspeed import hook
from resilience.events import Decision, Detection, Evidence
from resilience.guard import assembly
from resilience.guard.reporter import NO_ORDERS, Orders, SilentReporter
from resilience.snapshot.arena import Arena, make
from resilience.snapshot.copiers import StreamCopier, copier_for
from resilience.snapshot.holds import Holds
from resilience.snapshot.orders import Begin
from resilience.snapshot.watch import Watch

NUM_STEPS = 8
RUN = "rewind"
CASES = [
    *(
        Case(name=f"zero{zero}-{precision}", zero=zero, precision=precision)
        for zero in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    ),
    Case(name="zero3-bf16-sharded", zero=3, sharded=True),
    Case(name="zero2-gpt2", zero=2, model="gpt2"),
    Case(name="zero3-llama", zero=3, model="llama"),
    Case(name="zero1-direct", zero=1, backward="direct"),
    Case(name="zero2-bf16-late", zero=2),
    Case(name="zero3-bf16-late", zero=3),
]
THOROUGH = ("zero2-bf16",)
WEIGHT, HEAD = "attention.0.q_proj.weight", "head.weight"

Edit = Callable[[Any, int], None]


class Answering(SilentReporter):
    """Answers as a coordinator would, orders what a test wants, and keeps what it hears."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.detections: list[Detection] = []
        self.notes: list[str] = []
        self.badput: dict[str, float] = {}
        self.order = NO_ORDERS
        super().__init__(on_decision=self.decisions.append, on_fact=self._hear)

    def _hear(self, fact: Any) -> None:
        if isinstance(fact, Detection):
            self.detections.append(fact)

    def note(self, kind: str, message: str, *, step: int = 0) -> None:
        self.notes.append(f"{kind}: {message}")

    def add_badput(self, cause: str, seconds: float) -> None:
        self.badput[cause] = self.badput.get(cause, 0.0) + seconds

    def orders(self) -> Orders:
        return self.order

    def order_done(self, name: str) -> None:
        self.order = NO_ORDERS

    def decide(self, evidence: Evidence, deadline_s: float) -> Decision | None:
        return policy.decide(evidence, PolicyConfig(), now=0.0)


@contextlib.contextmanager
def arena() -> Iterator[None]:
    """An arena that both ranks know of, watched by rank 0."""
    names = [tempfile.mkdtemp(dir="/dev/shm", prefix="resilience-test-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names, src=0)
    directory = Path(names[0])
    place = Arena.of(directory, run_id=RUN, node="here")
    watch: Watch | None = None
    try:
        if dist.get_rank() == 0:
            make(directory, run_id=RUN, node="here", run_dir=directory)
            watch = Watch(place, run_id=RUN, node="here", holds=Holds(place), tell=lambda fact: None)
            watch.begin(Begin(generation=1, world_size=2, ranks=(0, 1), peers=(), source=None))
            watch.start()
        dist.barrier()
        os.environ[ARENA_VARIABLE] = str(place.path)
        yield
        dist.barrier()
    finally:
        del os.environ[ARENA_VARIABLE]
        if watch is not None:
            watch.stop()
            shutil.rmtree(directory)


@contextlib.contextmanager
def guarded(engine: Any, faults: str, sections: dict[str, dict[str, Any]]) -> Iterator[Answering]:
    reporter = Answering()
    with tempfile.TemporaryDirectory() as directory, arena():
        run_dir = Path(directory)
        (run_dir / "faults.toml").write_text(faults)
        settings: dict[str, dict[str, Any]] = {
            "detection": {"at_rest_share": 1.0},
            "snapshot": {"interval_steps": 1, "fast_forward": False},
        }
        for name, values in sections.items():
            settings.setdefault(name, {}).update(values)
        context = RunContext(
            run_id=RUN,
            run_dir=run_dir,
            coordinator_address="127.0.0.1:1",
            config=Config.model_validate(settings),
            fault_plan=run_dir / "faults.toml" if faults else None,
        )
        hook.protect(engine, context, reporter=reporter)
        try:
            yield reporter
        finally:
            hook.release(engine)


Before = Callable[[Any, int, Answering], None]


def run(
    case: Case,
    *,
    faults: str = "",
    protected: bool = True,
    num_steps: int = NUM_STEPS,
    before: Before = lambda engine, step, heard: None,
    **sections: dict[str, Any],
) -> tuple[dict[str, Any], list[int], list[float]]:
    """Train; what was decided and detected anywhere, the fingerprints of the state, the losses the script holds."""
    engine = build_engine(case)
    streams = LateStreams()
    if case.name.endswith("late"):
        assembly.copier_for = lambda device: StreamCopier(streams)
    protection = guarded(engine, faults, sections) if protected else contextlib.nullcontext(Answering())
    code, losses = 0, []
    with protection as heard:
        try:
            for step in range(1, num_steps + 1):
                before(engine, step, heard)
                losses += train_step(case, engine, step)
        except SystemExit as left:
            code = int(left.code or 0)
    assembly.copier_for = copier_for
    values = [float(loss) for loss in losses]
    state_at_end = state_of(engine)
    engine.destroy()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [[d.step, d.rank, d.site, str(d.check), d.param] for d in heard.detections])
    report = {
        "code": code,
        "actions": [f"{d.step}:{d.rule}:{d.outcome}" for d in heard.decisions],
        "reasons": [d.reason for d in heard.decisions],
        "lost_s": [d.lost_s for d in heard.decisions],
        "detections": [detection for rank in every for detection in rank],
        "notes": heard.notes,
        "badput": sorted(heard.badput),
        "waits_for_copies": streams.log.count("wait"),
    }
    return report, state_at_end, values


def fault(step: int, rank: int, site: str, param: str, count: int = 8) -> str:
    return (
        f'[[fault]]\nstep = {step}\nrank = {rank}\nsite = "{site}"\nparam = "{param}"\n'
        f'kind = "scale"\nfactor = 1.5\nindex = 0\ncount = {count}\n'
    )


def ordered(at: int, to: int = 1) -> Before:
    """An operator asks for a rewind while step `at` is being worked on; one rank hears of it."""

    def before(engine: Any, step: int, heard: Answering) -> None:
        if step == at and dist.get_rank() == 1:
            heard.order = Orders(rewind=to)

    return before


def with_a_fault_on_the_way(at: int) -> Before:
    """As `ordered`; and while step 5 is taken again a weight changes between its two forwards."""
    order = ordered(at)

    def before(engine: Any, step: int, heard: Answering) -> None:
        order(engine, step, heard)
        if step != at or dist.get_rank() != 0:
            return
        parameter = dict(engine.module.named_parameters())[WEIGHT]
        seen = 0

        def strike(*_: Any) -> None:
            nonlocal seen
            guard = hook.guarded(engine)
            assert guard is not None
            seen += guard.guard.rewinder.is_busy and guard.guard.step == 5
            if seen == 2:
                parameter.data.view(-1)[3] += 1.0
                handle.remove()

        handle = engine.module.register_forward_pre_hook(strike)

    return before


def edited(at: int) -> Before:
    """The script writes a weight before step 5, and step `at` is damaged."""
    order = ordered(at, to=1 + 3)

    def before(engine: Any, step: int, heard: Answering) -> None:
        order(engine, step, heard)
        if step == 5:
            with torch.no_grad():
                next(engine.module.parameters()).mul_(1.0)

    return before


def upset(at: int, ranks: tuple[int, ...], what: Callable[[Any], None]) -> Before:
    """State changes before step `at`, on some ranks, unseen by version counters."""

    def before(engine: Any, step: int, heard: Answering) -> None:
        if step == at and not hook.guarded(engine).guard.rewinder.num_rewinds and dist.get_rank() in ranks:
            what(engine)

    return before


def grow(engine: Any) -> None:
    """All weights that are computed with."""
    for parameter in engine.module.parameters():
        parameter.data.mul_(1.5)


def spoil(engine: Any) -> None:
    """One number of a master."""
    engine.optimizer.single_partition_of_fp32_groups[0].data[5] = float("nan")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    for case in CASES:
        if args.only not in case.name:
            continue
        result = {"case": case.name, **examine(case)}
        if dist.get_rank() == 0:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    dist.destroy_process_group()
    leave()


def examine(case: Case) -> dict[str, Any]:
    _, plain, plain_losses = run(case, protected=False)
    found: dict[str, Any] = {}

    def take(what: str, outcome: tuple[dict[str, Any], list[int], list[float]]) -> None:
        report, state, losses = outcome
        held = losses[-2:] == plain_losses[-2:] if case.model != "convolution" else True
        found[what] = {**report, "equal": is_equal(state, plain), "losses_equal": held}

    if case.zero == 0:
        # Every rank has it all: what one rank's hashes find is taken from the other. What only a comparison of two
        # ranks shows, nobody can tell right from wrong.
        site, param = ("weight", WEIGHT) if case.precision == "fp32" else ("optimizer", f"master of {WEIGHT}")
        compare = {"at_rest_share": 0.0, "replica_interval_steps": 2}
        take("damage", run(case, faults=fault(5, 1, site, param, 64), detection=compare))
    else:
        names = {"gpt": WEIGHT if case.zero == 3 else HEAD, "gpt2": "transformer.ln_f.weight"}
        param = names.get(case.model, "model.embed_tokens.weight")
        take("damage", run(case, faults=fault(5, 1, "optimizer", f"master of {param}")))
    if case.name not in THOROUGH:
        return found
    take("order", run(case, before=ordered(6)))
    take("to_a_step", run(case, before=ordered(7, to=1 + 5)))
    take("fault_on_the_way", run(case, before=with_a_fault_on_the_way(7)))
    struck = fault(5, 1, "optimizer", f"master of {HEAD}")
    take("short", run(case, faults=struck, snapshot={"history_max_mib": 1e-6}))
    take("edited", run(case, before=edited(7)))
    take("all_weights", run(case, before=upset(5, (1,), grow), detection={"at_rest_share": 0.03125}))
    take("nan", run(case, before=upset(5, (1,), spoil), detection={"at_rest_share": 0.0}))
    take("again", run(case, faults=struck + struck.replace("step = 5", "step = 6")))
    take("no_budget", run(case, faults=struck, policy={"max_rewinds": 0}))
    found["spike"] = examine_spike(case)
    return found


def examine_spike(case: Case) -> dict[str, Any]:
    """Weights that change on all ranks alike, which no comparison shows: the loss does, if it is asked to."""
    off = {"at_rest_share": 0.0, "replica_interval_steps": 0}
    _, plain, _ = run(case, protected=False, num_steps=20)
    spike = upset(19, (0, 1), grow)
    report, state, _ = run(case, num_steps=20, before=spike, detection=off, policy={"loss_spike_factor": 6.0})
    return {**report, "equal": is_equal(state, plain), "losses_equal": True}


if __name__ == "__main__":
    main()
