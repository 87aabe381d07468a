"""Compact SVG files for pages: matplotlib's output without what no reader sees, one line per element."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

GREY = "#808080"  # outside of a page there is no text color to follow: a grey that reads on white and on black
SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def write(path: Path, svg: str) -> None:
    """Writes the ``<svg>`` element of :func:`avsr.tools.analysis.plots.to_svg` as a file of its own."""
    path.write_text(slim(svg.replace("currentColor", GREY)), encoding="utf-8")


def slim(svg: str) -> str:
    """Without metadata, invisible patches and groups that only nest; coordinates to a tenth of a point."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    root = ElementTree.fromstring(svg)
    for element in root.findall(f"{{{SVG}}}metadata"):
        root.remove(element)
    _flatten(root)
    for element in root.iter():
        element.tail = "\n"
        if element.tag != f"{{{SVG}}}text":
            element.text = (element.text or "").strip()
        for name, value in element.attrib.items():
            if name in ("d", "x", "y", "width", "height", "transform", "points"):
                value = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), value)
            element.set(name, " ".join(value.split()))
        if element.get("transform", "").startswith(("rotate(-0 ", "rotate(0 ")):
            del element.attrib["transform"]
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")


def _flatten(parent: ElementTree.Element) -> None:
    children: list[ElementTree.Element] = []
    for child in parent:
        _flatten(child)
        # an invisible patch: the background of figure and axes
        hidden = child.tag == f"{{{SVG}}}path" and "fill: none; opacity: 0" in child.get("style", "")
        if child.tag == f"{{{SVG}}}g" and not child.attrib:
            children += list(child)
        elif not hidden:
            children.append(child)
    parent[:] = children
