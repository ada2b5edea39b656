"""The signs of the page. Each means one thing by its form and by its colour, so that neither has to be seen alone."""

from __future__ import annotations

from resilience.report_page.markup import Element, h

__all__ = ["RANKING", "fill_of", "inline_symbol", "symbol"]

_PATHS = {
    "circle": "M-5 0A5 5 0 1 1 5 0A5 5 0 1 1-5 0Z",
    "cross": "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z",
    "diamond": "M0-6.5L6.5 0L0 6.5L-6.5 0Z",
    "hexagon": "M-3-5.5H3L6 0L3 5.5H-3L-6 0Z",
    "left": "M4.5-5.5V5.5L-5.5 0Z",
    "left-twice": "M0.5-5.5V-1.5L6.5-5.5V5.5L0.5 1.5V5.5L-6.5 0Z",
    "octagon": "M-2.7-6.5H2.7L6.5-2.7V2.7L2.7 6.5H-2.7L-6.5 2.7V-2.7Z",
    "plus": "M-1.8-5.5H1.8V-1.8H5.5V1.8H1.8V5.5H-1.8V1.8H-5.5V-1.8H-1.8Z",
    "square": "M-4.7-4.7H4.7V4.7H-4.7Z",
    "triangle": "M0-6L6 5H-6Z",
    "triangle-down": "M0 6L-6-5H6Z",
    "up": "M0-6.5L6 0H2.4V6H-2.4V0H-6Z",
    "bolt": "M1.5-7L-5 1H-0.8L-1.8 7L5-1.5H0.8Z",
}
_SIGNS = {
    # decisions, cheapest rung first
    "continue": ("circle", "muted"),
    "corrected": ("plus", "green"),
    "replay": ("left", "blue"),
    "rewind": ("left-twice", "purple"),
    "restart": ("diamond", "orange"),
    "restore": ("up", "orange"),
    "quarantine": ("hexagon", "red"),
    "stop": ("octagon", "red"),
    # alarms, by what became of them
    "mended": ("plus", "green"),
    "transient": ("triangle", "blue"),
    "deterministic": ("square", "muted"),
    "false_positive": ("circle", "muted"),
    "propagated": ("circle", "muted"),
    "pending": ("triangle", "purple"),
    "persistent": ("triangle", "red"),
    # what was injected, and what was kept
    "injected": ("bolt", "ink"),
    "no effect": ("bolt", "muted"),
    "published": ("square", "green"),
    "loaded": ("up", "blue"),
    "doubted": ("cross", "orange"),
    "refused": ("cross", "red"),
    # what ended a generation
    "failure": ("octagon", "red"),
}
RANKING = {name: place for place, name in enumerate(_SIGNS)}
"""Where several meet in one place the later one is shown."""
_UNKNOWN = ("circle", "muted")


def fill_of(name: str) -> str:
    """The class of the colour of the sign for `name`."""
    return f"fill-{_SIGNS.get(name, _UNKNOWN)[1]}"


def symbol(name: str, size: float = 1.0) -> Element:
    """The sign for `name`, around the origin."""
    form, _ = _SIGNS.get(name, _UNKNOWN)
    transform = f"scale({size:g})" if size != 1.0 else None
    return h("path", d=_PATHS[form], class_=f"sign {fill_of(name)}", transform=transform)


def inline_symbol(name: str) -> Element:
    """The sign within a line of text; what it means must stand beside it."""
    return h("svg", symbol(name), class_="inline", viewBox="-8 -8 16 16", aria_hidden="true")
