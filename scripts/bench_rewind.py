"""How long training stands still when damage in the optimizer's state is rewound: from its detection until the state is
what it should have been, steps run again included.

One launch, struck every few steps. Durations come from the run's own report; a step's usual time, from what the script
says.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_recovery import DEEPSPEED, BenchError, Launch, launched
from result_file import result_file

_FIRST, _EVERY = 8, 4
_PARAMETERS = {"demo": "head.weight", "gpt2": "transformer.h.3.mlp.c_fc.weight"}


@dataclasses.dataclass(frozen=True)
class Result:
    """What one launch gave, in seconds."""

    rewinds_s: list[float]
    step_s: float
    """Median of the script's steps with a snapshot after each."""


def measure(directory: Path, model: str, repeats: int) -> Result:
    """Strike rank 1 again and again, and wait for the end."""
    num_steps = _FIRST + _EVERY * repeats
    strikes = (_strike(_FIRST + _EVERY * number, _PARAMETERS[model]) for number in range(repeats))
    (directory / "faults.toml").write_text("".join(strikes))
    config: dict[str, Any] = {"detection": {"at_rest_share": 1.0}, "snapshot": {"interval_steps": 1}}
    config["policy"] = {"max_rewinds": repeats + 1}
    (directory / "resilience.json").write_text(json.dumps(config))
    (directory / "ds_config.json").write_text(json.dumps(DEEPSPEED))
    words = ["--resilience", "--resilience-dir", str(directory / "run")]
    words += ["--resilience-config", str(directory / "resilience.json")]
    words += ["--resilience-faults", str(directory / "faults.toml")]
    script_words = ["--deepspeed_config", str(directory / "ds_config.json"), "--model", model]
    script_words += ["--steps", str(num_steps), "--save_every", "1000000", "--save_dir", str(directory / "checkpoints")]
    with launched(directory / "launch", words, script_words) as launch:
        for step in range(_FIRST, num_steps, _EVERY):
            launch.wait_for(lambda step=step: any(mark.step >= step for mark in launch.marks()), f"step {step}")
        report = launch.wait_for(lambda: _report(directory / "run"), "the end of the run")
        return Result([each["latency_ms"] / 1e3 for each in _rewinds(report, repeats)], _usual_step_s(launch))


def _strike(step: int, parameter: str) -> str:
    where = f'step = {step}\nrank = 1\nsite = "optimizer"\nparam = "exp_avg of {parameter}"\n'
    return f'[[fault]]\n{where}kind = "scale"\nfactor = 1.5\nindex = 0\ncount = 64\n'


def _report(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "report.json"
    return dict(json.loads(path.read_text())) if path.exists() else None


def _rewinds(report: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    found = [each for each in report["decisions"] if (each["action"], each["outcome"]) == ("rewind", "succeeded")]
    if len(found) != repeats:
        raise BenchError(f"{repeats} strikes led to {len(found)} rewinds; report.json says why")
    return found


def _usual_step_s(launch: Launch) -> float:
    ends = [mark.at for mark in launch.marks() if mark.what == "step" and mark.rank == 0]
    return statistics.median(after - before for before, after in itertools.pairwise(ends))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench rewind", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(_PARAMETERS), default=list(_PARAMETERS))
    parser.add_argument("--repeats", type=int, default=10, help="rewinds of each model (default: 10)")
    parser.add_argument("--json", type=result_file, help="write the results there")
    arguments = parser.parse_args(words)
    results = {}
    try:
        for model in arguments.models:
            with tempfile.TemporaryDirectory(prefix="bench-rewind-") as temporary:
                results[model] = result = measure(Path(temporary), model, arguments.repeats)
            median, low, high = statistics.median(result.rewinds_s), min(result.rewinds_s), max(result.rewinds_s)
            print(f"{model:5} rewind {median:.2f} s ({low:.2f} to {high:.2f}, n = {arguments.repeats}),"
                  f" a step takes {result.step_s:.2f} s", flush=True)  # fmt: skip
    except BenchError as error:
        print(f"scripts/bench rewind: {error}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        found = {model: dataclasses.asdict(result) for model, result in results.items()}
        arguments.json.write_text(json.dumps({"load_average": os.getloadavg(), "results": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
