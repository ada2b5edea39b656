"""Runs what can happen to a step, one scenario after the other; writes what it saw as JSON lines. One rank of two."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.pipe import PipelineModule
from ending import leave
from matrix_cases import Case
from matrix_worker import build_engine, computes_fp16, is_equal, state_of, train_step

from resilience import policy
from resilience.config import Config
from resilience.context import RunContext
from resilience.deepspeed import hook
from resilience.events import Decision, Detection, Evidence
from resilience.guard.reporter import Orders, SilentReporter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from train_tiny import Model, batch

ZERO2 = Case(name="zero2")


class Coordinator(SilentReporter):
    """A coordinator without a network: answers with the policy, orders from a step on, keeps all that it hears."""

    def __init__(self, config: Config, *, orders: Orders | None = None, answers: bool = True) -> None:
        self.detections: list[Detection] = []
        self.decisions: list[Decision] = []
        self.evidence: list[Evidence] = []
        self.notes: list[str] = []
        self.left: tuple[int, str] | None = None
        super().__init__(on_decision=self.decisions.append, on_fact=self._hear)
        self._config = config
        self._orders = orders
        self._answers = answers
        self.current_orders = Orders()

    def begin_step(self, step: int) -> None:
        if step == 3 and self._orders is not None:
            self.current_orders = self._orders

    def orders(self) -> Orders:
        return self.current_orders

    def note(self, kind: str, message: str, *, step: int = 0) -> None:
        self.notes.append(f"{kind}: {message}")

    def decide(self, evidence: Evidence, deadline_s: float) -> Decision | None:
        self.evidence.append(evidence)
        if not self._answers:
            return None
        return policy.decide(evidence, self._config.policy, self._config.mode, now=0.0)

    def leave(self, exit_code: int, reason: str) -> None:
        self.left = (exit_code, reason)

    def _hear(self, fact: Any) -> None:
        if isinstance(fact, Detection):
            self.detections.append(fact)


@dataclasses.dataclass
class Result:
    state: Any = None
    losses: Any = None
    exit_code: int | None = None
    steps: int = 0
    skipped: int = 0
    scales: list[float] = dataclasses.field(default_factory=list)
    coordinator: Coordinator | None = None
    directory_of_engine: list[str] = dataclasses.field(default_factory=list)

    def report(self) -> dict[str, Any]:
        seen = self.coordinator
        assert seen is not None
        return {
            "exit_code": self.exit_code,
            "steps": self.steps,
            "skipped": self.skipped,
            "actions": [f"{d.step}:{d.action}:{d.outcome}" for d in seen.decisions],
            "rules": [d.rule for d in seen.decisions],
            "verdicts": sorted({str(verdict) for d in seen.decisions for _, verdict in d.verdicts}),
            "cordon": [device for d in seen.decisions for device in d.cordon],
            "reasons": [d.reason for d in seen.decisions],
            "num_asked": len(seen.evidence),
            "roots": [f"{d.step}:{d.site}:{d.kind}:a{d.attempt}" for d in seen.detections if d.caused_by is None],
            "num_propagated": sum(d.caused_by is not None for d in seen.detections),
            "notes": seen.notes,
            "left": seen.left,
        }


def train(
    case: Case,
    *,
    settings: dict[str, Any] | None = None,
    faults: str = "",
    orders: Orders | None = None,
    answers: bool = True,
    num_steps: int = 6,
    step_of: Callable[[Case, Any, int], list[torch.Tensor]] = train_step,
    build: Callable[[Case], Any] = build_engine,
    save_at: int = 0,
) -> Result:
    engine = build(case)
    result = Result()
    with tempfile.TemporaryDirectory() as directory:
        if settings is not None:
            config = Config.model_validate(settings)
            result.coordinator = Coordinator(config, orders=orders, answers=answers)
            protect(engine, config, Path(directory), faults, result.coordinator)
        losses: list[float] = []
        try:
            for step in range(1, num_steps + 1):
                if result.coordinator is not None:
                    result.coordinator.begin_step(step)
                losses += [float(loss) for loss in step_of(case, engine, step)]
                result.scales.append(float(getattr(engine.optimizer, "loss_scale", 1.0)))
                if step == save_at:
                    engine.save_checkpoint(shared_directory() + "/checkpoints")
        except SystemExit as ending:
            result.exit_code = int(ending.code or 0)
        hook.release(engine)
    result.state, result.losses = state_of(engine), losses
    result.steps, result.skipped = engine.global_steps, engine.skipped_steps
    result.directory_of_engine = sorted(
        set(vars(engine)) & {"forward", "backward", "_take_model_step", "save_checkpoint"}
    )
    engine.destroy()
    return result


def protect(engine: Any, config: Config, run_dir: Path, faults: str, coordinator: Coordinator) -> None:
    plan = run_dir / "faults.toml"
    plan.write_text(faults)
    context = RunContext(
        run_id="scenario",
        run_dir=run_dir,
        coordinator_address="127.0.0.1:1",
        config=config,
        fault_plan=plan if faults else None,
    )
    hook.protect(engine, context, reporter=coordinator)


def shared_directory() -> str:
    """One directory for both ranks, removed by the tests."""
    return str(ARGUMENTS.output.parent)


def fault(step: int, site: str, kind: str, *, rank: int = 1, layer: int = 0, repeat: int = 1, more: str = "") -> str:
    address = f'step = {step}\nrank = {rank}\nsite = "{site}"\nlayer = {layer}'
    return f'[[fault]]\n{address}\nkind = "{kind}"\nrepeat = {repeat}\n{more}\n'


SPIKE = fault(5, "gradient", "scale", more="factor = 1e5")
CHECKSUM = {"detection": {"strength": "checksum"}}
UNMENDED = {"detection": {"strength": "checksum", "max_mends": 0}}


def nan_steps(*steps: int) -> Callable[[Case, Any, int], list[torch.Tensor]]:
    def step_of(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
        losses = []
        for micro_step in range(case.accumulation):
            tokens, targets = batch(step, micro_step, dist.get_rank())
            bad = step in steps and dist.get_rank() == 0
            loss = engine(tokens, targets, torch.tensor(float("nan") if bad else 1.0))
            engine.backward(loss)
            engine.step()
            losses.append(loss)
        return losses

    return step_of


def unprotected_fault() -> dict[str, Any]:
    clean = train(ZERO2)
    struck = train(ZERO2, settings={"detection": {"strength": "off"}}, faults=SPIKE)
    return {"equal": is_equal(clean.state, struck.state), **struck.report()}


def fail_open() -> dict[str, Any]:
    clean = train(ZERO2)
    struck = train(ZERO2, settings=CHECKSUM, faults=SPIKE, answers=False)
    return {"equal": is_equal(clean.state, struck.state), **struck.report()}


def forward_fault_replayed() -> dict[str, Any]:
    clean = train(ZERO2)
    struck = train(ZERO2, settings=UNMENDED, faults=fault(4, "linear.out", "scale", layer=2, more="factor = 50.0"))
    same = is_equal(clean.losses, struck.losses)
    return {"equal": is_equal(clean.state, struck.state), "losses_equal": same, **struck.report()}


def forward_fault_outside() -> dict[str, Any]:
    case = Case(name="outside", backward="outside", model="convolution", precision="fp32")
    return train(case, settings=UNMENDED, faults=fault(4, "linear.out", "scale", more="factor = 50.0")).report()


def persistent() -> dict[str, Any]:
    return train(ZERO2, settings=CHECKSUM, faults=fault(3, "linear.out", "inf", layer=1, repeat=-1)).report()


def nan_once() -> dict[str, Any]:
    stock = train(ZERO2, step_of=nan_steps(4))
    guarded = train(ZERO2, settings=CHECKSUM, step_of=nan_steps(4))
    return {"equal": is_equal(stock.state, guarded.state), "stock_skipped": stock.skipped, **guarded.report()}


def nan_for_good() -> dict[str, Any]:
    settings = {**CHECKSUM, "policy": {"max_skips_in_a_row": 2}}
    return train(ZERO2, settings=settings, step_of=nan_steps(*range(3, 20)), num_steps=12).report()


def scale_search() -> dict[str, Any]:
    results = {}
    for zero in (0, 2):
        case = Case(name="search", precision="fp16", zero=zero)
        stock = train(case, build=build_searching, num_steps=14)
        guarded = train(case, build=build_searching, settings=CHECKSUM, num_steps=14)
        results[f"zero{zero}"] = {
            "equal": is_equal(stock.state, guarded.state),
            "scales_equal": is_equal(stock.scales, guarded.scales),
            "num_scales": len(set(stock.scales)),
            **guarded.report(),
        }
    return results


def overflow_at_a_proven_scale() -> dict[str, Any]:
    case = Case(name="overflow", precision="fp16", zero=2)
    build = functools.partial(build_searching, scale_power=10)
    stock = train(case, build=build)
    struck = train(case, build=build, settings=CHECKSUM, faults=fault(3, "gradient", "inf"))
    same = is_equal(stock.scales, struck.scales)
    return {"equal": is_equal(stock.state, struck.state), "scales_equal": same, **struck.report()}


def build_searching(case: Case, scale_power: int = 24) -> Any:
    torch.manual_seed(1234)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": case.accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": case.zero},
        "fp16": {"enabled": True, "initial_scale_power": scale_power, "loss_scale_window": 2, "hysteresis": 1},
        "steps_per_print": 1_000_000,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def shadow() -> dict[str, Any]:
    stock = train(ZERO2, settings={"detection": {"strength": "off"}}, faults=SPIKE)
    shadowed = train(ZERO2, settings={**CHECKSUM, "mode": "shadow"}, faults=SPIKE)
    return {"equal": is_equal(stock.state, shadowed.state), **shadowed.report()}


def ordered(orders: Orders) -> dict[str, Any]:
    # One rank alone hears the order; all must leave at the same step.
    return train(ZERO2, settings=CHECKSUM, orders=orders if dist.get_rank() == 1 else None).report()


def drain() -> dict[str, Any]:
    orders = Orders(drain=True, reason="asked by an operator") if dist.get_rank() == 1 else None
    return train(ZERO2, settings=CHECKSUM, orders=orders, save_at=4).report()


class AuxiliaryLoss(Model):
    """Part of its loss goes around its outputs."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.auxiliary = self.embedding(tokens).float().square().mean()
        return super().forward(tokens, targets, weight)


def around_the_outputs() -> dict[str, Any]:
    def build(case: Case) -> Any:
        torch.manual_seed(1234)
        model = AuxiliaryLoss()
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": case.accumulation,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {
                "stage": case.zero,
                "offload_optimizer": {"device": "cpu" if case.offload else "none"},
            },
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": True},
            "steps_per_print": 1_000_000,
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        return engine

    def step_of(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
        for micro_step in range(case.accumulation):
            tokens, targets = batch(step, micro_step, dist.get_rank())
            engine.backward(engine(tokens, targets, torch.tensor(1.0)) + engine.module.auxiliary)
            engine.step()
        return []

    results = {}
    cases = [*(Case(name="auxiliary", zero=zero) for zero in (0, 1, 2, 3))]
    cases += [Case(name="auxiliary", zero=zero, offload=True) for zero in (2, 3)]
    for case in cases:
        stock = train(case, build=build, step_of=step_of)
        guarded = train(case, build=build, step_of=step_of, settings=CHECKSUM)
        name = f"zero{case.zero}{'-offload' if case.offload else ''}"
        results[name] = {"equal": is_equal(stock.state, guarded.state), **guarded.report()}
    return results


def evaluation_between() -> dict[str, Any]:
    def step_of(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
        losses = train_step(case, engine, step)
        tokens, targets = batch(step, 0, dist.get_rank())
        engine.eval()
        with torch.no_grad():
            engine(tokens, targets, torch.tensor(1.0))
        # Without no_grad too, as careless scripts do, and in the middle of a step.
        engine(tokens, targets, torch.tensor(1.0))
        engine.train()
        return losses

    clean = train(ZERO2, step_of=step_of)
    struck = train(ZERO2, step_of=step_of, settings=CHECKSUM, faults=SPIKE)
    return {"equal": is_equal(clean.state, struck.state), **struck.report()}


def pipeline() -> dict[str, Any]:
    """Two stages: replay is off, detection is on, the step is not taken."""
    deepspeed.init_distributed("gloo")

    def build(case: Case) -> Any:
        torch.manual_seed(1234)
        layers = [torch.nn.Linear(16, 16) for _ in range(4)]
        model = PipelineModule(layers=layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss)
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": case.accumulation,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "steps_per_print": 1_000_000,
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        return engine

    def step_of(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        data = [torch.randn(4, 16, generator=generator) for _ in range(case.accumulation)]
        factor = float("nan") if step == 5 else 1.0
        return [engine.train_batch(iter([(x, factor * x.tanh()) for x in data]))]

    clean = train(ZERO2, build=build, step_of=step_of, num_steps=4)
    guarded = train(ZERO2, build=build, step_of=step_of, num_steps=4, settings=CHECKSUM)
    struck = train(ZERO2, build=build, step_of=step_of, settings=CHECKSUM)
    return {"equal": is_equal(clean.state, guarded.state), **struck.report()}


@contextlib.contextmanager
def wrong_sums(step: int, *, times: int) -> Iterator[Callable[[Case, Any, int], list[torch.Tensor]]]:
    """DeepSpeed's reductions of gradients, wrong in one element of what rank 1 gets, so many times in a step.

    Gives a training step to use. The fault is below what watches the reductions, as a broken adapter's would be.
    """
    backend, current, left = comm.cdb, [0], [times]

    def struck(name: str) -> Callable[..., Any]:
        original = getattr(type(backend), name)

        def reduce(*args: Any, **kwargs: Any) -> Any:
            returned = original(backend, *args, **kwargs)
            tensor = args[0] if args else kwargs.get("output_tensor", kwargs.get("tensor"))
            # The norm of the gradients is a sum over ranks, too, of one number.
            if current[0] == step and left[0] > 0 and dist.get_rank() == 1 and tensor.numel() > 1:
                left[0] -= 1
                tensor.view(-1)[tensor.numel() // 2] += 1e3
            return returned

        return reduce

    def step_of(case: Case, engine: Any, step: int) -> list[torch.Tensor]:
        current[0] = step
        return train_step(case, engine, step)

    names = ("all_reduce", "reduce", "reduce_scatter_tensor")
    for name in names:
        setattr(backend, name, struck(name))
    try:
        yield step_of
    finally:
        for name in names:
            del backend.__dict__[name]


def wrong_reduction() -> dict[str, Any]:
    deepspeed.init_distributed("gloo")
    results = {}
    cases = [
        Case(name=f"zero{zero}-{precision}", zero=zero, precision=precision)
        for zero, precision in itertools.product((0, 1, 2, 3), ("fp32", "bf16"))
    ]
    padded = Case(name="zero3-padded", zero=3, precision="fp32", model="convolution", backward="outside")
    for case in (*cases, padded):

        def ending(trained: Result, case: Case = case) -> object:
            # What pads a shard is memory as DeepSpeed found it: its bits are others in every run.
            return trained.losses if case.name == "zero3-padded" else trained.state

        clean = train(case)
        with wrong_sums(4, times=1) as step_of:
            loose = train(case, step_of=step_of)
        with wrong_sums(4, times=1) as step_of:
            struck = train(case, settings=CHECKSUM, step_of=step_of)
        results[case.name] = {
            "matters": not is_equal(ending(clean), ending(loose)),
            "equal": is_equal(ending(clean), ending(struck)),
            **struck.report(),
        }
    return results


def wrong_reduction_for_good() -> dict[str, Any]:
    deepspeed.init_distributed("gloo")
    with wrong_sums(4, times=1000) as step_of:
        return train(ZERO2, settings=CHECKSUM, step_of=step_of).report()


def put_back() -> dict[str, Any]:
    guarded = train(ZERO2, settings=CHECKSUM, num_steps=1)
    return {"left_over": guarded.directory_of_engine, **guarded.report()}


NEED_FP16 = ("scale_search", "overflow_at_a_proven_scale")

SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "unprotected_fault": unprotected_fault,
    "fail_open": fail_open,
    "forward_fault_replayed": forward_fault_replayed,
    "forward_fault_outside": forward_fault_outside,
    "persistent": persistent,
    "nan_once": nan_once,
    "nan_for_good": nan_for_good,
    "scale_search": scale_search,
    "overflow_at_a_proven_scale": overflow_at_a_proven_scale,
    "shadow": shadow,
    "stop": lambda: ordered(Orders(stop_code=75, reason="asked by an operator")),
    "restart": lambda: ordered(Orders(restart=True, reason="a node is gone")),
    "fenced": lambda: ordered(Orders(fenced=True)),
    "drain": drain,
    "around_the_outputs": around_the_outputs,
    "evaluation_between": evaluation_between,
    "wrong_reduction": wrong_reduction,
    "wrong_reduction_for_good": wrong_reduction_for_good,
    "put_back": put_back,
    # The last one: DeepSpeed keeps the grid of a pipeline for the life of the process.
    "pipeline": pipeline,
}


def main() -> None:
    dist.init_process_group("gloo")
    for name, scenario in SCENARIOS.items():
        if ARGUMENTS.only not in name or (name in NEED_FP16 and not computes_fp16()):
            continue
        result = {"scenario": name, "rank": dist.get_rank(), **scenario()}
        every: list[Any] = [None, None]
        dist.all_gather_object(every, result)
        if dist.get_rank() == 0:
            with ARGUMENTS.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in every)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="")
    ARGUMENTS = parser.parse_args()
    main()
