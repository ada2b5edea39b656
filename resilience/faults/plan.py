"""The fault plan: which fault strikes where, when and how often. TOML in, frozen values out.

Here: the fields, the table of sites with their kinds, and one clear line for each thing that can be wrong with a plan.
Never here: torch, or anything that strikes; the launcher checks a plan before it starts a process.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic
from pydantic import Field

from resilience.errors import FaultPlanError

__all__ = [
    "KINDS_BY_SITE",
    "PROCESS_SITES",
    "STATE_SITES",
    "TENSOR_KINDS",
    "TENSOR_SITES",
    "Fault",
    "FaultPlan",
    "load_plan",
]

TENSOR_KINDS = ("inf", "nan", "near_inf", "zero", "bitflip", "multibit", "stride", "scale")
"""What can happen to a tensor; `Fault.kind` says what each does."""

TENSOR_SITES = (
    *(f"attention.{name}" for name in ("q", "k", "v", "scores", "probs", "context", "out")),
    *(f"attention.{name}" for name in ("dq", "dk", "dv", "dp", "ds")),
    *(f"linear.{name}" for name in ("out", "dgrad", "wgrad")),
    "gradient",
    "weight",
    "optimizer",
)

KINDS_BY_SITE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(TENSOR_SITES, TENSOR_KINDS),
    "process": ("kill", "stop", "exit"),
    "coordinator": ("kill", "stop"),
}
"""Every site that can be struck, with the kinds that make sense there."""

PROCESS_SITES = ("process", "coordinator")

STATE_SITES = ("weight", "optimizer")
"""What is kept between the steps: struck at rest, after the optimizer step of step s and the hashes that follow it."""

_SITES_TO_COME = ("node", "storage")

_PARAMETER_OF_KIND = {"bit": "bitflip", "bits": "multibit", "factor": "scale", "exit_code": "exit"}
"""Which kind each of these keys belongs to; `exit_code` alone has a default."""

_Bit = Annotated[int, Field(ge=0, le=63)]
_Index = Annotated[int, Field(ge=0)]


class Fault(pydantic.BaseModel):
    """One `[[fault]]`: an address, what happens there, and how often."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    step: Annotated[int, Field(ge=1)]
    """Optimizer step, from 1: step s is the one that takes `global_steps` from s − 1 to s."""
    rank: _Index = 0
    """Rank that is struck; for `coordinator`, the rank that strikes it."""
    micro_step: _Index = 0
    """Micro-batch of the step, from 0."""
    site: str
    """What is struck: a key of `KINDS_BY_SITE`."""
    layer: _Index = 0
    """Which call of that site in the forward order; for `gradient`, `weight` and `optimizer`, which parameter in the
    order of the module's `named_parameters`, unless `param` names it."""
    call: _Index | None = None
    """Only this execution of the operation within the micro-step and attempt: 0 is the first, later ones are
    repetitions by a check or recomputations by activation checkpointing; unset: any."""
    kind: str
    """For tensors: `inf`; `nan`; `near_inf` (0.9 × the dtype's maximum); `zero`; `bitflip` (`bit`); `multibit`
    (`bits`); `stride` (elements 32 apart, one warp's width, hold each other's values, cyclically); `scale` (`factor`).
    For `process`: `kill` (SIGKILL), `stop` (SIGSTOP), `exit` (`exit_code`). For `coordinator`: `kill`, `stop`."""
    repeat: Annotated[int, Field(ge=-1)] = 1
    """How many times it strikes when the operation is run again: 1 is transient, −1 persistent."""
    index: _Index | None = None
    """First element that is struck, counted in row-major order; unset: drawn from the plan's seed, the same one at
    every strike."""
    count: Annotated[int, Field(ge=1)] | None = None
    """How many elements are struck; default 1 (`stride`: up to 8; `gradient`: all, unless `index` is given)."""
    param: str | None = None
    """Name of the parameter; for `gradient`, `weight` and `optimizer` only. For `weight` it is the part that the rank
    computes with or holds; for `optimizer` the fp32 master on this rank (the first moment where there is none), or what
    is named in full: `exp_avg of <parameter>`."""
    bit: _Bit | None = None
    """Bit that flips, from 0 (the lowest of the mantissa); must exist in the tensor's dtype."""
    bits: Annotated[tuple[_Bit, ...], Field(min_length=1)] | None = None
    """Bits that flip together."""
    factor: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """What the elements are multiplied with."""
    exit_code: Annotated[int, Field(ge=1, le=255)] | None = None
    """What the process ends with; default 1."""

    @pydantic.model_validator(mode="after")
    def _makes_sense(self) -> Self:
        self._check_site_and_kind()
        self._check_parameters()
        if self.repeat == 0:
            raise ValueError("repeat = 0 never strikes; use 1 for transient, -1 for persistent, or drop the fault")
        if self.param is not None and self.site not in ("gradient", *STATE_SITES):
            raise ValueError(f"param = {self.param!r} has no meaning for site {self.site!r}; it is for 'gradient'")
        if self.micro_step and self.site in STATE_SITES:
            raise ValueError(
                f"micro_step has no meaning for site {self.site!r}, which is struck after the step; drop it"
            )
        elementwise = [key for key in ("index", "count") if getattr(self, key) is not None]
        if elementwise and not self.strikes_tensor:
            raise ValueError(f"{elementwise[0]} has no meaning for site {self.site!r}; drop it")
        if self.kind == "stride" and self.count == 1:
            raise ValueError("count = 1 leaves nothing to exchange; kind 'stride' needs 2 or more")
        return self

    def _check_site_and_kind(self) -> None:
        if self.site in _SITES_TO_COME:
            raise ValueError(f"site {self.site!r} is not available yet; available: {', '.join(KINDS_BY_SITE)}")
        kinds = KINDS_BY_SITE.get(self.site)
        if kinds is None:
            raise ValueError(f"unknown site {self.site!r}; {_nearest(self.site, KINDS_BY_SITE)}")
        if self.kind not in kinds:
            known = any(self.kind in other for other in KINDS_BY_SITE.values())
            what = f"kind {self.kind!r} is not for site {self.site!r}" if known else f"unknown kind {self.kind!r}"
            raise ValueError(f"{what}; {_nearest(self.kind, kinds)}")

    def _check_parameters(self) -> None:
        for key, kind in _PARAMETER_OF_KIND.items():
            value = getattr(self, key)
            if value is not None and self.kind != kind:
                raise ValueError(f"{key} = {value!r} has no meaning for kind {self.kind!r}; it is for {kind!r}")
            if value is None and self.kind == kind and key != "exit_code":
                raise ValueError(f"kind {kind!r} needs {key}")
        if self.bits is not None and len(set(self.bits)) < len(self.bits):
            raise ValueError(f"bits = {list(self.bits)} names a bit twice, which flips it back")

    @property
    def strikes_tensor(self) -> bool:
        """Whether a tensor is struck rather than a process."""
        return self.site not in PROCESS_SITES


class FaultPlan(pydantic.BaseModel):
    """All faults of a run, in the order of the file; a fault's place in it is part of its strikes' identity."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    """What elements are drawn from where a fault names none."""
    fault: tuple[Fault, ...] = ()
    """The faults: the `[[fault]]` tables."""

    def for_rank(self, rank: int, *, tensor: bool) -> list[tuple[int, Fault]]:
        """The (index in the plan, fault) pairs of `rank` that strike tensors, or those that strike processes."""
        return [(i, f) for i, f in enumerate(self.fault) if f.rank == rank and f.strikes_tensor == tensor]


def load_plan(path: Path, *, world_size: int | None = None, num_steps: int | None = None) -> FaultPlan:
    """Read and check a plan.

    Args:
        path: the TOML file.
        world_size: ranks of the run, where known; a fault on a rank beyond it is refused.
        num_steps: optimizer steps of the run, where known; a fault at a later step is refused.

    Raises:
        FaultPlanError: one line that names the file, the fault, the key and the fix.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FaultPlanError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError:
        raise FaultPlanError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise FaultPlanError(f"{path}: not TOML: {error}") from None
    try:
        plan = FaultPlan.model_validate(content)
    except pydantic.ValidationError as error:
        raise FaultPlanError(f"{path}: {_explain(error)}") from None
    for number, fault in enumerate(plan.fault, start=1):
        if world_size is not None and fault.rank >= world_size:
            raise FaultPlanError(f"{path}: fault {number}: rank = {fault.rank}, but ranks are 0 to {world_size - 1}")
        if num_steps is not None and fault.step > num_steps:
            raise FaultPlanError(f"{path}: fault {number}: step = {fault.step}, but the run has {num_steps} steps")
    return plan


def _explain(error: pydantic.ValidationError) -> str:
    """The first complaint, as one line with the fault's number, the key, the value and the fix."""
    first = error.errors()[0]
    match first["loc"]:
        case ("fault", int(place), *rest):
            prefix, key = f"fault {place + 1}: ", str(rest[0]) if rest else ""
        case location:
            prefix, key = "", str(location[0]) if location else ""
    if first["type"] == "extra_forbidden":
        valid = Fault.model_fields if prefix else FaultPlan.model_fields
        return f"{prefix}unknown key {key!r}; {_nearest(key, valid)}"
    if first["type"] == "missing":
        return f"{prefix}{key!r} is missing"
    if first["type"] == "value_error":
        return prefix + first["msg"].removeprefix("Value error, ")
    message: str = first["msg"]
    where = f"{key} = {_short(first['input'])}: " if key else ""
    return f"{prefix}{where}{message[:1].lower()}{message[1:]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest(name: str, valid: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
