"""The page that sets methods side by side.

The same clients under several methods, over several seeds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from fedmira.errors import RunFolderError
from fedmira.metrics import RULE, TEXT_METRICS, Standing
from fedmira.records import RecordedFolder
from fedmira.report.charts import (
    Series,
    legend,
    line_chart,
    percent_text,
)
from fedmira.report.comparison_figures import Figures, budget_text, compare_runs
from fedmira.report.comparison_files import (
    TUNED_RULE,
    interval_text,
    settings_text,
    write_tables,
)
from fedmira.report.findings import (
    CHANGE_LIMIT,
    MIB,
    algorithm_title,
    curve_of_test_loss,
    flat_settings,
)
from fedmira.report.heat_map import (
    HeatCell,
    HeatRow,
    heat_map,
    shift_keys,
)
from fedmira.report.page import render
from fedmira.report.paired import LEVEL, NOISE_RULE, ClientDifference
from fedmira.report.read import read_run
from fedmira.report.records import Run
from fedmira.report.sharing import SHARING_RULE
from fedmira.report.tables import (
    MOST_ROWS,
    Cell,
    Column,
    loss_text,
    number_cell,
    number_text,
    text_cell,
)
from fedmira.report.targets import TARGET_RULE, reached_text

__all__ = ["HEAT_LIMITS", "MOST_DRAWN", "heat", "write_comparison"]

HEAT_LIMITS = (
    0.0,
    0.02,
    0.05,
    0.1,
    0.25,
)  # excess over the best of the row, up to which a cell has heat 0, 1, 2, ...
MOST_DRAWN = 100  # clients in a heat map


def write_comparison(
    methods: Mapping[str, Mapping[int, Path]],
    folder: Path,
    reference: str = "",
    failures: Mapping[str, str] | None = None,
    target: float | None = None,
    other_seeds: Sequence[int] = (),
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
    controls: Mapping[str, str] | None = None,
) -> Figures:
    """Compare runs, and write comparison.html and the tables (see `write_tables`).

    Args:
        methods: method -> seed -> run folder, in the order of the columns. One with algorithm
            "local" is the baseline.
        folder: where to; it is made where it is missing. A run's report.html is linked, relative to
            it, where it exists.
        reference: a method that the others are paired with besides.
        failures: run -> why it failed, to be said on the page.
        target: a mean test loss; how soon each method reached it is added to the tables.
        other_seeds: of runs that lie beside these and were left out, to be said on the page.
        tuned: method -> what a search chose for it and how, to be said on the page.
        controls: method -> the method that is its control, for what sharing gains.

    Raises:
        ConfigError: the reference is not among the methods, or the target is no loss.
        RunFolderError: no run is given, or run folders are missing or damaged; the problems of all
            folders together.
    """
    if not any(methods.values()):
        raise RunFolderError("no run to compare; give at least one run folder")
    read: dict[str, dict[int, Run]] = {}
    problems: list[str] = []
    for method, folders in methods.items():
        for seed, run_folder in folders.items():
            try:
                read.setdefault(method, {})[seed] = read_run(run_folder)
            except RunFolderError as error:
                problems.extend(error.problems)
    if problems:
        raise RunFolderError(problems)
    figures = replace(
        compare_runs(read, reference, failures, target, controls),
        other_seeds=tuple(other_seeds),
        tuned=dict(tuned or {}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(figures, folder)
    page = render("comparison.html.j2", _content(figures, folder))
    RecordedFolder(folder).write("comparison.html", page, lasting=False)
    return figures


def heat(loss: float, best: float) -> int:
    """0 for the best of a row, up to 5 for more than a quarter above it (HEAT_LIMITS).

    Args:
        loss: of one method.
        best: the lowest loss of the row.
    """
    excess = (loss - best) / best if best else 0.0
    return sum(excess > limit for limit in HEAT_LIMITS)


_RULES = {
    "rule": NOISE_RULE,
    "choice_rule": RULE,
    "target_rule": TARGET_RULE,
    "sharing_rule": SHARING_RULE,
    "tuned_rule": TUNED_RULE,
}
"""What the page says of its figures, by the name in the template."""


def _content(figures: Figures, folder: Path) -> dict[str, Any]:
    columns, cells = _loss_table(figures)
    lines = [
        Series(
            name,
            _mean_curve(list(runs.values())),
            index % 8 + 1,
            dashed=(index + index // 8) % 2 == 1,
        )  # 16 that differ
        for index, (name, runs) in enumerate(figures.methods.items())
    ]
    lines = [line for line in lines if line.points]
    heat_keys = (
        ["best of the row"]
        + [f"up to {100 * limit:g} % above" for limit in HEAT_LIMITS[1:]]
        + [f"over {100 * HEAT_LIMITS[-1]:g} %"]
    )
    return {
        "title": "Comparison: " + ", ".join(figures.methods),
        "figures": figures,
        "seeds": max(len(runs) for runs in figures.methods.values()),
        "methods": [
            _method(row, figures, folder)
            for row in sorted(figures.method_rows, key=_place(figures))
        ],
        "scores": [
            metric
            for name, metric in TEXT_METRICS.items()
            if any(row[name] is not None for row in figures.method_rows)
        ],
        **_RULES,
        "level": f"{100 * LEVEL:g} %",
        "limit": f"{100 * CHANGE_LIMIT:g} %",
        "charts": [
            (
                "Mean test loss per response token",
                legend(lines),
                line_chart(lines, "Mean test loss of each method", size=(560, 280)),
            )
        ]
        if lines
        else [],
        "heat_maps": [
            _heat_map(figures, baseline)
            for baseline in figures.baselines
            if len(figures.methods) > 1
        ],
        "shift_keys": shift_keys(),
        "columns": columns,
        "cells": cells[:MOST_ROWS],
        "rows": len(cells),
        "heat_keys": heat_keys,
        "settings": _differing_settings(figures.methods),
        "tuned": _tuned(figures),
    }


def _tuned(figures: Figures) -> list[tuple[str, Mapping[str, Any] | None, str]]:
    """Each method with what was chosen for it, and that in words."""
    return [
        (name, figures.tuned.get(name), settings_text(figures.tuned.get(name)))
        for name in figures.methods
    ]


def _method(row: Mapping[str, Any], figures: Figures, folder: Path) -> dict[str, Any]:
    """A row of the tables of methods; what was not measured is None."""
    name = row["method"]
    pages = {seed: run.folder / "report.html" for seed, run in figures.methods[name].items()}
    links = {
        seed: quote(Path(os.path.relpath(page, folder)).as_posix())
        for seed, page in pages.items()
        if page.is_file()
    }
    standings, best_standings = (
        [
            (
                *interval_text(row, baseline, prefix).partition(" (")[::2],
                found.get((name, baseline)),
            )
            for baseline in figures.baselines
        ]
        if found
        else []
        for prefix, found in (("", figures.pairings), ("best_", figures.best_pairings))
    )
    return {
        **row,
        "title": name,
        "name": algorithm_title(row["algorithm"]),
        "links": links,
        "unfinished": [
            (seed, run) for seed, run in figures.methods[name].items() if run.status != "finished"
        ],
        "standings": standings,
        "best_standings": best_standings,
        "mib_up": None if row["bytes_up"] is None else row["bytes_up"] / MIB,
        "mib_down": None if row["bytes_down"] is None else row["bytes_down"] / MIB,
        "mib_up_each": None if row["bytes_up_each"] is None else row["bytes_up_each"] / MIB,
        "mib_down_each": None if row["bytes_down_each"] is None else row["bytes_down_each"] / MIB,
        "soon": None if figures.target is None else reached_text(row),
        "parameters": budget_text(row, "parameters"),
        "trained": budget_text(row, "trained"),
    }


def _place(figures: Figures) -> Callable[[Mapping[str, Any]], tuple[int, float]]:
    """Baselines first, then the lowest mean loss; what was not measured last."""

    def place(row: Mapping[str, Any]) -> tuple[int, float]:
        name, loss = row["method"], row["test_loss"]
        first = (
            figures.baselines.index(name) if name in figures.baselines else len(figures.baselines)
        )
        return first, math.inf if loss is None else loss

    return place


def _mean_curve(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """The mean over seeds, in rounds that all of them evaluated."""
    curves = [dict(curve_of_test_loss(run)) for run in runs]
    common = set.intersection(*(set(curve) for curve in curves))
    return [(number, fmean(curve[number] for curve in curves)) for number in sorted(common)]


def _heat_map(figures: Figures, baseline: str) -> dict[str, Any]:
    """Clients against a baseline; of many, every so manieth in the order of their training rows."""
    methods = [name for name in figures.methods if (name, baseline) in figures.pairings]
    clients = list(figures.described.items())
    step = max(1, -(-len(clients) // MOST_DRAWN))
    rows = []
    for client, described in clients[::step]:
        found = [figures.pairings[name, baseline].clients.get(client) for name in methods]
        rows.append(
            HeatRow(
                client,
                number_text(described.train_rows),
                [_heat_cell(difference) for difference in found],
            )
        )
    label = f"Difference of each client's test loss to {baseline} in percent, by method"
    return {
        "baseline": baseline,
        "table": heat_map(methods, rows, label),
        "step": step,
        "shown": len(rows),
        "clients": len(clients),
    }


def _heat_cell(found: ClientDifference | None) -> HeatCell | None:
    if found is None:
        return None
    losses = f"{loss_text(found.own)} against {loss_text(found.other)}"
    told = f"{percent_text(found.relative, 1)}, {losses}, {found.verdict}"
    return HeatCell(found.relative, found.verdict != "equal", told)


def _loss_table(figures: Figures) -> tuple[list[Column], list[list[Cell]]]:
    """Client by method; a cell is coloured by how far it lies above the best of its row."""
    choice = any(row["validation_choice"] for row in figures.client_rows)
    columns = [
        Column("client", number=False),
        *map(Column, figures.methods),
        Column("train rows"),
        Column("category", number=False),
    ]
    columns[1:1] = [Column("by its validation rows", number=False)] if choice else []
    cells = []
    for row in figures.client_rows:
        losses = [row[f"{name}_test_loss"] for name in figures.methods]
        best = min((loss for loss in losses if loss is not None), default=0.0)
        measured = [
            number_cell(loss, loss_text, "" if loss is None else f"heat-{heat(loss, best)}")
            for loss in losses
        ]
        chosen = [text_cell(_choice_text(row))] if choice else []
        cells.append(
            [
                text_cell(row["client"]),
                *chosen,
                *measured,
                number_cell(row["train_rows"]),
                text_cell(row["category"]),
            ]
        )
    return columns, cells


def _choice_text(row: Mapping[str, Any]) -> str:
    """The method that a client's validation rows choose, and where they could not."""
    unclear = row["validation_standing"] == Standing.unclear
    return (row["validation_choice"] or "") + (f" ({Standing.unclear})" if unclear else "")


def _differing_settings(methods: Mapping[str, Mapping[int, Run]]) -> list[tuple[str, list[Any]]]:
    """Settings that are not the same in all methods, with each method's value in its first run."""
    flat = [flat_settings(next(iter(runs.values())).settings) for runs in methods.values()]
    keys = {key: None for settings in flat for key in settings}
    rows = [(key, [settings.get(key) for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]
