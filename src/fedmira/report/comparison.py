"""The page that sets runs side by side: the same clients under several methods."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedmira.errors import RunFolderError
from fedmira.report.charts import Series, legend, line_chart
from fedmira.report.findings import CHANGE_LIMIT, algorithm_title, curve_of_test_loss, flat_settings, mean
from fedmira.report.page import render
from fedmira.report.read import read_run
from fedmira.report.records import Client, Run
from fedmira.report.tables import MOST_ROWS, Cell, Column, loss_text, number_cell, text_cell

__all__ = ["HEAT_LIMITS", "Standing", "heat", "standing", "write_comparison"]

HEAT_LIMITS = (0.0, 0.02, 0.05, 0.1, 0.25)  # excess over the best of the row, up to which a cell has heat 0, 1, 2, ...
BASELINE = "local"


@dataclass(frozen=True, slots=True)
class Standing:
    """Clients whose test loss differs from local training by more than CHANGE_LIMIT of it, of those both runs measured."""

    better: int
    worse: int
    measured: int


def write_comparison(runs: Mapping[str, Path], output: Path) -> Path:
    """Writes a page that compares runs.

    Args:
        runs: title -> run folder, in the order of the columns. A run with algorithm "local" is the baseline for better and worse.
        output: the HTML file; its folder is made where it is missing. A run's report.html is linked, relative to it, where it exists.

    Returns:
        `output`.

    Raises:
        RunFolderError: no run is given, or run folders are missing or damaged; the problems of all folders together.
    """
    if not runs:
        raise RunFolderError("no run to compare; give at least one run folder")
    read: dict[str, Run] = {}
    problems: list[str] = []
    for title, folder in runs.items():
        try:
            read[title] = read_run(folder)
        except RunFolderError as error:
            problems.extend(error.problems)
    if problems:
        raise RunFolderError(problems)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render("comparison.html.j2", _content(read, output.parent)), encoding="utf-8")
    return output


def heat(loss: float, best: float) -> int:
    """0 for the best of a row, up to 5 for more than a quarter above it (HEAT_LIMITS)."""
    excess = (loss - best) / best if best else 0.0
    return sum(excess > limit for limit in HEAT_LIMITS)


def standing(run: Run, baseline: Run) -> Standing:
    """Counts the clients that are better and worse off than under the baseline."""
    local = {row.client: row.after_align_loss for row in baseline.clients}
    pairs = [
        (row.after_align_loss, alone)
        for row in run.clients
        if row.after_align_loss is not None and (alone := local.get(row.client)) is not None
    ]
    better = sum(loss < alone * (1 - CHANGE_LIMIT) for loss, alone in pairs)
    worse = sum(loss > alone * (1 + CHANGE_LIMIT) for loss, alone in pairs)
    return Standing(better, worse, len(pairs))


def _content(runs: Mapping[str, Run], folder: Path) -> dict[str, Any]:
    columns, cells = _loss_table(runs)
    lines = [
        Series(title, curve_of_test_loss(run), index % 8 + 1, dashed=index % 2 == 1) for index, (title, run) in enumerate(runs.items())
    ]
    lines = [line for line in lines if line.points]
    clients = {frozenset(row.client for row in run.clients) for run in runs.values()}
    heat_keys = (
        ["best of the row"] + [f"up to {100 * limit:g} % above" for limit in HEAT_LIMITS[1:]] + [f"over {100 * HEAT_LIMITS[-1]:g} %"]
    )
    return {
        "title": "Comparison: " + ", ".join(runs),
        "methods": [_method(title, run, runs, folder) for title, run in runs.items()],
        "baseline": next((title for title, run in runs.items() if run.algorithm == BASELINE), ""),
        "same_clients": len(clients) == 1,
        "charts": [("Mean test loss per response token", legend(lines), line_chart(lines, "Mean test loss of each method"))]
        if lines
        else [],
        "columns": columns,
        "cells": cells[:MOST_ROWS],
        "rows": len(cells),
        "heat_keys": heat_keys,
        "limit": f"{100 * CHANGE_LIMIT:g} %",
        "settings": _differing_settings(runs),
    }


def _method(title: str, run: Run, runs: Mapping[str, Run], folder: Path) -> dict[str, Any]:
    """A row of the table of methods; what was not measured is None."""
    figure = run.summary.get("after_align_loss", {})
    best = [row.best_test_loss for row in run.clients if row.best_test_loss is not None]
    baseline = next((other for other in runs.values() if other.algorithm == BASELINE), None)
    page = run.folder / "report.html"
    return {
        "title": title,
        "algorithm": algorithm_title(run.algorithm),
        "status": run.status,
        "error": run.error,
        "link": quote(Path(os.path.relpath(page, folder)).as_posix()) if page.is_file() else "",
        "mean": figure.get("mean"),
        "weighted_mean": figure.get("weighted_mean"),
        "worst_tenth": figure.get("worst_tenth"),
        "best": mean(best) if len(best) == len(run.clients) else None,
        "rouge_l": run.summary.get("rouge_l", {}).get("mean"),
        "rouge_l_package": run.summary.get("rouge_l_package", {}).get("mean"),
        "exact_match": run.summary.get("exact_match", {}).get("mean"),
        "standing": standing(run, baseline) if baseline is not None and run is not baseline else None,
    }


def _loss_table(runs: Mapping[str, Run]) -> tuple[list[Column], list[list[Cell]]]:
    """Client by method; a cell is coloured by how far it lies above the best of its row."""
    rows_of = {title: {row.client: row for row in run.clients} for title, run in runs.items()}
    clients: dict[str, Client] = {}
    for rows in rows_of.values():
        clients = rows | clients  # the first run that has a client describes it
    columns = [Column("client", number=False), *(Column(title) for title in runs), Column("train rows"), Column("category", number=False)]
    cells = []
    for client, row in clients.items():
        losses = [rows[client].after_align_loss if client in rows else None for rows in rows_of.values()]
        best = min((loss for loss in losses if loss is not None), default=0.0)
        measured = [number_cell(loss, loss_text, "" if loss is None else f"heat-{heat(loss, best)}") for loss in losses]
        cells.append([text_cell(client), *measured, number_cell(row.train_rows), text_cell(row.category)])
    return columns, cells


def _differing_settings(runs: Mapping[str, Run]) -> list[tuple[str, list[Any]]]:
    """Settings that are not the same in all runs, with each run's value."""
    flat = [flat_settings(run.settings) for run in runs.values()]
    keys = {key: None for settings in flat for key in settings}
    rows = [(key, [settings.get(key) for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]
