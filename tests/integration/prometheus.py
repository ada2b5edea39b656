"""A real Prometheus with the configuration of deploy/prometheus, asked over HTTP. It knows nothing of runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.integration.harness import free_port, wait_for

__all__ = ["DEPLOY", "Prometheus", "prometheus"]

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
Samples = dict[frozenset[tuple[str, str]], float]


class Prometheus:
    """One that listens on `port`."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.at: float | None = None
        """The time that samples are asked for, in Unix seconds; none: now."""

    def get(self, path: str, **parameters: str | float) -> Any:
        """The `data` of an answer of the HTTP API.

        Raises:
            AssertionError: Prometheus refuses the request; its words are told.
        """
        words = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{words}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    def samples(self, query: str) -> Samples:
        """Labels -> value, at `at`. A scalar has no labels."""
        found = self.get("query", query=query, **({} if self.at is None else {"time": self.at}))
        if found["resultType"] == "scalar":
            return {frozenset(): float(found["result"][1])}
        return {frozenset(series["metric"].items()): float(series["value"][1]) for series in found["result"]}

    def value(self, query: str) -> float:
        """The one sample of `query`."""
        (value,) = self.samples(query).values()
        return value


@contextlib.contextmanager
def prometheus(program: str, directory: Path, *, target: str) -> Iterator[Prometheus]:
    """Serve from `directory` with the committed rules, scraping `target` every second."""
    shutil.copytree(DEPLOY, directory / "configuration")
    path = directory / "configuration" / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    config["global"].update(scrape_interval="1s", scrape_timeout="1s", evaluation_interval="1s")
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    words = [f"--config.file={path}", f"--storage.tsdb.path={directory / 'data'}"]
    words += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([program, *words], stderr=log, cwd=directory)
    try:
        found = Prometheus(port)
        wait_for(lambda: found.is_ready() or process.poll() is not None, what="Prometheus", timeout_s=30)
        assert process.poll() is None, (directory / "prometheus.log").read_text()
        yield found
    finally:
        process.terminate()
        process.wait(20)
