"""The page of a search for settings: all trials, the chosen one, and how close the next are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedmira.records import RecordedFolder
from fedmira.report.comparison_figures import pools_of
from fedmira.report.findings import algorithm_title
from fedmira.report.page import render
from fedmira.report.paired import LEVEL, Losses, Pairing, pair
from fedmira.report.read import read_run
from fedmira.report.tables import MISSING, setting_text
from fedmira.shown import csv_text

__all__ = ["write_tuning"]

_TOLD = {
    "chosen": "chosen",
    "close": "not told apart from the chosen one",
    "worse": "worse",
    "failed": "failed",
    "drawn": "not run by itself",
}


def write_tuning(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Hold each trial against the chosen one, and write tune.json, trials.csv and tune.html.

    Two trials are compared after the last round that both ran, client by client and seed by seed;
    one is worse where the bootstrap interval of the difference lies above 0.

    Args:
        document: what a search found, without comparisons.
        folder: of the search; the trials' run folders lie in it.

    Returns:
        The document with `rows`, one for each trial, the chosen one first.

    Raises:
        RunFolderError: the run of the chosen trial is damaged.
    """
    rows = _rows(document, folder)
    close = [row["trial"] for row in rows if row["standing"] == "close"]
    recorded = RecordedFolder(folder)
    full = {**document, "rows": rows, "close": close, "level": LEVEL}
    recorded.write("tune.json", json.dumps(full, indent=1, allow_nan=False) + "\n")
    recorded.write("trials.csv", _csv(rows), lasting=False)
    page = render("tune.html.j2", _content(full, folder))
    recorded.write("tune.html", page, lasting=False)
    return full


def _rows(document: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    best = document["best"]
    pools = pools_of([read_run(folder / next(iter(best["folders"].values())))])
    rows = []
    for trial in document["trials"]:
        pairing = _paired(trial, best, pools)
        rows.append(
            {
                "trial": trial["number"],
                **trial["values"],
                "status": trial["status"],
                "rounds": trial["rounds"],
                "loss": trial["loss"],
                "spread": trial["spread"],
                "difference": pairing.difference if pairing else None,
                "low": pairing.low if pairing else None,
                "high": pairing.high if pairing else None,
                "standing": _standing(trial, best, pairing),
                **{key: trial[key] for key in ("probability", "drawn") if key in trial},
            }
        )
    return sorted(rows, key=_place)


def _place(row: Mapping[str, Any]) -> tuple[float, ...]:
    """The chosen one first, then those that ran furthest, then the lowest loss; failed ones last.

    Losses after different rounds do not compare. Those that were only drawn: the likeliest first.
    """
    loss = math.inf if row["loss"] is None else row["loss"]
    likely = row.get("probability", 0.0)
    first = row["standing"] != "chosen", row["loss"] is None, -row["rounds"]
    return (*first, loss, -likely, row["trial"])


def _paired(
    trial: Mapping[str, Any], best: Mapping[str, Any], pools: Mapping[str, str] | None
) -> Pairing | None:
    """A trial against the chosen one, after the last round that both were measured after."""
    common = set(trial["losses"]) & set(best["losses"])
    if trial["number"] == best["number"] or trial["loss"] is None or not common:
        return None
    last = max(common, key=int)
    return pair(_losses(trial, last), _losses(best, last), pools)


def _losses(trial: Mapping[str, Any], rounds: str) -> Losses:
    return {int(seed): found for seed, found in trial["losses"][rounds].items()}


def _standing(trial: Mapping[str, Any], best: Mapping[str, Any], pairing: Pairing | None) -> str:
    if trial["number"] == best["number"]:
        return "chosen"
    if pairing is None:
        return "failed" if trial["problem"] or "drawn" not in trial else "drawn"
    return "worse" if pairing.low > 0 else "close"


def _content(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    trials = {trial["number"]: trial for trial in document["trials"]}
    keys = list(document["best"]["values"])
    shown = []
    for row in document["rows"]:
        trial = trials[row["trial"]]
        pages = {
            seed: f"{path}/report.html"
            for seed, path in trial["folders"].items()
            if (folder / path / "report.html").is_file()
        }
        shown.append(
            {
                **row,
                "problem": trial["problem"],
                "settings": [setting_text(row[key]) for key in keys],
                "links": {seed: quote(page) for seed, page in pages.items()},
                "told": _TOLD[row["standing"]],
                "interval": _interval(row),
            }
        )
    return {
        "title": f"Tuned: {algorithm_title(document['algorithm'])}",
        "document": document,
        "keys": keys,
        "trials": shown,
        "best": [(key, setting_text(value)) for key, value in document["best"]["values"].items()],
        "level": f"{100 * LEVEL:g} %",
        "space": [(key, _space_text(value)) for key, value in document["space"].items()],
    }


def _interval(row: Mapping[str, Any]) -> tuple[str, str]:
    """The difference to the chosen trial, and its interval."""
    if row["difference"] is None:
        return MISSING, ""
    texts = [
        f"{row[key]:+.3f}".replace("-", "\N{MINUS SIGN}") for key in ("difference", "low", "high")
    ]
    return texts[0], f"{texts[1]} to {texts[2]}"


def _space_text(value: Any) -> str:
    if isinstance(value, Mapping):
        scale = ", by factors" if value["log"] else ""
        return f"{setting_text(value['low'])} to {setting_text(value['high'])}{scale}"
    return setting_text(value)


def _csv(rows: list[dict[str, Any]]) -> str:
    return csv_text(list(rows[0]), rows)
