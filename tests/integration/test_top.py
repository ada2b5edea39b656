"""`resilience top` on a terminal: driven by keys in tmux, looked at as a person sees it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from resilience.rpc.codec import to_proto
from resilience.testing import detection
from tests.integration.debian import command_of
from tests.integration.harness import wait_for
from tests.integration.served import COMMAND, Served, serve

pytestmark = pytest.mark.integration

TOP = shlex.join([*COMMAND, "top", "--interval", "0.3"])
WAIT_S = 40.0


@dataclasses.dataclass
class Terminal:
    """A terminal of tmux, with a shell in it, on a server of its own."""

    tmux: list[str]

    def __call__(self, *words: str) -> str:
        return subprocess.run([*self.tmux, *words], check=True, capture_output=True, text=True, timeout=20).stdout

    def type(self, line: str) -> None:
        self("send-keys", "-l", line)
        self("send-keys", "Enter")

    def screen(self) -> str:
        return self("capture-pane", "-p")

    def shows(self, *patterns: str) -> str:
        """The screen, as soon as it matches all of `patterns`."""
        return self.becomes(lambda screen: all(re.search(p, screen, re.M) for p in patterns), str(patterns))

    def becomes(self, condition: Callable[[str], bool], what: str) -> str:
        seen = [""]

        def look() -> bool:
            seen[0] = self.screen()
            return condition(seen[0])

        try:
            wait_for(look, what=what, timeout_s=WAIT_S)
        except AssertionError:
            raise AssertionError(f"the screen never matched {what}:\n{seen[0]}") from None
        return seen[0]

    def resize(self, columns: int, lines: int) -> None:
        self("resize-window", "-x", str(columns), "-y", str(lines))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with serve(tmp_path) as found:
        yield found


@pytest.fixture
def terminal(served: Served) -> Iterator[Terminal]:
    tmux = [command_of("tmux", "tmux"), "-S", str(served.directory / "tmux"), "-f", os.devnull]
    # An exported size is that of the start: top must not believe it.
    shell = [
        "env",
        "-u",
        "NO_COLOR",
        "COLUMNS=100",
        "LINES=24",
        "LC_ALL=C.UTF-8",
        "TERM=screen-256color",
        "bash",
        "--norc",
    ]
    found = Terminal([*tmux, "-u"])
    found("new-session", "-d", "-x", "100", "-y", "24", shlex.join(shell))
    try:
        yield found
    finally:
        found("kill-server")


def _is_usual(terminal: Terminal) -> None:
    """The terminal is as the shell wants it: keys are echoed and come by lines, the cursor is there."""
    terminal.type("clear; stty -a | grep -oE '[-]?(echo|icanon)\\b' | sort | xargs echo and")
    assert re.search(r"^and echo icanon$", terminal.shows("^and"), re.M), terminal.screen()
    assert terminal("display-message", "-p", "#{cursor_flag} #{alternate_on}").split() == ["1", "0"]


def test_top_shows_a_run_as_it_goes_and_gives_the_terminal_back(served: Served, terminal: Terminal) -> None:
    with served.training():
        terminal.type(f"{TOP}; echo it ended with $?")
        terminal.shows(
            r"^r1 · training · mode enforce · generation 1 of 2 ranks",
            r"^ +0 +training +\d+ .* a +device-0",
            r"^ +1 +training +\d+ .* a +device-1",
            r"^nothing was decided",
            r"generation 1 begins on 2 ranks",
        )
        assert terminal.screen().splitlines()[-1].strip() == "q quits"
        first = _step(terminal.shows(r"\d steps/s"))
        terminal.becomes(lambda screen: _step(screen) > first, "a later step")

        alarm = to_proto(dataclasses.replace(detection(step=5), device="device-0"))
        served.report(detections=[alarm])
        served.decide(5, alarm)
        terminal.shows(r"^g1-s5-a0 +replay +succeeded +checksum alarm", r"1 detection · 1 decision")

        for columns, lines in ((40, 10), (16, 3), (90, 40)):
            terminal.resize(columns, lines)
            terminal.becomes(
                lambda screen, columns=columns, lines=lines: (
                    screen.startswith("r1 · training"[: columns - 1])
                    and screen.rstrip().count("\n") == lines - 1
                    and screen.rstrip().endswith("q quits")
                ),
                f"a picture of {columns} by {lines}",
            )
        terminal("send-keys", "x")  # no key of ours
        terminal("send-keys", "q")
        assert "q quits" not in terminal.shows("it ended with 0")
    _is_usual(terminal)


def test_top_stays_when_the_coordinator_is_silent_and_when_it_has_ended(served: Served, terminal: Terminal) -> None:
    terminal.type(f"{TOP}; echo it ended with $?")
    terminal.shows(r"^r1 · training")
    coordinator = psutil.Process(served.process.pid)
    coordinator.suspend()
    shown = terminal.shows(r"^the coordinator has been silent for")
    assert re.search(r"^r1 · training", shown, re.M), "what it said last stays"
    coordinator.resume()
    terminal.becomes(
        lambda screen: "silent" not in screen and "r1 · training" in screen, "the coordinator that is back"
    )

    served.finish(75)
    served.end()
    terminal.shows(r"^the coordinator has ended", r"^r1 · failed, exit code 75")
    _top_of(terminal).terminate()
    terminal.shows("it ended with 143")
    _is_usual(terminal)


def test_q_is_heard_while_nobody_answers(served: Served, terminal: Terminal) -> None:
    terminal.type(f"{TOP}; echo it ended with $?")
    terminal.shows(r"^r1 · training")
    psutil.Process(served.process.pid).suspend()
    before = terminal.screen()
    terminal("send-keys", "q")
    terminal.shows("it ended with 0")
    assert "silent" not in before, "nothing had timed out when q was pressed"


def test_ctrl_c_gives_the_terminal_back(served: Served, terminal: Terminal) -> None:
    terminal.type(f"{TOP}; echo it ended with $?")
    terminal.shows(r"^r1 · training")
    terminal("send-keys", "C-c")
    assert "Traceback" not in terminal.shows("it ended with 130")
    _is_usual(terminal)


def test_colours_are_for_terminals_that_want_them(served: Served, terminal: Terminal) -> None:
    number = itertools.count()

    def looked(command: str) -> str:
        # What the command before has left is on the screen until the shell has read this one.
        end = f"number {next(number)} ended with"
        terminal.type(f"clear; {command}; echo {end} $?")
        terminal.shows(f"^{end} 0")
        return terminal("capture-pane", "-p", "-e")

    ranks, status = (shlex.join([*COMMAND, verb]) for verb in ("ranks", "status"))
    assert re.search(r"\x1b\[32m(\x1b\[49m)?training\x1b", looked(status)), "green, and no more than the word"
    assert "\x1b[1m" in looked(ranks), "headings are bold"
    for plain in (f"NO_COLOR=1 {status}", f"{status} | cat", f"NO_COLOR=1 {shlex.join([*COMMAND, 'events'])}"):
        assert not re.search(r"\x1b\[3[0-8]m", looked(plain)), plain


def _step(screen: str) -> int:
    found = re.search(r"^step ([\d,]+)", screen, re.M)
    return int(found[1].replace(",", "")) if found else 0


def _top_of(terminal: Terminal) -> psutil.Process:
    shell = psutil.Process(int(terminal("display-message", "-p", "#{pane_pid}")))
    return next(process for process in shell.children(recursive=True) if "top" in process.cmdline())
