"""Verified checkpoints around a real DeepSpeed engine, on real ranks that are killed and disks that lie."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import free_port, wait_for

pytestmark = pytest.mark.integration

WORKER = Path(__file__).parent / "workers" / "checkpoint_rank.py"
MODEL = "mp_rank_00_model_states.pt"
TAGS = ("global_step2", "global_step4")

Ranks = Callable[..., list[dict[str, Any]]]


def start(directory: Path, *, world_size: int = 2, **settings: Any) -> list[subprocess.Popen[bytes]]:
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"stage": 2, "dtype": "bf16", "steps": 0, "result": str(directory / "result-{rank}.json")} | settings
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = []
    for rank in range(world_size):
        with (directory / f"rank-{rank}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER), json.dumps(settings)],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    for rank in ranks:
        rank.port = environment["MASTER_PORT"]  # type: ignore[attr-defined]
    return ranks


def end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs, and remove DeepSpeed's buffers of these ranks."""
    for rank in ranks:
        rank.kill()
        rank.wait()
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{ranks[0].port}_*"):  # type: ignore[attr-defined]
        path.unlink(missing_ok=True)


@pytest.fixture
def run(tmp_path: Path) -> Ranks:
    """Run the ranks of one job to their end; what each of them reports."""

    def run(*, world_size: int = 2, **settings: Any) -> list[dict[str, Any]]:
        directory = tmp_path / f"job-{len(list(tmp_path.iterdir()))}"
        return run_in(directory, world_size=world_size, **settings)

    return run


def run_in(directory: Path, *, world_size: int = 2, **settings: Any) -> list[dict[str, Any]]:
    ranks = start(directory, world_size=world_size, **settings)
    try:
        for rank, process in enumerate(ranks):
            code = process.wait(timeout=120)
            assert code == 0, (directory / f"rank-{rank}.log").read_text()
        return [json.loads((directory / f"result-{rank}.json").read_text()) for rank in range(world_size)]
    finally:
        end(ranks)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save_dir with good checkpoints of steps 2 and 4. Copied by those who change it."""
    directory = tmp_path_factory.mktemp("two")
    save_dir = directory / "ck"
    results = run_in(directory / "job", save_dir=str(save_dir), steps=4, saves=[2, 4])
    assert [fact["tag"] for fact in results[0]["facts"]] == ["global_step2", "global_step4"]
    assert [fact["kind"] for fact in results[0]["facts"]] == ["published", "published"]
    assert results[1]["facts"] == []
    return save_dir


@pytest.fixture(scope="module")
def plain_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save_dir that DeepSpeed wrote without us."""
    directory = tmp_path_factory.mktemp("plain")
    run_in(directory / "job", save_dir=str(directory / "ck"), steps=2, saves=[2], verify=False)
    assert not (directory / "ck" / "global_step2" / "resilience").exists()
    return directory / "ck"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_a_run_that_loads_goes_on_bit_for_bit(run: Ranks, tmp_path: Path, stage: int, dtype: str) -> None:
    common: dict[str, Any] = {"stage": stage, "dtype": dtype, "save_dir": str(tmp_path / "ck"), "steps": 6}
    straight = run(**common, saves=[4])
    resumed = run(**common, loads=[{"dir": common["save_dir"]}])
    for before, after in zip(straight, resumed, strict=True):
        assert after["loaded_step"] == 4
        assert after["losses"] == before["losses"][8:]
        assert after["digest"] == before["digest"]
    (fact,) = resumed[0]["facts"]
    assert (fact["kind"], fact["tag"], fact["step"], fact["generation"]) == ("loaded", "global_step4", 4, 1)


def test_loads_choose_what_can_be_trusted(run: Ranks, tmp_path: Path, two_saved: Path, plain_saved: Path) -> None:
    """Many save_dirs in one job: starting ranks is what takes the time."""
    places = {
        name: tmp_path / name for name in ("corrupt", "no_latest", "all_bad", "by_tag", "stray", "torn", "torn_latest")
    }
    for place in places.values():
        shutil.copytree(two_saved, place)
    flip(places["corrupt"] / "global_step4" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    (places["no_latest"] / "latest").unlink()
    flip(places["all_bad"] / "global_step2" / MODEL)
    (places["all_bad"] / "global_step4" / MODEL).unlink()
    flip(places["by_tag"] / "global_step2" / "resilience" / "random-rank-00001.json")
    (places["stray"] / "global_step4" / "mp_rank_01_model_states.pt").write_bytes(b"stray")
    for folder in (places[name] / tag / "resilience" for name in ("torn", "torn_latest") for tag in TAGS):
        marker = {"run_id": "run", "generation": 1, "step": 2, "started_at": 1.0}
        (folder / "saving.json").write_text(json.dumps(marker))
        (folder / "manifest.json").unlink()
    (places["torn"] / "latest").unlink()
    shutil.copytree(plain_saved, tmp_path / "plain")
    shutil.copytree(plain_saved, tmp_path / "plain_bad")
    flip(tmp_path / "plain_bad" / "global_step2" / MODEL)

    wanted = [
        {"dir": str(places["corrupt"])},
        {"dir": str(places["no_latest"])},
        {"dir": str(places["all_bad"])},
        {"dir": str(places["by_tag"]), "tag": "global_step2"},
        {"dir": str(places["stray"])},
        {"dir": str(places["torn"])},
        {"dir": str(places["torn_latest"])},
        {"dir": str(tmp_path / "plain")},
        {"dir": str(tmp_path / "plain_bad")},
        {"dir": str(tmp_path / "nothing")},
    ]
    results = run(save_dir=str(tmp_path / "unused"), loads=wanted)
    for mine, others in zip(results[0]["loads"], results[1]["loads"], strict=True):
        assert {**mine, "facts": []} == {**others, "facts": []}  # all ranks agree; rank 0 reports
    corrupt, no_latest, all_bad, by_tag, stray, torn, torn_latest, plain, plain_bad, nothing = results[0]["loads"]

    assert corrupt["step"] == 2
    assert [(fact["kind"], fact["tag"]) for fact in corrupt["facts"]] == [
        ("refused", "global_step4"),
        ("loaded", "global_step2"),
    ]
    assert "another checksum" in corrupt["facts"][0]["reason"]
    assert no_latest["step"] == 4
    assert all_bad["error"].startswith(
        f"CheckpointError: {places['all_bad']}: no checkpoint can be trusted (global_step4"
    )
    assert f"global_step4: {MODEL} is missing" in all_bad["error"]
    assert "global_step2: " in all_bad["error"]
    assert by_tag["error"].startswith("CheckpointError")  # nothing is older than the tag that was asked for
    assert stray["step"] == 2
    assert torn["path"] is None
    assert torn_latest["error"].startswith("CheckpointError")
    assert plain["step"] == 2
    assert "CRC" in plain_bad["error"]
    assert nothing["path"] is None

    (job,) = tmp_path.glob("job-*")
    said = (job / "rank-0.log").read_text()
    assert f"resilience: {places['corrupt']}: checkpoint global_step4 refused: " in said
    assert f"resilience: {places['corrupt']}: falls back to checkpoint global_step2" in said
    assert "has no manifest; its files are whole" in said


def test_a_rank_killed_in_mid_save_tears_nothing_that_is_loaded(run: Ranks, tmp_path: Path, two_saved: Path) -> None:
    save_dir = tmp_path / "ck"
    shutil.copytree(two_saved, save_dir)
    common: dict[str, Any] = {"save_dir": str(save_dir), "loads": [{"dir": str(save_dir)}]}
    ranks = start(tmp_path / "killed", **common, steps=6, saves=[6], kill_at=6, victim=1)
    try:
        wait_for(lambda: ranks[1].poll() is not None, what="the victim's death")
        assert ranks[1].returncode == -9
    finally:
        end(ranks)
    assert (save_dir / "latest").read_text() == "global_step4"
    torn = save_dir / "global_step6" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert torn.read_bytes() == b"PK torn"

    resumed = run(**common, steps=6, saves=[6], generation=2)
    assert [(fact["kind"], fact["tag"]) for fact in resumed[0]["facts"]] == [
        ("refused", "global_step6"),
        ("loaded", "global_step4"),
        ("published", "global_step6"),
    ]
    assert "never finished" in resumed[0]["facts"][0]["reason"]
    assert (save_dir / "latest").read_text() == "global_step6"


def test_an_older_generation_publishes_nothing(run: Ranks, tmp_path: Path) -> None:
    common: dict[str, Any] = {"save_dir": str(tmp_path / "ck"), "saves": [1]}
    run(**common, steps=1, generation=3)
    manifest = (tmp_path / "ck" / "global_step1" / "resilience" / "manifest.json").read_bytes()
    model = (tmp_path / "ck" / "global_step1" / MODEL).read_bytes()
    for result in run(**common, steps=1, generation=2):
        assert result["error"].startswith("FencedError")
        assert "published by generation 3" in result["error"]
    assert (tmp_path / "ck" / "global_step1" / "resilience" / "manifest.json").read_bytes() == manifest
    assert (tmp_path / "ck" / "global_step1" / MODEL).read_bytes() == model


def test_a_full_disk_on_one_rank_fails_all_and_publishes_nothing(run: Ranks, tmp_path: Path, two_saved: Path) -> None:
    save_dir = tmp_path / "ck"
    shutil.copytree(two_saved, save_dir)
    loads = [{"dir": str(save_dir)}]
    results = run(save_dir=str(save_dir), loads=loads, steps=6, saves=[6], full_at=6, victim=1)
    for result in results:
        assert result["error"].startswith("CheckpointError")
        assert "failed on rank 1: OSError: [Errno 28] No space left on device" in result["error"]
    assert (save_dir / "latest").read_text() == "global_step4"
    assert not (save_dir / "global_step6" / "resilience" / "manifest.json").exists()


def test_another_number_of_ranks_is_one_clear_line(run: Ranks, tmp_path: Path, two_saved: Path) -> None:
    (result,) = run(world_size=1, save_dir=str(tmp_path / "unused"), loads=[{"dir": str(two_saved)}])
    (load,) = result["loads"]
    assert "was saved by 2 ranks and this run has 1" in load["error"]
    assert "\n" not in load["error"]


def test_each_node_s_own_storage_is_hashed_there(run: Ranks, tmp_path: Path) -> None:
    common: dict[str, Any] = {"save_dir": str(tmp_path / "ck"), "node_local": True}
    run(**common, steps=1, saves=[1])
    manifest = json.loads((tmp_path / "ck" / "global_step1" / "resilience" / "manifest.json").read_text())
    assert all(entry["node"] for entry in manifest["files"].values())
    results = run(**common, loads=[{"dir": common["save_dir"]}])
    assert results[0]["loads"][0]["step"] == 1


def test_shadow_mode_says_what_it_would_refuse_and_loads_it(run: Ranks, tmp_path: Path, two_saved: Path) -> None:
    save_dir = tmp_path / "ck"
    shutil.copytree(two_saved, save_dir)
    flip(save_dir / "global_step4" / "resilience" / "random-rank-00001.json")
    results = run(save_dir=str(save_dir), mode="shadow", loads=[{"dir": str(save_dir)}])
    (load,) = results[0]["loads"]
    assert load["step"] == 4
    assert [(fact["kind"], fact["tag"]) for fact in load["facts"]] == [("refused", "global_step4")]
