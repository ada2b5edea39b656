"""A real browser for pages under test: Debian's Chromium without a window, spoken to through its DevTools protocol.

The protocol goes over a pair of pipes, so neither a port nor a driver is needed. What the page asked of the network and
what the browser complained about is kept beside what it shows.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser", "chromium", "opened"]

_ANSWER_S = 60.0


def chromium() -> str:
    """The browser's command; installed from Debian's archive where it is missing, or the test is skipped."""
    found = shutil.which("chromium")
    if found is not None:
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("no chromium here, and apt-get needs root to install it")
    install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    answer = subprocess.run(install, env=environment, capture_output=True, text=True, timeout=240, check=False)
    if answer.returncode != 0:
        refresh = subprocess.run(["apt-get", "update"], capture_output=True, text=True, timeout=120, check=False)
        if refresh.returncode == 0:
            answer = subprocess.run(install, env=environment, capture_output=True, text=True, timeout=240, check=False)
    found = shutil.which("chromium")
    if answer.returncode != 0 or found is None:
        pytest.skip(f"no chromium here, and it cannot be installed: {answer.stderr.strip()[-200:]}")
    return found


class Browser:
    """One page in one browser process."""

    def __init__(self, command: str, home: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The shell puts them where the browser looks for them; high numbers cannot be overwritten on the way.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_browser, from_browser)]
        arguments = [
            *(command, "--headless=new", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={home}"),
            *("--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"),
            *("--disable-component-update", "--disable-sync", "--no-default-browser-check", "about:blank"),
        ]
        shell = ["bash", "-c", 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"', "bash", *map(str, ends), *arguments]
        self._log = (home.parent / "browser.log").open("wb")
        environment = {**os.environ, "HOME": str(home), "TZ": "UTC"}
        self._process = subprocess.Popen(
            shell, pass_fds=ends, stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        for fd in (to_browser, from_browser, *ends):
            os.close(fd)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def show(self, path: Path, *, width: int, height: int = 900, is_dark: bool = False, is_phone: bool = False) -> None:
        """Open a file at a size and in a colour scheme; when this returns it is loaded."""
        self.events.clear()
        scheme = "dark" if is_dark else "light"
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        self._call("Page.navigate", url=path.absolute().as_uri())
        self._wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(answer["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console and of the browser itself, since the page was opened."""
        found = []
        for event in self.events:
            name, said = event["method"], event["params"]
            if name == "Runtime.exceptionThrown":
                found.append(str(said["exceptionDetails"]))
            elif name == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
                found.append(str(said["args"]))
            elif name == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                found.append(said["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Every address that the page asked for, its own included."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent]

    def close(self) -> None:
        """End the browser and every process of it."""
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self._call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait(10)
        os.close(self._out)
        os.close(self._in)
        self._log.close()

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        request: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._out, json.dumps(request).encode() + b"\0")
        for message in self._messages():
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                answer: dict[str, Any] = message["result"]
                return answer
        raise AssertionError(f"the browser did not answer {method}")

    def _wait_for(self, event: str) -> None:
        if not any(each["method"] == event for each in self.events):
            next(message for message in self._messages() if message.get("method") == event)

    def _messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + _ANSWER_S
        while True:
            head, found, rest = self._buffer.partition(b"\0")
            if found:
                self._buffer = rest
                message = json.loads(head)
                if "method" in message:
                    self.events.append(message)
                yield message
                continue
            left = deadline - time.monotonic()
            has_more = select.select([self._in], [], [], max(left, 0.0))[0]
            assert has_more, "the browser says nothing"
            more = os.read(self._in, 1 << 16)
            assert more, f"the browser has ended, see {self._log.name}"
            self._buffer += more


@contextlib.contextmanager
def opened(command: str, directory: Path) -> Iterator[Browser]:
    """A browser that is ended when the test leaves."""
    home = directory / "browser"
    home.mkdir()
    browser = Browser(command, home)
    try:
        yield browser
    finally:
        browser.close()
