"""A faulted run of a script that knows nothing of all this: DeepSpeed's own monitors tell what was seen and done."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import DEEPSPEED_CONFIG, launched

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

FAULTS = """
[[fault]]
step = 3
rank = 1
site = "attention.scores"
kind = "inf"

[[fault]]
step = 5
rank = 1
site = "gradient"
kind = "scale"
factor = 1e4
"""
BATCH = 16
"""Samples a step: 4 a micro-batch, 2 micro-steps, 2 ranks."""

Series = dict[str, list[tuple[int, float]]]


def csv_series(folder: Path) -> Series:
    found = {}
    for path in sorted(folder.glob("Resilience_*.csv")):
        rows = list(csv.reader(path.read_text().splitlines()))[1:]
        found[path.stem] = [(int(samples), float(value)) for samples, value in rows]
    return found


def tensorboard_series(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: Series = {}
    (path,) = folder.glob("events.out.tfevents.*")
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.tag.startswith("Resilience/"):
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_and_csv_files_hold_detections_and_decisions_at_their_steps(tmp_path: Path) -> None:
    monitors: Mapping[str, Any] = {
        name: {"enabled": True, "output_path": str(tmp_path / name), "job_name": "job"}
        for name in ("tensorboard", "csv_monitor")
    }
    with launched(
        tmp_path, faults=FAULTS, script_args=["--steps", "6"], deepspeed_config={**DEEPSPEED_CONFIG, **monitors}
    ) as run:
        assert run.wait() == 0, run.output()[-4000:]
    seen = tensorboard_series(tmp_path / "tensorboard" / "job")
    # What happened on rank 1 is written by rank 0; both faults, and nothing else.
    mended, replayed = 3 * BATCH, 5 * BATCH
    assert seen.pop("Resilience/detections/attention.scores") == [(mended, 1.0)]
    (gradients,) = seen.pop("Resilience/detections/gradient")
    assert gradients[0] == replayed
    ((at, lost_s),) = seen.pop("Resilience/lost_s")
    replay = next(each for each in run.report()["decisions"] if each["action"] == "replay")
    assert (at, lost_s) == (replayed, pytest.approx(replay["lost_s"], rel=1e-3))
    assert seen == {
        "Resilience/decisions/corrected": [(mended, 1.0)],
        "Resilience/decisions/replay": [(replayed, 1.0)],
        "Resilience/decisions/continue": [(replayed, 1.0)],
    }
    rates = (tmp_path / "csv_monitor" / "job" / "Train_Samples_lr.csv").read_text().splitlines()[1:]
    assert {int(rate.split(",")[0]) for rate in rates} == {step * BATCH for step in range(1, 7)}, "DeepSpeed's own axis"
    files = csv_series(tmp_path / "csv_monitor" / "job")
    assert files["Resilience_detections_attention.scores"] == [(mended, 1.0)]
    assert files["Resilience_decisions_replay"] == [(replayed, 1.0)]
