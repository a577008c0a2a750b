"""The tables of a comparison as files: JSON, CSV and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmira.records import RecordedFolder
from fedmira.report.charts import percent_text
from fedmira.report.comparison_figures import Figures, budget_text
from fedmira.report.findings import CHANGE_LIMIT, MIB
from fedmira.report.paired import LEVEL, NOISE_RULE
from fedmira.report.sharing import SHARING_RULE
from fedmira.report.tables import (
    MISSING,
    MOST_ROWS,
    loss_text,
    number_text,
    setting_text,
)
from fedmira.report.targets import TARGET_RULE, reached_text
from fedmira.shown import csv_text, markdown_text, plain

__all__ = ["COUNTS", "TUNED_RULE", "interval_text", "markdown", "settings_text", "write_tables"]

COUNTS = {
    "better_than": "better than",
    "equal_to": "equal to",
    "worse_than": "worse than",
    "below": f"{100 * CHANGE_LIMIT:g} % below",
    "above": f"{100 * CHANGE_LIMIT:g} % above",
}
"""What clients are counted by against a baseline, key -> words; the last two whatever the noise."""


TUNED_RULE = (
    "Settings were chosen by validation loss under other seeds than those compared. Rows are split "
    "anew for each seed unless the source sets test rows aside, so rows that are tested here may "
    "have been trained on or chosen by while tuning, alike for all tuned methods."
)


def settings_text(tuned: Mapping[str, Any] | None) -> str:
    """The settings that a search chose, or that there was none.

    Args:
        tuned: what a search chose for a method, and how; of a control, by what it differs from the
            tuned method.
    """
    if tuned is None:
        return "as given, not tuned"
    told = ", ".join(f"{key} = {setting_text(value)}" for key, value in tuned["values"].items())
    return f"as {tuned['control_of']}, but for {told}" if "control_of" in tuned else told


def write_tables(figures: Figures, folder: Path) -> None:
    """Write the files of a comparison over older ones.

    These are comparison.json, comparison.csv, comparison-runs.csv, comparison-clients.csv and
    comparison.md.

    Args:
        figures: of the whole comparison.
        folder: of the comparison.
    """
    texts = {
        "comparison.json": json.dumps(figures.document(), indent=1, allow_nan=False) + "\n",
        "comparison.csv": _csv(figures.method_rows),
        "comparison-runs.csv": _csv(figures.run_rows),
        "comparison-clients.csv": _csv(figures.client_rows),
        "comparison.md": markdown(figures),
    }
    recorded = RecordedFolder(folder)
    for name, text in texts.items():
        recorded.write(name, text, lasting=False)


def markdown(figures: Figures) -> str:
    """The tables for reading."""
    parts = ["# Comparison: " + ", ".join(figures.methods)]
    if figures.problems:
        parts.append(
            "**UNEQUAL: these methods were not run on equal terms, and their figures do "
            "not compare.**"
        )
        parts.append(
            "\n".join(
                f"- {markdown_text(problem)}"
                for problems in figures.problems.values()
                for problem in problems
            )
        )
    parts += [
        f"**{run} failed:** {markdown_text(str(error))}" for run, error in figures.failures.items()
    ]
    parts += [figures.left_out] if figures.left_out else []
    parts += [
        f"## Test loss {figures.read_out}",
        _table(_loss_columns(figures), figures.method_rows),
    ]
    several = any(len(runs) > 1 for runs in figures.methods.values())
    means = (
        "mean over clients and seeds; ± is the standard deviation over seeds"
        if several
        else "mean over clients"
    )
    parts.append(
        f"Test loss per response token, {means}. Differences are paired by "
        f"client and seed, with the {100 * LEVEL:g} % bootstrap interval over "
        f"{figures.resampled}. {NOISE_RULE}"
    )
    if figures.best_pairings:
        parts += [
            "## Test loss at each client's own best round",
            _table(_best_columns(figures), figures.method_rows),
        ]
    parts += _sharing(figures)
    parts += ["## Budget of a run", _table(_budget_columns(), figures.method_rows)]
    parts.append(
        "Sums over clients and rounds, mean over seeds; tokens computed include prompts "
        "and padding; a client's MiB are what one client "
        "sends (up) and is sent (down) in one round, on average, in the number type given; "
        "parameters of one client's adapter, and those "
        "of them that local training moves."
    )
    parts += ["\n".join(f"- {plain(note)}" for note in figures.notes)] if figures.notes else []
    parts += [*_target(figures), *_tuned(figures)]
    parts += ["## Clients", _table(_client_columns(figures), figures.client_rows[:MOST_ROWS])]
    if len(figures.client_rows) > MOST_ROWS:
        parts.append(
            f"The first {MOST_ROWS} of {len(figures.client_rows):,} clients; "
            "comparison-clients.csv holds all."
        )
    return "\n\n".join(parts) + "\n"


def _sharing(figures: Figures) -> list[str]:
    """What each method gains over its own control."""
    if not figures.sharing:
        return []
    lines = [
        f"| {gain.method} | {gain.control} | {when} | {difference} | {counts} |"
        for gain in figures.sharing.values()
        for when, difference, counts in gain.texts()
    ]
    head = ["| method | control | read-out | difference | below / above |", "|---|---|---|---|---|"]
    return ["## What sharing gains", "\n".join([*head, *lines]), SHARING_RULE]


def _target(figures: Figures) -> list[str]:
    """How soon each method came to the loss that was set."""
    if figures.target is None:
        return []
    table = _table(_target_columns(), figures.method_rows)
    return [f"## To a test loss of {figures.target:g}", table, TARGET_RULE]


def _tuned(figures: Figures) -> list[str]:
    """What a search chose for each method."""
    if not figures.tuned:
        return []
    chosen = [f"- {name}: {settings_text(figures.tuned.get(name))}" for name in figures.methods]
    return ["## Tuned settings", "\n".join(chosen), TUNED_RULE]


Columns = dict[str, Any]
"""Heading -> a function from the row to its text."""


def _loss_columns(figures: Figures) -> Columns:
    columns: Columns = {
        "method": lambda row: row["method"] + ("" if row["equal_budget"] else " (UNEQUAL)"),
        "seeds": lambda row: str(row["seeds"]),
        "test loss": lambda row: loss_text(row["test_loss"]),
        "± seeds": lambda row: loss_text(row["test_loss_spread"]),
        "worst tenth": lambda row: loss_text(row["worst_tenth"]),
    }
    return columns | _standing_columns(figures)


def _best_columns(figures: Figures) -> Columns:
    columns: Columns = {
        "method": lambda row: row["method"],
        "test loss": lambda row: loss_text(row["best_round"]),
    }
    return columns | _standing_columns(figures, "best_")


def _standing_columns(figures: Figures, prefix: str = "") -> Columns:
    """Difference and counts against each baseline."""
    columns: Columns = {}
    for baseline in figures.baselines:
        columns[f"to {baseline}"] = lambda row, baseline=baseline: interval_text(
            row, baseline, prefix
        )
        for key, title in COUNTS.items():
            columns[f"{title} {baseline}"] = lambda row, name=f"{prefix}{key}_{baseline}": (
                number_text(row[name])
            )
    return columns


def _budget_columns() -> Columns:
    columns: Columns = {
        "method": lambda row: row["method"] + ("" if row["equal_budget"] else " (UNEQUAL)")
    }
    for name in ("local_steps", "response_tokens", "tokens"):
        columns[{"tokens": "tokens computed"}.get(name, name.replace("_", " "))] = (
            lambda row, name=name: number_text(row[name])
        )
    for name in ("bytes_up", "bytes_down", "bytes_up_each", "bytes_down_each"):
        title = name.replace("bytes_", "MiB ").replace("_each", " a client")
        columns[title] = lambda row, name=name: number_text(
            None if row[name] is None else row[name] / MIB
        )
    columns |= {
        "parameters": lambda row: budget_text(row, "parameters"),
        "trained": lambda row: budget_text(row, "trained"),
    }
    return columns | {"number type": lambda row: row["dtype"] or MISSING}


def _target_columns() -> Columns:
    columns: Columns = {
        "method": lambda row: row["method"] + ("" if row["equal_budget"] else " (UNEQUAL)")
    }
    return columns | {
        "rounds": reached_text,
        "seconds": lambda row: number_text(row["seconds_to_target"]),
    }


def _client_columns(figures: Figures) -> Columns:
    columns: Columns = {
        "client": lambda row: row["client"],
        "train rows": lambda row: number_text(row["train_rows"]),
    }
    for method in figures.methods:
        columns[method] = lambda row, name=f"{method}_test_loss": loss_text(row[name])
    for method, baseline in figures.pairings:
        name = f"{method}_to_{baseline}_relative"
        columns[f"{method} to {baseline}"] = lambda row, name=name: (
            MISSING if row[name] is None else percent_text(row[name], 1)
        )
    return columns


def interval_text(row: Mapping[str, Any], baseline: str, prefix: str = "") -> str:
    """The mean difference of a method to a baseline with its interval.

    A dash for the baseline itself.

    Args:
        row: of one method.
        baseline: the name of the method that it is held against.
        prefix: "best_" for the clients' best rounds.
    """
    name = f"{prefix}difference_to_{baseline}"
    if row[name] is None:
        return MISSING
    signed = [
        f"{row[key]:+.3f}".replace("-", "\N{MINUS SIGN}")
        for key in (name, f"{name}_low", f"{name}_high")
    ]
    return f"{signed[0]} ({signed[1]} to {signed[2]})"


def _table(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        list(columns),
        ["---"] * len(columns),
        *([text_of(row) for text_of in columns.values()] for row in rows),
    ]
    return "\n".join(
        "| " + " | ".join(markdown_text(cell) for cell in line) + " |" for line in lines
    )


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    return csv_text(list(rows[0]) if rows else [], rows)
