"""A rank is killed at step 54 of scripts that know nothing of this package; training goes on from memory, bit for bit.

They begin where they begin by themselves: with nothing, or with their own checkpoint of step 40.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import DEEPSPEED_CONFIG, SCRIPTS, Run, digest, launched

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

KILL = '[[fault]]\nstep = 54\nrank = 1\nmicro_step = 1\nsite = "process"\nkind = "kill"\n'
EVERY_STEP = '[detection]\nstrength = "off"\n[snapshot]\ninterval_steps = 1\n'
CLIENT = {name: value for name, value in DEEPSPEED_CONFIG.items() if name != "optimizer"}


def run(
    directory: Path, script: str, *words: str, kill: bool, in_order: bool = True, config: dict[str, Any] | None = None
) -> Run:
    """`in_order`: the script's data come in the same order after a restart."""
    options: dict[str, Any] = {"faults": KILL, "resilience": EVERY_STEP} if kill else {"plain": True}
    config = config or (CLIENT if script == "accelerate" else DEEPSPEED_CONFIG)
    if script == "accelerate" and in_order:
        words = (*words, "--seedable")
    with launched(
        directory, script=SCRIPTS / f"train_{script}.py", script_args=list(words), deepspeed_config=config, **options
    ) as launch:
        code = launch.wait()
    assert code == 0 or not kill, launch.output()[-6000:]
    return launch


def said(launch: Run) -> list[str]:
    """What the script printed about its steps, each line once: a restarted one says some of it again."""
    lines = re.findall(r"^(?:step \d|history|done at).*$", launch.output(), flags=re.MULTILINE)
    return list(dict.fromkeys(line for line in lines if "train_" not in line))


@pytest.fixture(scope="module")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A script under stock DeepSpeed, without this package; each is run once."""
    folder = tmp_path_factory.mktemp("faultless")
    return functools.cache(lambda script: run(folder / script, script, kill=False))


@pytest.mark.parametrize(
    ("script", "words", "start"),
    [
        pytest.param("loader", [], 0, marks=pytest.mark.long),
        pytest.param("loader", ["--save-every", "40"], 40, marks=pytest.mark.long),
        pytest.param("trainer", [], 0, marks=pytest.mark.long),
        ("trainer", ["--save-every", "40"], 40),
        pytest.param("accelerate", [], 0, marks=pytest.mark.long),
        pytest.param("accelerate", ["--save-every", "40"], 40, marks=pytest.mark.long),
    ],
    ids=["loader", "loader-from-40", "trainer", "trainer-from-40", "accelerate", "accelerate-from-40"],
)
def test_a_killed_rank_costs_no_step_and_the_script_ends_with_the_same_weights(
    tmp_path: Path, faultless: Callable[[str], Run], script: str, words: list[str], start: int
) -> None:
    struck = run(tmp_path, script, *words, kill=True)
    output = struck.output()
    assert f"fast-forward from step {start} to step 53" in output, output[-6000:]
    assert "fast-forwarded to step 53" in output
    assert ("loaded without its optimizer's shards" in output) is (start == 40)
    assert digest(struck.directory, "final") == digest(faultless(script).directory, "final")
    assert said(struck) == said(faultless(script)), "losses, averages and evaluations, in their order"
    assert struck.report()["num_generations"] == 2
    assert not struck.shared_memory()


@pytest.mark.long
def test_a_script_whose_data_come_in_another_order_begins_from_its_checkpoint_with_the_reason(tmp_path: Path) -> None:
    struck = run(tmp_path, "accelerate", "--save-every", "40", kill=True, in_order=False)
    assert struck.report()["num_generations"] == 3
    assert "the script's data do not come in the same order after a restart" in struck.output()
    assert "generation 3 begins on 2 ranks from the last verified checkpoint (step 40)" in struck.output()
    assert "fast-forwarded to" not in struck.output()
    assert "done at step 60" in struck.output()


def test_what_was_loaded_without_the_optimizer_is_never_saved(tmp_path: Path) -> None:
    words = ["--save-every", "40", "--save-first"]
    struck = run(tmp_path / "struck", "loader", *words, kill=True)
    faultless = run(tmp_path / "faultless", "loader", *words, kill=False)
    assert struck.report()["num_generations"] == 3
    assert "the script saves a checkpoint before it trains" in struck.output()
    assert struck.output().count("loaded without its optimizer's shards") == 1, "not again"
    assert "fast-forwarded to step 53" in struck.output(), "nothing is lost"
    assert digest(struck.directory, "final") == digest(faultless.directory, "final")


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_every_stage_ends_with_the_same_weights(tmp_path: Path, stage: int, bf16: bool) -> None:
    config = {**DEEPSPEED_CONFIG, "zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
    runs = [
        run(tmp_path / name, "loader", "--save-every", "40", kill=name == "struck", config=config)
        for name in ("struck", "faultless")
    ]
    output = runs[0].output()
    assert "fast-forwarded to step 53" in output, output[-6000:]
    assert ("loaded without its optimizer's shards" in output) is (stage in (1, 2))
    assert digest(runs[0].directory, "final") == digest(runs[1].directory, "final")


@pytest.mark.long
def test_a_script_that_needs_large_outputs_begins_from_its_checkpoint_with_the_reason(tmp_path: Path) -> None:
    struck = run(tmp_path, "loader", "--accuracy", "--num-classes", "2000", "--save-every", "40", kill=True)
    report = struck.report()
    assert report["num_generations"] == 3
    assert "uses an output of the model that was too large to be recorded (shape (4, 2000)" in struck.output()
    assert "fast-forwarded to" not in struck.output()
    assert "done at step 60" in struck.output()
