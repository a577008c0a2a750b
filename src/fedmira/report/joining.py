"""The page about a newcomer to a run: whom it resembles, how it started, what that gave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmira.records import RecordedFolder
from fedmira.report.page import render
from fedmira.report.tables import Cell, Column, loss_text, number_cell, number_text, text_cell

__all__ = ["write_joining"]


def write_joining(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write join.json and join.html into a folder.

    Args:
        folder: which is there.
        figures: of the newcomer, as JSON has them.
    """
    recorded = RecordedFolder(folder)
    text = json.dumps(figures, indent=1, allow_nan=False)
    recorded.write("join.json", text + "\n", lasting=False)
    page = render("joining.html.j2", _content(figures))
    recorded.write("join.html", page, lasting=False)


def _content(figures: Mapping[str, Any]) -> dict[str, Any]:
    likeness: list[list[Cell]] = [
        [
            number_cell(place, number_text),
            text_cell(each["client"]),
            number_cell(each["loss"], loss_text),
            number_cell(each["behind"], loss_text),
            number_cell(each["error"], loss_text),
            number_cell(figures["start_weights"].get(each["client"]), loss_text),
        ]
        for place, each in enumerate(figures["resembles"], start=1)
    ]
    tried: list[list[Cell]] = [
        [
            text_cell(_taken(figures, each["start"])),
            text_cell(each["start"]),
            text_cell(each["meaning"]),
            number_cell(each["loss_of_start"], loss_text),
            number_cell(each["loss_trained"], loss_text),
        ]
        for each in figures["tried"]
    ]
    words = {"adapter", "taken", "start", "meaning"}
    ranks = ("place", "adapter", "loss", "behind the best", "error of that", "share in the start")
    ways = ("taken", "start", "meaning", "loss of the start", "loss trained")
    held = [(name, loss_text(loss)) for name, loss in figures["held_out"].items()]
    return {
        "title": f"{figures['client']} joins {figures['run']}",
        "summary": _summary(figures),
        "figures": figures,
        "likeness_columns": [Column(name, name not in words) for name in ranks],
        "likeness": likeness,
        "tried_columns": [Column(name, name not in words) for name in ways],
        "tried": tried,
        "held_out": held,
        "sure": _sure(figures),
    }


def _summary(figures: Mapping[str, Any]) -> str:
    rows, nearest = figures["rows"], figures["resembles"][0]["client"]
    how = "was told to start" if figures["start_given"] else "starts"
    return (
        f"With {rows['train']} rows it comes nearest to {nearest}, {how} from "
        f"{figures['start']}, and {_training(figures)}."
    )


def _taken(figures: Mapping[str, Any], start: str) -> str:
    if start != figures["start"]:
        return "–"
    return "trained" if figures["steps"] else "as it is"


def _training(figures: Mapping[str, Any]) -> str:
    if figures["steps"]:
        return f"trains alone for {figures['steps']} local steps"
    if figures["steps_asked"]:
        return f"keeps that as it is, as {figures['steps_asked']} local steps made it worse"
    return "keeps that as it is"


def _sure(figures: Mapping[str, Any]) -> str:
    judged = figures["against_fresh"]
    if judged is None:
        return ""
    if judged["difference"] is None:
        return "Against a fresh start nothing could be judged."
    told = {
        "better": "The rows show that another start than a fresh one is better",
        "cannot tell": "The rows cannot tell whether another start than a fresh one is better",
        "no better": "On the rows no other start is better than a fresh one",
    }[judged["standing"]]
    return (
        f"{told}: the cross-fitted difference is {judged['difference']:.3f} nats a token, and it "
        f"would have to be below {-judged['margin']:.3f} to be sure by 90 %."
    )
