"""After a load nothing of the engine lies in a file of the arena, whatever DeepSpeed and the optimizer did with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.deepspeed import powers, snapshot_load
from resilience.deepspeed.snapshot_load import _load_mapped
from resilience.errors import SnapshotError
from resilience.snapshot.archive import Archive, picture
from resilience.snapshot.manifest import Commit, Manifest, Part

STATE = {"weight": torch.arange(8.0), "exp_avg": torch.full((8,), 0.5)}


class Optimizer:
    """As torch's optimizers do, it takes over what it loads."""

    def __init__(self, state: dict[Any, dict[str, Any]]) -> None:
        self.state = state


class Engine:
    """Loads one file; weights are copied, moments are not, and what else is kept is up to the test."""

    def __init__(self, path: Path, moments: dict[str, Any]) -> None:
        self.path = path
        self.weight = torch.zeros(8)
        self.optimizer = Optimizer({self.weight: moments})
        self.checkpoint_engine: Any = object()
        self.kept: list[torch.Tensor] = []
        self.keep: Callable[[dict[str, Any]], list[torch.Tensor]] = lambda state: []
        self.num_loads = 0

    def load(self) -> None:
        self.num_loads += 1
        state = self.checkpoint_engine.load(str(self.path), map_location="cpu")
        self.weight.copy_(state["weight"])
        self.optimizer.state[self.weight] = {"exp_avg": state["exp_avg"], "step": 3}
        self.kept = self.keep(state)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(snapshot_load, "gather", lambda value, device: [value])
    archive = Archive(tmp_path / "file.pt", picture(STATE))
    archive.fill(picture(STATE))
    archive.close()
    return archive.path


def overwrite(path: Path) -> None:
    """As the next snapshot in the same slot does."""
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


def assert_loaded(engine: Engine) -> None:
    assert torch.equal(engine.weight, STATE["weight"])
    assert torch.equal(engine.optimizer.state[engine.weight]["exp_avg"], STATE["exp_avg"])
    assert engine.optimizer.state[engine.weight]["step"] == 3


def test_moments_come_back_to_where_they_were(path: Path) -> None:
    moment = torch.zeros(8)
    engine = Engine(path, {"exp_avg": moment, "step": 0})
    before = engine.checkpoint_engine
    _load_mapped(engine, torch.device("cpu"), engine.load)
    overwrite(path)
    assert_loaded(engine)
    assert engine.optimizer.state[engine.weight]["exp_avg"] is moment
    assert engine.num_loads == 1
    assert engine.checkpoint_engine is before


def test_an_optimizer_without_state_gets_memory_of_its_own(path: Path) -> None:
    engine = Engine(path, {})
    _load_mapped(engine, torch.device("cpu"), engine.load)
    overwrite(path)
    assert_loaded(engine)
    assert engine.num_loads == 1


def test_where_anything_still_lies_in_the_file_all_is_loaded_again_without_it(path: Path) -> None:
    engine = Engine(path, {"exp_avg": torch.zeros(8)})
    engine.keep = lambda state: [state["weight"]]
    _load_mapped(engine, torch.device("cpu"), engine.load)
    assert engine.num_loads == 2
    overwrite(path)
    assert_loaded(engine)
    assert torch.equal(engine.kept[0], STATE["weight"])


class Bare:
    """An engine of which only the load is asked for."""

    device = torch.device("cpu")
    checkpoint_engine: Any = object()
    optimizer = Optimizer({})


def a_commit(rank: int) -> Commit:
    return Commit(
        run_id="run", generation=1, step=7, rank=rank, world_size=2, slot=0, sequence=1, at=1.0, clean_through=0,
        blocked_s=0.0, random={}, counters={"global_steps": 7, powers.NAME: 0}, trail_bytes=0, files=(),
    )  # fmt: skip


def load_on_rank_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load_checkpoint: Callable[..., Any], *, elsewhere: str = ""
) -> None:
    """What rank 0 of two sees; `elsewhere` is what rank 1 says of its load."""
    said: list[Any] = []

    def gather(value: Any, device: torch.device) -> list[Any]:
        said.append(value)
        return [value, elsewhere if len(said) == 3 else False if isinstance(value, bool) else ""]

    monkeypatch.setattr(snapshot_load, "gather", gather)
    monkeypatch.setattr(snapshot_load, "compare", lambda engine, parts, rank: "compared")
    manifest = Manifest(
        run_id="run", generation=1, step=7, world_size=2, node="n", at=1.0, clean_through=0,
        parts=tuple(Part(commit=a_commit(rank), trail="") for rank in range(2)),
    )  # fmt: skip
    snapshot_load.load(Bare(), tmp_path, manifest, rank=0, load_checkpoint=load_checkpoint)


def misfit(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("module.head.weight")


@pytest.mark.parametrize(
    ("load_checkpoint", "elsewhere", "words"),
    [
        (lambda *args, **kwargs: (None, {}), "", "step 7: rank 0: DeepSpeed found nothing to load"),
        (misfit, "", r"does not fit the engine \(KeyError: 'module.head.weight'\)"),
        (lambda *args, **kwargs: ("here", {}), "rank 1: found nothing", "rank 1: found nothing"),
        (lambda *args, **kwargs: ("here", {}), "", "compared"),
    ],
    ids=["nothing found", "another model", "another rank fails", "a difference"],
)
def test_where_one_rank_cannot_load_all_say_so_before_they_compare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load_checkpoint: Callable[..., Any], elsewhere: str, words: str
) -> None:
    with pytest.raises(SnapshotError, match=words):
        load_on_rank_0(monkeypatch, tmp_path, load_checkpoint, elsewhere=elsewhere)
