"""The proof: train under three faults with resilience, train without faults with DeepSpeed alone, compare the weights.

The second run does not load the package at all, so equality says both that every fault was repaired without a trace and
that protection by itself changes nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launching import Aborted, LaunchError, launch

FILES = Path(__file__).parent / "demo_gpt"

EXPECTED = (
    ("INF in the attention scores", 12, "attention.scores", "corrected"),
    ("gradient scaled by 1e4", 33, "gradient", "replay"),
    ("kill -9 of rank 1", 55, "process", "restart"),
)
"""What is injected: in words, at which step, at which site, and what must be decided."""

STEPS_BEHIND = 3
"""How old the coordinator's knowledge of a dead process may be, in steps: that of its last heartbeat."""


def train(launch_options: list[str], directory: Path, checkpoints: Path, *, steps: int) -> float:
    """Run the training script to its end; returns the seconds it took."""
    words = [*launch_options, "--num_gpus", "2", str(FILES / "train_gpt.py")]
    words += ["--deepspeed_config", str(FILES / "ds_config.json"), "--save_dir", str(checkpoints)]
    words += ["--steps", str(steps)]
    started_at = time.monotonic()
    try:
        launch(words, directory)
    except Aborted:
        # gloo's threads may abort an interpreter that shuts down (torch 2.13). Plain DeepSpeed calls that a failure;
        # what the run was for is done once it has saved its last checkpoint.
        latest = checkpoints / "latest"
        if not latest.is_file() or latest.read_text(encoding="utf-8").strip() != f"global_step{steps}":
            raise
        print("a rank aborted after it had saved the last checkpoint; the checkpoint counts")
    return time.monotonic() - started_at


def digest(checkpoints: Path) -> str:
    """SHA-256 over the consolidated fp32 weights of the newest checkpoint."""
    command = ["resilience", "digest", str(checkpoints)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if answer.returncode != 0:
        raise LaunchError(f"{' '.join(command)}: {answer.stderr.strip()}")
    return answer.stdout.strip()


def read_report(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path}: the run left no readable report ({error})") from None
    return report


def judge(report: dict[str, Any]) -> list[str]:
    """What is wrong with the report of the faulted run; empty when each fault met its answer, once."""
    wrong = []
    injected = [(fault["step"], fault["site"]) for fault in report["faults_injected"]]
    decisions = [(decision["step"], decision["action"]) for decision in report["decisions"]]
    for words, step, site, action in EXPECTED:
        if injected.count((step, site)) != 1:
            wrong.append(f"{words}: injected {injected.count((step, site))} times at step {step}")
        first = step - STEPS_BEHIND if site == "process" else step
        if not any((at, action) in decisions for at in range(first, step + 1)):
            wrong.append(f"{words}: no decision {action!r} at step {step}")
    acted = [action for _, action in decisions if action != "continue"]
    if len(acted) != len(EXPECTED):
        wrong.append(f"{len(EXPECTED)} faults, but {len(acted)} actions: {', '.join(acted)}")
    return wrong


def prove(directory: Path, steps: int) -> bool:
    """Both runs and the verdict, printed."""
    faulted, plain, run = directory / "faulted", directory / "plain", directory / "run"
    options = ["--resilience", "--resilience-config", str(FILES / "resilience.toml")]
    options += ["--resilience-faults", str(FILES / "faults.toml"), "--resilience-dir", str(run)]
    faulted_s = train(options, directory, faulted, steps=steps)
    plain_s = train([], directory, plain, steps=steps)
    wrong = judge(read_report(run / "report.json"))
    weights = {"three faults, resilience": digest(faulted), "no faults, plain DeepSpeed": digest(plain)}
    print()
    for words, seconds in zip(weights, (faulted_s, plain_s), strict=True):
        print(f"{words:27} {seconds:5.0f} s   sha256 {weights[words]}")
    if len(set(weights.values())) > 1:
        wrong.append("the final weights differ")
    for line in wrong:
        print(f"FAILED: {line}", flush=True)
    if not wrong:
        print("PROVED: the final weights are equal, bit for bit; each fault was met once, by the expected action.")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--dir", type=Path, help="keep logs, report and checkpoints here (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps; at least 56 (default: 80)")
    arguments = parser.parse_args()
    if arguments.steps <= EXPECTED[-1][1]:
        parser.error(f"--steps {arguments.steps}: the last fault strikes at step {EXPECTED[-1][1]}; take more")
    if arguments.dir is not None and arguments.dir.exists() and any(arguments.dir.iterdir()):
        parser.error(f"--dir {arguments.dir}: not empty; name a new directory")
    directory = (arguments.dir or Path(tempfile.mkdtemp(prefix="resilience-demo-"))).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, and so ends the run in progress
    started_at = time.monotonic()
    proved = False
    try:
        proved = prove(directory, arguments.steps)
    except LaunchError as error:
        print(f"FAILED: {error}")
    print(f"The demo took {time.monotonic() - started_at:.0f} s.")
    if proved and arguments.dir is None:
        shutil.rmtree(directory)
    else:
        print(f"Logs, report and checkpoints: {directory}")
    return 0 if proved else 1


if __name__ == "__main__":
    sys.exit(main())
