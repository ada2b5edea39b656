"""`resilience calibrate` around a real job of two ranks: their histograms, the bound, and the profile."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from resilience.abft.calibration import FOLDER, Histogram, load_profile
from tests.integration.harness import BIN, DEEPSPEED_CONFIG, TINY, free_port

pytestmark = pytest.mark.integration


def test_a_real_job_leaves_a_histogram_of_every_rank_and_a_profile_that_a_launch_reads(tmp_path: Path) -> None:
    (tmp_path / "ds_config.json").write_text(json.dumps(DEEPSPEED_CONFIG))
    script = [str(TINY), "--deepspeed_config", "ds_config.json", "--checkpoints", "checkpoints", "--steps", "3"]
    script += ["--save-every", "100"]
    command = [str(BIN / "resilience"), "calibrate", "--json", "--output", "profile.toml", "--"]
    command += ["--num_gpus", "2", "--master_port", str(free_port()), "--resilience-dir", "run", *script]
    path = os.environ["PATH"]  # with this Python's commands first, once: DeepSpeed compiles again where it differs
    environment = {
        **os.environ,
        "PATH": path if path.startswith(f"{BIN}:") else f"{BIN}:{path}",
        "OMP_NUM_THREADS": "1",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    answer = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,  # where nothing was compiled yet, DeepSpeed's Adam is
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    sites = {site["site"]: site for site in json.loads(answer.stdout)["sites"]}
    assert {"attention.scores", "attention.context", "attention.probs", "linear.dgrad", "linear.wgrad"} <= set(sites)
    assert all(site["num_alarms"] == 0 and site["num_checks"] > 0 for site in sites.values())
    ranks = [Histogram.read(tmp_path / "run" / FOLDER / f"rank-{rank}.json") for rank in (0, 1)]
    for site, fields in sites.items():
        assert fields["num_checks"] == sum(one.sites[site].num_checks for one in ranks)
        assert fields["max_ratio"] == max(one.sites[site].max_ratio for one in ranks)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["outcome"], report["num_steps"], report["detections"]) == ("finished", 3, [])
    profile = load_profile(tmp_path / "profile.toml")
    assert all(profile[site] >= 2.0 * fields["max_ratio"] * 0.999 for site, fields in sites.items())
