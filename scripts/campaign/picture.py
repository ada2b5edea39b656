"""The campaign as a picture: detection by kind and site, by relative error, and what unseen faults do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

__all__ = ["draw"]

NAMED = ("nan", "inf", "-inf", "near_inf", "stride", "scale", "zero", "multibit")
SITES = (
    "linear.out", "linear.dgrad", "linear.wgrad", "attention.q", "attention.k", "attention.v", "attention.out",
    "attention.scores", "attention.context", "attention.dp", "attention.dv", "attention.dq", "attention.dk",
    "attention.probs", "attention.ds", "attention.context (fused)", "attention.dv (fused)", "attention.dk (fused)",
    "attention.dq (fused)",
)  # fmt: skip
COLOURS = {"product": "#1b6ca8", "softmax": "#d17b0f", "fused attention": "#7a3b8f"}


def draw(result: dict[str, Any], file: Path) -> None:
    """Write a PNG (or whatever the name of `file` asks for)."""
    matplotlib.use("Agg")
    figure = pyplot.figure(figsize=(17, 17), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=[1.15, 1.15, 0.8])
    for place, dtype in enumerate(("float32", "bfloat16")):
        _heat_map(figure.add_subplot(grid[place, :]), result, dtype)
    _curve(figure.add_subplot(grid[2, 0]), result)
    _outcomes(figure.add_subplot(grid[2, 1]), result)
    figure.suptitle(
        f"{result['num_trials']:,} faults, one a trial, in steps of GPT-2 and Llama; "
        f"{result['false_positives']['alarms']} false alarms in {result['false_positives']['checks']:,} clean checks",
        fontsize=15,
    )
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def _heat_map(axes: Axes, result: dict[str, Any], dtype: str) -> None:
    found = {(cell["site"], cell["kind"]): cell for cell in result["cells"] if cell["dtype"] == dtype}
    sites = [site for site in SITES if any(key[0] == site for key in found)]
    bits = sorted((int(kind[4:]) for _, kind in found if kind.startswith("bit ")), reverse=True)
    columns = [*NAMED, *(f"bit {bit}" for bit in dict.fromkeys(bits))]
    shares = np.full((len(sites), len(columns)), np.nan)
    for row, site in enumerate(sites):
        for column, kind in enumerate(columns):
            cell = found.get((site, kind))
            if cell and cell["trials"]:
                shares[row, column] = 100.0 * cell["detected"] / cell["trials"]
                if column < len(NAMED):
                    dark = shares[row, column] < 35
                    text, colour = f"{shares[row, column]:.0f}", "white" if dark else "black"
                    axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=100, cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(sites)), sites, fontsize=9)
    axes.axvline(len(NAMED) - 0.5, color="white", linewidth=2)
    trials = sum(cell["trials"] for cell in found.values())
    axes.set_title(f"{dtype}: detected, % of faults that changed a bit ({trials:,} trials)")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _curve(axes: Axes, result: dict[str, Any]) -> None:
    for dtype, line in (("float32", "-"), ("bfloat16", "--")):
        for check, colour in COLOURS.items():
            rows = [row for row in result["curve"] if row["dtype"] == dtype and row["check"] == check]
            rows = [row for row in rows if row["trials"] >= 5]
            middles = [math.sqrt(max(row["from"], 1e-8) * (row["to"] or 1e3)) for row in rows]
            shares = [100.0 * row["detected"] / row["trials"] for row in rows]
            axes.plot(middles, shares, line, marker="o", color=colour, label=f"{check}, {dtype}")
    axes.set_xscale("log")
    axes.set_xlabel("relative change of the result, max|ΔY| ÷ rms(Y); the last point holds all above 100")
    axes.set_ylabel("detected, %")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)


def _outcomes(axes: Axes, result: dict[str, Any]) -> None:
    for row in result["outcome_points"]:
        x, y = row["relative_change"], row["weight_change"]
        if x is None or y is None:
            continue
        marker, colour = ("o", "#c0392b") if not row["detected"] else (".", "#95a5a6")
        face = "none" if row["dtype"] == "bfloat16" else colour
        axes.plot(
            min(max(x, 1e-9), 1e3), max(y, 1e-9), marker, color=colour, markerfacecolor=face, markersize=5, alpha=0.7
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("relative change of the result; 1000 stands for all above")
    axes.set_ylabel("‖Δ weights‖ ÷ ‖movement‖ after 5 steps, unrepaired")
    axes.set_title("red: faults that no check saw (hollow: bfloat16); grey: seen, but left unrepaired", fontsize=10)
    axes.grid(alpha=0.3)
