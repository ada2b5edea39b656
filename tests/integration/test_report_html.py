"""`resilience report --html` of a run that was struck three times, seen in a real browser: at a desk, on a phone, in
the dark. A folder named by SCREENSHOTS gets what was seen, for people to look at.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.browser import Browser, chromium, opened
from tests.integration.harness import launched, resilience, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

FAULTS = """
[[fault]]
step = 3
rank = 0
site = "attention.scores"
layer = 1
kind = "inf"

[[fault]]
step = 6
rank = 1
site = "gradient"
kind = "scale"
factor = 1e6

[[fault]]
step = 10
rank = 1
site = "process"
kind = "kill"
"""

BOXES = "[...document.querySelectorAll(%r)].map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])"
COUNTS = "[...document.querySelectorAll('#%s .row')].filter(r => r.querySelector('.row-name span').textContent == %r)\
.flatMap(r => [...r.querySelectorAll('.mark')].map(m => Number(m.dataset.count)))"

CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                          return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                        if (c[3] == 255) return c; } return [255, 255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
    if (!own || !e.getBoundingClientRect().width || e.closest('.band-label, .skip, title')) continue;
    const style = getComputedStyle(e), b = light(behind(e));
    const a = light(rgb(e.closest('svg') ? style.fill : style.color));
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.className.baseVal ?? e.className, e.textContent]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 3).concat([[found.length, '', '']]);
})()"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory of a run that was struck three times and finished, and its report."""
    chromium()  # who cannot look at the page need not train for it
    directory = tmp_path_factory.mktemp("struck")
    with launched(directory, faults=FAULTS) as struck:
        wait_for(lambda: any((struck.run_dir / "strikes").glob("*")), what="the first strike")
        endpoint = json.loads((struck.run_dir / "coordinator.json").read_text())
        address, token = endpoint["address"], endpoint["token_file"]
        words = ("--address", address, "--token-file", token, "--html", "asked.html")
        answers = [
            resilience("report", str(struck.run_dir), "--html", "live.html", cwd=directory, state=directory / "state"),
            resilience("report", *words, cwd=directory),
        ]
        assert [answer.returncode for answer in answers] == [0, 0], answers
        assert struck.wait() == 0, struck.output()[-4000:]
        report = struck.report()
        struck.assert_nothing_left()
    assert [d["action"] for d in report["decisions"]] == ["corrected", "replay", "continue", "restart"]
    return struck.run_dir, report


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened(chromium(), tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def page(run: tuple[Path, dict[str, Any]]) -> Path:
    directory = run[0].parent
    answer = resilience("report", str(run[0]), "--html", "run.html", cwd=directory, state=directory / "state")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("run.html: ")
    return directory / "run.html"


def keep(browser: Browser, name: str, tmp_path: Path) -> None:
    """Take a picture of the page; keep it where somebody wants to see it."""
    picture = tmp_path / f"{name}.png"
    browser.screenshot(picture)
    assert picture.stat().st_size > 10_000
    wanted = os.environ.get("SCREENSHOTS")
    if wanted:
        shutil.copy(picture, wanted)


def test_on_a_desk(browser: Browser, page: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    report = run[1]
    browser.show(page, width=1280)
    keep(browser, "desk", tmp_path)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]
    assert page.stat().st_size < 200_000
    assert browser.evaluate("document.querySelectorAll('.remark').length") == 0, "everything could be read"

    assert sum(browser.evaluate(COUNTS % ("timeline", "Injected"))) == len(report["faults_injected"]) == 3
    assert sum(browser.evaluate(COUNTS % ("timeline", "Alarms"))) == len(report["detections"]) == 3
    assert sum(browser.evaluate(COUNTS % ("timeline", "Decisions"))) == len(report["decisions"]) == 4
    # The three struck steps lie far apart, so the axis of steps shows each by itself.
    assert browser.evaluate(COUNTS % ("curves", "Alarms")) == [1, 1, 1]
    generations = browser.evaluate("document.querySelectorAll('#timeline .band.training').length")
    assert generations == report["num_generations"] == 2
    sticks = browser.evaluate("document.querySelector('#curves .sticks.usual').getAttribute('d').split('M').length - 1")
    assert sticks == report["num_steps"] == 12
    causes = [cause for cause, seconds in report["badput_s"].items() if seconds > 0]
    assert len(browser.evaluate(BOXES % "#badput .bar")) == len(causes) + 1

    for drawn in ("#timeline .mark path", "#timeline .band", "#timeline .line-progress", "#curves .sticks", ".bar"):
        boxes = browser.evaluate(BOXES % drawn)
        assert boxes, drawn
        assert all(width > 0 and height > 0 for width, height in boxes), (drawn, boxes)
    reasons = [decision["reason"] for decision in report["decisions"]]
    assert browser.evaluate("[...document.querySelectorAll('.decision p')].map(p => p.textContent)") == reasons
    assert browser.evaluate("document.querySelector('h1').textContent") == "Finished"


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_is_readable_everywhere(browser: Browser, page: Path, tmp_path: Path, width: int, is_dark: bool) -> None:
    browser.show(page, width=width, height=844, is_dark=is_dark, is_phone=width < 640)
    keep(browser, f"{'dark' if is_dark else 'light'}-{width}", tmp_path)
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    sizes = "[...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(n => n.nodeType == 3 &&\
 n.textContent.trim()) && !e.closest('title, .unseen, .skip')).map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(browser.evaluate(sizes)) >= 11
    *worst, (count, _, _) = browser.evaluate(CONTRAST)
    assert count > 100
    assert worst[0][0] >= 4.5, worst
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    channels = [int(each) for each in background.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (max(channels) < 40) if is_dark else (min(channels) > 220)


@pytest.mark.parametrize("name", ["live", "asked"])
def test_while_it_goes_on(browser: Browser, run: tuple[Path, dict[str, Any]], name: str) -> None:
    """From the journal that was being written, and from the coordinator itself."""
    browser.show(run[0].parent / f"{name}.html", width=1280)
    assert browser.complaints() == []
    assert browser.evaluate("document.querySelector('h1').textContent") == "Running"
    assert browser.evaluate("document.querySelector('.run-name').textContent").startswith(f"run {run[1]['run_id']}")


def test_from_the_report_alone(browser: Browser, page: Path, run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A run whose journal is gone is drawn as far as report.json goes, and says so."""
    left = tmp_path / "left"
    left.mkdir()
    shutil.copy(run[0] / "report.json", left)
    answer = resilience("report", str(left), "--html", "left.html", cwd=tmp_path, state=tmp_path)
    assert answer.returncode == 0, answer.stderr
    browser.show(tmp_path / "left.html", width=1280)
    assert browser.complaints() == []
    assert sum(browser.evaluate(COUNTS % ("timeline", "Alarms"))) == 3
    assert "report.json alone" in browser.evaluate("document.querySelector('.remark').textContent")
