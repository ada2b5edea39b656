"""Verified checkpoints around a real DeepSpeed engine, on real ranks that are killed and disks that lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.checkpoint.doubt import doubt
from resilience.checkpoint.verify import inspect
from resilience.context import NODE_VARIABLE
from tests.integration.harness import free_port, wait_for

pytestmark = pytest.mark.integration

WORKER = Path(__file__).parent / "workers" / "checkpoint_rank.py"
MODEL = "mp_rank_00_model_states.pt"
TAGS = ("global_step2", "global_step4")

Ranks = Callable[..., list[dict[str, Any]]]


class Job:
    """The ranks of one job."""

    def __init__(self, directory: Path, *, world_size: int = 2, **settings: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        defaults = {"stage": 2, "dtype": "bf16", "steps": 0, "result": str(directory / "result-<rank>.json")}
        self.ranks = [self._start(rank, world_size, defaults | settings) for rank in range(world_size)]

    def _start(self, rank: int, world_size: int, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": "1" if settings.get("node_local") else str(world_size),
            "RANK": str(rank),
            "LOCAL_RANK": "0" if settings.get("node_local") else str(rank),
            NODE_VARIABLE: f"node-{rank}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }
        command = [sys.executable, str(WORKER), json.dumps(settings)]
        with (self.directory / f"rank-{rank}.log").open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def results(self) -> list[dict[str, Any]]:
        """What each rank reports at its end."""
        for rank, process in enumerate(self.ranks):
            assert process.wait(timeout=120) == 0, self.log(rank)
        paths = [self.directory / f"result-{rank}.json" for rank in range(len(self.ranks))]
        return [json.loads(path.read_text()) for path in paths]

    def log(self, rank: int) -> str:
        return (self.directory / f"rank-{rank}.log").read_text()

    def end(self) -> None:
        """End what still runs, and remove DeepSpeed's buffers of these ranks."""
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{self.port}_*"):
            path.unlink(missing_ok=True)


@pytest.fixture
def run(tmp_path: Path) -> Ranks:
    """Run the ranks of one job to their end; what each of them reports."""

    def run(**settings: Any) -> list[dict[str, Any]]:
        return run_in(tmp_path / f"job-{len(list(tmp_path.iterdir()))}", **settings)

    return run


def run_in(directory: Path, **settings: Any) -> list[dict[str, Any]]:
    job = Job(directory, **settings)
    try:
        return job.results()
    finally:
        job.end()


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
        assert not after["loads"][0]["random_kept"]
    (fact,) = resumed[0]["facts"]
    assert (fact["kind"], fact["tag"], fact["step"], fact["generation"]) == ("loaded", "global_step4", 4, 1)


@dataclasses.dataclass
class Chosen:
    """What load_checkpoint chose in each of many save_dirs, and what was said meanwhile."""

    loads: dict[str, dict[str, Any]]
    log: str

    def facts(self, name: str) -> list[tuple[str, str]]:
        return [(fact["kind"], fact["tag"]) for fact in self.loads[name]["facts"]]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, two_saved: Path, plain_saved: Path) -> Iterator[Chosen]:
    """Many loads in one job: starting ranks is what takes the time."""
    root = tmp_path_factory.mktemp("chosen")
    places = {
        name: root / name for name in ("corrupt", "no_latest", "all_bad", "by_tag", "stray", "torn", "named", "doubted")
    }
    for place in places.values():
        shutil.copytree(two_saved, place)
    flip(places["corrupt"] / "global_step4" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    (places["no_latest"] / "latest").unlink()
    doubt(places["doubted"] / "global_step4", "damage to the state was found in step 6")
    flip(places["all_bad"] / "global_step2" / MODEL)
    (places["all_bad"] / "global_step4" / MODEL).unlink()
    flip(places["by_tag"] / "global_step4" / "resilience" / "random-rank-00001.json")
    (places["stray"] / "global_step4" / "mp_rank_01_model_states.pt").write_bytes(b"stray")
    for folder in (places[name] / tag / "resilience" for name in ("torn", "named") for tag in TAGS):
        marker = {"run_id": "run", "generation": 1, "step": 2, "started_at": 1.0}
        (folder / "saving.json").write_text(json.dumps(marker))
        (folder / "manifest.json").unlink()
    (places["torn"] / "latest").unlink()
    for name in ("plain", "plain_bad"):
        places[name] = root / name
        shutil.copytree(plain_saved, places[name])
    flip(places["plain_bad"] / "global_step2" / MODEL)
    places["nothing"] = root / "nothing"
    tags = {"by_tag": "global_step4"}
    wanted = [{"dir": str(place), "tag": tags.get(name)} for name, place in places.items()]
    job = Job(root / "job", save_dir=str(root / "unused"), loads=wanted, run_id="another")
    try:
        first, second = job.results()
        for mine, others in zip(first["loads"], second["loads"], strict=True):
            assert {**mine, "facts": []} == {**others, "facts": []}  # all ranks agree; rank 0 reports
        yield Chosen(dict(zip(places, first["loads"], strict=True)), job.log(0))
    finally:
        job.end()


def test_a_flipped_bit_in_the_newest_falls_back_and_is_told(chosen: Chosen) -> None:
    assert chosen.loads["corrupt"]["step"] == 2
    assert chosen.facts("corrupt") == [("refused", "global_step4"), ("loaded", "global_step2")]
    assert "another checksum" in chosen.loads["corrupt"]["facts"][0]["reason"]
    assert "corrupt: checkpoint global_step4 refused: bf16_zero_pp_rank_1" in chosen.log
    assert "corrupt: falls back to checkpoint global_step2" in chosen.log


def test_what_may_hold_damage_that_was_found_later_is_not_loaded(chosen: Chosen) -> None:
    assert chosen.facts("doubted") == [("refused", "global_step4"), ("loaded", "global_step2")]
    assert chosen.loads["doubted"]["facts"][0]["reason"] == "damage to the state was found in step 6"


def test_a_missing_latest_is_no_obstacle(chosen: Chosen) -> None:
    assert chosen.facts("no_latest") == [("loaded", "global_step4")]


def test_what_another_run_saved_leaves_the_generators_alone_as_deepspeed_does(chosen: Chosen) -> None:
    assert all(load["random_kept"] for load in chosen.loads.values())


def test_when_none_is_good_each_is_named(chosen: Chosen) -> None:
    error = chosen.loads["all_bad"]["error"]
    assert error.startswith("CheckpointError: ")
    assert f"no checkpoint can be trusted (global_step4: {MODEL} is missing; global_step2: {MODEL} has another" in error


def test_a_bad_tag_falls_back_to_an_older_one(chosen: Chosen) -> None:
    assert chosen.facts("by_tag") == [("refused", "global_step4"), ("loaded", "global_step2")]


def test_a_stray_shard_is_not_loaded(chosen: Chosen) -> None:
    assert chosen.facts("stray") == [("refused", "global_step4"), ("loaded", "global_step2")]


def test_saves_that_never_ended_count_as_none_unless_latest_names_them(chosen: Chosen) -> None:
    assert chosen.loads["torn"]["path"] is None
    assert chosen.loads["named"]["error"].startswith("CheckpointError")


def test_nothing_at_all_is_left_to_deepspeed(chosen: Chosen) -> None:
    assert chosen.loads["nothing"]["path"] is None
    assert chosen.facts("nothing") == []


def test_what_stock_deepspeed_saved_is_loaded_with_a_warning_if_it_is_whole(chosen: Chosen) -> None:
    assert chosen.loads["plain"]["step"] == 2
    assert "has no manifest; its files are whole" in chosen.log
    assert "has another CRC" in chosen.loads["plain_bad"]["error"]


def test_a_rank_killed_in_mid_save_tears_nothing_that_is_loaded(run: Ranks, tmp_path: Path, two_saved: Path) -> None:
    save_dir = tmp_path / "ck"
    shutil.copytree(two_saved, save_dir)
    common: dict[str, Any] = {"save_dir": str(save_dir), "loads": [{"dir": str(save_dir)}]}
    job = Job(tmp_path / "killed", **common, steps=6, saves=[6], kill_at=6, victim=1)
    try:
        wait_for(lambda: job.ranks[1].poll() is not None, what="the victim's death")
        assert job.ranks[1].returncode == -9
    finally:
        job.end()
    assert (save_dir / "latest").read_text() == "global_step4"
    torn = save_dir / "global_step6" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert torn.read_bytes() == b"PK torn"

    late = [{"dir": str(save_dir), "tag": tag} for tag in ("global_step4", "global_step6")]
    resumed = run(**common, steps=6, saves=[6], generation=2, late_loads=late)
    # Neither load resumes the run: before the first it had trained, and what the second loads was saved since it began.
    assert [(each["step"], each["random_kept"]) for each in resumed[0]["late_loads"]] == [(4, True), (6, True)]
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
    for result in run(**common, steps=1, generation=2, clock_is_behind_s=3600):
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


def test_a_pipeline_s_plain_checkpoint_has_as_many_shards_as_data_parallel_ranks(run: Ranks, tmp_path: Path) -> None:
    place = str(tmp_path / "ck")
    results = run(stage=1, pipeline=True, save_dir=place, stock_save=place, loads=[{"dir": place}])
    for result in results:
        assert result["loads"][0]["path"] is not None
    assert [fact["kind"] for fact in results[0]["facts"]] == ["loaded"]


def test_each_node_s_own_storage_is_hashed_there(run: Ranks, tmp_path: Path) -> None:
    common: dict[str, Any] = {"save_dir": str(tmp_path / "node-<rank>" / "ck"), "node_local": True}
    run(**common, steps=2, saves=[1, 2])
    for node in ("node-0", "node-1"):
        assert (tmp_path / node / "ck" / "latest").read_text() == "global_step2"
        manifest = json.loads((tmp_path / node / "ck" / "global_step2" / "resilience" / "manifest.json").read_text())
        assert {entry["node"] for entry in manifest["files"].values()} == {"node-0", "node-1"}
        assert all(each.good for each in inspect(tmp_path / node / "ck", read_files=True, node="by another name"))
        shutil.copytree(tmp_path / node / "ck", tmp_path / node / "mixed")
    other = tmp_path / "node-1" / "mixed"
    shutil.rmtree(other / "global_step2")
    shutil.copytree(other / "global_step1", other / "global_step2")  # good in itself, but of another save
    mixed = str(tmp_path / "node-<rank>" / "mixed")
    good, refused = run(**common, loads=[{"dir": common["save_dir"]}, {"dir": mixed}])[0]["loads"]
    assert good["step"] == 2
    assert [(fact["kind"], fact["tag"]) for fact in refused["facts"]] == [
        ("refused", "global_step2"),
        ("loaded", "global_step1"),
    ]
    assert "different saves" in refused["facts"][0]["reason"]


def test_storage_that_is_not_shared_is_one_clear_line_on_all_ranks(run: Ranks, tmp_path: Path) -> None:
    for result in run(save_dir=str(tmp_path / "node-<rank>"), steps=1, saves=[1]):
        assert "rank 0 does not see" in result["error"]
        assert "save to storage that all nodes share" in result["error"]


def test_the_weights_alone_come_from_the_checkpoint_that_was_verified(run: Ranks, tmp_path: Path) -> None:
    save_dir = tmp_path / "ck"
    run(stage=3, save_dir=str(save_dir), steps=2, saves=[1, 2])
    (save_dir / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    wanted = {"dir": str(save_dir), "options": {"load_optimizer_states": False}}
    for result in run(stage=3, save_dir=str(save_dir), loads=[wanted]):
        assert result["loads"][0]["step"] == 1  # `latest` names the other, and there DeepSpeed would look


def test_a_script_s_own_files_beside_ours_may_change(run: Ranks, tmp_path: Path, two_saved: Path) -> None:
    tag_dir = tmp_path / "ck" / "global_step2"
    shutil.copytree(two_saved / "global_step2", tag_dir)
    own = [tag_dir / name for name in ("trainer.pt", "notes.txt", f"global_step2/{MODEL}")]
    own[-1].parent.mkdir()
    for path in own:
        path.write_text("first")
    run(save_dir=str(tmp_path / "ck"), steps=2, saves=[2])  # the same tag again
    assert MODEL in json.loads((tag_dir / "resilience" / "manifest.json").read_text())["files"]
    for path in own:
        path.write_text("second, longer")
    (inspection,) = inspect(tag_dir, read_files=True)
    assert inspection.good


def test_shadow_mode_says_what_it_would_refuse_and_loads_it(run: Ranks, tmp_path: Path, two_saved: Path) -> None:
    save_dir = tmp_path / "ck"
    shutil.copytree(two_saved, save_dir)
    flip(save_dir / "global_step4" / "resilience" / "random-rank-00001.json")
    results = run(save_dir=str(save_dir), mode="shadow", loads=[{"dir": str(save_dir)}])
    (load,) = results[0]["loads"]
    assert load["step"] == 4
    assert [(fact["kind"], fact["tag"]) for fact in load["facts"]] == [("refused", "global_step4")]


def digest_of(path: Path) -> str:
    """As `resilience digest` computes it, in a process of its own: DeepSpeed is not imported into the tests."""
    program = "import sys; from resilience.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "digest", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return line


def test_equal_weights_have_equal_digests_whoever_saved_them(two_saved: Path, plain_saved: Path) -> None:
    of_latest = digest_of(two_saved)
    assert of_latest == digest_of(two_saved / "global_step4")
    assert of_latest != digest_of(two_saved / "global_step2")
    assert digest_of(plain_saved) == digest_of(two_saved / "global_step2")


def test_the_digest_is_what_the_reference_says(tmp_path: Path) -> None:
    tag_dir = tmp_path / "global_step1"
    tag_dir.mkdir()
    weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T  # not contiguous
    module = {"tied": weight, "b": weight, "a.num": torch.tensor(7)}
    master = [torch.tensor([0.5, 0.25])]
    torch.save({"module": module, "optimizer": {"fp32_groups": [master]}}, tag_dir / MODEL)
    expected = hashlib.sha256()
    values = weight.float().contiguous().numpy().tobytes()
    for header, content in (
        ('["a.num","int64",[]]', struct.pack("<q", 7)),
        ('["b","float32",[3,2]]', values),
        ('["optimizer.fp32_groups.0.0","float32",[2]]', struct.pack("<2f", 0.5, 0.25)),
        ('["tied","float32",[3,2]]', values),
    ):
        expected.update(header.encode() + b"\n" + content)
    assert digest_of(tag_dir) == expected.hexdigest()
