"""One picture of a run for `resilience top`: what was told, and how it is laid out in so many columns and lines.

Pure: asks nobody, reads no clock and no terminal. Whatever the size, the head comes first, then ranks, then decisions,
then events; what has no room is counted, never half shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from rich.console import RenderableType
from rich.layout import Layout
from rich.table import Table
from rich.text import Text

from resilience.cli.output import clock_time, duration, number, style_of
from resilience.events import Decision
from resilience.rpc.v1 import operator_pb2 as op

__all__ = ["Glance", "draw", "full_height"]

SMALLEST_SECTION = 3
"""Lines of a section that says anything: its title, and two more."""
_Column = tuple[str, Literal["left", "right"], Callable[[op.RankState], Text]]
"""Heading, side, and what stands there for a rank."""
_AT_WORK = frozenset({"training", "done"})


@dataclasses.dataclass(frozen=True, slots=True)
class Glance:
    """What a run told at one moment.

    Attributes:
        steps_per_s: by rank, measured over the last looks; empty where nothing was measured yet.
        silent_s: seconds since the coordinator answered; 0 when it did just now.
        is_live: False when a journal answered, because the coordinator has ended.
    """

    run: op.Run
    ranks: Sequence[op.RankState] = ()
    decisions: Sequence[Decision] = ()
    snapshots: Sequence[op.SnapshotState] = ()
    events: Sequence[op.Event] = ()
    steps_per_s: Mapping[int, float] = dataclasses.field(default_factory=dict)
    silent_s: float = 0.0
    is_live: bool = True


def draw(glance: Glance, width: int, height: int, *, footer: str = "") -> Layout:
    """The picture, `width` columns by `height` lines."""
    head = _cut([_flow(paragraph, width) for paragraph in _head(glance)], max(2, height // 3))
    room = height - len(head) - (1 if footer else 0)
    sections = _sections(glance, width)
    lines = _share(room, [wanted for wanted, _ in sections])
    parts = [Layout(_text(head), size=min(len(head), height))]
    for granted, (_, make) in zip(lines, sections, strict=True):
        if granted:
            parts.append(Layout(make(granted), size=granted))
    if room > sum(lines):
        parts.append(Layout(Text(" "), size=room - sum(lines)))
    if footer and height > len(head):
        parts.append(Layout(Text(footer, style="dim", no_wrap=True, overflow="ellipsis"), size=1))
    layout = Layout()
    layout.split_column(*parts)
    return layout


def full_height(glance: Glance, width: int) -> int:
    """Lines of a picture that leaves nothing out."""
    head = sum(len(_flow(paragraph, width)) for paragraph in _head(glance))
    # The head may have a third of the picture.
    return max(3 * head, head + sum(wanted for wanted, _ in _sections(glance, width)))


def _sections(glance: Glance, width: int) -> list[tuple[int, Callable[[int], RenderableType]]]:
    """(lines that would show all of it, what draws it in so many) by importance."""
    return [
        (2 + max(1, len(glance.ranks)), lambda lines: _ranks(glance, width, lines)),
        (1 + max(1, len(glance.decisions)), lambda lines: _decisions(glance.decisions, lines)),
        (1 + max(1, len(glance.events)), lambda lines: _events(glance.events, lines)),
    ]


def _share(room: int, wanted: Sequence[int]) -> list[int]:
    """Lines for each section: the least for each while there is room, then what each wants, in order."""
    granted = []
    for want in wanted:
        least = min(want, SMALLEST_SECTION)
        granted.append(least if room >= least else 0)
        room -= granted[-1]
    for index, want in enumerate(wanted):
        if granted[index]:
            # What follows keeps a third of the room, as long as it has something to say.
            waiting = sum(w - g for w, g in zip(wanted[index + 1 :], granted[index + 1 :], strict=True) if g)
            more = min(want - granted[index], max(room - min(waiting, room // 3), 0))
            granted[index] += more
            room -= more
    return granted


# ------ the head


def _head(glance: Glance) -> list[list[Text]]:
    """Paragraphs of pieces, each of which stays whole where it can."""
    run = glance.run
    code = f", exit code {run.exit_code}" if run.HasField("exit_code") else ""
    title = [
        Text(run.run_id, style="bold"),
        Text(run.state + code, style=style_of(run.state) or "bold"),
        Text(f"mode {run.mode}"),
        Text(f"generation {run.generation} of {run.world_size} ranks"),
        Text(f"{run.restarts_left} restarts left", style="red" if run.restarts_left == 0 else ""),
    ]
    progress = [Text(f"step {run.step:,}", style="bold"), Text(_rate(glance), style="bold")]
    if run.HasField("loss"):
        progress.append(Text(f"loss {number(run.loss, 5)}"))
    if run.HasField("tokens_per_s"):
        progress.append(Text(number(run.tokens_per_s, 4, "tokens/s")))
    progress += [
        Text(f"goodput {run.goodput_ratio:.1%} of {duration(run.now - run.started_at)}"),
        Text(f"verified through {run.last_verified_step:,}"),
        _snapshot(glance),
        Text(_counted(run.num_detections, "detection"), style="yellow" if run.num_detections else ""),
        Text(_counted(run.num_decisions, "decision")),
    ]
    paragraphs = [title, [piece for piece in progress if piece.plain]]
    if glance.silent_s:
        silent = f"the coordinator has been silent for {duration(glance.silent_s)}; this is what it said last"
        paragraphs.insert(0, [Text(silent, style="bold red")])
    elif not glance.is_live:
        paragraphs.insert(0, [Text("the coordinator has ended: this is what its journal holds", style="yellow")])
    return paragraphs


def _rate(glance: Glance) -> str:
    """Steps per second of the slowest rank, since all wait for it; from its last step where nothing was measured."""
    if glance.run.state != "training" or not glance.is_live:
        return ""
    if glance.steps_per_s:
        return f"{number(min(glance.steps_per_s.values()))} steps/s"
    slowest = max((rank.step_seconds for rank in glance.ranks if rank.HasField("step_seconds")), default=0.0)
    return f"{number(1 / slowest)} steps/s" if slowest else ""


def _snapshot(glance: Glance) -> Text:
    if not glance.is_live:
        return Text("")
    whole = [snapshot for snapshot in glance.snapshots if snapshot.complete] or list(glance.snapshots)
    if not whole:
        return Text("no snapshot yet")
    newest = max(whole, key=lambda snapshot: (snapshot.generation, snapshot.step))
    steps = max(0, glance.run.step - newest.step)
    age = duration(max(0.0, glance.run.now - newest.at))
    return Text(f"snapshot of step {newest.step:,} in {newest.tier}, {_counted(steps, 'step')} and {age} old")


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _flow(pieces: Iterable[Text], width: int) -> list[Text]:
    """Lines of pieces with dots between them, broken between pieces only."""
    lines: list[Text] = []
    line = Text()
    for piece in pieces:
        if line.plain and len(line) + 3 + len(piece) > width:
            lines.append(line)
            line = Text()
        line = Text.assemble(line, " · " if line.plain else "", piece)
    return [*lines, line]


def _cut(paragraphs: Sequence[Sequence[Text]], room: int) -> list[Text]:
    """At most `room` lines, of all paragraphs alike: their beginnings say most."""
    kept: list[Text] = []
    for index, lines in enumerate(paragraphs):
        kept += lines[: max(1, (room - len(kept)) // (len(paragraphs) - index))]
    return kept[:room]


# ------ ranks, decisions, events


def _ranks(glance: Glance, width: int, lines: int) -> RenderableType:
    table = _table(expand=False)
    columns: list[_Column] = [
        ("rank", "right", lambda rank: Text(str(rank.rank))),
        ("state", "left", lambda rank: Text(rank.state, style=_rank_style(rank))),
        ("step", "right", lambda rank: Text(f"{rank.step:,}")),
        ("steps/s", "right", lambda rank: Text(number(glance.steps_per_s.get(rank.rank)))),
        ("step took", "right", lambda rank: Text(_took(rank))),
        ("age", "right", lambda rank: Text(duration(rank.heartbeat_age_s))),
        ("node", "left", lambda rank: Text(rank.node)),
        ("device", "left", lambda rank: Text(rank.device)),
        ("loss", "right", lambda rank: Text(number(rank.loss, 4) if rank.HasField("loss") else "–")),
    ]
    if width < 80:
        columns = [column for column in columns if column[0] not in ("loss", "step took")]
    if width < 60:
        columns = [column for column in columns if column[0] not in ("device", "age")]
    for name, side, _ in columns:
        table.add_column(name, justify=side, no_wrap=True, overflow="ellipsis")
    shown, hidden = _chosen(glance, lines - 2)
    for rank in shown:
        table.add_row(*(cell(rank) for _, _, cell in columns))
    if not glance.ranks:
        return _titled("ranks", Text("no ranks yet", style="dim"))
    hint = f", {len(shown)} of {len(glance.ranks)}: first who is not at work, then who is behind" if hidden else ""
    return _titled(f"ranks{hint}", table)


def _took(rank: op.RankState) -> str:
    return duration(rank.step_seconds) if rank.HasField("step_seconds") else "–"


def _chosen(glance: Glance, room: int) -> tuple[list[op.RankState], int]:
    """The ranks that are shown, and how many are not; where not all can be, the unusual ones are."""
    ranks = list(glance.ranks)
    if len(ranks) <= room:
        return ranks, 0
    ranks.sort(key=lambda rank: (_rank_style(rank) != "red", rank.state in _AT_WORK, rank.step, rank.rank))
    return sorted(ranks[: max(room, 0)], key=lambda rank: rank.rank), len(ranks) - room


def _rank_style(rank: op.RankState) -> str:
    return "red" if rank.state.startswith("left with") else style_of(rank.state)


def _decisions(decisions: Sequence[Decision], lines: int) -> RenderableType:
    if not decisions:
        return _titled("decisions", Text("nothing was decided", style="dim"))
    table = _table(header=False)
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for decision in decisions[-(lines - 1) :][::-1]:
        words = (str(decision.action), str(decision.outcome))
        table.add_row(
            Text(decision.decision_id), *(Text(word, style=style_of(word)) for word in words), Text(decision.reason)
        )
    return _titled("decisions, newest first", table)


def _events(events: Sequence[op.Event], lines: int) -> RenderableType:
    table = _table(header=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for event in events[-(lines - 1) :][::-1]:
        table.add_row(Text(clock_time(event.at), style="dim"), Text(event.kind), Text(event.text))
    return _titled("events, newest first", table if events else Text("nothing has happened", style="dim"))


def _table(*, header: bool = True, expand: bool = True) -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=header, header_style="dim", expand=expand)


def _titled(title: str, content: RenderableType) -> RenderableType:
    whole = Table.grid(expand=True)
    whole.add_row(Text(f"── {title} ", style="cyan", no_wrap=True, overflow="ellipsis"))
    whole.add_row(content)
    return whole


def _text(lines: Sequence[Text]) -> RenderableType:
    whole = Table.grid(expand=True)
    whole.add_column(no_wrap=True, overflow="ellipsis")
    for line in lines:
        whole.add_row(line)
    return whole
