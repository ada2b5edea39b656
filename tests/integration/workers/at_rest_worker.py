"""Trains with state struck at rest, and with state that the script itself edits; writes what it found as JSON lines.

One rank of two. Every case runs in the same two processes: importing torch and DeepSpeed takes longer than training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from ending import leave
from matrix_cases import Case
from matrix_worker import build_engine, is_equal, state_of, train_step

from resilience import policy
from resilience.config import Config, PolicyConfig
from resilience.context import RunContext
from resilience.deepspeed import hook
from resilience.events import Decision, Detection, Evidence
from resilience.guard.reporter import SilentReporter

NUM_STEPS = 5
CASES = [
    *(
        Case(name=f"zero{zero}-{precision}", zero=zero, precision=precision)
        for zero in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    ),
    Case(name="zero3-bf16-sharded", zero=3, sharded=True),
    Case(name="zero2-bf16-offload", zero=2, offload=True),
]
THOROUGH = ("zero0-fp32", "zero0-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16")
WEIGHT, WEIGHT_SIZE = "attention.0.q_proj.weight", 32 * 32

Edit = Callable[[Any, int], None]


class Answering(SilentReporter):
    """Answers as a coordinator would, and keeps what it hears."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.detections: list[Detection] = []
        super().__init__(on_decision=self.decisions.append, on_fact=self._hear)

    def _hear(self, fact: Any) -> None:
        if isinstance(fact, Detection):
            self.detections.append(fact)

    def decide(self, evidence: Evidence, deadline_s: float) -> Decision | None:
        return policy.decide(evidence, PolicyConfig(), now=0.0)


@contextlib.contextmanager
def guarded(engine: Any, faults: str, detection: dict[str, Any]) -> Iterator[Answering]:
    reporter = Answering()
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory)
        (run_dir / "faults.toml").write_text(faults)
        context = RunContext(
            run_id="at-rest",
            run_dir=run_dir,
            coordinator_address="127.0.0.1:1",
            config=Config.model_validate({"detection": {"at_rest_share": 1.0, **detection}}),
            fault_plan=run_dir / "faults.toml" if faults else None,
        )
        hook.protect(engine, context, reporter=reporter)
        try:
            yield reporter
        finally:
            hook.release(engine)


def run(
    case: Case, *, faults: str = "", protected: bool = True, edit: Edit | None = None, **detection: Any
) -> tuple[dict[str, Any], list[int]]:
    """Train; what was decided and detected anywhere, and the fingerprints of the state at the end."""
    engine = build_engine(case)
    protection = guarded(engine, faults, detection) if protected else contextlib.nullcontext(Answering())
    code = 0
    with protection as heard:
        try:
            for step in range(1, NUM_STEPS + 1):
                train_step(case, engine, step)
                if edit is not None:
                    edit(engine, step)
        except SystemExit as left:
            code = int(left.code or 0)
        num_checks = {}
        if protected:
            state = hook.guarded(engine).guard._state
            num_checks = state.checks() if state is not None else {}
    state_at_end = state_of(engine)
    engine.destroy()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [_plain(detection) for detection in heard.detections])
    report = {
        "code": code,
        "step": engine.global_steps,
        "actions": [f"{decision.step}:{decision.rule or decision.action}" for decision in heard.decisions],
        "reasons": [decision.reason for decision in heard.decisions],
        "detections": [detection for rank in every for detection in rank],
        "num_checks": num_checks,
    }
    return report, state_at_end


def _plain(detection: Detection) -> list[Any]:
    d = detection
    return [d.step, d.rank, d.site, str(d.check), d.param, d.mended]


def fault(step: int, rank: int, site: str, param: str, kind: str = 'kind = "bitflip"\nbit = 13') -> str:
    return f'[[fault]]\nstep = {step}\nrank = {rank}\nsite = "{site}"\nparam = "{param}"\n{kind}\n'


def whole(numel: int) -> str:
    return f'kind = "scale"\nfactor = 1.5\nindex = 0\ncount = {numel}'


def edits(engine: Any, step: int) -> None:
    """What scripts do between two steps, on all ranks alike."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.numel()]
    with torch.no_grad():
        if step == 1:  # an average of the weights is swapped in for an evaluation, and out again
            kept = [parameter.detach().clone() for parameter in parameters]
            for parameter in parameters:
                parameter.data.mul_(0.999)
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)
        elif step == 2:  # and one that stays, which no version counter shows
            for parameter in parameters:
                parameter.data.mul_(0.999)
        elif step == 3:  # in place, as load_state_dict writes; one rank more than the other
            for parameter in parameters[dist.get_rank() :]:
                parameter.mul_(1.001)
        elif step == 4:  # through DeepSpeed, which writes where no version counter shows
            parameter = next(engine.module.parameters())
            value = deepspeed.utils.safe_get_full_fp32_param(parameter)
            if value is not None:
                deepspeed.utils.safe_set_full_fp32_param(parameter, value * 0.5)
            else:
                parameter.mul_(0.5)


def strike_in_use() -> Edit:
    """A weight that changes between a forward and the optimizer step: struck here, in the second forward of step 3."""

    def edit(engine: Any, step: int) -> None:
        if step != 2 or dist.get_rank() != 0:
            return
        parameter = dict(engine.module.named_parameters())[WEIGHT]
        seen = 0

        def strike(*_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == 2:
                parameter.data.view(-1)[3] += 1.0
                handle.remove()

        handle = engine.module.register_forward_pre_hook(strike)

    return edit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    for case in CASES:
        if args.only not in case.name:
            continue
        result = {"case": case.name, **examine(case, args.output.parent / case.name)}
        if dist.get_rank() == 0:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    dist.destroy_process_group()
    leave()


def save(directory: Path) -> Edit:
    """The script saves a checkpoint after step 2."""

    def edit(engine: Any, step: int) -> None:
        if step == 2:
            engine.save_checkpoint(str(directory))

    return edit


def examine(case: Case, checkpoints: Path) -> dict[str, Any]:
    plain, edited = run(case, protected=False)[1], run(case, protected=False, edit=edits)[1]
    found: dict[str, Any] = {}

    def take(what: str, outcome: tuple[dict[str, Any], list[int]], expected: list[int]) -> None:
        found[what] = {**outcome[0], "equal": is_equal(outcome[1], expected)}

    struck = fault(1, 0, "weight", WEIGHT)
    struck += fault(3, 1, "weight", WEIGHT, whole(WEIGHT_SIZE // 2 if case.sharded else WEIGHT_SIZE))
    if case.zero == 3 and not case.sharded:
        struck += fault(2, 1, "weight", f"shard of {WEIGHT}", whole(WEIGHT_SIZE // 2))
    take("weight", run(case, faults=struck), plain)
    take("edits", run(case, edit=edits), edited)
    # Optimizer state that rank 1 keeps a part of.
    parameter = WEIGHT if case.zero in (0, 3) else "head.weight"
    if case.name != "zero0-fp32":  # its weights are their own masters
        struck = fault(2, 1, "optimizer", f"master of {parameter}", whole(8))
        take("master", run(case, faults=struck, edit=save(checkpoints)), plain)
        found["master"]["saved"] = bool(list(checkpoints.rglob("*.pt")))
    if case.name not in THOROUGH:
        return found
    take("clean", run(case), plain)
    take("in_use", run(case, edit=strike_in_use()), plain)
    lone = fault(2, 1, "weight", WEIGHT)
    take("replica", run(case, faults=lone, at_rest_share=0.0, replica_interval_steps=1), plain)
    take("moment", run(case, faults=fault(2, 1, "optimizer", f"exp_avg of {parameter}")), plain)
    return found


if __name__ == "__main__":
    main()
