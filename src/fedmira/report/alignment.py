"""The pages about a fleet of adapters that was aligned: HTML, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedmira.atomic import replace_file
from fedmira.report.charts import percent_text
from fedmira.report.graph_picture import MOST_DRAWN_CLIENTS, Node, graph_picture
from fedmira.report.page import render
from fedmira.report.records import TaskGraph
from fedmira.report.tables import Cell, Column, loss_text, number_cell, number_text, text_cell
from fedmira.shown import markdown_text, plain

__all__ = ["write_alignment"]

_COLUMNS = ("number", "adapter", "takes", "pull", "moved by", "pulled by", "rank", "cut off")
_JUDGED = ("rows", "own loss", "difference", "margin", "what the rows say")


def write_alignment(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write align.json, report.md and report.html into a folder.

    Args:
        folder: which is there.
        figures: of the alignment, as JSON has them.
    """
    text = json.dumps(figures, indent=1, allow_nan=False)
    replace_file(folder / "align.json", text + "\n", lasting=False)
    replace_file(folder / "report.md", _markdown(figures), lasting=False)
    page = render("alignment.html.j2", _content(figures))
    replace_file(folder / "report.html", page, lasting=False)


def _summary(figures: Mapping[str, Any]) -> str:
    adapters = figures["adapters"]
    moved = sum(each["takes"] != "not moved" for each in adapters)
    taken = sum(each["takes"] == "aligned" for each in adapters)
    pairs = len(figures["graph"]["pairs"])
    told = (
        f"{len(adapters)} adapters, {pairs} related pair{'s' * (pairs != 1)}. The step moves "
        f"{moved} of them"
    )
    if figures["judged"]:
        return f"{told}; by the owners’ rows {taken} take the aligned one, the others keep theirs."
    return f"{told}; no rows were given, so all that it moves are written as moved."


def _about_graph(figures: Mapping[str, Any]) -> str:
    graph = figures["graph"]
    return (
        f"Learned from the cosines of the updates, each choosing at most {figures['nearest']} "
        f"neighbours. The mean cosine of all pairs is {graph['mean_cosine']:.3f}; a cosine counts "
        f"by what it has beyond twice its noise, which is {graph['noise']:.3f} here. Who has no "
        "line has no relative that noise would let tell."
    )


def _cells(figures: Mapping[str, Any]) -> list[list[Cell]]:
    lines = []
    for number, each in enumerate(figures["adapters"], start=1):
        ranks = each["ranks"]
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        cut = each["tail"] + each["dropped"]
        line = [
            number_cell(number, number_text),
            text_cell(each["name"]),
            text_cell(each["takes"]),
            number_cell(each["pull"], _share),
            number_cell(each["distance"], _share),
            text_cell(", ".join(f"{name} {_share(w)}" for name, w in each["by"].items()) or "–"),
            text_cell(rank),
            number_cell(cut, _share),
        ]
        if figures["judged"]:
            line += [
                number_cell(each["rows"], number_text),
                number_cell(each["own_loss"], loss_text),
                number_cell(each["difference"], loss_text),
                number_cell(each["margin"], loss_text),
                text_cell(each["standing"] or "–"),
            ]
        lines.append(line)
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else percent_text(value, 1).lstrip("+")


def _headings(figures: Mapping[str, Any]) -> list[str]:
    return [*_COLUMNS, *(_JUDGED if figures["judged"] else ())]


def _content(figures: Mapping[str, Any]) -> dict[str, Any]:
    adapters = figures["adapters"]
    names = tuple(each["name"] for each in adapters)
    pairs = [(p["source"], p["target"], p["weight"]) for p in figures["graph"]["pairs"]]
    picture = Markup("")
    if len(names) <= MOST_DRAWN_CLIENTS:
        nodes = {name: Node(number) for number, name in enumerate(names, start=1)}
        picture = graph_picture(TaskGraph("similarity", names, tuple(pairs)), nodes)
    text = {"adapter", "takes", "pulled by", "rank", "what the rows say"}
    return {
        "title": f"Alignment of {len(names)} adapters",
        "summary": _summary(figures),
        "figures": figures,
        "about_graph": _about_graph(figures),
        "picture": picture,
        "columns": [Column(name, name not in text) for name in _headings(figures)],
        "cells": _cells(figures),
        "pairs": _pairs(figures),
    }


def _pairs(figures: Mapping[str, Any]) -> list[list[Cell]]:
    ordered = sorted(figures["graph"]["pairs"], key=lambda pair: -pair["weight"])
    return [
        [
            text_cell(pair["source"]),
            text_cell(pair["target"]),
            number_cell(pair["cosine"], loss_text),
            number_cell(pair["weight"], loss_text),
        ]
        for pair in ordered
    ]


def _markdown(figures: Mapping[str, Any]) -> str:
    unknown = "\n".join(f"- {markdown_text(text)}" for text in figures["unknown"])
    notes = "\n".join(f"- {plain(text)}" for text in figures["notes"])
    parts = [
        f"# Alignment of {len(figures['adapters'])} adapters",
        _summary(figures),
        "## What is sure",
        figures["bound"],
        *(["## How the rows judge", figures["rule"]] if figures["judged"] else []),
        *(["## What cannot be known", unknown] if unknown else []),
        *(["## What was done to the rows", notes] if notes else []),
        "## Adapters",
        _table(_headings(figures), _cells(figures)),
        "## Related pairs",
        _about_graph(figures),
        _table(["adapter", "adapter", "cosine", "weight"], _pairs(figures)),
    ]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], lines: Sequence[Sequence[Cell]]) -> str:
    rows = ["| " + " | ".join(markdown_text(cell.text) for cell in line) + " |" for line in lines]
    return "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *rows])
