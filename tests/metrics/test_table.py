"""A metric is one entry of a table: files, summaries, cards, pages and comparisons iterate it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmira.experiment import build_experiment, run_experiment
from fedmira.metrics import TEXT_METRICS, TextMetric
from fedmira.report import write_comparison
from small import make_config, table_of


def test_a_metric_is_one_entry_and_appears_wherever_metrics_do(
    base_folder: Path, clients_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = TextMetric(
        name="seven",
        title="Always seven",
        heading="sevens",
        meaning="seven for every answer",
        function=lambda prediction, reference: 7.0,
    )
    monkeypatch.setitem(TEXT_METRICS, metric.name, metric)
    settings = {"rounds.count": 2, "local.steps": 1, "evaluation.rouge": True}
    config = make_config(base_folder, clients_folder, settings)
    result = run_experiment(build_experiment(config), tmp_path / "run")
    assert {row["seven"] for row in result.clients} == {7.0}
    assert {row["seven"] for row in table_of(result.folder, "clients")} == {"7.0"}
    index = json.loads((result.folder / "adapters/index.json").read_text(encoding="utf-8"))
    assert {entry["metrics"]["seven"] for entry in index.values()} == {7.0}
    document = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    seven = {"mean": 7.0, "weighted_mean": 7.0, "worst_tenth": 7.0, "spread": 0.0}
    assert result.summary["seven"] == document["summary"]["seven"] == pytest.approx(seven)
    for client in index:
        card = (result.folder / "adapters" / client / "README.md").read_text(encoding="utf-8")
        assert "| `seven` | 7.0000 | seven for every answer |" in card
    page = result.report.read_text(encoding="utf-8")
    assert "Always seven" in page and "sevens" in page
    figures = write_comparison({"mira": {0: result.folder}}, tmp_path / "comparison")
    assert figures.method_rows[0]["seven"] == 7.0
    assert "sevens" in (tmp_path / "comparison/comparison.html").read_text(encoding="utf-8")
    csv_text = (tmp_path / "comparison/comparison.csv").read_text(encoding="utf-8")
    assert ",seven," in csv_text.splitlines()[0]
