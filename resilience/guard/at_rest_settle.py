"""What becomes of differences at rest: all ranks together find out whose they are, and rebuild what can be rebuilt.

Collective, and only entered when some rank has a difference. A tensor that changed on every rank that keeps it, without
a version counter moving, was changed by the script (`p.data.copy_(…)`): it is taken as it is. Else a weight is rebuilt
from the fp32 masters of the ranks that keep them, or from an undamaged copy; optimizer state from an undamaged copy
where there is one. What was rebuilt counts as mended only if its hash is again what it was. Never here: what is decided
about the rest.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from resilience.abft.finding import Finding
from resilience.deepspeed.shards import Held, Role
from resilience.events import Check, DetectionKind
from resilience.guard.at_rest import AtRest, Mark, integers, site_of
from resilience.guard.at_rest_schedule import Supply, cover
from resilience.guard.exchange import Exchange
from resilience.guard.wire import decode, encode

__all__ = ["give_up", "not_finite", "settle", "spoiled_gradients"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One difference of one rank, in elements of its parameter."""

    name: str
    parameter: str
    role: Role
    start: int
    stop: int
    dtype: str
    """As `str(torch.dtype)`."""
    of_replicas: bool
    """Copies on other ranks do not count then: it is not known since when they differ."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a rank knows about a claim."""

    unchanged: bool | None
    """Whether its own tensor of that name is what it was; None where it has none or did not compare."""
    offers: tuple[tuple[int, int, int, str], ...]
    """(first element, one past the last, priority, tensor) of what it can give."""


class _Result(enum.Enum):
    MENDED = "mended"
    DAMAGED = "damaged"
    INNOCENT = "innocent"
    EDITED = "edited"


def settle(at_rest: AtRest, exchange: Exchange, *, repair: bool, check: Check = Check.AT_REST) -> list[Finding]:
    """Settle the differences of all ranks; returns this rank's findings. Collective.

    Args:
        at_rest: with its differences, which are gone afterwards.
        exchange: to the other ranks.
        repair: whether anything may be written.
        check: which check found them.
    """
    marks = list(at_rest.differences)
    held = {item.name: item for item in at_rest.holdings()}
    own = encode([_claim(mark) for mark in marks])
    asked = [
        (rank, claim)
        for rank, content in enumerate(exchange.all_gather(own))
        for claim in decode(tuple[Claim, ...], content)
    ]
    mine = encode([_answer(at_rest, held.values(), claim) for _, claim in asked])
    answers = [decode(tuple[Answer, ...], content) for content in exchange.all_gather(mine)]
    waiting = iter(marks)
    results: list[tuple[Mark, _Result]] = []
    for number, (rank, claim) in enumerate(asked):
        told = [answer[number] for answer in answers]
        is_edit = not claim.of_replicas and (
            _is_the_scripts([answer.unchanged for answer in told])
            or (exchange.world_size == 1 and _has_no_equal(claim, held.values()))
        )
        plan = _plan(rank, claim, told) if repair and not is_edit else None
        content = _carry(plan, rank, held, claim, exchange) if plan is not None else None
        if rank == exchange.rank:
            mark = next(waiting)
            results.append((mark, _Result.EDITED if is_edit else _rebuild(mark, claim, content)))
    at_rest.was_edited |= any(result is _Result.EDITED for _, result in results)
    # What was mended is still compared at the end of the step; the rest is known by now.
    at_rest.drop([mark for mark, result in results if result is not _Result.MENDED])
    at_rest.differences.clear()
    return _findings(results, check, at_rest)


def give_up(at_rest: AtRest) -> list[Finding]:
    """Findings of differences that are not to be rebuilt: a replay of the step has met another one."""
    results = [(mark, _Result.DAMAGED) for mark in at_rest.differences]
    at_rest.drop(list(at_rest.differences))
    return _findings(results, Check.AT_REST, at_rest)


def not_finite(at_rest: AtRest, *, clean_step: int) -> list[Finding]:
    """The first tensor of this rank's state that an optimizer step changes and that is not finite; in a list, or none.

    Args:
        at_rest: with the state.
        clean_step: newest step whose snapshot is known to be finite.
    """
    for held in at_rest.holdings():
        # A frozen parameter may be a mask, infinite by intent.
        if held.is_frozen or bool(torch.isfinite(held.read()).all()):
            continue
        return [
            Finding(
                site=site_of(held.role),
                layer=held.index,
                check=Check.SCREEN,
                kind=DetectionKind.NAN if bool(torch.isnan(held.read()).any()) else DetectionKind.INF,
                residual_ratio=math.inf,
                param=held.name,
                detected_at=at_rest.now(),
                clean_step=clean_step,
            )
        ]
    return []


def spoiled_gradients(findings: Iterable[Finding]) -> list[Finding]:
    """Where a weight changed while it was in use, what was computed from it is an alarm of its own: it is run again."""
    first = next((finding for finding in findings if finding.site == "weight" and finding.mended), None)
    if first is None:
        return []
    alarm = dataclasses.replace(first, site="gradient", layer=-1, mended=False, bit_exact=False, param=None)
    return [dataclasses.replace(alarm, clean_step=None)]


def _claim(mark: Mark) -> Claim:
    held = mark.held
    return Claim(
        name=held.name,
        parameter=held.parameter,
        role=held.role,
        start=held.offset + mark.start,
        stop=held.offset + mark.stop,
        dtype=str(held.read().dtype),
        of_replicas=mark.of_replicas,
    )


def _answer(at_rest: AtRest, held: Iterable[Held], claim: Claim) -> Answer:
    """What this rank can say and give."""
    offers = []
    for item in held:
        priority = _priority(at_rest, item, claim)
        low, high = max(claim.start, item.offset), min(claim.stop, item.offset + item.length)
        if priority is not None and low < high:
            offers.append((low, high, priority, item.name))
    return Answer(unchanged=at_rest.is_unchanged(claim.name), offers=tuple(offers))


def _priority(at_rest: AtRest, item: Held, claim: Claim) -> int | None:
    """How well a tensor serves to rebuild the claimed one: masters, then copies; None where it does not."""
    if item.parameter != claim.parameter or at_rest.is_unchanged(item.name) is False:
        return None
    if claim.role is Role.WEIGHT and item.role is Role.MASTER:
        return 0
    if claim.of_replicas or str(item.read().dtype) != claim.dtype:
        return None
    if claim.role is Role.WEIGHT:
        return 1 if item.role is Role.WEIGHT else None
    return 1 if item.name == claim.name and item.replicated else None


def _is_the_scripts(unchanged: Sequence[bool | None]) -> bool:
    """Hardware does not change the same tensor on all ranks that keep it at once."""
    return sum(value is False for value in unchanged) > 1 and not any(unchanged)


def _has_no_equal(claim: Claim, held: Iterable[Held]) -> bool:
    """Whether a weight exists once, without a master: on one rank nothing tells an upset from the script's own write,
    and clipping weights through `.data` is common.
    """
    masters = {item.parameter for item in held if item.role is Role.MASTER}
    return claim.role is Role.WEIGHT and claim.parameter not in masters


def _plan(claimant: int, claim: Claim, answers: Sequence[Answer]) -> list[Supply] | None:
    """Who gives what, the same on all ranks; the claimant itself is asked first."""
    order = sorted(range(len(answers)), key=lambda rank: rank != claimant)
    offers = [Supply(rank, *offer) for rank in order for offer in answers[rank].offers]
    return cover(claim.start, claim.stop, offers)


def _carry(
    plan: Sequence[Supply], claimant: int, held: Mapping[str, Held], claim: Claim, exchange: Exchange
) -> bytes | None:
    """Bring the parts together; the whole on the claimant, None elsewhere."""
    parts = []
    for part in plan:
        content = _give(part, held[part.source], claim) if part.rank == exchange.rank else b""
        parts.append(content if part.rank == claimant else exchange.broadcast(content, source=part.rank))
    return b"".join(parts) if exchange.rank == claimant else None


def _give(part: Supply, item: Held, claim: Claim) -> bytes:
    """The bytes of a part in the claimed dtype: rounded from a master exactly as the optimizer does."""
    elements = item.read().data[part.start - item.offset : part.stop - item.offset]
    return elements.to(_dtype(claim.dtype)).cpu().view(torch.uint8).numpy().tobytes()


def _rebuild(mark: Mark, claim: Claim, content: bytes | None) -> _Result:
    """Write what came; if the hash is not what it was, put back what was there."""
    if content is None:
        return _Result.INNOCENT if mark.is_suspected else _Result.DAMAGED
    elements = mark.elements()
    before = elements.clone()
    fresh = torch.frombuffer(bytearray(content), dtype=_dtype(claim.dtype)).to(elements.device)
    elements.copy_(fresh)
    if mark.hash is None:
        # Nobody knows which rank is right but the masters.
        same = torch.equal(before.view(torch.uint8), fresh.view(torch.uint8))
        return _Result.INNOCENT if same else _Result.MENDED
    now, then = integers([mark.hash_now(), mark.hash])
    if now != then:
        elements.copy_(before)
    return _Result.MENDED if now == then else _Result.DAMAGED


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _findings(results: Sequence[tuple[Mark, _Result]], check: Check, at_rest: AtRest) -> list[Finding]:
    """One finding for each tensor that was hit."""
    hit: dict[str, tuple[Mark, bool, int | None]] = {}
    for mark, result in results:
        if result in (_Result.MENDED, _Result.DAMAGED):
            _, so_far, clean = hit.get(mark.held.name, (mark, True, mark.clean_step))
            clean = None if clean is None or mark.clean_step is None else min(clean, mark.clean_step)
            hit[mark.held.name] = (mark, so_far and result is _Result.MENDED, clean)
    return [
        Finding(
            site=site_of(mark.held.role),
            layer=mark.held.index,
            check=check,
            kind=DetectionKind.MISMATCH,
            residual_ratio=math.inf,
            mended=mended,
            bit_exact=mended,
            param=name,
            detected_at=at_rest.detected_at,
            latency_ms=at_rest.milliseconds_since_detection(),
            clean_step=clean,
        )
        for name, (mark, mended, clean) in hit.items()
    ]
