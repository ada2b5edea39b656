"""`scripts/bench overhead`: protected ÷ plain step time, pair by pair in one run, model by model.

The cases are a table; each is one launch of `overhead_rank.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launching import LaunchError, launch
from result_file import result_file, revision
from rich.console import Console
from rich.table import Table

__all__ = ["main"]

SCRIPTS = Path(__file__).parent
CHECKSUM = {"strength": "checksum"}
ADAPTIVE = {"strength": "checksum", "share": "adaptive", "overhead_budget_ratio": 0.01}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model under one configuration of DeepSpeed; all `detections` are measured in the same processes."""

    name: str
    model: str
    attention: str = "eager"
    precision: str = "fp32"
    checkpointing: bool = False
    num_ranks: int = 1
    detections: tuple[dict[str, Any], ...] = (CHECKSUM,)


FOUR = ("bert", "gpt2", "gpt-neo", "roberta")
CASES = (
    Case(
        name="demo-bf16",
        model="demo",
        precision="bf16",
        num_ranks=2,
        detections=({"strength": "screen"}, {"strength": "invariants"}, CHECKSUM),
    ),
    *(Case(name=f"{model}-eager-fp32", model=model) for model in FOUR),
    # SDPA has no GPT-Neo in transformers.
    *(
        Case(name=f"{model}-{attention}-fp32", model=model, attention=attention)
        for attention in ("sdpa", "fused")
        for model in FOUR
        if model != "gpt-neo"
    ),
    Case(name="gpt2-checkpointing-fp32", model="gpt2", checkpointing=True),
    Case(name="gpt2-adaptive-fp32", model="gpt2", detections=(ADAPTIVE,)),
    Case(name="bert-adaptive-fp32", model="bert", detections=(ADAPTIVE,)),
    Case(name="gpt2-eager-bf16", model="gpt2", precision="bf16"),
    Case(name="gpt2-sdpa-bf16", model="gpt2", attention="sdpa", precision="bf16"),
    Case(name="gpt2-fused-bf16", model="gpt2", attention="fused", precision="bf16"),
)


def deepspeed_config(case: Case, batch_size: int) -> dict[str, Any]:
    """Of the models from Hugging Face; the demo has its own."""
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": case.precision == "bf16"},
    }


def measure(case: Case, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Run one case.

    Raises:
        LaunchError: it did not end well.
    """
    result_file, config_file = directory / f"{case.name}.json", SCRIPTS / "demo_gpt" / "ds_config.json"
    if case.model != "demo":
        config_file = directory / "ds_config.json"
        config_file.write_text(json.dumps(deepspeed_config(case, arguments.batch)), encoding="utf-8")
    words = ["--num_gpus", str(case.num_ranks), str(SCRIPTS / "overhead_rank.py")]
    words += ["--deepspeed_config", str(config_file), "--model", case.model, "--attention", case.attention]
    words += ["--layers", str(arguments.layers), "--batch", str(arguments.batch)]
    words += ["--checkpointing"] if case.checkpointing else []
    words += ["--detections", json.dumps(case.detections)]
    words += ["--pairs", str(arguments.pairs), "--steps", str(arguments.steps), "--result", str(result_file)]
    commit = revision()  # before hours in which files may change
    with _threads(max(1, (os.cpu_count() or 1) // case.num_ranks)):
        launch(words, directory)
    measured: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    what = {key: value for key, value in dataclasses.asdict(case).items() if key != "detections"}
    if case.model != "demo":
        what |= {"num_layers": arguments.layers, "batch_size": arguments.batch, "sequence": 512, "width": 768}
    return what | {"revision": commit} | measured


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """All cores shared among the ranks."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def show(results: list[dict[str, Any]]) -> None:
    """Print what was measured."""
    table = Table(title=results[0]["machine"])
    headings = ("case", "checks", "share", "plain step", "protected ÷ plain", "least", "most", "of quartiles", "own")
    for heading in (*headings, "user", "system", "pair by pair"):
        table.add_column(heading)
    for result in results:
        for row in result["rows"]:
            ratios = row["ratios"]
            found = row["median_ratio"], min(ratios), max(ratios), row["quartile_ratio"], 1 + row["own_ratio"]
            spread = [f"{value:.3f}" for value in (*found, row["user_ratio"])]
            spread.append(
                " → ".join(f"{row[step]['system_seconds']:.1f} s" for step in ("plain_median", "protected_median"))
            )
            pairs = " ".join(f"{ratio:.3f}" for ratio in ratios)
            share = str(row.get("share", 1))
            if "coverage" in row:
                share += f", coverage {row['coverage']:.4f}"
            table.add_row(result["name"], row["strength"], share, f"{row['plain_step_ms']:.0f} ms", *spread, pairs)
    Console(width=150).print(table)
    print(
        "Ratios are medians over pairs of blocks; of quartiles: the lower quartile of all protected steps by that of\n"
        "all plain ones; own: 1 + seconds in protection's own code ÷ all other seconds of a protected step, by timers\n"
        "(median); user: of the medians of processor time outside the kernel; system: that in the kernel, mostly for\n"
        "pages of memory, plain → protected.\n"
        "Protected is recording, checks, screens, hashes, the vote; not snapshots, heartbeats and what a run writes."
    )


def main(words: list[str]) -> int:
    """Run the benchmark with these command-line words; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench overhead", description=__doc__)
    parser.add_argument(
        "--only", default="", help="cases whose name holds this; all: " + ", ".join(c.name for c in CASES)
    )
    parser.add_argument("--layers", type=int, default=6, help="of the models from Hugging Face (default: 6)")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step of those models (default: 4)")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of blocks (default: 6)")
    parser.add_argument("--steps", type=int, default=2, help="timed optimizer steps in a block (default: 2)")
    parser.add_argument("--json", type=result_file, help="write the results here, too")
    arguments = parser.parse_args(words)
    cases = [case for case in CASES if arguments.only in case.name]
    if not cases:
        parser.error(
            f"--only {arguments.only}: no case has this in its name; there are {', '.join(c.name for c in CASES)}"
        )
    if min(arguments.pairs, arguments.steps, arguments.layers // 2, arguments.batch) < 1:
        parser.error("--pairs, --steps and --batch must be at least 1, --layers at least 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, and so ends the launch
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="resilience-bench-") as directory:
        for case in cases:
            try:
                results.append(measure(case, arguments, Path(directory)))
            except LaunchError as error:
                print(f"scripts/bench: {case.name}: {error}", file=sys.stderr)
                return 1
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)
    return 0
