"""The page of one sheet about a federation: who trains together, who alone, and how sure that is.

The figures behind it are written beside it as decision.json and decision.csv.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fedmira.metrics import RULE, Judgement, Standing
from fedmira.records import RecordedFolder
from fedmira.report.charts import percent_text
from fedmira.report.findings import CHANGE_LIMIT
from fedmira.report.page import render
from fedmira.report.paired import LEVEL, bootstrap_interval
from fedmira.report.tables import MISSING, loss_text
from fedmira.shown import csv_text

__all__ = ["ClientDecision", "Decisions", "write_decision"]


@dataclass(frozen=True, slots=True)
class ClientDecision:
    """What one client takes.

    Attributes:
        client, category: its id, and what it is grouped by.
        train_rows, test_rows: how many it has.
        judgement: what its validation rows say.
        own_test: test loss per response token of the adapter that it trained alone; None where it
            has no test rows.
        chosen_test: the same of the adapter that it takes.
        test_margin: half the width of the 95 % interval of their difference over test rows; None
            where it keeps its own, or has a single test row.
    """

    client: str
    category: str
    train_rows: int
    test_rows: int
    judgement: Judgement
    own_test: float | None = None
    chosen_test: float | None = None
    test_margin: float | None = None

    @property
    def keeps_own(self) -> bool:
        """Whether it stays with the adapter that it trained alone."""
        return self.own_test == self.chosen_test and self.test_margin is None

    @property
    def test_gain(self) -> float | None:
        """Chosen minus own test loss, below 0 is a gain; None without test rows."""
        if self.own_test is None or self.chosen_test is None:
            return None
        return self.chosen_test - self.own_test

    def row(self) -> dict[str, Any]:
        """Its line of decision.csv."""
        judged = {key: value for key, value in asdict(self.judgement).items() if key != "rows"}
        judged["standing"] = str(self.judgement.standing)
        return {
            "client": self.client,
            "category": self.category,
            "train_rows": self.train_rows,
            "validation_rows": self.judgement.rows,
            "test_rows": self.test_rows,
            **{key: _known(value) for key, value in judged.items()},
            "own_test_loss": _known(self.own_test),
            "chosen_test_loss": _known(self.chosen_test),
            "test_difference": _known(self.test_gain),
            "test_margin": _known(self.test_margin),
        }


@dataclass(frozen=True)
class Decisions:
    """The decisions of all clients.

    Attributes:
        own: the name of the adapters that clients trained alone.
        candidates: names of all adapters that were judged, in order.
        seed: of the runs.
        clients: one decision each.
        notes: what could not be judged, a sentence each.
        runs: name -> the folder of the run that it is from, as seen from that of the decisions.
    """

    own: str
    candidates: tuple[str, ...]
    seed: int
    clients: Sequence[ClientDecision]
    notes: tuple[str, ...] = ()
    runs: Mapping[str, str] = field(default_factory=dict)

    def of(self, standing: Standing) -> list[ClientDecision]:
        """The clients whose rows say this."""
        return [one for one in self.clients if one.judgement.standing is standing]

    @property
    def taken(self) -> int:
        """How many clients take another adapter than their own."""
        return sum(one.judgement.choice != self.own for one in self.clients)

    @cached_property
    def measured(self) -> dict[str, Any]:
        """What following the decisions gains on test rows, the mean over clients with test rows.

        Empty where nobody has any.
        """
        known = [one for one in self.clients if one.test_gain is not None]
        if not known:
            return {}
        gains = np.array([[one.test_gain] for one in known], dtype=np.float64)
        low, high = bootstrap_interval(gains)
        own = fmean(one.own_test for one in known if one.own_test is not None)
        relative = [(one.test_gain or 0.0) / one.own_test for one in known if one.own_test]
        return {
            "clients": len(known),
            "own_test_loss": own,
            "chosen_test_loss": own + float(gains.mean()),
            "difference": float(gains.mean()),
            "low": low,
            "high": high,
            "above": sum(share > CHANGE_LIMIT for share in relative),
            "below": sum(share < -CHANGE_LIMIT for share in relative),
        }

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "rule": RULE,
            "own": self.own,
            "candidates": list(self.candidates),
            "seed": self.seed,
            "runs": dict(self.runs),
            "counts": {str(standing): len(self.of(standing)) for standing in Standing},
            "measured": {key: _known(value) for key, value in self.measured.items()},
            "notes": list(self.notes),
            "clients": [one.row() for one in self.clients],
        }


def write_decision(decisions: Decisions, folder: Path) -> Path:
    """Write decision.html, decision.json and decision.csv over older ones; the path of the page.

    Args:
        decisions: of all clients.
        folder: where to.
    """
    rows = [one.row() for one in decisions.clients]
    document = json.dumps(decisions.document(), indent=1, allow_nan=False) + "\n"
    recorded = RecordedFolder(folder)
    recorded.write("decision.json", document, lasting=False)
    recorded.write("decision.csv", csv_text(list(rows[0]), rows), lasting=False)
    page = render("decision.html.j2", _content(decisions))
    recorded.write("decision.html", page, lasting=False)
    return folder / "decision.html"


def _content(decisions: Decisions) -> dict[str, Any]:
    counts = {standing.name: len(decisions.of(standing)) for standing in Standing}
    measured = decisions.measured
    return {
        "title": "Who trains together",
        "decisions": decisions,
        "counts": counts,
        "measured": measured,
        "taken": decisions.taken,
        "percent": percent_text(measured["difference"] / measured["own_test_loss"], 1)
        if measured and measured["own_test_loss"]
        else MISSING,
        "lines": [_line(one) for one in decisions.clients],
        "rule": RULE,
        "level": f"{100 * LEVEL:g} %",
        "limit": f"{100 * CHANGE_LIMIT:g} %",
    }


_WORDS = {
    Standing.better: "together",
    Standing.unclear: "alone: the rows cannot tell",
    Standing.no_better: "alone",
}


def _line(one: ClientDecision) -> dict[str, str]:
    """A client's line of the sheet."""
    judged = one.judgement
    expected = (
        MISSING
        if judged.difference is None or judged.margin is None
        else f"{judged.difference:+.3f} ± {judged.margin:.3f}"
    )
    gain, margin = one.test_gain, one.test_margin
    measured = "" if one.keeps_own or gain is None else f"{gain:+.3f}"
    shown = gain is not None and margin is not None and abs(gain) > margin
    return {
        "client": one.client,
        "verdict": _WORDS[judged.standing],
        "adapter": judged.choice,
        "rows": f"{one.train_rows} / {judged.rows} / {one.test_rows}",
        "expected": expected,
        "own": loss_text(one.own_test),
        "measured": measured + ("" if margin is None or not measured else f" ± {margin:.3f}"),
        "style": ("gained" if (gain or 0) < 0 else "harmed") if shown else "",
        "reason": judged.reason,
    }


def _known(value: Any) -> Any:
    """What JSON and tables can say: None for numbers that are not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
