"""Elements of the page. Text and attributes are escaped when the tree is written, so nothing that came from a run can
become markup. Never here: what the page says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree as tree

__all__ = ["Child", "Element", "clean", "h", "write_document"]

Element = tree.Element
Child = Element | str | None

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters
    "\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of what follows
    "\ud800-\udfff\ufffe\uffff]"  # no characters at all
)


def clean(text: str) -> str:
    """`text` without what a page must not hold or what would make it read differently than it is written."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def h(name: str, *children: Child | Iterable[Child], **attributes: str | float | bool | None) -> Element:
    """One element.

    Args:
        name: of the tag.
        children: elements and texts, or lists of them, in their order; None is left out.
        attributes: by name, an underscore for each dash (`class_` for `class`); None and False are left out.
    """
    made = tree.Element(name)
    for key, value in attributes.items():
        if value is not None and value is not False:
            made.set(key.rstrip("_").replace("_", "-"), _attribute(value))
    for child in children:
        _append(made, child)
    return made


def _attribute(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return ""
    return clean(value) if isinstance(value, str) else f"{round(value, 3):g}"


def _append(parent: Element, child: Child | Iterable[Child]) -> None:
    if child is None:
        return
    if isinstance(child, str):
        text = clean(child)
        if len(parent):
            parent[-1].tail = (parent[-1].tail or "") + text
        else:
            parent.text = (parent.text or "") + text
    elif isinstance(child, Element):
        parent.append(child)
    else:
        for each in child:
            _append(parent, each)


def write_document(root: Element) -> str:
    """The page as text."""
    return "<!doctype html>\n" + tree.tostring(root, encoding="unicode", method="html") + "\n"
