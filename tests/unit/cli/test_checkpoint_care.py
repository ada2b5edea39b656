"""checkpoints prune, and what checkpoints convert refuses before it touches anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from resilience.checkpoint.batch import Batch
from resilience.checkpoint.manifest import Manifest
from resilience.checkpoint.publish import Marker, begin, hash_and_flush, publish
from resilience.checkpoint.verify import list_files

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def save_dir(here: Path) -> Path:
    """Checkpoints of steps 1 to 4, of 8 samples a step on two ranks."""
    save_dir = here / "ck"
    batch = Batch(train_batch_size=8, micro_batch_size=2, accumulation=2, world_size=2)
    for step in (1, 2, 3, 4):
        tag = f"step{step}"
        begin(save_dir, tag, Marker(run_id="run", generation=1, step=step, started_at=float(step)))
        (save_dir / tag / "mp_rank_00_model_states.pt").write_bytes(b"weights")
        record = save_dir / tag / "resilience" / "random-rank-00000.json"
        record.write_text(json.dumps({"batch": dataclasses.asdict(batch)}))
        manifest = Manifest(
            run_id="run",
            generation=1,
            tag=tag,
            step=step,
            last_verified_step=step,
            world_size=2,
            zero_stage=2,
            latest=True,
            created_at=float(step),
            files={path: hash_and_flush(save_dir / tag / path) for path in list_files(save_dir / tag)},
        )
        publish(save_dir, manifest)
    return save_dir


def tags(save_dir: Path) -> list[str]:
    return sorted(path.name for path in save_dir.iterdir() if path.is_dir())


def test_prune_shows_first_and_then_deletes_what_it_showed(command: Command, save_dir: Path) -> None:
    code, out, _ = command("checkpoints", "prune", "ck", "--keep", "2", "--keep-every", "1", "--dry-run")
    assert (code, out.count("kept")) == (0, 4)
    code, out, _ = command("checkpoints", "prune", "ck", "--keep", "2", "--dry-run", "--json")
    shown = json.loads(out)
    assert [(each["tag"], each["delete"], each["deleted"]) for each in shown] == [
        ("step4", False, False),
        ("step3", False, False),
        ("step2", True, False),
        ("step1", True, False),
    ]
    assert tags(save_dir) == ["step1", "step2", "step3", "step4"]
    code, out, _ = command("checkpoints", "prune", "ck", "--keep", "2")
    assert (code, out.count("deleted")) == (0, 2)
    assert "free again" in out
    assert tags(save_dir) == ["step3", "step4"]


def test_prune_counts_only_what_is_good(command: Command, save_dir: Path) -> None:
    (save_dir / "step3" / "mp_rank_00_model_states.pt").write_bytes(b"damaged")
    answer = json.loads(command("checkpoints", "prune", "ck", "--keep", "2", "--drop-bad", "--json")[1])
    assert {each["tag"]: each["deleted"] for each in answer} == {
        "step4": False,
        "step3": True,
        "step2": False,
        "step1": True,
    }


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prune", "ck/step1"], 64, "ck/step1: give the save_dir of save_checkpoint, which holds several"),
        (["prune", "nowhere"], 64, "nowhere: give the save_dir"),
        (["prune", "ck", "--keep", "0"], 64, "--keep"),
        (["convert", "ck"], 64, "--world-size"),
        (["convert", "ck", "--world-size", "0"], 64, "--world-size"),
        (
            ["convert", "ck", "--world-size", "3"],
            64,
            "--world-size 3: 3 ranks with micro-batch 2 cannot keep train_batch_size 8: with micro-batch 2 use",
        ),
        (["convert", "nowhere", "--world-size", "1"], 1, "nowhere: no checkpoint there"),
    ],
)
def test_bad_input_is_one_clear_line(
    command: Command, save_dir: Path, arguments: list[str], code: int, words: str
) -> None:
    found, _, err = command("checkpoints", *arguments)
    assert (found, err.count("\n")) == (code, 1)
    assert words in err
    assert tags(save_dir) == ["step1", "step2", "step3", "step4"]


def test_what_is_universal_is_not_converted_again(command: Command, here: Path) -> None:
    (here / "ck" / "step1-universal" / "zero").mkdir(parents=True)
    code, _, err = command("checkpoints", "convert", "ck/step1-universal", "--world-size", "1")
    assert (code, "any number of ranks can load already" in err) == (64, True)
