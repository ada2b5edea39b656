"""What a fault plan may say, and the one line that answers everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilience.errors import FaultPlanError
from resilience.faults.plan import KINDS_BY_SITE, Fault, FaultPlan, load_plan

GOOD = 'step = 12\nsite = "attention.scores"\nkind = "inf"\n'


def write(tmp_path: Path, *faults: str, head: str = "") -> Path:
    path = tmp_path / "faults.toml"
    path.write_text(head + "".join(f"[[fault]]\n{fault}\n" for fault in faults), encoding="utf-8")
    return path


def test_defaults_and_every_key(tmp_path: Path) -> None:
    full = (
        'step = 33\nrank = 1\nmicro_step = 1\nsite = "gradient"\nlayer = 2\ncall = 1\nkind = "multibit"\n'
        'repeat = -1\nindex = 7\ncount = 3\nparam = "blocks.0.w"\nbits = [3, 30]\n'
    )
    plan = load_plan(write(tmp_path, GOOD, full, head="seed = 5\n"), world_size=2, num_steps=80)
    first, second = plan.fault
    assert plan.seed == 5
    assert (first.rank, first.micro_step, first.layer, first.repeat, first.call) == (0, 0, 0, 1, None)
    assert (second.bits, second.param, second.count, second.call) == ((3, 30), "blocks.0.w", 3, 1)


def test_an_empty_plan_is_a_plan(tmp_path: Path) -> None:
    assert load_plan(write(tmp_path)).fault == ()


def test_faults_are_told_apart_by_rank_and_target() -> None:
    plan = FaultPlan.model_validate(
        {
            "fault": [
                {"step": 1, "site": "process", "kind": "kill", "rank": 1},
                {"step": 1, "site": "linear.out", "kind": "nan", "rank": 1},
                {"step": 1, "site": "linear.out", "kind": "nan"},
            ]
        }
    )
    assert [i for i, _ in plan.for_rank(1, tensor=True)] == [1]
    assert [i for i, _ in plan.for_rank(1, tensor=False)] == [0]
    assert [i for i, _ in plan.for_rank(0, tensor=True)] == [2]


@pytest.mark.parametrize("site", sorted(KINDS_BY_SITE))
def test_every_kind_of_every_site_is_accepted(site: str) -> None:
    parameters = {"bitflip": {"bit": 3}, "multibit": {"bits": [1, 2]}, "scale": {"factor": 2.0}}
    for kind in KINDS_BY_SITE[site]:
        fault = Fault.model_validate({"step": 1, "site": site, "kind": kind, **parameters.get(kind, {})})
        assert fault.strikes_tensor == (site not in ("process", "coordinator"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "stepp = 3\n", "fault 1: unknown key 'stepp'; did you mean 'step'?"),
        (GOOD.replace("scores", "scoers"), "unknown site 'attention.scoers'; did you mean 'attention.scores'?"),
        (GOOD.replace("attention.scores", "storage"), "site 'storage' is not available yet; available: attention.q, "),
        (
            GOOD.replace("attention.scores", "weight") + "micro_step = 1\n",
            "micro_step has no meaning for site 'weight', which is struck after the step",
        ),
        (GOOD.replace("attention.scores", "node"), "site 'node' is not available yet"),
        (GOOD.replace("inf", "bitfip"), "unknown kind 'bitfip'; did you mean 'bitflip'?"),
        (GOOD.replace("inf", "kill"), "kind 'kill' is not for site 'attention.scores'; valid: inf, nan"),
        (GOOD.replace("attention.scores", "process"), "kind 'inf' is not for site 'process'"),
        (GOOD.replace("inf", "bitflip"), "kind 'bitflip' needs bit"),
        (GOOD.replace("inf", "bitflip") + "bit = 64\n", "bit = 64: "),
        (GOOD + "bit = 3\n", "bit = 3 has no meaning for kind 'inf'; it is for 'bitflip'"),
        (GOOD.replace("inf", "multibit") + "bits = [3, 3]\n", "names a bit twice"),
        (GOOD.replace("inf", "multibit") + "bits = []\n", "bits = []: "),
        (GOOD.replace("inf", "scale"), "kind 'scale' needs factor"),
        (GOOD.replace("inf", "scale") + "factor = inf\n", "factor = inf: "),
        (GOOD.replace("inf", "stride") + "count = 1\n", "count = 1 leaves nothing to exchange"),
        (GOOD + "repeat = 0\n", "repeat = 0 never strikes"),
        (GOOD + "repeat = -2\n", "repeat = -2: "),
        (GOOD + 'param = "w"\n', "param = 'w' has no meaning for site 'attention.scores'"),
        ('step = 1\nsite = "process"\nkind = "kill"\nindex = 3\n', "index has no meaning for site 'process'"),
        (GOOD + "rank = 2\n", "fault 1: rank = 2, but ranks are 0 to 1"),
        (GOOD + "rank = -1\n", "rank = -1: "),
        (GOOD.replace("12", "81"), "fault 1: step = 81, but the run has 80 steps"),
        (GOOD.replace("12", "0"), "step = 0: "),
        (GOOD.replace("step = 12\n", ""), "fault 1: 'step' is missing"),
        (GOOD.replace("12", '"twelve"'), "step = 'twelve': "),
        ("step = = 1\n", "not TOML: "),
    ],
)
def test_what_is_wrong_is_one_clear_line(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(FaultPlanError) as caught:
        load_plan(path, world_size=2, num_steps=80)
    line = str(caught.value)
    assert words in line
    assert line.startswith(f"{path}: ")
    assert "\n" not in line


def test_the_faulty_one_of_several_is_named(tmp_path: Path) -> None:
    with pytest.raises(FaultPlanError, match="fault 2: unknown key 'kinds'; did you mean 'kind'"):
        load_plan(write(tmp_path, GOOD, GOOD + "kinds = 1\n"))


@pytest.mark.parametrize(
    ("content", "words"),
    [("seeds = 1\n", "unknown key 'seeds'; did you mean 'seed'?"), ("fault = 3\n", "fault = 3: ")],
)
def test_wrong_top_level(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(FaultPlanError) as caught:
        load_plan(write(tmp_path, head=content))
    assert words in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FaultPlanError, match=r"cannot be read \(No such file or directory\)"):
        load_plan(tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(FaultPlanError, match="not UTF-8"):
        load_plan(binary)


def test_the_demo_plan_is_valid() -> None:
    path = Path(__file__).parents[3] / "scripts" / "demo_gpt" / "faults.toml"
    plan = load_plan(path, world_size=2, num_steps=80)
    assert [(f.step, f.site, f.kind) for f in plan.fault] == [
        (12, "attention.scores", "inf"),
        (33, "gradient", "scale"),
        (55, "process", "kill"),
    ]
